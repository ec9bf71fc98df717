"""What a straight line reads: k-sparse probes on latents, and the dense probe on the model as upper bound."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, Shaped

from mechinterp.metrics.statistics import auroc

__all__ = ["LinearProbe", "SparseProbe", "k_sparse_probe", "linear_probe", "rank_by_mean_difference"]

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Inverse penalties C that validation patients choose from."""


@dataclass(frozen=True)
class LinearProbe:
    """Logistic regression on standardised columns: `scores = ((x - mean) / scale) @ weight + bias`."""

    mean: Float[np.ndarray, " feature"]
    scale: Float[np.ndarray, " feature"]
    weight: Float[np.ndarray, " feature"]
    bias: float
    strength: float

    def scores(self, x: Float[np.ndarray, "image feature"]) -> Float[np.ndarray, " image"]:
        """The logit of every image."""
        return ((x - self.mean) / self.scale) @ self.weight + self.bias


def linear_probe(
    x: Float[np.ndarray, "image feature"],
    labels: Shaped[np.ndarray, " image"],
    split: Shaped[np.ndarray, " image"],
    strengths: Sequence[float] = STRENGTHS,
) -> LinearProbe | None:
    """L2 logistic regression on training images, its penalty chosen by AUROC on validation images.

    Columns are standardised by the training images. Images whose label is nan are left out. None when the training
    or validation images hold one class only. It is the upper bound beside which a dictionary's AUROC stands.
    """
    known = np.isfinite(np.asarray(labels, np.float64))
    train, val = ((split == name) & known for name in ("train", "val"))
    if any(len(np.unique(labels[rows] > 0.5)) < 2 for rows in (train, val)):
        return None
    x = np.asarray(x, np.float64)
    mean, scale = x[train].mean(0), x[train].std(0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    scaled, y = (x - mean) / scale, labels > 0.5
    probes = []
    for strength in strengths:
        fitted = _logistic(scaled[train], y[train], strength)
        probes.append(LinearProbe(mean, scale, fitted.coef_[0], float(fitted.intercept_[0]), strength))
    return max(
        probes, key=lambda probe: auroc(probe.scores(x[val]), y[val].astype(float))
    )  # the first, most penalised, on a tie


def rank_by_mean_difference(
    acts: Float[np.ndarray, "image latent"], labels: Shaped[np.ndarray, " image"]
) -> Int64[np.ndarray, " latent"]:
    """Latents by falling `|mean(z | y = 1) - mean(z | y = 0)|`, z divided by its mean where it fires.

    As sae-probes does (arXiv:2502.16681). Training images only: ranking on all leaks the test labels.
    """
    acts, y = np.asarray(acts, np.float64), np.asarray(labels) > 0.5
    mean = np.abs(acts).sum(0) / ((acts != 0).sum(0) + 1e-6) + 1e-6
    return np.argsort(-np.abs(acts[y].mean(0) - acts[~y].mean(0)) / mean, kind="stable")


@dataclass(frozen=True)
class SparseProbe:
    """A probe on `k` latents and its AUROC on test images."""

    k: int
    latents: tuple[int, ...]
    auroc: float
    test_scores: Float[np.ndarray, " test_image"]


def k_sparse_probe(
    acts: Float[np.ndarray, "image latent"],
    labels: Shaped[np.ndarray, " image"],
    split: Shaped[np.ndarray, " image"],
    k: int,
) -> SparseProbe:
    """Logistic regression on k latents (Gurnee et al., arXiv:2305.01610; Kantamneni et al., arXiv:2502.16681).

    The first k of `rank_by_mean_difference` on training images; the penalty is chosen on validation images; the AUROC
    is that of the test images, nan when a split holds one class only. Report it beside `linear_probe`, PCA and raw
    neurons: a k-sparse probe that a random dictionary matches says nothing about the dictionary.
    """
    known = np.isfinite(np.asarray(labels, np.float64))
    train, test = (split == "train") & known, (split == "test") & known
    nothing = np.full(int(test.sum()), np.nan)
    y = np.asarray(labels) > 0.5
    if len(np.unique(y[train])) < 2:
        return SparseProbe(k, (), float("nan"), nothing)
    chosen = rank_by_mean_difference(acts[train], y[train])[:k]
    probe = linear_probe(acts[:, chosen], labels, split)
    if probe is None:
        return SparseProbe(k, tuple(int(j) for j in chosen), float("nan"), nothing)
    scores = probe.scores(np.asarray(acts[test][:, chosen], np.float64))
    return SparseProbe(k, tuple(int(j) for j in chosen), auroc(scores, y[test].astype(float)), scores)


def _logistic(x: np.ndarray, y: np.ndarray, strength: float) -> Any:
    """A fitted scikit-learn LogisticRegression. One that has not converged after 500 steps is used as it is."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=500).fit(x, y)
