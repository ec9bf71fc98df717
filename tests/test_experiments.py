"""Experiments: the folder they write, how they fail, and that each quick version runs and can be repeated."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mechinterp.cli import main
from mechinterp.errors import StorageError, UsageError
from mechinterp.experiments import EXPERIMENTS, experiment, run_experiment
from mechinterp.experiments.canvas import canvas, png
from mechinterp.experiments.result import Claim, Result, Row, Table, claim_folder, write_result
from mechinterp.storage import verify_folder


def small_result() -> Result:
    figure, _ = canvas(1, 1, 1, 1)
    rows = [Row("r2", 0.5, 10, (0.4, 0.6), {"factor": "a|b"}), Row("slope", float("nan"), 0)]
    table = Table("Numbers", ("name", "value"), (("a|b", 0.5), ("c", float("nan"))))
    return Result(rows, [Claim("it is so", False, "0.5 < 0.7")], [table], png(figure), ("a note",))


def test_a_folder_is_whole_and_says_what_failed(tmp_path):
    write_result(tmp_path / "out", small_result(), "superposition", "is it so?", True, 3, 1.25)
    assert verify_folder(tmp_path / "out") == []
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert {"experiment", "seed", "seconds", "versions", "rows", "claims"} <= set(result)
    assert result["rows"][0] == {"name": "r2", "value": 0.5, "ci95": [0.4, 0.6], "n": 10, "factor": "a|b"}
    assert result["rows"][1]["value"] is None, "what was not measured is null, never 0"
    assert result["claims"] == [{"claim": "it is so", "holds": False, "evidence": "0.5 < 0.7"}]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| it is so | **no** | 0.5 < 0.7 |" in text and "a\\|b" in text and "not tested" in text
    assert "no result" in text, "a quick run says so"


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(StorageError, match=r"thesis\.txt"):
        run_experiment("superposition", tmp_path, quick=True)
    assert (tmp_path / "thesis.txt").exists()
    assert claim_folder(tmp_path / "new") == tmp_path / "new"


def test_an_unknown_name_is_one_line_and_exit_2(tmp_path, capsys):
    with pytest.raises(UsageError, match="confounding-dose"):
        experiment("tea-leaves")
    assert main(["experiment", "tea-leaves", "--out", str(tmp_path / "x")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_list_names_every_experiment(capsys):
    assert main(["experiment", "list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in EXPERIMENTS)


@pytest.mark.parametrize("name", ["superposition", "intervention-fidelity", "confounding-dose"])
def test_quick_versions_run_from_the_command_line(name, tmp_path, capsys):
    out = tmp_path / name
    assert main(["experiment", name, "--quick", "--out", str(out)]) == 0
    assert "table.md" in capsys.readouterr().out
    assert verify_folder(out) == []
    result = json.loads((out / "result.json").read_text())
    assert result["experiment"] == name and result["quick"] and result["claims"]
    assert all(row["n"] >= 0 and row["name"] for row in result["rows"])
    values = [row["value"] for row in result["rows"] if row["value"] is not None]
    assert len(values) > 10 and np.isfinite(values).all()
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
