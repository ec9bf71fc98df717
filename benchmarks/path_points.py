"""How many points integrated gradients need: Gauss-Legendre's, and those of `integrated_gradients_of_copies`.

`python -m benchmarks.path_points` (10 CPU minutes): three images of three findings, both CLIPs on phantoms, an image
and two copies each. Copies have every patch moved by 5 % (as R and RBP do it) or every pixel (as in the benchmark of
explainers). The largest error of any element, as a share of the difference of the scores of input and reference,
against 120 Gauss-Legendre points. `benchmarks/results/path-points.json`.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mechinterp.audit.defaults import default_data
from mechinterp.explain.ask import about_image
from mechinterp.explain.gradients import integrated_gradients, integrated_gradients_of_copies
from mechinterp.explain.question import Question
from mechinterp.explain.shake import shaken
from mechinterp.models import HookedVLM
from mechinterp.progress import progress

RESULTS = Path(__file__).parent / "results" / "path-points.json"
MODELS, IMAGES, FINDINGS = ("phantom-clip", "phantom-clip-shortcut"), (0, 7, 23), 3
STEPS, TRUTH = (12, 16, 18, 20, 24, 32), 120
KINDS, COPIES, NOISE = ("patches", "pixels"), 2, 0.05
Explain = Callable[[Question, torch.Generator, int], Tensor]


def questions(kind: str) -> list[Question]:
    """An image and two copies, for every model, finding and image."""
    found, data = [], default_data(200)
    for name in MODELS:
        model = HookedVLM.from_pretrained(name)
        for target in list(data.targets.values())[:FINDINGS]:
            for image in IMAGES:
                one = about_image(model, model.prepare(data.pixels(range(image, image + 1)), [target]), target)
                draw = torch.Generator().manual_seed(0)
                found.append(shaken(one, COPIES, NOISE, draw) if kind == "patches" else by_pixel(one, draw))
    return found


def by_pixel(question: Question, draw: torch.Generator) -> Question:
    """The image and copies with each pixel moved by itself."""
    again = question.repeated(1 + COPIES)
    eps = torch.randn(again.values[0].shape, generator=draw)
    eps[0] = 0
    return again.at((again.values[0] * (1 + NOISE * eps),))


def errors(question: Question, truth: Tensor, steps: int, explain: Explain) -> float:
    """The largest, as a share of the score's difference."""
    size = truth.sum(1, keepdim=True).abs()
    return float(((explain(question, torch.Generator(), steps) - truth).abs() / size).max())


def main() -> None:
    """Print and write the table."""
    found = {}
    for kind in KINDS:
        asked = questions(kind)
        truths = [integrated_gradients(question, torch.Generator(), TRUTH) for question in asked]
        for steps in progress(STEPS, f"points, {kind}"):
            for explain in (integrated_gradients, integrated_gradients_of_copies):
                found[f"{kind}, {explain.__name__}, {steps}"] = [
                    errors(question, truth, steps, explain) for question, truth in zip(asked, truths, strict=True)
                ]
    print("median and largest error:")
    for name, values in found.items():
        print(f"{name:60s} {statistics.median(values):.1e} {max(values):.1e}")
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
