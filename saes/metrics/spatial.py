"""Where does a latent fire? Overlap with masks, pointing, and Moran's I on the grid of patches."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from mechinterp.errors import UsageError
from saes.metrics.alignment import average_precision

__all__ = ["best_iou_threshold", "grid_weights", "iou", "mask_precision", "morans_i", "patch_masks", "pointing"]


def patch_masks(
    masks: Bool[np.ndarray, "image height width"], rows: int, columns: int, least: float = 1 / 32
) -> Bool[np.ndarray, "image row column"]:
    """Patches of which the mask covers at least the share `least`.

    Raises UsageError when the image does not divide into the grid.
    """
    n, height, width = masks.shape
    if height % rows or width % columns:
        raise UsageError(f"{height} x {width} pixels on a grid of {rows} x {columns}", where="masks")
    tiles = masks.reshape(n, rows, height // rows, columns, width // columns)
    return tiles.mean((2, 4)) >= least


def iou(
    heat: Float[np.ndarray, "image *grid"], masks: Bool[np.ndarray, "image *grid"], threshold: float
) -> Float[np.ndarray, " image"]:
    """`|heat > t and mask| / |heat > t or mask|` of each image; nan where the mask is empty.

    The threshold must come from other patients (`best_iou_threshold`): the best one in hindsight rewards any map.
    """
    on, there = _flat(heat) > threshold, _flat(masks)
    either = (on | there).sum(1)
    found = np.divide((on & there).sum(1), either, out=np.full(len(on), np.nan), where=either > 0)
    return np.where(there.any(1), found, np.nan)


def best_iou_threshold(
    heat: Float[np.ndarray, "image *grid"], masks: Bool[np.ndarray, "image *grid"], levels: int = 32
) -> float:
    """The threshold with the highest mean `iou`, among 0 and `levels` quantiles of the positive heat."""
    positive = heat[heat > 0]
    if positive.size == 0 or not masks.any():
        return 0.0
    candidates = np.unique(np.r_[0.0, np.quantile(positive, np.linspace(0, 1, levels, endpoint=False))])
    return float(max(candidates, key=lambda t: np.nanmean(iou(heat, masks, float(t)))))


def pointing(
    heat: Float[np.ndarray, "image *grid"], masks: Bool[np.ndarray, "image *grid"]
) -> Float[np.ndarray, " image"]:
    """Pointing game (Zhang et al. 2018): share of the hottest places of an image that lie in its mask.

    1 or 0 when one place is hottest; a map that is the same everywhere gets the mask's share of the image, its
    chance. nan where the mask is empty.
    """
    values, there = _flat(heat), _flat(masks)
    hottest = values == values.max(1, keepdims=True)
    return np.where(there.any(1), (hottest & there).sum(1) / hottest.sum(1), np.nan)


def mask_precision(
    heat: Float[np.ndarray, "image *grid"], masks: Bool[np.ndarray, "image *grid"]
) -> Float[np.ndarray, " image"]:
    """Average precision of the heat for the mask's places, image by image; nan where the mask is empty.

    Its chance level is the mask's share of the image.
    """
    values, there = _flat(heat), _flat(masks)
    return np.array(
        [average_precision(v, m.astype(np.float64)) if m.any() else np.nan for v, m in zip(values, there, strict=True)]
    )


def grid_weights(rows: int, columns: int, neighbours: Literal["rook", "queen"] = "queen") -> Float[np.ndarray, "p p"]:
    """1 for two patches that touch: at an edge ("rook"), or also at a corner ("queen", as ViSAEBench has it)."""
    y, x = np.divmod(np.arange(rows * columns), columns)
    dy, dx = np.abs(y[:, None] - y), np.abs(x[:, None] - x)
    near = (dy + dx == 1) if neighbours == "rook" else (np.maximum(dy, dx) == 1)
    return near.astype(np.float64)


def morans_i(
    maps: Float[np.ndarray, "*map patch"], weights: Float[np.ndarray, "patch patch"]
) -> Float[np.ndarray, "*map"]:
    """`I = (P / sum W) (x_c^T W x_c) / (x_c^T x_c)`, x_c centred (Moran 1950); nan for a constant map.

    Its expectation without structure is -1 / (P - 1). It says that a map is smooth, not that it is right: nearly all
    of it is the model's own smoothness, so report it beside raw neurons.
    """
    centred = np.asarray(maps, np.float64)
    centred = centred - centred.mean(-1, keepdims=True)
    power = np.square(centred).sum(-1)
    related = (centred * (centred @ weights)).sum(-1)
    scale = maps.shape[-1] / weights.sum()
    floor = 1e-24 * np.maximum(np.square(np.asarray(maps, np.float64)).sum(-1), 1e-300)
    return np.asarray(scale * np.divide(related, power, out=np.full(np.shape(power), np.nan), where=power > floor))


def _flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)
