"""Does a latent find a concept? AUROC, average precision, and F1 at a threshold that other patients chose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import numpy as np
from jaxtyping import Bool, Float, Int64, Num, Shaped
from scipy import stats

from mechinterp.metrics.statistics import auroc_columns, benjamini_hochberg
from saes.nulls.labels import permuted_rows

__all__ = [
    "Alignment",
    "FeatureTests",
    "Sorted",
    "align",
    "auroc_table",
    "average_precision",
    "average_precision_table",
    "best_thresholds",
    "f_beta",
    "f_score",
    "feature_tests",
    "known_groups",
    "sensitivity",
]


def auroc_table(
    acts: Float[np.ndarray, "image latent"], labels: Shaped[np.ndarray, "image concept"]
) -> Float[np.ndarray, "latent concept"]:
    """AUROC of every latent for every concept (Mann-Whitney with mid-ranks); images whose label is nan are left out."""
    out = np.full((acts.shape[1], labels.shape[1]), np.nan)
    for concepts, known in known_groups(labels):
        out[:, concepts] = _aurocs(_centred_ranks(acts[known]), labels[known][:, concepts] > 0.5)
    return out


def average_precision_table(
    acts: Float[np.ndarray, "image latent"], labels: Shaped[np.ndarray, "image concept"]
) -> Float[np.ndarray, "latent concept"]:
    """`average_precision` of every latent for every concept; images whose label is nan are left out."""
    out = np.full((acts.shape[1], labels.shape[1]), np.nan)
    for concepts, known in known_groups(labels):
        for a in concepts:
            out[:, a] = [average_precision(z, labels[known, a]) for z in acts[known].T]
    return out


@overload
def average_precision(
    scores: Num[np.ndarray, " image"], labels: Shaped[np.ndarray, " image"], weights: None = None
) -> float: ...
@overload
def average_precision(
    scores: Num[np.ndarray, " image"],
    labels: Shaped[np.ndarray, " image"],
    weights: Float[np.ndarray, "draw image"],
) -> Float[np.ndarray, " draw"]: ...
def average_precision(
    scores: Num[np.ndarray, " image"],
    labels: Shaped[np.ndarray, " image"],
    weights: Float[np.ndarray, "draw image"] | None = None,
) -> float | Float[np.ndarray, " draw"]:
    """`AP = sum_k (R_k - R_{k-1}) P_k` over distinct thresholds (scikit-learn's definition); nan with no positive.

    With `weights`, one value a row of image weights, for a bootstrap.
    """
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    ordered = np.asarray(scores)[order]
    ends = np.flatnonzero(np.r_[ordered[1:] != ordered[:-1], True])  # the last image of every distinct score
    table = np.ones((1, len(order))) if weights is None else np.asarray(weights, np.float64)[:, order]
    hits = np.cumsum(table * (np.asarray(labels)[order] > 0.5), axis=1)[:, ends]
    shown = np.cumsum(table, axis=1)[:, ends]
    total = hits[:, -1:]
    recall = np.divide(hits, total, out=np.full(hits.shape, np.nan), where=total > 0)
    precision = np.divide(hits, shown, out=np.zeros(hits.shape), where=shown > 0)
    found = (np.diff(recall, axis=1, prepend=0.0) * precision).sum(1)
    return float(found[0]) if weights is None else found


def f_beta(
    hits: Num[np.ndarray, "*some"],
    fired: Num[np.ndarray, "*some"],
    positives: Num[np.ndarray, "*some"] | float,
    beta: float = 1.0,
) -> Float[np.ndarray, "*some"]:
    """`F_beta = (1 + b^2) TP / (b^2 P + fired)`, with `fired = TP + FP`; 0 where nothing is there and nothing fired."""
    below = np.asarray(beta**2 * positives + np.asarray(fired, np.float64))
    return np.divide((1 + beta**2) * np.asarray(hits, np.float64), below, out=np.zeros(below.shape), where=below > 0)


@overload
def f_score(
    predicted: Bool[np.ndarray, " image"],
    labels: Shaped[np.ndarray, " image"],
    weights: None = None,
    beta: float = 1.0,
) -> float: ...
@overload
def f_score(
    predicted: Bool[np.ndarray, " image"],
    labels: Shaped[np.ndarray, " image"],
    weights: Float[np.ndarray, "draw image"],
    beta: float = 1.0,
) -> Float[np.ndarray, " draw"]: ...
def f_score(
    predicted: Bool[np.ndarray, " image"],
    labels: Shaped[np.ndarray, " image"],
    weights: Float[np.ndarray, "draw image"] | None = None,
    beta: float = 1.0,
) -> float | Float[np.ndarray, " draw"]:
    """F_beta of a yes-no prediction; with `weights`, one value a row of image weights. nan with no positive."""
    y = np.asarray(labels) > 0.5
    table = np.ones((1, len(y))) if weights is None else weights
    positives = (table @ y).astype(np.float64)
    found = f_beta(table @ (predicted & y), table @ predicted.astype(np.float64), positives, beta)
    found = np.where(positives > 0, found, np.nan)
    return float(found[0]) if weights is None else found


@dataclass(frozen=True)
class Sorted:
    """Activations in falling order, column by column: sorted once, asked about many concepts."""

    order: Int64[np.ndarray, "image latent"]
    at: Float[np.ndarray, "image latent"]
    between: Float[np.ndarray, "image latent"]
    allowed: Bool[np.ndarray, "image latent"]

    @classmethod
    def of(cls, acts: Float[np.ndarray, "image latent"]) -> Sorted:
        """Sort; a threshold may stand below an activation that is above 0 and above the next one."""
        order = np.argsort(-acts, axis=0, kind="stable")
        at = np.take_along_axis(acts, order, 0)
        below = np.maximum(np.vstack([at[1:], np.zeros((1, acts.shape[1]), at.dtype)]), 0)
        return cls(order, at, (at.astype(np.float64) + below) / 2, at > below)

    def best(
        self, labels: Shaped[np.ndarray, " image"], beta: float = 1.0
    ) -> tuple[Float[np.ndarray, " latent"], Float[np.ndarray, " latent"]]:
        """See `best_thresholds`."""
        y, columns = np.asarray(labels) > 0.5, np.arange(self.at.shape[1])
        if not y.any():
            return np.full(len(columns), np.inf), np.full(len(columns), np.nan)
        hits = np.cumsum(y[self.order], axis=0, dtype=np.int32)
        f = (1 + beta**2) * hits / (beta**2 * y.sum() + np.arange(1.0, len(y) + 1)[:, None])
        f[~self.allowed] = -1.0
        best = f.argmax(0)
        found = f[best, columns]
        return np.where(found >= 0, self.between[best, columns], np.inf), np.maximum(found, 0.0)


def best_thresholds(
    acts: Float[np.ndarray, "image latent"], labels: Shaped[np.ndarray, " image"], beta: float = 1.0
) -> tuple[Float[np.ndarray, " latent"], Float[np.ndarray, " latent"]]:
    """The threshold t of every latent at which `z > t` has the highest F_beta, and that F_beta.

    t lies half-way between two neighbouring activations, and is at least 0 (a latent that does not fire says no).
    Ties go to the higher threshold. Without a positive label F is nan and t is infinite.
    """
    return Sorted.of(acts).best(labels, beta)


@dataclass(frozen=True)
class Alignment:
    """One latent a concept: chosen on training patients, its threshold on validation, its scores on test patients."""

    latent: Int64[np.ndarray, " concept"]
    threshold: Float[np.ndarray, " concept"]
    auroc: Float[np.ndarray, " concept"]
    average_precision: Float[np.ndarray, " concept"]
    f1: Float[np.ndarray, " concept"]


def align(
    acts: Float[np.ndarray, "image latent"],
    labels: Shaped[np.ndarray, "image concept"],
    split: Shaped[np.ndarray, " image"],
) -> Alignment:
    """The best latent of every concept by training F1, and its held-out AUROC, AP and F1 (`F1*` of arXiv:2408.00113).

    Images whose label is nan are left out. A concept without a positive in a split is nan.
    """
    latents, thresholds = [], []
    scores = np.full((3, labels.shape[1]), np.nan)
    for a, column in enumerate(np.asarray(labels, np.float64).T):
        rows = {name: (split == name) & np.isfinite(column) for name in ("train", "val", "test")}
        f = best_thresholds(acts[rows["train"]], column[rows["train"]])[1]
        latent = int(np.argmax(np.nan_to_num(f, nan=-1.0)))
        z = acts[:, latent]
        threshold = float(best_thresholds(z[rows["val"], None], column[rows["val"]])[0][0])
        at, y = rows["test"], column[rows["test"]]
        latents.append(latent)
        thresholds.append(threshold)
        scores[0, a] = auroc_columns(z[at, None], y)[0]
        scores[1, a] = average_precision(z[at], y)
        scores[2, a] = f_score(z[at] > threshold, y) if np.isfinite(threshold) else np.nan
    return Alignment(np.array(latents, np.int64), np.array(thresholds), scores[0], scores[1], scores[2])


def sensitivity(
    fires: Bool[np.ndarray, "image latent"],
    labels: Shaped[np.ndarray, "image concept"],
    latents: Int64[np.ndarray, " concept"],
) -> Float[np.ndarray, " concept"]:
    """Share of new images with the concept on which its latent fires (arXiv:2509.23717); nan without such images.

    The images must be others than those that named the latent.
    """
    out = np.full(labels.shape[1], np.nan)
    for a, j in enumerate(latents):
        there = np.asarray(labels)[:, a] > 0.5
        if there.any():
            out[a] = fires[there, j].mean()
    return out


@dataclass(frozen=True)
class FeatureTests:
    """Every latent against every concept: AUROC, two-sided p, and q over all of them (Benjamini-Hochberg)."""

    auroc: Float[np.ndarray, "latent concept"]
    p: Float[np.ndarray, "latent concept"]
    q: Float[np.ndarray, "latent concept"]

    def discoveries(self, q: float = 0.05) -> int:
        """Number of latents that go with at least one concept at this false discovery rate."""
        return int((self.q < q).any(1).sum())


def feature_tests(
    acts: Float[np.ndarray, "image latent"],
    labels: Shaped[np.ndarray, "image concept"],
    patients: Shaped[np.ndarray, " image"],
    permutations: int = 200,
    seed: int = 0,
) -> FeatureTests:
    """Test all latents for all concepts, with patients as the unit, and control the false discovery rate.

    The spread of each AUROC under no association is that over `permutations` shufflings of whole patients' labels;
    p is normal with that spread, so that p can be smaller than 1 / permutations.
    """
    labels = np.asarray(labels, np.float64)
    owner = np.unique(patients, return_inverse=True)[1]
    aurocs, p = auroc_table(acts, labels), np.full((acts.shape[1], labels.shape[1]), np.nan)
    for concepts, known in known_groups(labels):
        ranks, y = _centred_ranks(acts[known]), labels[known][:, concepts] > 0.5
        moved = [permuted_rows(owner[known], seed * permutations + i) for i in range(permutations)]
        shuffled = np.stack([_aurocs(ranks, y[rows]) for rows in moved])
        spread = shuffled.std(0)
        z = np.divide(aurocs[:, concepts] - 0.5, spread, out=np.zeros(spread.shape), where=spread > 0)
        p[:, concepts] = np.where(np.isfinite(aurocs[:, concepts]), 2 * stats.norm.sf(np.abs(z)), np.nan)
    return FeatureTests(aurocs, p, benjamini_hochberg(p.ravel()).reshape(p.shape))


def known_groups(
    labels: Shaped[np.ndarray, "image concept"],
) -> list[tuple[Int64[np.ndarray, " some"], Int64[np.ndarray, " known"]]]:
    """Concepts that are known for the same images, and those images: what is sorted once for all of them."""
    finite = np.isfinite(np.asarray(labels, np.float64))
    patterns, group = np.unique(finite, axis=1, return_inverse=True)
    return [(np.flatnonzero(group.ravel() == g), np.flatnonzero(patterns[:, g])) for g in range(patterns.shape[1])]


def _centred_ranks(acts: Float[np.ndarray, "image latent"]) -> Float[np.ndarray, "image latent"]:
    return stats.rankdata(acts, axis=0) - (len(acts) + 1) / 2


def _aurocs(
    ranks: Float[np.ndarray, "image latent"], y: Bool[np.ndarray, "image concept"]
) -> Float[np.ndarray, "latent concept"]:
    """`1/2 + sum of the positives' centred ranks / (n1 n0)`."""
    n1 = y.sum(0)
    pairs = n1 * (len(y) - n1)
    total = ranks.T @ y.astype(np.float64)
    return 0.5 + np.divide(total, pairs, out=np.full(total.shape, np.nan), where=pairs > 0)
