"""What both interpreters of `bench_graph` share: CPU seconds and peak memory of a call, and the loop that takes jobs.

Standard library alone, because the other interpreter does not have our packages.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MIB = 2**20


def _status(field: str) -> float | None:
    """A field of the process's memory in MiB, where the system tells it."""
    if not STATUS.exists():
        return None
    lines = [line for line in STATUS.read_text().splitlines() if line.startswith(field)]
    return int(lines[0].split()[1]) / 1024 if lines else None


def peak_mib() -> float:
    """Peak resident memory. Not `ru_maxrss` where it can be avoided: that one starts at the parent's peak."""
    scale = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / MIB


def measured(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """The result; CPU seconds; MiB that the process held before, and the most that it held during the call."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # give back what earlier jobs left, or it hides what this takes
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # where it cannot be done the peak includes what came before
        CLEAR.write_text("5")  # the peak starts again at what is held now
    before = _status("VmRSS") or peak_mib()
    start = time.process_time()
    found = call()
    return found, {"cpu": time.process_time() - start, "before": before, "peak": peak_mib()}


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]], name: str) -> None:
    """Say who this is; then answer each line of standard input, a job in JSON, with a line."""
    answers, sys.stdout = sys.stdout, sys.stderr  # nobody else's line gets between
    print(json.dumps({"name": name}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
