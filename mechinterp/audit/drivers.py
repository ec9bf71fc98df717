"""Features that move the score and that no column of the metadata explains, with where they look."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mechinterp.audit.causal import Trial
from mechinterp.audit.features import Selectivity
from mechinterp.audit.settings import Settings
from mechinterp.audit.verdicts import Ruling
from mechinterp.metrics.statistics import Interval, percentile_interval
from mechinterp.pages import place

__all__ = ["Driver", "Place", "find_drivers", "judge", "place_of"]

UNEXPLAINED = 0.65  # a feature with a lower best AUROC is explained by nothing
LEAST_SHARE = 0.02  # of the total absolute effect of all features
MOST = 5


@dataclass(frozen=True)
class Driver:
    """A feature, its share of the score's total absolute effect, its mean push, and what explains it best."""

    feature: int
    share: float
    push: float
    ci95: Interval
    images: int
    best_attribute: str
    best_auroc: float


@dataclass(frozen=True)
class Place:
    """Where a feature fires: in words, the share of its activation in the border, and the share on patch tokens."""

    words: str
    border: float
    on_patches: float


def find_drivers(trial: Trial, selectivity: Selectivity, taken: set[int]) -> list[Driver]:
    """The features with the largest share of the effect that neither an attribute nor the target explains."""
    total = np.abs(trial.push).sum()
    if total == 0:
        return []
    shares = np.abs(trial.push).sum(1) / total
    found = []
    for i in np.argsort(-shares, kind="stable"):
        feature = trial.features[i]
        name, area = selectivity.best(feature)
        if shares[i] < LEAST_SHARE or len(found) == MOST:
            break
        if feature in taken or area >= UNEXPLAINED:
            continue
        draws = trial.bootstrap.mean(trial.push[i])
        fires = trial.push[i] != 0
        found.append(
            Driver(
                feature,
                float(shares[i]),
                float(trial.push[i].mean()),
                percentile_interval(draws),
                int(fires.sum()),
                name,
                area,
            )
        )
    return found


def place_of(heat: Float[np.ndarray, "rows columns"], elsewhere: float) -> Place:
    """Put a mean activation map into words. `elsewhere` is the activation on tokens that are no patches."""
    mass = float(heat.sum())
    if mass + elsewhere == 0:
        return Place("does not fire", 0.0, 0.0)
    if mass < 0.05 * (mass + elsewhere):
        return Place("class token only, no place in the image", 0.0, mass / (mass + elsewhere))
    return Place(place.place_of(heat, " of the image"), place.border_share(heat), mass / (mass + elsewhere))


def judge(driver: Driver, where: Place, settings: Settings) -> Ruling:
    """CONCERN for a driver that sits where a chest film has marks and moves the score; else a person has to look."""
    what = (
        f"carries {driver.share:.0%} of the score's total feature effect, fires in {driver.images} test images, "
        f"{where.words}; nearest attribute {driver.best_attribute} (AUROC {driver.best_auroc:.2f})"
    )
    if where.border > place.IN_BORDER and "border" in where.words:
        return Ruling("CONCERN", f"{what}: it looks outside the chest")
    return Ruling("NOT TESTED", f"{what}: no column of the metadata says what it is; look at its gallery")
