"""Does an explanation help an agent to predict the model? Student and teacher, after Pruthi et al. 2022 (TACL 10).

A small student learns to predict a teacher's score from images, from few examples. In training it may be told where the
teacher is said to look; at test time it is told nothing. What it gains on unseen patients over a student that was told
nothing is what the explanation carries *about the model's output for this agent*. Controls: random maps; the same maps
handed to the wrong images (what remains is where findings lie on average); and a map that spells out the teacher's
answer and nothing else. As explanations are not there at test time, the last one must not help; were they there, it
would win (`given`), which is why a score that shows explanations at test time measures leaks.

None of this says anything about people: no person was asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import UsageError

__all__ = [
    "Lessons",
    "Simulated",
    "as_shares",
    "given",
    "leak",
    "patch_features",
    "random_maps",
    "shuffled",
    "simulate",
]

HIDDEN, STEPS, RATE, DECAY, LOOK = 8, 200, 2e-2, 1e-3, 10


@dataclass(frozen=True)
class Lessons:
    """Images as the student sees them, and the teacher's score of each, of patients who are in no other set.

    Args:
        features: per patch.
        scores: of the teacher, in its own units; above 0 is its yes.
        patients: of the images.
    """

    features: Float[Tensor, "image patch feature"]
    scores: Float[Tensor, " image"]
    patients: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class Simulated:
    """How well students predict the teacher on unseen patients, one number per seed.

    Args:
        r2: 1 - sum (score - prediction)^2 / sum (score - mean)^2.
        accuracy: share of images on which student and teacher give the same yes or no.
        strength: the weight of the explanation that was chosen on the validation patients.
    """

    r2: Float[np.ndarray, " seed"]
    accuracy: Float[np.ndarray, " seed"]
    strength: float


def simulate(
    train: Lessons,
    valid: Lessons,
    test: Lessons,
    explanations: Mapping[str, Float[Tensor, "image patch"] | None],
    size: int,
    seeds: int = 5,
    strengths: tuple[float, ...] = (0.1, 1.0),
    steps: int = STEPS,
    seed: int = 0,
) -> dict[str, Simulated]:
    """Teach students with each explanation; the same initial weights and the same images for all, seed by seed.

    The weight of the explanation in the loss is chosen for each from `strengths` by mean R2 on the validation patients,
    and every student is the one of the training step that predicted them best: a student that was left to overfit would
    gain from any map whatever, as from any penalty.

    Args:
        explanations: maps of the training images, for each way of explaining; None: the student is told nothing.
        size: training images of each seed, drawn from `train`.
        seeds: students of each.
        strengths: weights of the explanation that are tried.
        steps: of training.

    Raises UsageError when a patient is in two sets, a map belongs to other images, or there are too few images.
    """
    _check(train, valid, test, explanations, size)
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(np.stack([rng.choice(len(train), size, replace=False) for _ in range(seeds)]))
    found = {}
    for name, maps in explanations.items():
        tried = []
        for strength in (0.0,) if maps is None else strengths:
            told = None if maps is None else as_shares(maps)[rows]
            student = _taught(train, rows, told, strength, steps, seed, valid)
            tried.append((float(np.nanmean(_r2(student(valid.features), valid.scores))), strength, student))
        _, strength, student = max(tried, key=lambda t: t[0])
        said = student(test.features)
        found[name] = Simulated(_r2(said, test.scores), _agreement(said, test.scores), strength)
    return found


def given(
    train: Lessons,
    test: Lessons,
    maps: Float[Tensor, "image patch"],
    test_maps: Float[Tensor, "other patch"],
    size: int,
    seeds: int = 5,
    steps: int = STEPS,
    seed: int = 0,
) -> Simulated:
    """The same with the map in place of the student's attention, in training *and at test time*: the leaky protocol."""
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(np.stack([rng.choice(len(train), size, replace=False) for _ in range(seeds)]))
    student = _taught(train, rows, as_shares(maps)[rows], None, steps, seed)
    said = student(test.features, as_shares(test_maps))
    return Simulated(_r2(said, test.scores), _agreement(said, test.scores), float("nan"))


def as_shares(maps: Float[Tensor, "image patch"]) -> Float[Tensor, "image patch"]:
    """Where the map points, as shares of 1: absolute values; a map of zeros points everywhere alike."""
    size = maps.detach().abs()
    total = size.sum(1, keepdim=True)
    return torch.where(total > 0, size / torch.where(total > 0, total, 1.0), 1.0 / maps.shape[1])


def random_maps(images: int, patches: int, generator: torch.Generator) -> Float[Tensor, "image patch"]:
    """Control: noise of the shape of a map (absolute values of normals)."""
    return torch.randn(images, patches, generator=generator).abs()


def shuffled(
    maps: Float[Tensor, "image patch"], patients: tuple[str, ...], generator: torch.Generator
) -> Float[Tensor, "image patch"]:
    """Control: each image gets the map of another patient, every map used about once."""
    names = np.asarray(patients)
    order = np.asarray(torch.randperm(len(maps), generator=generator))
    for i in np.flatnonzero(names[order] == names):
        # swap with the first image for which both swaps are another patient's
        fits = (names[order] != names[i]) & (names != names[order[i]])
        if not fits.any():
            raise UsageError("one patient holds too many of the images", where="shuffled")
        j = int(np.flatnonzero(fits)[0])
        order[i], order[j] = order[j], order[i]
    return maps[torch.from_numpy(order)]


def leak(scores: Float[Tensor, " image"], patches: int) -> Float[Tensor, "image patch"]:
    """Control: a map that holds the teacher's yes or no (last or first patch) and nothing about the image."""
    maps = torch.zeros(len(scores), patches)
    maps[torch.arange(len(scores)), torch.where(scores > 0, patches - 1, 0)] = 1.0
    return maps


