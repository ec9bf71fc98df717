"""Textures made once from a fixed seed and cut per image: noise, lung texture, vessel trees, glyphs."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float32
from PIL import Image, ImageDraw, ImageFilter

__all__ = ["GLYPHS", "TREES", "glyphs", "grain", "texture", "vessels"]

TREES = 12
TILE = 512


def _spectrum(seed: int, power: float, low: float) -> np.ndarray:
    """A [TILE, TILE] periodic Gaussian field with amplitude ~ 1 / (f + low)^power, unit variance."""
    rng = np.random.Generator(np.random.Philox(seed))
    white = np.fft.rfft2(rng.standard_normal((TILE, TILE)))
    f = np.hypot(np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE)[None, :])
    white[0, 0] = 0.0
    field = np.fft.irfft2(white / (f + low) ** power, s=(TILE, TILE))
    return (field / field.std()).astype(np.float32)


@lru_cache(maxsize=1)
def grain() -> Float32[np.ndarray, "1024 1024"]:
    """Quantum noise: nearly white, a little blurred by the detector. Tiled twice so that a cut never wraps."""
    return np.tile(_spectrum(11, 0.35, 0.05), (2, 2))


@lru_cache(maxsize=1)
def texture() -> Float32[np.ndarray, "1024 1024"]:
    """Cloudy field (1/f^2 above ~1/40 px): parenchyma and the edges of opacities."""
    return np.tile(_spectrum(12, 2.0, 0.025), (2, 2))


def _grow(draw: ImageDraw.ImageDraw, rng: np.random.Generator, at: tuple, angle: float, width: float, length: float):
    """Draw a vessel and its branches, each thinner than its parent."""
    if width < 0.35 or length < 3:
        return
    x, y = at
    for _ in range(int(length / 3) + 1):
        nx, ny = x + 3 * np.cos(angle), y + 3 * np.sin(angle)
        draw.line((x, y, nx, ny), fill=int(min(255, 45 + 60 * width)), width=max(1, round(width)))
        x, y, angle = nx, ny, angle + rng.normal(0, 0.10)
        if rng.random() < 0.07:
            _grow(draw, rng, (x, y), angle + rng.choice((-1, 1)) * rng.uniform(0.4, 0.9), width * 0.62, length * 0.5)
    for turn in (rng.uniform(0.15, 0.45), -rng.uniform(0.15, 0.45)):
        _grow(draw, rng, (x, y), angle + turn, width * 0.7, length * 0.62)


@lru_cache(maxsize=2)
def vessels(size: int) -> Float32[np.ndarray, "tree height width"]:
    """Trees of `TREES` left lungs on a canvas of [1.5 size, size], hilum at (0.75 size, 0). Mirror for the right."""
    out = []
    high, wide = size * 3 // 2, size
    scale = 384 / size
    for tree in range(TREES):
        rng = np.random.Generator(np.random.Philox(100 + tree))
        canvas = Image.new("L", (int(wide * scale), int(high * scale)))
        draw = ImageDraw.Draw(canvas)
        for angle in np.linspace(-1.4, 1.4, 8):
            start = (rng.uniform(12, 24), high * scale / 2 + 32 * np.sin(angle) + rng.uniform(-6, 6))
            _grow(draw, rng, start, angle + rng.normal(0, 0.1), rng.uniform(3.0, 4.6), rng.uniform(38, 56))
        small = canvas.filter(ImageFilter.GaussianBlur(0.45 * scale)).resize((wide, high), Image.Resampling.BOX)
        tree_map = np.asarray(small, np.float32) / 255.0
        # vessels thin out towards the periphery
        y, x = np.mgrid[:high, :wide] / size
        out.append(tree_map * np.exp(-2.6 * np.hypot(x, y - 0.75)).astype(np.float32))
    return np.stack(out)


# 3x5 capitals, one row per string; enough for the marks that are burned in
GLYPHS = {
    "P": ("11.", "1.1", "11.", "1..", "1.."),
    "O": ("111", "1.1", "1.1", "1.1", "111"),
    "R": ("11.", "1.1", "11.", "1.1", "1.1"),
    "T": ("111", ".1.", ".1.", ".1.", ".1."),
    "A": (".1.", "1.1", "111", "1.1", "1.1"),
    "B": ("11.", "1.1", "11.", "1.1", "11."),
    "L": ("1..", "1..", "1..", "1..", "111"),
    "E": ("111", "1..", "11.", "1..", "111"),
}


@lru_cache(maxsize=16)
def glyphs(text: str, scale: int) -> Bool[np.ndarray, "height width"]:
    """The text as a bitmap, `5 * scale` high, one blank column between letters."""
    rows = [".".join(GLYPHS[letter][r] for letter in text) for r in range(5)]
    bits = np.array([[c == "1" for c in row] for row in rows])
    return bits.repeat(scale, 0).repeat(scale, 1)
