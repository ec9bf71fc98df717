"""Does a latent find a concept? AUROC, average precision, and F1 at a threshold that other patients chose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int64, Num, Shaped
from scipy import stats

from mechinterp.metrics.statistics import auroc_columns, benjamini_hochberg
from saes.nulls.labels import permuted_rows

__all__ = [
    "Alignment",
    "FeatureTests",
    "align",
    "auroc_table",
    "average_precision",
    "average_precision_table",
    "best_thresholds",
    "f_beta",
    "f_score",
    "feature_tests",
    "sensitivity",
]


def auroc_table(
    acts: Float[np.ndarray, "image latent"], labels: Shaped[np.ndarray, "image concept"]
) -> Float[np.ndarray, "latent concept"]:
    """AUROC of every latent for every concept (Mann-Whitney with mid-ranks); images whose label is nan are left out."""
    return _each_concept(auroc_columns, acts, labels)


def average_precision_table(
    acts: Float[np.ndarray, "image latent"], labels: Shaped[np.ndarray, "image concept"]
) -> Float[np.ndarray, "latent concept"]:
    """`average_precision` of every latent for every concept."""

    def columns(values: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.array([average_precision(z, y) for z in values.T])

    return _each_concept(columns, acts, labels)


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


def best_thresholds(
    acts: Float[np.ndarray, "image latent"], labels: Shaped[np.ndarray, " image"], beta: float = 1.0
) -> tuple[Float[np.ndarray, " latent"], Float[np.ndarray, " latent"]]:
    """The threshold t of every latent at which `z > t` has the highest F_beta, and that F_beta.

    t lies half-way between two neighbouring activations, and is at least 0 (a latent that does not fire says no).
    Ties go to the higher threshold. Without a positive label F is nan and t is infinite.
    """
    acts = np.asarray(acts, np.float64)
    y = np.asarray(labels) > 0.5
    if not y.any():
        return np.full(acts.shape[1], np.inf), np.full(acts.shape[1], np.nan)
    order = np.argsort(-acts, axis=0, kind="stable")
    ordered = np.take_along_axis(acts, order, 0)
    hits = np.cumsum(y[order], axis=0)
    below = np.vstack([ordered[1:], np.zeros((1, acts.shape[1]))])
    f = f_beta(hits, np.broadcast_to(np.arange(1, len(y) + 1.0)[:, None], hits.shape), float(y.sum()), beta)
    f[(ordered <= below) | (ordered <= 0)] = -1.0  # no threshold lies between equal values, nor below 0
    best = f.argmax(0)
    columns = np.arange(acts.shape[1])
    found = f[best, columns]
    between = (ordered[best, columns] + np.maximum(below[best, columns], 0.0)) / 2
    return np.where(found >= 0, between, np.inf), np.maximum(found, 0.0)


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
    aurocs = auroc_table(acts, labels)
    p = np.full(aurocs.shape, np.nan)
    for a, column in enumerate(labels.T):
        known = np.flatnonzero(np.isfinite(column))
        y = column[known] > 0.5
        n1, n0 = int(y.sum()), int((~y).sum())
        if n1 == 0 or n0 == 0:
            continue
        ranks = stats.rankdata(acts[known], axis=0)
        ranks -= (len(known) + 1) / 2
        shuffled = np.stack([y[permuted_rows(patients[known], seed * permutations + i)] for i in range(permutations)])
        spread = (shuffled.astype(np.float64) @ ranks / (n1 * n0)).std(0)
        z = np.divide(aurocs[:, a] - 0.5, spread, out=np.zeros(len(spread)), where=spread > 0)
        p[:, a] = 2 * stats.norm.sf(np.abs(z))
    return FeatureTests(aurocs, p, benjamini_hochberg(p.ravel()).reshape(p.shape))


def _each_concept(score, acts: np.ndarray, labels: np.ndarray) -> np.ndarray:
    out = np.full((acts.shape[1], labels.shape[1]), np.nan)
    for a, column in enumerate(np.asarray(labels, np.float64).T):
        known = np.isfinite(column)
        out[:, a] = score(acts[known], column[known])
    return out
