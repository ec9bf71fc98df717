"""Peak memory of an effect sweep, against doing all of its (feature, image) pairs in one forward pass."""

from __future__ import annotations

import subprocess
import sys

from benchmarks import subject
from benchmarks.common import Row

NAME = "memory"
SITE = "vision.blocks.3.hook_resid_post"
SWEEP = """
import resource, sys
from benchmarks import subject
from mechinterp.interventions import effects
n_images = int(sys.argv[1])
model, name = subject.model()
pixels = subject.images(n_images)
placed, _ = subject.dictionary(model, {site!r}, name, pixels[:16])
batch = model.prepare(pixels, subject.TARGETS)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = effects(model, placed, batch, subject.TARGETS)
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(found.row), *batch.pixel_values.shape)
"""


def run(quick: bool = False) -> list[Row]:
    """Megabytes that a sweep adds to the process, in a fresh process; the peer is the size of its site values alone."""
    n_images = 8 if quick else 32
    command = [sys.executable, "-c", SWEEP.format(site=SITE), str(n_images)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after, pairs = (int(number) for number in done.stdout.split()[:3])
    scale = 1024 if sys.platform != "darwin" else 1024**2  # ru_maxrss is in KiB, on macOS in bytes
    ours = max((after - before) / scale, 1.0)
    tokens = (subject.SIZE // subject.PATCH) ** 2 + 1
    peer = pairs * tokens * (subject.D_MODEL + 4 * subject.D_MODEL) * 4 / 2**20
    case = f"{pairs} pairs over {n_images} images at {SITE}"
    return [Row(case, ours, peer, "one batch of all pairs: residual stream and MLP", "MiB", peer / ours, None)]
