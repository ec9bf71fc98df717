"""Which features carry an attribute: chosen on train and val patients, within target strata, FDR controlled.

1. For every attribute and feature: the AUROC of the feature for the attribute among images with the same target label,
   with the feature's largest and its mean activation over tokens; the more selective of the two counts.
2. A feature belongs to an attribute when it passes the false discovery rate, deviates enough from 0.5, follows the
   attribute clearly better than it follows the target (a drain lies where the pneumothorax is), and no attribute of
   another column explains it clearly better.
3. They are ranked by how much of the attribute they write: |mean activation with - without it|, within target strata,
   x decoder norm. The first ones that hold `WRITTEN` of the sum are its feature set: `MOST` at most, and at most a
   quarter of the live features, so that random sets can be drawn from the rest. Both signs count: a feature that fires
   without the attribute tells the model about it as well. What a feature does to the score plays no part in the choice,
   so that random sets are a fair comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from mechinterp.audit.candidates import Candidate
from mechinterp.audit.evidence import Evidence
from mechinterp.metrics.statistics import benjamini_hochberg, difference_weights, stratified_auroc_columns

__all__ = ["MOST", "Selectivity", "measure_selectivity", "select"]

MOST = 32  # features in one set
WRITTEN = 0.9
LEAST_DEVIATION = 0.10  # |AUROC - 0.5| for the attribute
OVER_TARGET = 0.05  # by how much that must exceed the deviation for the target
OVER_OTHERS = 0.05  # by how much an attribute of another column may be better
FALSE_DISCOVERIES = 0.05
LEAST_IMAGES = 5  # train and val images in which a feature must fire to be looked at
TARGET = "target"


@dataclass(frozen=True, eq=False)
class Selectivity:
    """How well each feature follows each attribute (rows), on train and val patients.

    Fields (a attributes, the last one the target; f features):
        names, columns: of the attributes.
        deviation: signed AUROC - 0.5 within target strata (for the target itself: plain).
        q: Benjamini-Hochberg adjusted p of it, over the live features.
        target: AUROC - 0.5 of the feature for the target, within strata of the attribute.
        written: |difference of mean activation| x decoder norm.
        by_mean: True where the mean over tokens was the more selective, False where the largest was.
        live: features that fire often enough to say anything.
    """

    names: tuple[str, ...]
    columns: tuple[str, ...]
    deviation: Float[np.ndarray, "a f"]
    q: Float[np.ndarray, "a f"]
    target: Float[np.ndarray, "a f"]
    written: Float[np.ndarray, "a f"]
    by_mean: Bool[np.ndarray, "a f"]
    live: Bool[np.ndarray, " f"]

    def best(self, feature: int) -> tuple[str, float]:
        """The attribute (or the target) that explains a feature best, and its AUROC on train and val patients."""
        row = int(np.abs(self.deviation[:, feature]).argmax())
        return self.names[row], float(0.5 + np.abs(self.deviation[row, feature]))


def measure_selectivity(candidates: Sequence[Candidate], evidence: Evidence, target: str) -> Selectivity:
    """Steps 1 of the module text, for every candidate and the target."""
    fit = ~evidence.test
    live = (evidence.strongest[fit] > 0).sum(0) >= LEAST_IMAGES
    shape = (len(candidates) + 1, len(live))
    deviation, toward, q, written = np.zeros(shape), np.zeros(shape), np.ones(shape), np.zeros(shape)
    norm = evidence.activity.decoder_norm.numpy()[live]
    by_mean = np.zeros(shape, dtype=bool)
    columns = [evidence.strongest[:, live], evidence.average[:, live]]
    for a, candidate in enumerate([*candidates, None]):
        rows = fit if candidate is None else fit & candidate.known
        label = evidence.labels[rows]
        value, strata = (label, np.zeros(len(label))) if candidate is None else (candidate.values[rows], label)
        areas, ps = zip(*(stratified_auroc_columns(x[rows], value, strata) for x in columns), strict=True)
        dev = np.nan_to_num(np.stack(areas) - 0.5)
        choice = np.abs(dev).argmax(0)
        picked = np.arange(dev.shape[1])
        deviation[a, live], by_mean[a, live] = dev[choice, picked], choice == 1
        written[a, live] = np.abs(difference_weights(value, strata) @ columns[1][rows]) * norm
        p = np.minimum(2 * np.stack(ps)[choice, picked], 1)  # the better of two was taken
        q[a, live] = np.nan_to_num(benjamini_hochberg(p), nan=1.0)
        if candidate is not None:
            toward[a, live] = [0.0] if not live.any() else _for_target(columns, rows, label, value, choice)
    names = (*(c.name for c in candidates), target)
    return Selectivity(
        names, (*(c.attribute.column for c in candidates), TARGET), deviation, q, toward, written, by_mean, live
    )


def select(selectivity: Selectivity, a: int) -> tuple[int, ...]:
    """The feature set of attribute `a`, what writes most of it first (steps 2 and 3)."""
    strength = np.abs(selectivity.deviation)
    others = [i for i, column in enumerate(selectivity.columns[:-1]) if column != selectivity.columns[a]]
    rival = strength[others].max(0) if others else np.zeros(strength.shape[1])
    kept = (
        selectivity.live
        & (selectivity.q[a] < FALSE_DISCOVERIES)
        & (strength[a] >= LEAST_DEVIATION)
        & (strength[a] >= np.abs(selectivity.target[a]) + OVER_TARGET)
        & (strength[a] >= rival - OVER_OTHERS)
    )
    order = np.argsort(-selectivity.written[a], kind="stable")
    ranked = [int(f) for f in order if kept[f]]
    share = np.cumsum(selectivity.written[a][ranked])
    needed = int(np.searchsorted(share, WRITTEN * share[-1])) + 1 if ranked else 0
    return tuple(ranked[: min(needed, MOST, int(selectivity.live.sum()) // 4)])


def _for_target(columns, rows, label, value, choice) -> Float[np.ndarray, " f"]:
    areas = np.stack([stratified_auroc_columns(x[rows], label, value)[0] for x in columns])
    return np.nan_to_num(areas[choice, np.arange(areas.shape[1])] - 0.5)
