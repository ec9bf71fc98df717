"""Rows, interleaved timing, the machine, and the table: shared by every benchmark."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from mechinterp.storage import write_json

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One comparison. `ratio` > 1 means that we are better, whichever way the unit points."""

    case: str
    ours: float
    peer: float
    peer_name: str
    unit: str
    ratio: float
    equal_to: float | None
    """Largest difference between the two results, in the unit of the result; None where there is none to compare."""
    share_of_1e5: float | None = None
    """The same as a share of 1e-5 (1 + |peer|), element by element: up to 1, `allclose(rtol=1e-5, atol=1e-5)` holds."""


def read_answer(process: subprocess.Popen[str], errors: IO[str]) -> dict[str, Any]:
    """The next line of JSON from a worker process. Raises RuntimeError with its last word when it has ended."""
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        errors.seek(0)
        said = errors.read().strip().splitlines()
        raise RuntimeError(said[-1] if said else "it ended without a word")
    return json.loads(line)


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each run. They take turns, so that a change of the machine's speed meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def save(name: str, rows: list[Row], quick: bool, out: Path = RESULTS) -> Path:
    """Write `out/NAME.json` as INTERFACE says; a quick run is marked as such."""
    path = out / f"{name}.json"
    write_json(path, {"name": name, "machine": machine(), "quick": quick, "rows": [asdict(row) for row in rows]})
    return path


def table(name: str, rows: list[Row]) -> str:
    """The rows as text."""
    head = ("case", "ours", "peer", "unit", "ratio", "differ by", "of 1e-5 (1 + |peer|)", "peer is")
    body = [
        (
            row.case,
            f"{row.ours:.4g}",
            f"{row.peer:.4g}",
            row.unit,
            f"{row.ratio:.2f}x",
            "-" if row.equal_to is None else f"{row.equal_to:.1e}",
            "-" if row.share_of_1e5 is None else f"{row.share_of_1e5:.2f}",
            row.peer_name,
        )
        for row in rows
    ]
    if all(row.share_of_1e5 is None for row in rows):
        head, body = head[:6] + head[7:], [line[:6] + line[7:] for line in body]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (head, *body)]
    return "\n".join([f"== {name}", *(line.rstrip() for line in lines)])
