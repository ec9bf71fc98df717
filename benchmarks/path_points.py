"""How many points integrated gradients need: Gauss-Legendre's, and those put where the score turns.

`python -m benchmarks.path_points` (5 CPU minutes): three images of three findings, both CLIPs on phantoms, an image and
two copies each, every patch moved by 5 %. The largest error of any element, as a share of the difference of the scores
of input and reference, against 120 Gauss-Legendre points. `benchmarks/results/path-points.json`.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import torch

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


def questions() -> list[Question]:
    """An image and two copies, for every model, finding and image."""
    found, data = [], default_data(200)
    for name in MODELS:
        model = HookedVLM.from_pretrained(name)
        for target in list(data.targets.values())[:FINDINGS]:
            for image in IMAGES:
                one = about_image(model, model.prepare(data.pixels(range(image, image + 1)), [target]), target)
                found.append(shaken(one, 2, 0.05, torch.Generator().manual_seed(0)))
    return found


def errors(question: Question, steps: int) -> tuple[float, float]:
    """Of plain points and of points put where the score turns."""
    draw = torch.Generator()
    truth = integrated_gradients(question, draw, TRUTH)
    size = truth.sum(1, keepdim=True).abs()
    plain, put = (explain(question, draw, steps) for explain in (integrated_gradients, integrated_gradients_of_copies))
    return float(((plain - truth).abs() / size).max()), float(((put - truth).abs() / size).max())


def main() -> None:
    """Print and write the table."""
    asked = questions()
    found = {steps: [errors(question, steps) for question in asked] for steps in progress(STEPS, "points")}
    print(f"{len(asked)} images; median and largest error: Gauss-Legendre, put where the score turns")
    for steps, pairs in found.items():
        plain, put = zip(*pairs, strict=True)
        print(
            f"{steps:3d} points  {statistics.median(plain):.1e} {max(plain):.1e}"
            f"   {statistics.median(put):.1e} {max(put):.1e}"
        )
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
