"""How alike two maps are, row by row. 1 is the same map; nan where one of the two is constant."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy.ndimage import uniform_filter, zoom
from scipy.stats import rankdata

from mechinterp.metrics.scored import flat

__all__ = ["SIMILARITIES", "Similarity", "hog", "hog_pearson", "spearman", "spearman_abs", "ssim"]

Maps = Float[np.ndarray, "row height width"]
Similarity = Callable[[Maps, Maps], Float[np.ndarray, " row"]]
WINDOW, K1, K2 = 7, 0.01, 0.03  # SSIM: scikit-image's window; the constants of Wang et al. 2004
SIDE, CELL, BINS = 32, 8, 9


def spearman(a: Maps, b: Maps) -> Float[np.ndarray, " row"]:
    """Rank correlation of the signed maps (Adebayo et al. 2018, "without absolute values").

    A map with its sign turned counts as different here and as the same in `spearman_abs`: read both.
    """
    return _pearson(*(rankdata(m.reshape(len(m), -1), axis=1) for m in (a, b)), broken=_constant(a, b))


def spearman_abs(a: Maps, b: Maps) -> Float[np.ndarray, " row"]:
    """Rank correlation of the absolute maps: where, not in which direction."""
    return spearman(np.abs(a), np.abs(b))


def ssim(a: Maps, b: Maps) -> Float[np.ndarray, " row"]:
    """Structural similarity (Wang et al. 2004, eq. 13) of the absolute maps scaled to [0, 1].

    Means, variances and covariance in a square window (7, or the largest odd number that fits) with sample correction,
    averaged over the places where the window fits: scikit-image's default. Maps on few patches are compared as they
    are, not smoothed onto pixels, which would make any two maps look alike.
    """
    window = min(WINDOW, *(n - 1 + n % 2 for n in a.shape[1:]))
    x, y = (_unit(np.abs(m)) for m in (a, b))

    def local(values: np.ndarray) -> np.ndarray:
        edge = window // 2
        found = np.asarray(uniform_filter(uniform_filter(values, window, axes=1), window, axes=2))
        return found[:, edge : found.shape[1] - edge, edge : found.shape[2] - edge]

    n = window**2
    mx, my = local(x), local(y)
    correction = n / (n - 1) if n > 1 else 1.0
    vx, vy = correction * (local(x * x) - mx**2), correction * (local(y * y) - my**2)
    cov = correction * (local(x * y) - mx * my)
    value = (2 * mx * my + K1**2) * (2 * cov + K2**2) / ((mx**2 + my**2 + K1**2) * (vx + vy + K2**2))
    return np.where(_constant(np.abs(a), np.abs(b)), np.nan, value.mean((1, 2)))


def hog_pearson(a: Maps, b: Maps) -> Float[np.ndarray, " row"]:
    """Pearson correlation of histograms of oriented gradients (Dalal and Triggs 2005) of the absolute maps."""
    return _pearson(hog(np.abs(a)), hog(np.abs(b)), broken=_constant(np.abs(a), np.abs(b)))


def hog(maps: Maps) -> Float[np.ndarray, "row feature"]:
    """Histograms of 9 unsigned orientations in cells of 8 x 8 of the map brought to 32 x 32, each cell of length 1.

    The histogram is of the map's edges alone: where an edge is and which way it runs, in 16 places.
    """
    scale = (1, SIDE / maps.shape[1], SIDE / maps.shape[2])
    large = np.asarray(zoom(_unit(maps), scale, order=1, grid_mode=True, mode="nearest"))
    down, across = np.gradient(large, axis=(1, 2))
    strength = np.hypot(down, across)
    # a vote is split between the two nearest bins: with whole votes, rounding at upright edges would move it
    angle = (np.mod(np.arctan2(down, across), np.pi) / np.pi * BINS)[..., None]
    apart = np.abs(np.mod(angle - np.arange(BINS) + BINS / 2, BINS) - BINS / 2)
    votes = np.clip(1 - apart, 0, None) * strength[..., None]
    cells = votes.reshape(len(maps), SIDE // CELL, CELL, SIDE // CELL, CELL, BINS).sum((2, 4))
    length = np.linalg.norm(cells, axis=-1, keepdims=True)
    return (cells / np.maximum(length, 1e-6)).reshape(len(maps), -1)


SIMILARITIES: dict[str, Similarity] = {
    "spearman": spearman,
    "spearman_abs": spearman_abs,
    "ssim": ssim,
    "hog": hog_pearson,
}


def _constant(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.logical_or(*(flat(m.reshape(len(m), -1)) for m in (a, b)))


def _unit(maps: np.ndarray) -> np.ndarray:
    low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
    return (maps - low) / np.where(high > low, high - low, 1.0)


def _pearson(a: np.ndarray, b: np.ndarray, broken: np.ndarray) -> np.ndarray:
    x, y = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    size = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    r = np.divide((x * y).sum(1), size, out=np.full(len(a), np.nan), where=size > 0)
    return np.where(broken, np.nan, np.clip(r, -1, 1))
