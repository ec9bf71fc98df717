"""iq-image: a bright patch on synthetic shapes, at test time only.

1. Small CNNs (several seeds) learn squares against discs in images of 16 x 16 pixels. The upper left of 4 x 4 patches
   holds a random level or pixel in most of the training images, whatever the shape: it means nothing.
2. At test time that patch follows the output: psi * z + noise; or, as in the paper's picture, one bright pixel in it
   stands on images whose output says "square" and on no other.
3. R, F, IS and companions before and after, for every explainer of patches (Grad-CAM too), plain, under RBP, under an
   exaggerated RBP, and under bounds. Explainers remove patches to the background's mean; F is scored against the
   blurred image and against patches of other images, so that no explainer is judged by its own removal.
4. The same before and after, plain, when explainers remove patches to the blurred image; the background's mean judges.

11 CPU minutes on one core.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechinterp.experiments.iq_judges import left_out_note
from mechinterp.experiments.iq_page import Layout, injection_result
from mechinterp.experiments.iq_references import Second
from mechinterp.experiments.iq_toys import (
    ANCHORS,
    CIRCULAR,
    Sizes,
    Toy,
    dealt,
    explainers_for,
    fit,
    following,
    toy_study,
)
from mechinterp.experiments.result import Result
from mechinterp.explain.ask import about_function, blurred, patch_owner
from mechinterp.explain.inject import Injected, scale_of
from mechinterp.explain.question import Question, Values
from mechinterp.metrics.faithfulness import refilled
from mechinterp.metrics.iq import expected_absolute_r

__all__ = ["Shapes", "Sizes", "bright_pixel", "run", "shapes", "toy_of"]

SIDE, GRID, SLOT = 16, 4, 0
BRIGHT = 1.5  # shapes reach 1
NONE, PIXEL, CONTROL = "no injection", "bright pixel", "shuffled"
MEAN, BLUR, OTHERS = "the background's mean", "blur", "other images"


QUICK = Sizes(rows=5, seeds=1, draws=3, steps=60, psi=(0.8,), few=True)


class Shapes(nn.Module):
    """Two convolutions and two linear layers; `features` are the 4 x 4 places of the second convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.hidden, self.last = nn.Linear(12 * GRID * GRID, 32), nn.Linear(32, 1)

    def features(self, x: Float[Tensor, "row side side"]) -> Float[Tensor, "row place d"]:
        """What Grad-CAM reads."""
        pool = nn.functional.max_pool2d
        found = pool(self.second(pool(self.first(x[:, None]).relu(), 2)).relu(), 2)
        return found.flatten(2).transpose(1, 2)

    def read(self, features: Float[Tensor, "row place d"]) -> Float[Tensor, " row"]:
        """The logit of "square"."""
        return self.last(self.hidden(features.flatten(1)).relu())[:, 0]

    def forward(self, x: Float[Tensor, "row side side"]) -> Float[Tensor, " row"]:
        """The logit of "square"."""
        return self.read(self.features(x))


def shapes(
    n: int, generator: torch.Generator, with_slot: bool = True
) -> tuple[Float[Tensor, "n side side"], Float[Tensor, " n"]]:
    """Squares (1) and discs (0) of random size, place and brightness on noise; the slot holds noise or a random level.

    Shapes keep out of the slot.
    """
    label = (torch.rand(n, generator=generator) < 0.5).float()
    radius = 2.5 + 1.5 * torch.rand(n, 1, 1, generator=generator)
    centre = 6.5 + 4.5 * torch.rand(n, 2, 1, 1, generator=generator)
    at = torch.arange(SIDE, dtype=torch.float32)
    down, across = (at[:, None] - centre[:, 0]).abs(), (at[None, :] - centre[:, 1]).abs()
    square = torch.maximum(down, across) <= 0.886 * radius  # of the disc's area
    disc = down.square() + across.square() <= radius.square()
    level = 0.6 + 0.4 * torch.rand(n, 1, 1, generator=generator)
    image = 0.1 * torch.randn(n, SIDE, SIDE, generator=generator)
    image = image + level * torch.where(label[:, None, None] > 0, square, disc)
    size = SIDE // GRID
    if with_slot:
        value = torch.randn(n, 1, 1, generator=generator)
        some = torch.rand(n, 1, 1, generator=generator)
        corner = image[:, :size, :size]
        pixel = corner.clone()
        pixel[:, 1, 1] = 1.5 * value[:, 0, 0].abs()
        image[:, :size, :size] = torch.where(some < 0.4, value, torch.where(some < 0.6, pixel, corner))
    return image, label


