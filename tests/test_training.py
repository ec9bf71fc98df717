"""The scripts that made the bundled models run, and what they write opens: a few steps of each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mechinterp.models import HookedVLM
from mechinterp.storage import verify_folder
from mechinterp.types import Target

ROOT = Path(__file__).resolve().parents[1]
POSITIVE, NEGATIVE = "a chest x-ray with chest drain", "a chest x-ray without chest drain"
TARGET = Target("drain", POSITIVE, NEGATIVE, "is there a chest drain ?")


@pytest.mark.parametrize("script", ["phantom_clip", "phantom_llava"])
def test_a_training_script_writes_a_whole_model(script, tmp_path):
    out = tmp_path / "model"
    few = ["--images", "64", "--steps", "2", "--test", "24", "--shortcut", "--out", str(out)]
    few += ["--reports", "2"] if script == "phantom_llava" else []
    run = subprocess.run(
        [sys.executable, str(ROOT / "training" / f"{script}.py"), *few], capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert verify_folder(out) == []
    facts = json.loads((out / "training.json").read_text())
    assert facts["planted"] == {"shortcut": "drain", "finding": "pneumothorax", "phi": 0.9} and facts["steps"] == 2
    assert {row["factor"] for row in facts["do"]} >= {"drain", "view"}
    assert "phi 0.9" in (out / "README.md").read_text()
    model = HookedVLM.from_pretrained(out)
    pixels = model.prepare(np.full((1, 128, 128), 0.5, "float32"), [TARGET])
    assert model.score(pixels, [TARGET]).isfinite().all()
