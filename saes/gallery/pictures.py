"""A radiograph under a feature's heat, with the outline of the drawn finding, as a small JPEG."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image
from scipy import ndimage

__all__ = ["SIDE", "heat_picture", "owners"]

SIDE = 160
_HOT = np.array([[0.99, 0.75, 0.15], [0.93, 0.33, 0.10], [0.75, 0.05, 0.20]])  # weak to strong
_OUTLINE = np.array([0.25, 0.90, 0.95])


def owners(token_of_pixel: Int[np.ndarray, "height width"], first_patch: int) -> Int[np.ndarray, "side side"]:
    """Which patch each pixel of the picture belongs to, -1 where the model's preprocessing crops it away."""
    height, width = token_of_pixel.shape
    y = ((np.arange(SIDE) + 0.5) * height / SIDE).astype(int)
    x = ((np.arange(SIDE) + 0.5) * width / SIDE).astype(int)
    found = token_of_pixel[y][:, x]
    return np.where(found >= 0, found - first_patch, -1)


def heat_picture(
    pixels: Float[np.ndarray, "height width"],
    heat: Float[np.ndarray, "rows columns"],
    largest: float,
    owner: Int[np.ndarray, "side side"],
    outline: Bool[np.ndarray, "h w"] | None = None,
    box: int | None = None,
) -> bytes:
    """The image with `heat` (0 to `largest`) over it: clear where the feature is silent, coloured where it fires.

    Args:
        outline: a mask of what the feature is named after; its border is drawn.
        box: a patch to draw a frame around.
    """
    grey = _resize(pixels)[..., None]
    flat = np.append(heat.ravel() / largest if largest > 0 else heat.ravel(), 0.0)  # the last: cropped away
    patch_side = SIDE / max(heat.shape)
    strength = np.clip(ndimage.gaussian_filter(flat[owner], 0.3 * patch_side), 0, 1)
    position = strength * (len(_HOT) - 1)
    below = np.minimum(position.astype(int), len(_HOT) - 2)
    colour = _HOT[below] + (position - below)[..., None] * (_HOT[below + 1] - _HOT[below])
    alpha = (0.62 * np.sqrt(strength))[..., None]
    picture = grey * (1 - alpha) + colour * (0.35 + 0.65 * grey) * alpha
    if outline is not None:
        mask = Image.fromarray(outline).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        picture[_border(np.asarray(mask, dtype=bool))] = _OUTLINE
    if box is not None:
        frame = _border(owner == box)
        picture[frame] = 1.0
    return _jpeg(picture)


def _border(mask: Bool[np.ndarray, "side side"]) -> Bool[np.ndarray, "side side"]:
    return mask & ~ndimage.binary_erosion(mask, border_value=0)


def _resize(values: np.ndarray) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def _jpeg(rgb: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.clip(rgb * 255 + 0.5, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=84)
    return buffer.getvalue()
