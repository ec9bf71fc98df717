"""What happens to a feature: a closed union of small frozen choices, as plain functions of its activations.

Every choice maps the activations that a dictionary encoded, `old`, to the ones that the intervention wants, `new`.
What is then written into the model is `decode(new) - decode(old)`, which for a linear decoder is
`(new - old) @ W_dec`: whatever the dictionary failed to explain (its error term) stays in the model. Nothing here
touches a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, assert_never

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import UsageError
from mechinterp.types import Placed

__all__ = [
    "ZERO",
    "Edit",
    "How",
    "Inject",
    "Mean",
    "Patch",
    "Resample",
    "Scale",
    "Steer",
    "Tokens",
    "Zero",
    "donors",
    "edited",
]

Tokens: TypeAlias = Literal["all", "patch", "cls"] | Sequence[int]


@dataclass(frozen=True)
class Zero:
    """Zero ablation: the feature is off."""


@dataclass(frozen=True)
class Mean:
    """Mean ablation: the feature takes `values[feature]`, its mean over a reference data set, at every chosen token."""

    values: Float[Tensor, " d_sae"] = field(repr=False)


@dataclass(frozen=True)
class Resample:
    """Resample ablation: the feature takes what it has at the same token in another image of the same call.

    Donors are drawn from `seed`; no image is its own donor, and each image donates once.
    """

    seed: int = 0


@dataclass(frozen=True)
class Scale:
    """The activation is multiplied by `factor`, so that only places where the feature fires change."""

    factor: float


@dataclass(frozen=True)
class Steer:
    """`strength` is added to the activation at every chosen token, in units of the feature's activation."""

    strength: float


@dataclass(frozen=True)
class Patch:
    """Activation patching: the feature takes the activations of another run, one row for each image of the batch."""

    activations: Float[Tensor, "batch token d_sae"] = field(repr=False)


@dataclass(frozen=True)
class Inject:
    """The activation is set to `value` at every chosen token, whether or not the feature fired."""

    value: float


ZERO = Zero()
How: TypeAlias = Zero | Mean | Resample | Scale | Steer | Patch | Inject


@dataclass(frozen=True)
class Edit:
    """One intervention: `how` is done to the set `features` of a placed dictionary at the chosen `tokens`.

    Args:
        placed: the dictionary, where it reads and where its decoder writes.
        features: indices of the set; the members change together.
        how: Zero, Mean, Resample, Scale, Steer, Patch or Inject.
        tokens: "all", "patch" (image patches), "cls", or token positions.
    """

    placed: Placed
    features: tuple[int, ...]
    how: How = ZERO
    tokens: Tokens = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", check_features(self.placed, self.features))


def check_features(placed: Placed, features: Sequence[int]) -> tuple[int, ...]:
    """The feature indices as a tuple of ints. Raises UsageError for none, a repeated one, or one out of range."""
    picked = tuple(int(f) for f in features)
    width = placed.dictionary.W_dec.shape[0]
    wrong = [f for f in picked if not 0 <= f < width]
    if wrong:
        raise UsageError(f"no feature {wrong[0]}", where=str(placed.reads), hint=f"the dictionary has 0 to {width - 1}")
    if not picked or len(set(picked)) != len(picked):
        raise UsageError(f"features must be distinct and at least one, got {list(picked)[:8]}", where=str(placed.reads))
    return picked


def donors(n_images: int, seed: int) -> Int[Tensor, " image"]:
    """Which image gives to each image: one random cycle, so that none gives to itself and each gives once."""
    if n_images < 2:
        raise UsageError("resample ablation needs at least two images", where="batch", hint="pass more images")
    order = torch.randperm(n_images, generator=torch.Generator().manual_seed(seed))
    donor = torch.empty_like(order)
    donor[order] = order.roll(1)
    return donor


def edited(
    how: How,
    old: Float[Tensor, "image token feature"],
    features: Int[Tensor, " feature"],
    mask: Bool[Tensor, " token"],
    *,
    donor: Float[Tensor, "image token feature"] | None = None,
    rows: Int[Tensor, " image"] | None = None,
) -> Float[Tensor, "image token feature"]:
    """The activations that `how` wants for the columns `features`; `old` where `mask` is False.

    Args:
        how: the choice.
        old: activations of the columns `features` of the dictionary.
        features: the index of each column in the dictionary.
        mask: chosen tokens.
        donor: for Resample, the donors' activations of the same columns.
        rows: for Patch, the row of `how.activations` of each image (default: in order).
    """
    match how:
        case Zero():
            new = torch.zeros_like(old)
        case Mean(values):
            new = values.to(old)[features].expand_as(old)
        case Resample():
            assert donor is not None, "the caller encodes the donors"
            new = donor
        case Scale(factor):
            new = old * factor
        case Steer(strength):
            new = old + strength
        case Patch(activations):
            given = activations if rows is None else activations[rows]
            if given.shape[:2] != old.shape[:2]:
                raise UsageError(
                    f"the other run has shape {tuple(given.shape[:2])} (image, token), this one {tuple(old.shape[:2])}",
                    where="Patch.activations",
                )
            new = given.to(old)[..., features]
        case Inject(value):
            new = torch.full_like(old, value)
        case _:
            assert_never(how)
    return torch.where(mask[None, :, None], new, old)
