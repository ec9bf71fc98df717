"""kill -9 at random moments of extraction and of training every kind, then resume: the bytes of a whole run."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 12  # of training, two of each kind; and 8 of extraction


def test_killed_runs_resume_to_identical_bytes(tmp_path):
    server = Path(__file__).with_name("kill_server.py")
    done = subprocess.run(
        [sys.executable, str(server), str(tmp_path), str(KILLS), "0"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report) == {"extraction", "topk", "batchtopk", "matryoshka", "jumprelu", "gated", "transcoder"}
    assert sum(name.endswith(".safetensors") for name in report["extraction"]["files"]) >= 20
    assert not [name for job in report.values() for name in job["files"] if name.endswith(".partial")]
    for job in report.values():
        assert all(trial["resumed"] == 0 and trial["same"] for trial in job["trials"]), (job, done.stderr)
        assert all(trial["killed"] for trial in job["trials"])
    # the kills must land in different states of the folder to mean anything
    extraction = report.pop("extraction")
    assert len(extraction["trials"]) == 8 and len({trial["left"] for trial in extraction["trials"]}) >= 3
    training = [trial for job in report.values() for trial in job["trials"]]
    assert len(training) == KILLS and len({trial["step"] for trial in training}) >= 3


HALF = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from mechinterp.activations.shards import Rows, write_shard
row = np.zeros(2000, np.int32)
rows = Rows(np.zeros((2000, 8), np.float32), row, row, row, row.astype(np.uint8))
if sys.argv[2] == "half":  # the kernel kills the writer at its 4,096th byte
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
write_shard(Path(sys.argv[1]) / "00000.safetensors", rows)
"""


@pytest.mark.parametrize("how", ["whole", "half"])
def test_writer_of_a_shard_leaves_only_what_a_resumed_run_removes(tmp_path, how):
    done = subprocess.run([sys.executable, "-c", HALF, str(tmp_path), how], capture_output=True, text=True, timeout=60)
    left = [path.name for path in tmp_path.iterdir()]
    assert done.returncode == (0 if how == "whole" else -signal.SIGXFSZ), done.stderr
    assert left == ["00000.safetensors"] if how == "whole" else len(left) == 1 and left[0].endswith(".partial")
