"""Attribution graphs against circuit-tracer, on the same random weights; and how ours grow.

circuit-tracer's pins contradict ours, so it runs in an environment of its own (benchmarks/peers/circuit_tracer.txt);
`MECHINTERP_GRAPH_PEER_PYTHON` names its interpreter, and without it only our growth is measured. Each side has a
process with one thread; they take turns. What is timed is CPU time from tokens to graph: forward pass, features, edges,
and on our side the certificate; loading is not. The peer's batch of 32 was the fastest of 32, 64, 128, 256 and 512 (its
default) at the first shape, at any budget; where memory allows, whole graphs are timed with the default too, each side
in a fresh process. It leaves out features and errors of the first token, which ours have too;
compared are all edges that both have. What the best features capture is judged for each side by its own full graph.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import graph_growth
from benchmarks.common import Row
from benchmarks.graph_compare import captured, difference, read
from benchmarks.graph_processes import PEER_PYTHON, Process, circuit_tracer, ours
from benchmarks.toy import Shape

NAME = "graph"


@dataclass(frozen=True)
class Case:
    """A shape, budgets (None: all features), the peer's batch, turns that are timed, whether with its default too."""

    shape: Shape
    budgets: tuple[int | None, ...]
    batch: int = 32
    turns: int = 5
    default: bool = False


CASES = [
    Case(Shape(6, 128, 32, 64, 4785), (None, 200, 500, 1500), default=True),
    Case(Shape(6, 128, 32, 65, 4585, causal=False), (None,), default=True),
    Case(Shape(12, 192, 64, 197, 6134, causal=False), (None,), turns=1),
]
QUICK = [Case(Shape(2, 32, 8, 12, 100), (None, 20), turns=1, default=True)]
DEFAULT_BATCH = 512  # of circuit_tracer.attribute


def run(quick: bool = False) -> list[Row]:
    """Against the peer where it is there, then growth."""
    rows: list[Row] = []
    if PEER_PYTHON not in os.environ:
        print(f"graph: circuit-tracer skipped, {PEER_PYTHON} is not set (see benchmarks/peers/circuit_tracer.txt)")
    else:
        for case in QUICK if quick else CASES:
            rows += _against(case, case.budgets)
            if case.default:
                rows += _against(replace(case, batch=DEFAULT_BATCH, turns=min(case.turns, 3)), (None,))
    return rows + graph_growth.run(quick)


def _against(case: Case, budgets: Sequence[int | None]) -> list[Row]:
    """The rows of one shape and batch, both sides in processes of their own."""
    with tempfile.TemporaryDirectory() as folder, ours() as our, circuit_tracer() as their:
        our({"folder": folder, "write": asdict(case.shape)})
        return [row for budget in budgets for row in _rows(case, budget, our, their, Path(folder))]


def _rows(case: Case, budget: int | None, our: Process, their: Process, folder: Path) -> list[Row]:
    jobs = {"ours": (our, None), "peer": (their, case.batch)}
    files = {who: _file(folder, who, budget) for who in jobs}
    costs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for turn in range(case.turns):
        for who, (process, batch) in jobs.items():
            out = str(files[who]) if turn == 0 else None
            costs[who].append(process({"folder": str(folder), "batch": batch, "budget": budget, "out": out}))
    first = {who: each[0] for who, each in costs.items()}
    found = {who: read(file) for who, file in files.items()}
    what = "all" if budget is None else "best"
    label = f"{case.shape}, {what} {first['ours']['rows']} features"
    peer = f"{their.name}, batch {case.batch}{' (its default)' if case.batch == DEFAULT_BATCH else ''}"
    seconds = {who: statistics.median(cost["cpu"] for cost in each) for who, each in costs.items()}
    differ = difference(found["ours"], found["peer"])
    rows = [_row(label, seconds, peer, "CPU s", differ)]
    if budget is not None:
        mass = {who: captured(found[who], read(_file(folder, who, None))) for who in found}
        return [*rows, Row(label, *mass.values(), peer, "of the best's influence", mass["ours"] / mass["peer"], None)]
    # of the first turn: later ones find memory that an earlier one left
    added = {who: max(cost["peak"] - cost["before"], 1.0) for who, cost in first.items()}
    peak = {who: cost["peak"] for who, cost in first.items()}
    return [*rows, _row(label, added, peer, "MiB added"), _row(label, peak, peer, "MiB in all")]


def _row(case: str, values: dict[str, float], peer: str, unit: str, differ: float | None = None) -> Row:
    """Of something that is better when it is less."""
    return Row(case, values["ours"], values["peer"], peer, unit, values["peer"] / values["ours"], differ)


def _file(folder: Path, who: str, budget: int | None) -> Path:
    return folder / f"{who}.{budget or 'all'}.safetensors"
