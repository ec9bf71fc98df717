"""Processes that build graphs of toys, a job a line: see `peers/measure.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import read_answer

PEER_PYTHON = "MECHINTERP_GRAPH_PEER_PYTHON"
"""Variable that names the interpreter of circuit-tracer's environment: see `peers/circuit_tracer.txt`."""
PEER = Path(__file__).parent / "peers" / "run_circuit_tracer.py"


def ours() -> Process:
    """Our worker."""
    return Process([sys.executable, "-W", "ignore", "-m", "benchmarks.graph_worker"])


def circuit_tracer() -> Process:
    """The peer's worker."""
    return Process([os.environ[PEER_PYTHON], "-W", "ignore", str(PEER)])


class Process:
    """Calling it with a job gives the answer. A context manager: leaving it ends the process.

    One thread. Raises RuntimeError, with the last line that the process wrote, where it fails.
    """

    def __init__(self, command: list[str]):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed on leaving)
        one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **one},
        )
        try:
            self.name = self._answer()["name"]
        except RuntimeError:
            self.__exit__()
            raise

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()
        self._errors.close()

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        return read_answer(self._process, self._errors)
