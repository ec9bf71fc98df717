"""Small JPEGs: a radiograph, and a radiograph under a feature's heat, with the outline of a drawn finding."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image
from scipy import ndimage

__all__ = ["LARGE", "SMALL", "heat_picture", "thumbnail"]

LARGE, SMALL = 208, 136
_HOT = np.array([[0.99, 0.75, 0.15], [0.93, 0.33, 0.10], [0.75, 0.05, 0.20]])  # weak to strong
_OUTLINE = np.array([0.25, 0.90, 0.95])


def heat_picture(
    pixels: Float[np.ndarray, "height width"],
    heat: Float[np.ndarray, "rows columns"],
    largest: float,
    owner: Int[np.ndarray, "height width"] | None = None,
    outline: Bool[np.ndarray, "height width"] | None = None,
    box: int | None = None,
    side: int = LARGE,
) -> bytes:
    """The image with `heat` (0 to `largest`) over it: clear where the feature is silent, coloured where it fires.

    Args:
        owner: the patch of each pixel, -1 where the model's preprocessing crops it away; None: the patches tile it.
        outline: a mask of what the feature is named after; its border is drawn.
        box: a patch to draw a frame around.
        side: of the picture.
    """
    grey = _resize(pixels, side)[..., None]
    owner = _tiled(*heat.shape) if owner is None else owner
    y, x = (((np.arange(side) + 0.5) * length / side).astype(int) for length in owner.shape)
    owner = owner[y][:, x]
    flat = np.append(heat.ravel() / largest if largest > 0 else heat.ravel(), 0.0)  # the last: cropped away
    patch_side = side / max(heat.shape)
    strength = np.clip(ndimage.gaussian_filter(flat[owner], 0.3 * patch_side), 0, 1)
    position = strength * (len(_HOT) - 1)
    below = np.minimum(position.astype(int), len(_HOT) - 2)
    colour = _HOT[below] + (position - below)[..., None] * (_HOT[below + 1] - _HOT[below])
    alpha = (0.62 * np.sqrt(strength))[..., None]
    picture = grey * (1 - alpha) + colour * (0.35 + 0.65 * grey) * alpha
    if outline is not None:
        mask = Image.fromarray(outline).resize((side, side), Image.Resampling.NEAREST)
        picture[_border(np.asarray(mask, dtype=bool))] = _OUTLINE
    if box is not None:
        frame = _border(owner == box)
        picture[frame] = 1.0
    return _jpeg(picture)


def thumbnail(pixels: Float[np.ndarray, "height width"], side: int = SMALL) -> bytes:
    """The image alone."""
    return _jpeg(np.repeat(_resize(pixels, side)[..., None], 3, axis=2))


def _tiled(rows: int, columns: int) -> Int[np.ndarray, "rows columns"]:
    return np.arange(rows * columns).reshape(rows, columns)


def _border(mask: Bool[np.ndarray, "side side"]) -> Bool[np.ndarray, "side side"]:
    return mask & ~ndimage.binary_erosion(mask, border_value=0)


def _resize(values: np.ndarray, side: int) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))


def _jpeg(rgb: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.clip(rgb * 255 + 0.5, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=84)
    return buffer.getvalue()
