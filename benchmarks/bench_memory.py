"""Peak memory of an effect sweep, against doing all of its (feature, image) pairs in one forward pass."""

from __future__ import annotations

import subprocess
import sys

from benchmarks import subject
from benchmarks.common import Row

NAME = "memory"
SWEEP = """
import resource, sys
from benchmarks import subject
from mechinterp.interventions import effects
n_images = int(sys.argv[1])
pixels = subject.images(n_images)
model, placed, name = subject.subjects(pixels)[-1]
batch = model.prepare(pixels, subject.TARGETS)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = effects(model, placed, batch, subject.TARGETS)
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(found.row), placed.reads, sep="\\n")
"""


def run(quick: bool = False) -> list[Row]:
    """Megabytes that a sweep adds to the process, in a fresh process; the peer is the size of its site values alone."""
    n_images = 8 if quick else 32
    command = [sys.executable, "-c", SWEEP, str(n_images)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *numbers, site = done.stdout.splitlines()[-4:]
    before, after, pairs = (int(number) for number in numbers)
    scale = 1024 if sys.platform != "darwin" else 1024**2  # ru_maxrss is in KiB, on macOS in bytes
    ours = max((after - before) / scale, 1.0)
    tokens = (subject.SIZE // subject.PATCH) ** 2 + 1
    peer = pairs * tokens * (subject.D_MODEL + 4 * subject.D_MODEL) * 4 / 2**20
    case = f"{subject.RANDOM}: {pairs} pairs over {n_images} images at {site}"
    return [Row(case, ours, peer, "one batch of all pairs: residual stream and MLP", "MiB", peer / ours, None)]
