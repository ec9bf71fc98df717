"""The benchmarks run, and write the file that docs/ and others read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import graph_causal, graph_compare

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["extraction", "memory"])
def test_a_quick_benchmark_writes_its_rows(name, tmp_path):
    command = [sys.executable, "-m", "benchmarks", name, "--quick", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert run.returncode == 0, run.stderr[-2000:]
    written = json.loads((tmp_path / f"{name}.json").read_text())
    assert written["name"] == name and written["rows"]
    for row in written["rows"]:
        assert {"case", "ours", "peer", "peer_name", "unit", "ratio", "equal_to"} <= set(row)
        assert row["ours"] > 0 and row["peer"] > 0 and row["ratio"] > 0


def test_the_graph_benchmark_without_its_peer_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv("MECHINTERP_GRAPH_PEER_PYTHON", raising=False)
    command = [sys.executable, "-m", "benchmarks", "graph", "--quick", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "circuit-tracer skipped, MECHINTERP_GRAPH_PEER_PYTHON is not set" in run.stdout
    rows = json.loads((tmp_path / "graph.json").read_text())["rows"]
    assert rows and not any("circuit-tracer" in row["peer_name"] for row in rows)
    assert {row["case"].split()[-1] for row in rows} == {"positions", "layers", "features", "targets"}
    assert all(row["ours"] > 0 and row["ratio"] > 0 for row in rows)


def _edges(rows, columns, features):
    """A graph of one output and features of one layer, in the form of `benchmarks.graph_compare`."""
    n = len(rows)
    return {
        "rows": torch.tensor(rows),
        "columns": torch.tensor(columns),
        "features": torch.tensor(features),
        "errors": torch.zeros(n, 4),
        "tokens": torch.zeros(n, 2),
        "total": torch.tensor(features).abs().sum(1),
        "shares": torch.ones(1),
    }


def test_graphs_are_compared_by_name_and_not_by_order():
    names = [[0, 1, 7], [1, 1, 3]]
    one = _edges([*names, [2, 1, 0]], names, [[0.0, 0.0], [2.0, 0.0], [1.0, 3.0]])
    other = _edges([[2, 1, 0], *names[::-1]], names[::-1], [[3.5, 1.0], [0.0, 2.0], [0.0, 0.0]])
    assert graph_compare.difference(one, other) == 0.5
    other["tokens"][0, 0] = 0.75
    assert graph_compare.difference(one, other) == 0.75
    other["errors"][0, 2] = 9.0  # at the first position, where the peer has no error
    assert graph_compare.difference(one, other) == 0.75
    other["errors"][0, 3] = 2.0
    assert graph_compare.difference(one, other) == 2.0


def test_graphs_that_share_little_are_not_called_equal():
    one = _edges([[0, 1, 7], [1, 1, 0]], [[0, 1, 7]], [[0.0], [1.0]])
    other = _edges([[0, 1, 8], [1, 1, 1]], [[0, 1, 8]], [[0.0], [1.0]])
    with pytest.raises(AssertionError, match="0 of 2 rows"):
        graph_compare.difference(one, other)


def test_captured_influence_counts_paths_through_features():
    names = [[0, 1, 7], [0, 1, 8], [1, 1, 3]]
    weights = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [4.0, 0.0, 0.0], [1.0, 1.0, 2.0]]
    full = _edges([*names, [2, 1, 0]], names, weights)
    assert graph_compare.influence(full) == {(0, 1, 7): 0.75, (0, 1, 8): 0.25, (1, 1, 3): 0.5}
    found = {"rows": torch.tensor([names[0], names[1], [2, 1, 0]])}
    assert graph_compare.captured(found, full) == pytest.approx(1 / 1.25)


def test_the_causal_table_tells_edges_and_total_effects_by_layers_between():
    """Every distance that any image has gets a line for each statistic, of edges and of total effects, by median."""

    def told(value: float) -> dict[str, float]:
        return {"pearson": value, "spearman": value / 2, "sign": value / 4}

    rows = [{"nodes": 3, "completeness": 1.0, "replacement": 1.0, "node_spearman": {}} for _ in range(4)]
    for row, value in zip(rows[:3], (0.2, 0.4, 0.8), strict=True):
        row["pairs"] = {"direct_by_distance": {1: told(value)}, "by_distance": {1: told(-value)}}
    for row in rows[:3]:
        row["pairs"]["direct_by_distance"][9] = row["pairs"]["by_distance"][9] = told(1.0)
    lines = {line["name"]: line for line in graph_causal.collect(rows, [str(i) for i in range(4)])}
    for distance, direct, total in ((1, 0.4, -0.4), (9, 1.0, 1.0)):
        for statistic, part in (("pearson", 1), ("spearman", 2), ("sign", 4)):
            for kind, value in (("direct", direct), ("total", total)):
                line = lines[f"{kind} effect, layer distance {distance}: {statistic}"]
                assert (line["median"], line["n"]) == (value / part, 3)
