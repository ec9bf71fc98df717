"""How well each feature follows each concept once the other attributes are held fixed.

A feature that answers to a drain follows the pneumothorax, too, wherever drains are put in for one. So the AUROC of a
feature for a concept is counted within strata of each attribute that goes with it, one at a time, and the weakest of
these counts (van Elteren 1960; `mechinterp.metrics.statistics.stratified_auroc_columns`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from mechinterp.metrics.statistics import stratified_auroc_columns
from saes.naming.concepts import Concept

__all__ = ["Association", "associate", "rivals"]

MOST_RIVALS = 3
LEAST_PHI = 0.1
LEAST_PAIRED = 5  # images in which rival and concept agree, and in which they differ


@dataclass(frozen=True, eq=False)
class Association:
    """Concepts in rows, features in columns.

    Fields:
        plain: AUROC - 0.5, nothing held fixed.
        within: AUROC - 0.5 within strata of the rival that weakens it most; 0 when a rival turns its sign.
        z: standard normal deviate of `within` under no difference, corrected for ties; signed.
        rival: index of that rival among the concepts, -1 where nothing is held fixed.
    """

    plain: Float[np.ndarray, "c f"]
    within: Float[np.ndarray, "c f"]
    z: Float[np.ndarray, "c f"]
    rival: Int[np.ndarray, "c f"]


def rivals(concepts: Sequence[Concept], rows: Bool[np.ndarray, " n"]) -> list[list[int]]:
    """For each concept the (up to three) attributes of other columns that go with it most, by |phi| on `rows`.

    One that hardly ever differs from the concept cannot be held fixed and is left out: the two have one name.
    """
    found: list[list[int]] = []
    for a, concept in enumerate(concepts):
        phi = {}
        for b, other in enumerate(concepts):
            if b == a or not other.labelled or not concept.labelled or other.column == concept.column:
                continue
            both = rows & concept.known & other.known
            x, y = concept.values[both], other.values[both]
            agree = int((x == y).sum())
            if min(agree, len(x) - agree) < LEAST_PAIRED or not x.std() or not y.std():
                continue
            phi[b] = abs(float(np.corrcoef(x, y)[0, 1]))
        ranked = sorted((b for b in phi if phi[b] >= LEAST_PHI), key=lambda b: -phi[b])
        found.append(ranked[:MOST_RIVALS])
    return found


def associate(
    signal: Float[np.ndarray, "n f"],
    concepts: Sequence[Concept],
    rows: Bool[np.ndarray, " n"],
    held_fixed: Sequence[Sequence[int]],
) -> Association:
    """Association of every feature with every concept on the images `rows`; `held_fixed` comes from `rivals`."""
    shape = (len(concepts), signal.shape[1])
    plain, within, z = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    rival = np.full(shape, -1)
    for a, concept in enumerate(concepts):
        mine = rows & concept.known
        plain[a], z[a] = _deviation(signal[mine], concept.values[mine], np.zeros(int(mine.sum())))
        within[a] = plain[a]
        for b in held_fixed[a]:
            both = mine & concepts[b].known
            dev, score = _deviation(signal[both], concept.values[both], concepts[b].values[both])
            weaker = np.abs(dev) < np.abs(within[a])
            turned = dev * plain[a] < 0
            within[a] = np.where(turned, 0.0, np.where(weaker, dev, within[a]))
            z[a] = np.where(turned, 0.0, np.where(weaker, score, z[a]))
            rival[a] = np.where(weaker | turned, b, rival[a])
    return Association(plain, within, z, rival)


def _deviation(x: np.ndarray, labels: np.ndarray, strata: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    area, p = stratified_auroc_columns(x, labels, strata)
    dev = np.nan_to_num(area - 0.5)
    return dev, np.sign(dev) * np.nan_to_num(stats.norm.isf(np.clip(p, 1e-300, 1) / 2))
