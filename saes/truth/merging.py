"""Do a finding's and a shortcut's latents come apart? Matching with and without the association, and how to tell.

Where finding and shortcut go together, "fires on the finding" and "fires on the shortcut" are nearly the same label.
Two things can go wrong: the dictionary has no latent for one without the other (merged), or it has, and matching picks
the wrong one (confused). Balanced matching can repair the second, never the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int64

from mechinterp.metrics.statistics import Interval, percentile_interval, stratified_auroc_columns, weighted_auroc
from saes.metrics.alignment import best_thresholds
from saes.metrics.matching import fbmp

__all__ = ["Separation", "balanced_rows", "chosen_latents", "separation", "within"]

How = Literal["naive", "balanced"]


def balanced_rows(
    finding: Bool[np.ndarray, " n"], shortcut: Bool[np.ndarray, " n"], seed: int
) -> Int64[np.ndarray, " m"] | None:
    """Rows drawn so that the four cells finding x shortcut are equal: the association is gone.

    Each cell gives n / 4 rows, drawn with replacement. None when a cell is empty: nothing can then tell the two apart.
    """
    cells = [np.flatnonzero((finding == f) & (shortcut == s)) for f in (False, True) for s in (False, True)]
    if min(len(cell) for cell in cells) == 0:
        return None
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.choice(cell, max(1, len(finding) // 4)) for cell in cells])


def chosen_latents(
    acts: Float[np.ndarray, "n latent"],
    labels: Bool[np.ndarray, " n"],
    other: Bool[np.ndarray, " n"],
    how: How,
    seed: int,
) -> tuple[int, ...] | None:
    """At most 3 latents for `labels` by F-beta matching pursuit; "balanced" first removes the association with `other`.

    Half of the rows set the thresholds, the others choose. None when balancing is impossible.
    """
    half = np.random.default_rng(seed).permutation(len(labels)) % 2 == 0
    parts = []
    for part in (half, ~half):
        rows = np.flatnonzero(part)
        if how == "balanced":
            drawn = balanced_rows(labels[rows], other[rows], seed)
            if drawn is None:
                return None
            rows = rows[drawn]
        parts.append(rows)
    thresholds = best_thresholds(acts[parts[0]], labels[parts[0]].astype(np.float64), beta=0.5)[0]
    return fbmp(acts[parts[1]] > thresholds, labels[parts[1]].astype(np.float64))


def within(
    acts: Float[np.ndarray, "n latent"], labels: Bool[np.ndarray, " n"], other: Bool[np.ndarray, " n"]
) -> Float[np.ndarray, " latent"]:
    """AUROC of every latent for `labels` within the strata of `other` (0.5: it follows only the other)."""
    return stratified_auroc_columns(acts, labels.astype(np.float64), other.astype(np.int64))[0]


@dataclass(frozen=True)
class Separation:
    """What two sets of latents do on images where finding and shortcut are independent.

    Fields:
        shared: share of the latents of both sets that stand in both (Jaccard).
        own: AUROC of each set (finding's, shortcut's) for its own factor within strata of the other factor; a set's
            value is the sum of its latents, each in units of its sd. Below 0.5 counts as its mirror image.
        other: the same for the other factor.
        separable: the smaller of the two sets' `own - other`. 0 or less: a set follows the other factor as much.
        ci95: patient-bootstrap interval of `separable`.
    """

    shared: float
    own: tuple[float, float]
    other: tuple[float, float]
    separable: float
    ci95: Interval

    @property
    def merged(self) -> bool:
        """A set follows the other factor at least as much as its own, or the two sets are one."""
        return self.shared > 0.999 or self.separable <= 0.0


def separation(
    acts: Float[np.ndarray, "n latent"],
    finding: Bool[np.ndarray, " n"],
    shortcut: Bool[np.ndarray, " n"],
    of_finding: tuple[int, ...],
    of_shortcut: tuple[int, ...],
    weights: Float[np.ndarray, "draw n"],
) -> Separation:
    """Judge two sets of latents on held-out images in which the two factors are independent.

    `weights` are a patient bootstrap's. Two sets that are one and the same have `separable` of at most 0.
    """
    both, either = set(of_finding) & set(of_shortcut), set(of_finding) | set(of_shortcut)
    table = np.vstack([np.ones(len(finding)), weights])
    own, other = [], []
    for latents, mine, theirs in ((of_finding, finding, shortcut), (of_shortcut, shortcut, finding)):
        value = _summed(acts, latents)
        own.append(_follows(value, mine, theirs, table))
        other.append(_follows(value, theirs, mine, table))
    margin = np.minimum(own[0] - other[0], own[1] - other[1])
    return Separation(
        shared=len(both) / len(either) if either else float("nan"),
        own=(float(own[0][0]), float(own[1][0])),
        other=(float(other[0][0]), float(other[1][0])),
        separable=float(margin[0]),
        ci95=percentile_interval(margin[1:]),
    )


def _follows(
    value: Float[np.ndarray, " n"],
    labels: Bool[np.ndarray, " n"],
    strata: Bool[np.ndarray, " n"],
    weights: Float[np.ndarray, "draw n"],
) -> Float[np.ndarray, " draw"]:
    """AUROC within strata (pairs of one stratum only), mirrored above 0.5, for each row of weights."""
    total, mass = np.zeros(len(weights)), np.zeros(len(weights))
    for stratum in (False, True):
        rows = strata == stratum
        area = weighted_auroc(value[rows], labels[rows].astype(np.float64), weights[:, rows])
        pairs = (weights[:, rows] @ labels[rows]) * (weights[:, rows] @ ~labels[rows])
        total += np.where(pairs > 0, np.nan_to_num(area) * pairs, 0.0)
        mass += pairs
    area = np.divide(total, mass, out=np.full(len(weights), np.nan), where=mass > 0)
    return np.maximum(area, 1 - area)


def _summed(acts: Float[np.ndarray, "n latent"], latents: tuple[int, ...]) -> Float[np.ndarray, " n"]:
    chosen = acts[:, list(latents)].astype(np.float64)
    spread = chosen.std(0)
    return (chosen / np.where(spread > 0, spread, 1.0)).sum(1)
