"""Phantoms as material for experiments: rendered once, with the pairs that removing a factor makes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped, UInt8

from mechinterp.data.phantom import FACTORS, Phantom, prompts
from mechinterp.models import HookedVLM
from mechinterp.types import ImageTextBatch, Target
from saes.truth.asking import generative, questions_of

__all__ = ["NAMED", "Cohort", "Removal", "batch_of", "outputs", "removals", "scores"]

NAMED = tuple(name for name, factor in FACTORS.items() if factor.kind in ("finding", "device"))
"""Factors that captions and prompts name: each has an output of its own."""

BATCH = 100
_MARK = ("a chest x-ray with portable mark", "a chest x-ray without portable mark")


@dataclass(frozen=True, eq=False)
class Cohort:
    """A rendered phantom; it reads as the images of an extraction do."""

    phantom: Phantom
    rendered: UInt8[np.ndarray, "n size size"]
    split: Shaped[np.ndarray, " n"]

    @classmethod
    def of(cls, phantom: Phantom, split: str = "train", every: int = 0) -> Cohort:
        """Render; every `every`-th patient (0: none) is of the val split, all others of `split`."""
        number = phantom.factors["patient"].to_numpy()
        val = number % every == every - 1 if every else np.zeros(len(number), bool)
        return cls(phantom, phantom.render(), np.where(val, "val", split))

    def __len__(self) -> int:
        return len(self.rendered)

    @property
    def images(self) -> tuple[str, ...]:
        """Name of each image."""
        return tuple(self.phantom.images)

    @property
    def patients(self) -> tuple[str, ...]:
        """Patient of each image."""
        return tuple(self.phantom.patients)

    @property
    def sha256(self) -> str:
        """Hash of the pixels and the split."""
        digest = hashlib.sha256(self.rendered.tobytes())
        digest.update("".join(self.split.tolist()).encode())
        return digest.hexdigest()

    def pixels(self, rows: Sequence[int] | Int64[np.ndarray, " row"], size: int | None = None) -> np.ndarray:
        """Grey pixels in [0, 1]."""
        return self.rendered[np.asarray(rows)].astype(np.float32) / 255

    def has(self, factor: str) -> Bool[np.ndarray, " n"]:
        """Where a binary factor is 1."""
        return self.phantom.factors[factor].to_numpy() == 1

    def head(self, n: int) -> Cohort:
        """The first `n` images."""
        return Cohort(self.phantom[slice(0, n)], self.rendered[:n], self.split[:n])


@dataclass(frozen=True, eq=False)
class Removal:
    """The images with a factor (`rows` of the cohort), drawn again without it."""

    rows: Int64[np.ndarray, " row"]
    rendered: UInt8[np.ndarray, "row size size"]


def removals(cohort: Cohort, factors: Sequence[str]) -> dict[str, Removal]:
    """do(factor = 0) of every image that has the factor."""
    found = {}
    for name in factors:
        rows = np.flatnonzero(cohort.has(name))
        found[name] = Removal(rows, cohort.phantom[rows].do(**{name: 0}).render())
    return found


def outputs() -> list[Target]:
    """The prompts that the models are asked: one for each finding and device, and one for the PORTABLE mark."""
    asked = [Target(name, *prompts(name)[:2]) for name in NAMED]
    return [*asked, Target("portable", *_MARK)]


def batch_of(model: HookedVLM, rendered: UInt8[np.ndarray, "n size size"], targets: Sequence[Target]) -> ImageTextBatch:
    """Model-ready images. A batch of a generative model asks one question: the first target's."""
    return model.prepare(rendered.astype(np.float32) / 255, targets[:1] if generative(model) else targets)


@torch.no_grad()
def scores(
    model: HookedVLM, rendered: UInt8[np.ndarray, "n size size"], targets: Sequence[Target]
) -> Float[np.ndarray, "n target"]:
    """The model's scores on every target, in float64."""
    if not len(rendered):
        return np.zeros((0, len(targets)))
    answer = questions_of(model, targets) if generative(model) else lambda batch: model.score(batch, targets)
    parts = [
        answer(batch_of(model, rendered[start : start + BATCH], targets)) for start in range(0, len(rendered), BATCH)
    ]
    return torch.cat(parts).double().numpy()