def bright_pixel(toy: Toy, near: Question, seed: int) -> Injected:
    """One bright pixel in the slot of every image whose output says "square". The others do not count (nan)."""
    before = near.score()
    image = near.values[0].clone()
    image[before > 0, 1, 1] = BRIGHT
    changed = near.at((image,))
    moved = (changed.score() - before).masked_fill(before <= 0, float("nan"))
    return Injected(changed, moved, toy.scale.sd)


def toy_of(seed: int, size: Sizes) -> Toy:
    """A trained CNN and test images without anything in the slot."""
    torch.manual_seed(60_000 + seed)
    net = Shapes()
    fit(net, shapes, seed, size.steps)
    generator = torch.Generator().manual_seed(70_000 + seed)
    many, label = shapes(500, generator, with_slot=False)
    skill = float(((net(many) > 0) == (label > 0.5)).float().mean())
    images, _ = shapes(size.rows, generator, with_slot=False)

    def inner(values: Values) -> tuple[Tensor, Tensor]:
        features = net.features(values[0]).requires_grad_()
        return features, net.read(features)

    owner = patch_owner(SIDE, SIDE, GRID, GRID)
    question = about_function(net, images, torch.zeros(SIDE, SIDE), owner, "patch", (GRID, GRID), inner)
    blur = replace(question, parts=(replace(question.parts[0], reference=blurred(images)),))
    others = refilled(question, "resample", torch.Generator().manual_seed(71_000 + seed))
    scale = scale_of(about_function(net, many, torch.zeros(SIDE, SIDE), owner, "patch"))
    second = Second(BLUR, blur, {MEAN: question, OTHERS: others})
    return Toy(question, {BLUR: blur, OTHERS: others}, SLOT, scale, skill, second)


def run(seed: int = 0, quick: bool = False, sizes: Sizes | None = None) -> Result:
    """Run the experiment. `sizes` overrides both versions."""
    size = sizes or (QUICK if quick else Sizes())
    toys = [toy_of(seed * 100 + s, size) for s in range(size.seeds)]
    conditions = {NONE: None, **{f"psi {p:g}": following(p) for p in size.psi}, PIXEL: bright_pixel}
    conditions[CONTROL] = dealt(max(size.psi))
    strongest = f"psi {max(size.psi):g}"
    explainers = explainers_for(toys[0].question, size.few)
    study = toy_study(toys, conditions, (NONE, strongest, PIXEL), explainers, size.draws, seed, (NONE, strongest))
    anchors = tuple(n for n in ANCHORS if n in explainers)
    real = tuple(n for n in explainers if n not in anchors)
    line = ((NONE, 0.0), *((f"psi {p:g}", p) for p in size.psi))
    layout = Layout(
        NONE, strongest, line, real, anchors, "the injected patch", CIRCULAR, (PIXEL,), CONTROL, (MEAN, BLUR)
    )
    skills = [toy.skill for toy in toys]
    squares = [toy.question.score() > 0 for toy in toys]
    share = float(study.kept(PIXEL).sum() / max(1, sum(int(s.sum()) for s in squares)))
    notes = [
        f"Images classified rightly, not trained on: {min(skills):.2f} to {max(skills):.2f} over {len(skills)} seeds.",
        f"R by chance with {size.draws} draws: {expected_absolute_r(size.draws):.3f}.",
        f"Of the images that are called squares, {1 - share:.0%} were dropped as the bright pixel moved the output.",
        "F is scored by removing single patches to the blurred image ('by other images': to the same patch of another "
        "image). occlusion removes single patches too, to the "
        "background's mean, so claims about F leave it out; oracle is the same thing as an anchor.",
    ]
    notes.append(left_out_note([(toy.question, toy.scale.sd) for toy in toys], seed))
    return injection_result(study, layout, notes)
