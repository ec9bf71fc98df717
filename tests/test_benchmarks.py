"""The benchmarks run, and write the file that docs/ and others read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
