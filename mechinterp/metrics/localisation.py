"""Does the map lie where the finding is? Scores against a mask, each beside what chance gives.

A map on patches is compared with the *share* of each patch that the mask covers: a patch counts as that many pixels
inside and the rest outside, so nothing is decided by a threshold and the scores equal those of the unsmoothed pixel
map. A map on pixels is compared with the mask itself. All use the signed map: what speaks against the target counts as
low.

Localisation is no faithfulness: a model that reads the wrong place is explained well by a map of the wrong place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float

from mechinterp.errors import UsageError
from mechinterp.metrics.iq.scores import DOUBLE
from mechinterp.metrics.scored import Scored, ScoreStatus, flat

__all__ = [
    "SCORES",
    "Located",
    "average_precision",
    "localise",
    "mask_shares",
    "mass_ratio",
    "pointing_game",
    "top_k_intersection",
]

PERMUTED = 1024  # elements up to which chance is found by permuting the map; above, it is the share of the mask
DRAWS = 100


@dataclass(frozen=True)
class Located:
    """A score of every row and what a random order of the same values would score on that row."""

    score: Scored
    chance: Float[np.ndarray, " row"]

    @property
    def above_chance(self) -> Scored:
        """Score minus chance."""
        return Scored(self.score.value - self.chance, self.score.status)


def mask_shares(
    masks: Bool[np.ndarray, "row height width"], rows: int, columns: int
) -> Float[np.ndarray, "row element"]:
    """Share of each patch that the mask covers. The mask is on the pixels that the model sees.

    Raises UsageError when the pixels do not fall into that many patches.
    """
    height, width = masks.shape[1:]
    if height % rows or width % columns:
        raise UsageError(f"{height} x {width} pixels do not fall into {rows} x {columns} patches", where="masks")
    return (
        masks.reshape(len(masks), rows, height // rows, columns, width // columns)
        .mean((2, 4))
        .reshape(len(masks), rows * columns)
    )


def pointing_game(maps: Float[np.ndarray, "row n"], inside: Float[np.ndarray, "row n"]) -> Float[np.ndarray, " row"]:
    """Share of the maximum that lies in the mask (Zhang et al. 2018, section 4.1, without their 15 pixels' margin).

    Over several maxima, and over a patch that is half inside, the expected hit.
    """
    top = maps == maps.max(1, keepdims=True)
    return (inside * top).sum(1) / top.sum(1)


def average_precision(
    maps: Float[np.ndarray, "row n"], inside: Float[np.ndarray, "row n"]
) -> Float[np.ndarray, " row"]:
    """Area under the precision-recall curve, as a sum over steps (scikit-learn's `average_precision_score`).

    Equal values are one step. nan where nothing is inside.
    """
    order = np.argsort(-maps, axis=1, kind="stable")
    ranked = np.take_along_axis(maps, order, 1)
    hits = np.cumsum(np.take_along_axis(inside, order, 1), 1)
    seen = np.arange(1, maps.shape[1] + 1)
    last = np.concatenate([ranked[:, 1:] != ranked[:, :-1], np.ones((len(maps), 1), bool)], 1)
    # recall gained since the last end of a group of equal values
    ends = np.where(last, hits, 0)
    before = np.concatenate([np.zeros((len(maps), 1)), np.maximum.accumulate(ends, 1)[:, :-1]], 1)
    gained = np.where(last, hits - before, 0)
    total = hits[:, -1]
    return np.divide((gained * hits / seen).sum(1), total, out=np.full(len(maps), np.nan), where=total > 0)


def mass_ratio(maps: Float[np.ndarray, "row n"], inside: Float[np.ndarray, "row n"]) -> Float[np.ndarray, " row"]:
    """Share of the positive relevance inside the mask over the mask's share of the area; 1 is chance, nan without any.

    The numerator alone is the relevance mass accuracy of Arras et al. 2022 (eq. 3).
    """
    positive = np.clip(maps, 0, None)
    total = positive.sum(1)
    share = np.divide((positive * inside).sum(1), total, out=np.full(len(maps), np.nan), where=total > 0)
    area = inside.mean(1)
    return np.divide(share, area, out=np.full(len(maps), np.nan), where=area > 0)


def top_k_intersection(
    maps: Float[np.ndarray, "row n"], inside: Float[np.ndarray, "row n"]
) -> Float[np.ndarray, " row"]:
    """Share of the k highest that lies inside, k being the size of the mask, at least 1.

    The relevance rank accuracy of Arras et al. 2022 (eq. 4). Among values equal to the k-th, the expected share.
    """
    k = np.maximum(1, np.round(inside.sum(1))).astype(int)
    ranked = -np.sort(-maps, axis=1)
    edge = ranked[np.arange(len(maps)), k - 1][:, None]
    above, equal = maps > edge, maps == edge
    room = k - above.sum(1)
    return ((inside * above).sum(1) + room * (inside * equal).sum(1) / equal.sum(1)) / k


SCORES = {
    "pointing_game": pointing_game,
    "auprc": average_precision,
    "mass_ratio": mass_ratio,
    "top_k": top_k_intersection,
}


def localise(
    maps: Float[np.ndarray, "row n"], inside: Float[np.ndarray, "row m"], seed: int = 0, eps: float = DOUBLE
) -> dict[str, Located]:
    """Every score of `SCORES` with its chance.

    Args:
        maps: one value per patch (or pixel), larger speaks more for the target.
        inside: share of it inside the mask, in [0, 1]; `mask_shares` for patches, the mask itself for pixels.
        seed: of the permutations of chance. With few patches, chance of the AUPRC lies well above the mask's share: a
            random order of 64 patches, 3 of them inside, has .10, not .05.
        eps: to which the maps were rounded when they were computed; decides what is constant.

    Raises UsageError for other shapes, or shares outside [0, 1].
    """
    if maps.shape != inside.shape:
        raise UsageError(f"{inside.shape} for maps {maps.shape}", where="inside")
    if inside.size and not (inside.min() >= 0 and inside.max() <= 1):
        raise UsageError("shares outside [0, 1]", where="inside")
    area = inside.mean(1)
    finite = np.asarray(np.isfinite(maps).all(1))
    broken: dict[ScoreStatus, np.ndarray] = {
        "no_region": np.logical_or(area == 0, area == 1),
        "nonfinite": np.logical_not(finite),
        "const_attr": flat(maps, eps),
    }
    clean = np.where(finite[:, None], maps, 0.0)
    found = {}
    for name, score in SCORES.items():
        reasons: dict[ScoreStatus, np.ndarray] = dict(broken)
        if name == "mass_ratio":
            reasons["no_mass"] = clean.max(1) <= 0
        found[name] = Located(Scored.of(score(clean, inside), reasons), _chance(name, clean, inside, seed))
    return found


def _chance(name: str, maps: np.ndarray, inside: np.ndarray, seed: int) -> Float[np.ndarray, " row"]:
    """Mean score of permuted maps; exact where it is known."""
    if name == "mass_ratio":
        return np.ones(len(maps))
    if name != "auprc" or maps.shape[1] > PERMUTED:
        return inside.mean(1)
    generator = torch.Generator().manual_seed(seed)
    total = np.zeros(len(maps))
    for _ in range(DRAWS):
        total += average_precision(maps[:, torch.randperm(maps.shape[1], generator=generator).numpy()], inside)
    return total / DRAWS
