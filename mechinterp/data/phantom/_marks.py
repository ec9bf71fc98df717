"""What the technologist and the detector add: the side letter, the PORTABLE mark, the border of the scanner."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float32

from mechinterp.data.phantom._banks import glyphs
from mechinterp.data.phantom._random import uniform
from mechinterp.data.phantom._scene import Scene, ramp

__all__ = ["border", "letter", "portable", "signature"]

Marks = Bool[np.ndarray, "n height width"]


def _spot(seed: int, name: str, image: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * uniform(seed, name, image)


def letter(s: Scene, seed: int) -> Marks:
    """The letter with the bar that one hospital puts under it."""
    return _letter(s, seed, bar=False) | (signature(s, seed) & (s.f["hospital"] == 1)[:, None, None])


def signature(s: Scene, seed: int) -> Marks:
    """Where hospital south puts a bar under the letter (and hospital north leaves the place empty)."""
    return _letter(s, seed, bar=True)


def _letter(s: Scene, seed: int, bar: bool) -> Marks:
    """L at the upper left of the patient (right of the image), or R opposite."""
    out = np.zeros((len(s), s.size, s.size), bool)
    image = s.f["image"]
    scale = max(1, round(s.size / 100))
    away, down = _spot(seed, "letter/x", image, 0.05, 0.09), _spot(seed, "letter/v", image, 0.05, 0.16)
    for i in range(len(s)):
        bits = glyphs("L" if s.f["letter"][i] else "R", scale)
        top, near = int(down[i] * s.size), int(away[i] * s.size)
        if bar:
            top, bits = top + 6 * scale, np.ones((scale, bits.shape[1]), bool)
        h, w = bits.shape
        start = s.size - near - w if s.f["letter"][i] else near
        out[i, top : top + h, start : start + w] = bits
    return out


def portable(s: Scene, seed: int) -> Marks:
    """The word PORTABLE, low in the image on one side."""
    out = np.zeros((len(s), s.size, s.size), bool)
    image = s.f["image"]
    bits = glyphs("PORTABLE", max(1, round(s.size / 128)))
    h, w = bits.shape
    right = uniform(seed, "portable/side", image) < 0.5
    along, down = _spot(seed, "portable/x", image, 0.04, 0.12), _spot(seed, "portable/v", image, 0.80, 0.93)
    for i in range(len(s)):
        top, near = int(down[i] * s.size), int(along[i] * s.size)
        start = s.size - near - w if right[i] else near
        out[i, top : top + h, start : start + w] = bits
    return out


def border(s: Scene, seed: int) -> Float32[np.ndarray, "n height width"]:
    """Openness in [0, 1] of the collimator of scanner beta, which leaves a slightly turned dark frame."""
    image = s.f["image"]
    wide = [_spot(seed, f"border/{k}", image, 0.012, 0.045)[:, None, None].astype(np.float32) for k in range(4)]
    turn = _spot(seed, "border/turn", image, -0.03, 0.03)[:, None, None].astype(np.float32)
    u = s.x + s.p["cx"] + turn * (s.v - 0.5)
    w = s.v - turn * (u - 0.5)
    inside = np.minimum(np.minimum(u - wide[0], 1 - wide[1] - u), np.minimum(w - wide[2], 1 - wide[3] - w))
    return ramp(inside * 100.0 + 0.5)
