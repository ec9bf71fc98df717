"""simulatability: the quick version is whole, says what it may say, and its patients are apart."""

from __future__ import annotations

import json

import numpy as np

from mechinterp.experiments import run_experiment
from mechinterp.experiments.simulatability import QUICK
from mechinterp.storage import verify_folder


def test_the_quick_version_is_whole(tmp_path):
    run_experiment("simulatability", tmp_path / "out", quick=True)
    assert verify_folder(tmp_path / "out") == []
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    rows = result["rows"]
    told = {row["explanation"] for row in rows if row["name"] == "r2"}
    assert told == {"none", "random", "leak", "truth", *QUICK.methods} | {
        f"{m}, shuffled" for m in ("truth", *QUICK.methods)
    }
    surface = [row for row in rows if row["name"] == "team accuracy" and row["explanation"] == "lure"]
    assert len(surface) == 16 and len({(r["persuasion"], r["detection"]) for r in surface}) == 16
    at = {(r["persuasion"], r["detection"]): r["value"] for r in surface}
    assert at[4.0, 0.0] < at[0.0, 0.0], "a persuasive wrong explanation lowers the score"
    assert np.isclose(at[0.0, 0.0], at[0.0, 4.0]), "a lure shows nothing that could be checked"
    assert all(np.isfinite(row["value"]) for row in rows if row["value"] is not None)
    text = (tmp_path / "out" / "table.md").read_text()
    assert "no person was asked" in text and "points of information about the model's output for this agent" in text
    assert "clinician" not in text and "trust the model" not in text
