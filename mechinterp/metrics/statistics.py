"""Statistics for clustered medical images: ranks, patient bootstrap, multiple testing, permutation p, power.

Everything is vectorised NumPy on plain arrays. The unit of resampling is the patient: a bootstrap draw gives each
patient a whole number of copies, and all the patient's images carry that weight (Efron and Tibshirani 1993, ch. 8).
Labels are 0 or 1 without missing values; the caller drops those. What cannot be computed is `nan`, never 0 or 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Integer, Num, Shaped
from scipy import stats

from mechinterp.errors import UsageError

__all__ = [
    "PatientBootstrap",
    "auroc",
    "auroc_columns",
    "benjamini_hochberg",
    "difference_weights",
    "holm",
    "percentile_interval",
    "permutation_p",
    "sign_flip_p",
    "smallest_detectable_effect",
    "strata_of",
    "stratified_auroc_columns",
    "stratified_mean_difference",
    "weighted_auroc",
]

Interval = tuple[float, float]


def auroc(scores: Num[np.ndarray, " n"], labels: Num[np.ndarray, " n"]) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative), ties counted half; nan with one class."""
    return float(auroc_columns(np.asarray(scores)[:, None], labels)[0])


def auroc_columns(columns: Num[np.ndarray, "n f"], labels: Num[np.ndarray, " n"]) -> Float[np.ndarray, " f"]:
    """AUROC of every column at once, from mid-ranks (Mann-Whitney: U = R1 - n1 (n1 + 1) / 2)."""
    positive = np.asarray(labels) > 0.5
    n1, n0 = int(positive.sum()), int((~positive).sum())
    if n1 == 0 or n0 == 0:
        return np.full(columns.shape[1], np.nan)
    ranks = stats.rankdata(columns, axis=0)
    return (ranks[positive].sum(0) - n1 * (n1 + 1) / 2) / (n1 * n0)


def stratified_auroc_columns(
    columns: Num[np.ndarray, "n f"], labels: Num[np.ndarray, " n"], strata: Shaped[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " f"], Float[np.ndarray, " f"]]:
    """AUROC of every column within strata, and its two-sided p.

    The AUROC counts only pairs inside one stratum (sum of U over sum of n1 n0), so a column that follows the label
    only through the stratum gets 0.5. The p is normal, from the summed tie-corrected variance of U under no
    difference (van Elteren 1960 with weight 1). It takes images as independent: use it to choose, not to conclude.
    """
    u, pairs, expected_variance = np.zeros(columns.shape[1]), 0.0, np.zeros(columns.shape[1])
    for stratum in np.unique(strata):
        rows = strata == stratum
        positive = np.asarray(labels)[rows] > 0.5
        n, n1 = int(rows.sum()), int(positive.sum())
        n0 = n - n1
        if n1 == 0 or n0 == 0:
            continue
        ranks = stats.rankdata(columns[rows], axis=0)
        u += ranks[positive].sum(0) - n1 * (n1 + 1) / 2
        pairs += n1 * n0
        # sum of squared centred ranks holds the tie correction: without ties it is n (n^2 - 1) / 12
        expected_variance += n1 * n0 / (n * (n - 1)) * ((ranks - (n + 1) / 2) ** 2).sum(0)
    if pairs == 0:
        nothing = np.full(columns.shape[1], np.nan)
        return nothing, nothing
    deviation = np.sqrt(expected_variance)
    z = np.divide(u - pairs / 2, deviation, out=np.zeros_like(u), where=deviation > 0)
    return u / pairs, 2 * stats.norm.sf(np.abs(z))


