"""The effect of every feature, or of many sets of features, on every target over a set of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import UsageError
from mechinterp.interventions.edits import ZERO, How, Tokens, check_features
from mechinterp.interventions.sweep import Sweep
from mechinterp.models import HookedVLM
from mechinterp.types import ImageTextBatch, Placed, Target

__all__ = ["Effects", "effects", "set_effect", "set_effects"]


@dataclass(frozen=True)
class Effects:
    """Effects of single features, stored only where a feature was changed; every other effect is exactly 0.

    Fields:
        features: the swept features, in the order asked for.
        targets: names of the targets.
        clean: unedited scores.
        row: for each entry, position in `features`.
        image: for each entry, position in the batch.
        value: for each entry, `score(edited) - score(clean)`, in the units of the scores.
    """

    features: tuple[int, ...]
    targets: tuple[str, ...]
    clean: Float[Tensor, "image target"]
    row: Int[Tensor, " entry"]
    image: Int[Tensor, " entry"]
    value: Float[Tensor, "entry target"]

    def dense(self) -> Float[Tensor, "feature image target"]:
        """All effects, zeros filled in."""
        full = self.value.new_zeros(len(self.features), *self.clean.shape)
        full[self.row, self.image] = self.value
        return full

    @property
    def effect(self) -> Float[Tensor, "feature image target"]:
        """Same as `dense()`."""
        return self.dense()

    def of(self, feature: int) -> Float[Tensor, "image target"]:
        """Effects of one feature on every image. Raises UsageError when it was not swept."""
        if feature not in self.features:
            raise UsageError(f"feature {feature} was not swept", where="Effects")
        mine = self.row == self.features.index(feature)
        full = torch.zeros_like(self.clean)
        full[self.image[mine]] = self.value[mine]
        return full

    def mean(self) -> Float[Tensor, "feature target"]:
        """Mean effect over all images, those where the feature does not fire included as 0."""
        return self._sum(self.value) / len(self.clean)

    def mean_abs(self) -> Float[Tensor, "feature target"]:
        """Mean absolute effect over all images."""
        return self._sum(self.value.abs()) / len(self.clean)

    def n_images(self) -> Int[Tensor, " feature"]:
        """In how many images each feature was changed."""
        return torch.bincount(self.row, minlength=len(self.features))

    def _sum(self, value: Float[Tensor, "entry target"]) -> Float[Tensor, "feature target"]:
        total = value.new_zeros(len(self.features), len(self.targets), dtype=torch.float64)
        return total.index_add(0, self.row, value.double()).float()


@torch.no_grad()
def effects(
    model: HookedVLM,
    placed: Placed,
    batch: ImageTextBatch,
    targets: Sequence[Target],
    features: Sequence[int] | None = None,
    how: How = ZERO,
    tokens: Tokens = "all",
    *,
    image_batch: int = 32,
    pair_batch: int = 256,
) -> Effects:
    """Effect of editing every feature, one at a time, on every target, over the images of `batch`.

    Equal (to rounding) to one full forward per feature with a hook, but recomputes only what an edit can change and
    only where it changes something; see mechinterp.interventions.sweep.

    Args:
        model, placed: where the features live.
        batch: model-ready images, from `model.prepare(pixels, targets)`.
        targets: what is scored.
        features: which features; default all of the dictionary.
        how: what is done: Zero() (default), Mean(values), Resample(seed), Scale, Steer, Patch or Inject.
        tokens: "all", "patch", "cls", or positions.
        image_batch, pair_batch: chunk sizes; they bound the memory and move results by rounding only.

    Raises:
        UsageError: for features or tokens that do not exist, or a dictionary whose decoder is not linear.
        NonFiniteError: naming the images, as soon as anything is not finite.
    """
    swept = check_features(placed, range(placed.dictionary.W_dec.shape[0]) if features is None else features)
    sets = torch.tensor(swept)[:, None]
    sweep = Sweep(model, placed, batch, targets, how, tokens, image_batch=image_batch, pair_batch=pair_batch)
    parts = list(sweep.run(sets, torch.ones_like(sets, dtype=torch.bool)))
    empty = torch.zeros(0, dtype=torch.long)
    return Effects(
        features=swept,
        targets=tuple(target.name for target in targets),
        clean=sweep.clean,
        row=torch.cat([part.sets for part in parts]) if parts else empty,
        image=torch.cat([part.images for part in parts]) if parts else empty,
        value=torch.cat([part.effect for part in parts]) if parts else sweep.clean[:0],
    )


@torch.no_grad()
def set_effects(
    model: HookedVLM,
    placed: Placed,
    batch: ImageTextBatch,
    targets: Sequence[Target],
    sets: Sequence[Sequence[int]],
    how: How = ZERO,
    tokens: Tokens = "all",
    *,
    image_batch: int = 32,
    pair_batch: int = 256,
) -> Float[Tensor, "set image target"]:
    """Effect of editing each set of features together; 0 in images where no member changes. Else as `effects`."""
    if not sets:
        raise UsageError("no feature sets", where="sets")
    checked = [check_features(placed, members) for members in sets]
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(m) for m in checked], batch_first=True, padding_value=-1)
    valid = padded >= 0
    sweep = Sweep(model, placed, batch, targets, how, tokens, image_batch=image_batch, pair_batch=pair_batch)
    out = sweep.clean.new_zeros(len(checked), *sweep.clean.shape)
    for part in sweep.run(padded.clamp(min=0), valid):
        out[part.sets, part.images] = part.effect
    return out


def set_effect(
    model: HookedVLM,
    placed: Placed,
    batch: ImageTextBatch,
    targets: Sequence[Target],
    features: Sequence[int],
    how: How = ZERO,
    tokens: Tokens = "all",
) -> Float[Tensor, "image target"]:
    """Effect of editing one set of features together."""
    return set_effects(model, placed, batch, targets, [features], how, tokens)[0]
