"""Does a feature fire where the thing is? Overlap of its patches with drawn masks or boxes, beside chance.

Both are counted on the grid of patches. For image n with mask M: S is the set of patches with at least half of the
feature's largest activation in the image; IoU = |S and M| / |S or M| by area. The pointing game asks whether the patch
with the largest activation overlaps the mask (Zhang et al. 2018, arXiv:1608.00507). Chance for both is the same
heat laid on the masks of other images, in a cycle: what a feature that always looks at the same place would get.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mechinterp.data import ImageData
from mechinterp.models import HookedVLM

__all__ = ["Covered", "Overlap", "coverage", "overlap"]

SIDE = 96
MOST = 60
LEAST = 5


@dataclass(frozen=True, eq=False)
class Covered:
    """Which share of each patch the mask of an attribute covers, in some of the observed images."""

    images: Int[np.ndarray, " m"]
    share: Float[np.ndarray, "m patch"]


@dataclass(frozen=True)
class Overlap:
    """Mean over the images in which a feature fires and a mask exists."""

    images: int
    iou: float
    iou_chance: float
    pointing: float
    pointing_chance: float


def coverage(
    model: HookedVLM, data: ImageData, attribute: str, rows: Int[np.ndarray, " n"], images: Sequence[int]
) -> Covered | None:
    """Masks of an attribute on the grid of patches, for the first `MOST` of `images` (positions in `rows`) with one."""
    owner = model.grid(SIDE, SIDE).cpu().numpy().ravel() - (model.patch_tokens().start or 0)
    size = model.grid_shape[0] * model.grid_shape[1]
    inside = owner >= 0
    area = np.maximum(np.bincount(owner[inside], minlength=size), 1)
    kept, shares = [], []
    for image in images:
        mask = data.mask(attribute, int(rows[image]), size=SIDE)
        if mask is None or not mask.any():
            continue
        kept.append(int(image))
        shares.append(np.bincount(owner[inside], weights=mask.ravel()[inside], minlength=size) / area)
        if len(kept) == MOST:
            break
    return Covered(np.array(kept), np.array(shares)) if len(kept) >= LEAST else None


def overlap(heat: Float[np.ndarray, "m rows columns"], covered: Covered) -> Overlap | None:
    """IoU and pointing of a feature's `heat` in the covered images; None where it fires in fewer than five of them."""
    flat = heat.reshape(len(heat), -1)
    fires = np.flatnonzero(flat.max(1) > 0)
    if len(fires) < LEAST:
        return None
    flat, share = flat[fires], covered.share[fires]
    chosen = flat >= 0.5 * flat.max(1, keepdims=True)
    peak = flat.argmax(1)
    found = [_measure(chosen, peak, np.roll(share, shift, axis=0)) for shift in range(len(fires))]
    chance = np.mean(found[1:], axis=0)
    return Overlap(len(fires), found[0][0], float(chance[0]), found[0][1], float(chance[1]))


def _measure(chosen: np.ndarray, peak: np.ndarray, share: np.ndarray) -> tuple[float, float]:
    both = (chosen * share).sum(1)
    either = chosen.sum(1) + share.sum(1) - both
    return float((both / either).mean()), float((share[np.arange(len(peak)), peak] > 0).mean())