def patch_features(
    fitted_on: Float[Tensor, "image patch pixel"], *others: Float[Tensor, "_ patch pixel"], components: int = 16
) -> tuple[Float[Tensor, "_ patch feature"], ...]:
    """Principal components of patches, standardised, fitted on the first set and applied to all."""
    flat = fitted_on.flatten(0, 1)
    mean = flat.mean(0)
    _, _, axes = torch.linalg.svd((flat - mean).T @ (flat - mean), full_matrices=False)
    axes = axes[:components].T
    spread = ((flat - mean) @ axes).std(0).clamp(min=1e-6)
    return tuple((pixels - mean) @ axes / spread for pixels in (fitted_on, *others))


class _Students:
    """Students of all seeds at once: a hidden layer per patch, attention over patches, a number for each patch."""

    def __init__(self, weights: dict[str, Tensor], mean: Tensor, spread: Tensor):
        self.weights, self.mean, self.spread = weights, mean, spread

    @torch.no_grad()
    def __call__(self, features: Tensor, shares: Tensor | None = None) -> Float[np.ndarray, "seed image"]:
        many = features.expand(len(self.mean), *features.shape)
        told = None if shares is None else shares.expand(len(self.mean), *shares.shape)
        said, _ = _forward(self.weights, many, told)
        return (said * self.spread[:, None] + self.mean[:, None]).double().numpy()


def _forward(w: dict[str, Tensor], x: Tensor, shares: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Predictions `[seed, image]` and log attention `[seed, image, patch]`; `shares` replaces the attention."""
    hidden = torch.tanh(torch.einsum("snpf,sfh->snph", x, w["in"]) + w["place"][:, None])
    attention = torch.log_softmax(torch.einsum("snph,sh->snp", hidden, w["key"]), -1)
    value = torch.einsum("snph,sh->snp", hidden, w["value"])
    weight = attention.exp() if shares is None else shares
    return (weight * value).sum(-1) + w["bias"][:, None], attention


def _taught(
    train: Lessons,
    rows: Int[Tensor, "seed n"],
    told: Tensor | None,
    strength: float | None,
    steps: int,
    seed: int,
    valid: Lessons | None = None,
) -> _Students:
    """Adam on all images at once: squared error of the score, plus `strength` times KL(map || attention).

    `strength` None: the map takes the place of the attention. With `valid`, the weights of each student's best step.
    """
    seeds, patches, features = len(rows), train.features.shape[1], train.features.shape[2]
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, scale: float) -> Tensor:
        return (scale * torch.randn(seeds, *shape, generator=generator)).requires_grad_()

    weights = {
        "in": drawn(features, HIDDEN, scale=features**-0.5),
        "place": drawn(patches, HIDDEN, scale=0.1),
        "key": drawn(HIDDEN, scale=0.1),
        "value": drawn(HIDDEN, scale=0.1),
        "bias": drawn(scale=0.0),
    }
    x, y = train.features[rows].float(), train.scores[rows].float()
    mean, spread = y.mean(1), y.std(1).clamp(min=1e-9)
    y = (y - mean[:, None]) / spread[:, None]
    adam = torch.optim.AdamW(weights.values(), lr=RATE, weight_decay=DECAY)
    best = _Best(weights, seeds)
    for step in range(steps):
        if valid is not None and step % LOOK == 0:
            best.look(_r2(_Students(weights, mean, spread)(valid.features), valid.scores), weights)
        said, attention = _forward(weights, x, told if strength is None else None)
        loss = (said - y).square().mean(1)
        if strength and told is not None:
            kl = torch.xlogy(told, told) - told * attention
            loss = loss + strength * kl.sum(-1).mean(1)
        adam.zero_grad()
        loss.sum().backward()
        adam.step()
    if valid is None:
        return _Students({k: w.detach() for k, w in weights.items()}, mean, spread)
    best.look(_r2(_Students(weights, mean, spread)(valid.features), valid.scores), weights)
    return _Students(best.weights, mean, spread)


class _Best:
    """The weights of each student at the step with its best score so far."""

    def __init__(self, weights: dict[str, Tensor], seeds: int):
        self.weights = {k: w.detach().clone() for k, w in weights.items()}
        self.score = np.full(seeds, -np.inf)

    def look(self, score: Float[np.ndarray, " seed"], weights: dict[str, Tensor]) -> None:
        better = torch.from_numpy(score > self.score)
        self.score = np.maximum(self.score, score)
        for name, kept in self.weights.items():
            kept[better] = weights[name].detach()[better]


def _r2(said: Float[np.ndarray, "seed image"], scores: Tensor) -> Float[np.ndarray, " seed"]:
    y = scores.double().numpy()
    return 1 - ((said - y) ** 2).sum(1) / ((y - y.mean()) ** 2).sum()


def _agreement(said: Float[np.ndarray, "seed image"], scores: Tensor) -> Float[np.ndarray, " seed"]:
    return ((said > 0) == (scores.numpy() > 0)).mean(1)


def _check(train: Lessons, valid: Lessons, test: Lessons, explanations: Mapping[str, Tensor | None], size: int) -> None:
    for name, a, b in (("validation", train, valid), ("test", train, test), ("validation and test", valid, test)):
        both = set(a.patients) & set(b.patients)
        if both:
            raise UsageError(f"patient {min(both)} is in two sets", where=name, hint="split by patient")
    if not 2 <= size <= len(train):
        raise UsageError(f"{size} of {len(train)} training images", where="size")
    wanted = train.features.shape[:2]
    for name, maps in explanations.items():
        if maps is not None and maps.shape != wanted:
            raise UsageError(f"{tuple(maps.shape)} for {tuple(wanted)} images and patches", where=name)