def weighted_auroc(
    scores: Num[np.ndarray, " n"], labels: Num[np.ndarray, " n"], weights: Num[np.ndarray, "draw n"]
) -> Float[np.ndarray, " draw"]:
    """AUROC under each row of image weights; equal to repeating every image `weight` times. nan with one class."""
    order = np.argsort(scores, kind="stable")
    ordered = np.asarray(scores)[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])  # one group for each distinct score
    positive = (np.asarray(labels) > 0.5)[order]
    sorted_weights = np.asarray(weights, dtype=np.float64)[:, order]
    up = np.add.reduceat(sorted_weights * positive, starts, axis=1)
    down = np.add.reduceat(sorted_weights * ~positive, starts, axis=1)
    below = np.cumsum(down, axis=1) - down / 2
    pairs = up.sum(1) * down.sum(1)
    return np.divide((up * below).sum(1), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def stratified_mean_difference(
    values: Num[np.ndarray, " n"],
    attribute: Num[np.ndarray, " n"],
    strata: Shaped[np.ndarray, " n"],
    weights: Num[np.ndarray, "draw n"] | None = None,
) -> Float[np.ndarray, " draw"]:
    """Mean of `values` where `attribute` is 1 minus where it is 0, within strata, averaged over strata.

    A stratum counts n1 n0 / (n1 + n0) (Cochran-Mantel-Haenszel weights: the least variance under one common
    difference). One value for each row of `weights` (all ones when None). nan when no stratum holds both.
    """
    table = np.ones((1, len(values))) if weights is None else np.asarray(weights, dtype=np.float64)
    with_it = np.asarray(attribute) > 0.5
    total, mass = np.zeros(len(table)), np.zeros(len(table))
    for stratum in np.unique(strata):
        rows = strata == stratum
        one, zero = table[:, rows & with_it], table[:, rows & ~with_it]
        n1, n0 = one.sum(1), zero.sum(1)
        both = (n1 > 0) & (n0 > 0)
        difference = np.zeros(len(table))
        difference[both] = (one @ values[rows & with_it])[both] / n1[both]
        difference[both] -= (zero @ values[rows & ~with_it])[both] / n0[both]
        weight = np.zeros(len(table))
        weight[both] = n1[both] * n0[both] / (n1[both] + n0[both])
        total += weight * difference
        mass += weight
    return np.divide(total, mass, out=np.full(len(table), np.nan), where=mass > 0)


def difference_weights(attribute: Num[np.ndarray, " n"], strata: Shaped[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Weights c with c @ values = `stratified_mean_difference(values, attribute, strata)`; zeros where undefined."""
    with_it = np.asarray(attribute) > 0.5
    weights, mass = np.zeros(len(with_it)), 0.0
    for stratum in np.unique(strata):
        one, zero = (strata == stratum) & with_it, (strata == stratum) & ~with_it
        n1, n0 = one.sum(), zero.sum()
        if n1 and n0:
            share = n1 * n0 / (n1 + n0)
            weights[one], weights[zero] = share / n1, -share / n0
            mass += share
    return weights / mass if mass else weights


@dataclass(frozen=True)
class PatientBootstrap:
    """Resampling of patients: `weights[b, i]` is how often image i stands in draw b."""

    weights: Float[np.ndarray, "draw n"]

    @classmethod
    def of(
        cls, patients: Sequence[str] | Shaped[np.ndarray, " n"], *, draws: int = 2000, seed: int = 0
    ) -> PatientBootstrap:
        """Draw as many patients as there are, with replacement, `draws` times. Raises UsageError without patients."""
        names, owner = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
        if len(names) == 0:
            raise UsageError("a bootstrap needs at least one patient")
        count = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
        return cls(count.astype(np.float64)[:, owner])

    def auroc(
        self, scores: Num[np.ndarray, " n"], labels: Num[np.ndarray, " n"], rows: Bool[np.ndarray, " n"] | None = None
    ) -> Float[np.ndarray, " draw"]:
        """AUROC of every draw, on the images in `rows`."""
        chosen = np.ones(len(scores), dtype=bool) if rows is None else rows
        if not chosen.any():
            return np.full(len(self.weights), np.nan)
        return weighted_auroc(scores[chosen], labels[chosen], self.weights[:, chosen])

    def mean(self, values: Num[np.ndarray, " n"]) -> Float[np.ndarray, " draw"]:
        """Mean over images of every draw."""
        return self.weights @ values / self.weights.sum(1)

    def difference(
        self, values: Num[np.ndarray, " n"], attribute: Num[np.ndarray, " n"], strata: Shaped[np.ndarray, " n"]
    ) -> Float[np.ndarray, " draw"]:
        """`stratified_mean_difference` of every draw."""
        return stratified_mean_difference(values, attribute, strata, self.weights)


def percentile_interval(draws: Float[np.ndarray, " draw"], level: float = 0.95) -> Interval:
    """Percentile interval of bootstrap draws (paired when the draws are of a difference on the same patients).

    Draws without a value (a class was not drawn) are left out; with over a fifth of them missing it is (nan, nan).
    """
    kept = draws[np.isfinite(draws)]
    if len(kept) < 0.8 * len(draws):
        return (float("nan"), float("nan"))
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return (float(low), float(high))


def holm(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """Holm (1979) step-down adjusted p values (family-wise error). Tests that are nan stay nan and do not count."""
    return _adjust(p, lambda ranked: np.maximum.accumulate(ranked * np.arange(len(ranked), 0, -1)))


def benjamini_hochberg(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """Benjamini-Hochberg (1995) adjusted p values (false discovery rate). Tests that are nan do not count."""

    def step_up(ranked: np.ndarray) -> np.ndarray:
        n = len(ranked)
        return np.minimum.accumulate((ranked * n / np.arange(1, n + 1))[::-1])[::-1]

    return _adjust(p, step_up)


def _adjust(p: np.ndarray, rule) -> np.ndarray:
    p = np.asarray(p, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    known = np.flatnonzero(np.isfinite(p))
    if len(known):
        order = known[np.argsort(p[known], kind="stable")]
        adjusted[order] = np.minimum(rule(p[order]), 1.0)
    return adjusted


def permutation_p(observed: float, null: Float[np.ndarray, " draw"]) -> float:
    """(b + 1) / (n + 1) with b null draws at least as large: never 0 (Phipson and Smyth 2010). nan without draws."""
    null = null[np.isfinite(null)]
    if len(null) == 0 or not np.isfinite(observed):
        return float("nan")
    return float((np.count_nonzero(null >= observed) + 1) / (len(null) + 1))


def sign_flip_p(differences: Float[np.ndarray, " n"], draws: int = 4999, seed: int = 0) -> float:
    """Two-sided p of paired differences whose signs are exchangeable under no difference (Fisher 1935)."""
    if len(differences) == 0 or not np.isfinite(differences).all():
        return float("nan")
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, len(differences)))
    # a draw of the observed signs is a tie, whatever order its terms were added in; missed, p is far too small
    rounding = 1e-12 * np.abs(differences).sum()
    return permutation_p(abs(float(differences.sum())) - rounding, np.abs(signs @ differences))


def smallest_detectable_effect(standard_error: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The effect that a two-sided z test at `alpha` would find with probability `power`.

    (z[1 - alpha / 2] + z[power]) * standard error = 2.80 standard errors by default. The standard error is that of
    the estimate itself (here: of its patient bootstrap), so clustering is in it.
    """
    return float((stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)) * standard_error)


def strata_of(*labels: Num[np.ndarray, " n"]) -> Integer[np.ndarray, " n"]:
    """One whole number for each combination of 0/1 labels."""
    code = np.zeros(len(labels[0]), dtype=np.int64)
    for column in labels:
        code = 2 * code + (np.asarray(column) > 0.5)
    return code
