"""kill -9 at 20 random moments of extraction and training, then resume: the bytes of an uninterrupted run."""

import json
import subprocess
import sys
from pathlib import Path

KILLS = 10  # of each


def test_killed_runs_resume_to_identical_bytes(tmp_path):
    server = Path(__file__).with_name("kill_server.py")
    done = subprocess.run(
        [sys.executable, str(server), str(tmp_path), str(KILLS), "0"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert sum(name.endswith(".safetensors") for name in report["extraction"]["files"]) >= 20
    assert not [name for job in report.values() for name in job["files"] if name.endswith(".partial")]
    for job in report.values():
        assert len(job["trials"]) == KILLS
        assert all(trial["resumed"] == 0 and trial["same"] for trial in job["trials"]), (job, done.stderr)
        assert all(trial["killed"] for trial in job["trials"])
    # the kills must land in different states of the folder to mean anything
    assert len({trial["left"] for trial in report["extraction"]["trials"]}) >= 3
    assert len({trial["step"] for trial in report["training"]["trials"]}) >= 3
