"""Which images stand for a feature: the strongest, those at quantiles of its activation, and near misses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

__all__ = ["GROUPS", "Shot", "choose_shots"]

GROUPS = ("strongest", "90 %", "50 %", "near misses")
EACH = 4


@dataclass(frozen=True)
class Shot:
    """One picture: a position among the observed images, its group, and the activation as a share of the largest."""

    image: int
    group: str
    share: float


def choose_shots(
    strength: Float[np.ndarray, " n"],
    closest: Float[np.ndarray, " n"] | None,
    patients: np.ndarray,
    allowed: Bool[np.ndarray, " n"],
    each: int = EACH,
) -> list[Shot]:
    """Pictures of one feature, at most one a patient in each group and none in two groups.

    A gallery of the strongest images alone flatters a feature: what it answers to in the middle of its range often
    is something else (the interpretability illusion, arXiv:2104.07143). So there are images next to its 90 % and 50 %
    quantile over the images in which it fires, and near misses: images in which it is silent although its
    pre-activation comes closest to firing.
    """
    on = np.flatnonzero(allowed & (strength > 0))
    if not len(on):
        return []
    largest = float(strength[on].max())
    ranked: dict[str, Int[np.ndarray, " k"]] = {"strongest": on[np.argsort(-strength[on], kind="stable")]}
    for name, level in (("90 %", 0.9), ("50 %", 0.5)):
        distance = np.abs(strength[on] - np.quantile(strength[on], level))
        ranked[name] = on[np.argsort(distance, kind="stable")]
    if closest is not None:
        off = np.flatnonzero(allowed & (strength <= 0))
        ranked["near misses"] = off[np.argsort(-closest[off], kind="stable")]
    shots, used = [], set()
    for group, order in ranked.items():
        seen: set[str] = set()
        mine: list[int] = []
        for image in order:
            if len(mine) == each:
                break
            if int(image) not in used and str(patients[image]) not in seen:
                mine.append(int(image))
                seen.add(str(patients[image]))
        used |= set(mine)
        mine.sort(key=lambda image: -strength[image] if group != "near misses" else 0.0)
        shots += [Shot(image, group, float(strength[image] / largest)) for image in mine]
    return shots
