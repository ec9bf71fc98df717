"""Small pictures for the report: a radiograph, and a radiograph under a feature's heat."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import Float
from PIL import Image

__all__ = ["heat_picture", "thumbnail"]

SIDE = 168
_HOT = np.array([[0.99, 0.75, 0.15], [0.93, 0.33, 0.10], [0.75, 0.05, 0.20]])  # weak to strong


def thumbnail(pixels: Float[np.ndarray, "height width"]) -> bytes:
    """The image as a small JPEG."""
    return _jpeg(np.repeat(_resize(pixels)[..., None], 3, axis=2))


def heat_picture(
    pixels: Float[np.ndarray, "height width"], heat: Float[np.ndarray, "rows columns"], largest: float
) -> bytes:
    """The image with `heat` (0 to `largest`) over it: clear where the feature is silent, coloured where it fires."""
    grey = _resize(pixels)[..., None]
    strength = np.clip(_resize(heat / largest if largest > 0 else heat), 0, 1)
    position = strength * (len(_HOT) - 1)
    below = np.minimum(position.astype(int), len(_HOT) - 2)
    colour = _HOT[below] + (position - below)[..., None] * (_HOT[below + 1] - _HOT[below])
    alpha = (0.62 * np.sqrt(strength))[..., None]
    return _jpeg(grey * (1 - alpha) + colour * (0.35 + 0.65 * grey) * alpha)


def _resize(values: np.ndarray) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def _jpeg(rgb: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(np.clip(rgb * 255 + 0.5, 0, 255).astype(np.uint8))
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
