"""One training step of several trainers in turns, by wall clock and by CPU time.

CPU time is that of the process, all threads together; it hardly depends on what else the machine does. Trainers that
cannot share our environment run in one of their own (benchmarks/peers/dictionaries.txt), a step at a time.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.common import read_answer

PEER_PYTHON = "MECHINTERP_SAE_PEER_PYTHON"
SCRIPT = Path(__file__).parent / "peers" / "run_dictionary.py"
ELSEWHERE = {"topk": ("dictionary_learning", "sparsify"), "batchtopk": ("dictionary_learning",)}
ELSEWHERE["matryoshka"] = ELSEWHERE["batchtopk"]
REST = 0.05
"""Seconds before each turn: torch's threads spin for some milliseconds after their last operation, on the other core,
and that would be time of whoever comes next."""


@dataclass(frozen=True)
class Seconds:
    """Of one step."""

    wall: float
    cpu: float


def here(trainer: Any, batches: list[Tensor]) -> Callable[[], Seconds]:
    """One step a call, on the batches in turn, of a trainer of ours or of sae-lens."""
    done = 0

    def step() -> Seconds:
        nonlocal done
        time.sleep(REST)
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.step(batches[done % len(batches)])
        seconds = Seconds(time.perf_counter() - wall, time.process_time() - cpu)
        if hasattr(trainer, "n_training_steps"):
            trainer.n_training_steps += 1
        done += 1
        return seconds

    return step


def product(x: Tensor, width: int) -> Callable[[], Seconds]:
    """The encoder product alone."""
    W, out = torch.randn(width, x.shape[1]), torch.empty(len(x), width)

    def run() -> Seconds:
        time.sleep(REST)
        wall, cpu = time.perf_counter(), time.process_time()
        torch.mm(x, W.T, out=out)
        return Seconds(time.perf_counter() - wall, time.process_time() - cpu)

    return run


class Elsewhere:
    """A trainer in another environment. A context manager: leaving it ends the process.

    Raises RuntimeError, with the last line that the process wrote, where it cannot run there.
    """

    def __init__(self, package: str, kind: str, batches: list[Tensor], k: int, width: int):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            file = folder / "batches.safetensors"
            save_file({f"{i:03d}": batch.contiguous() for i, batch in enumerate(batches)}, file)
            sizes = {"k": k, "width": width, "threads": torch.get_num_threads()}
            options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
            command = [os.environ[PEER_PYTHON], str(SCRIPT), str(file), package, kind, *options]
            self._errors = stack.enter_context((folder / "stderr").open("w+"))
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True)
            self._process = stack.enter_context(process)  # leaving it closes its input, which ends it, and waits
            self.name = f"{package} {self._answer()['version']}"
            self._open = stack.pop_all()

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __call__(self) -> Seconds:
        assert self._process.stdin
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        found = self._answer()
        return Seconds(found["wall"], found["cpu"])

    def _answer(self) -> dict[str, Any]:
        return read_answer(self._process, self._errors)


def trained_elsewhere(package: str, batches: list[Tensor], k: int, width: int, seed: int) -> dict[str, float]:
    """R2, L0 and dead latents on the last batch of a TopK dictionary that another package trained on the others."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "batches.safetensors"
        save_file({f"{i:06d}": batch.contiguous() for i, batch in enumerate(batches)}, file)
        sizes = {"k": k, "width": width, "threads": torch.get_num_threads(), "train": seed}
        options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
        command = [os.environ[PEER_PYTHON], str(SCRIPT), str(file), package, "topk", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def elsewhere(kind: str, batches: list[Tensor], k: int, width: int) -> list[Elsewhere]:
    """The trainers of other packages, as far as they are there; says which are not."""
    if PEER_PYTHON not in os.environ:
        print(f"{kind}: without {', '.join(ELSEWHERE[kind])} ({PEER_PYTHON} is not set, see {SCRIPT.parent.name}/)")
        return []
    found = []
    for package in ELSEWHERE[kind]:
        try:
            found.append(Elsewhere(package, kind, batches, k, width))
        except (RuntimeError, OSError) as error:
            print(f"{kind}: without {package} ({error})")
    return found


def in_turns(runs: dict[str, Callable[[], Seconds]], repeats: int) -> dict[str, Seconds]:
    """Median seconds of each, after a step that is not counted. They take turns, so that a slow moment meets all."""
    for run in runs.values():
        run()
    found: dict[str, list[Seconds]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            found[name].append(run())
    return {
        name: Seconds(statistics.median(s.wall for s in seconds), statistics.median(s.cpu for s in seconds))
        for name, seconds in found.items()
    }
