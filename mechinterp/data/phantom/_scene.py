"""Where things are: coordinates and anatomy of a chunk of images, in units of the image side.

`x` runs from the midline (negative: the patient's right, on the left of the image), `v` from the top; `a = |x|`.
Everything is float32 and broadcasts to [image, row, column].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float32

from mechinterp.data.phantom._random import normal, uniform

__all__ = ["Scene", "bump", "make_scene", "ramp", "rounded", "smooth"]

Array = np.ndarray
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_clip = np.clip


def ramp(t: Array) -> Array:
    """t clipped to [0, 1]: a sharp edge, one or two pixels wide."""
    return _clip(t, _ZERO, _ONE)


def smooth(t: Array) -> Array:
    """Smoothstep of t clipped to [0, 1]; compact, so that what it bounds has an end."""
    t = _clip(t, _ZERO, _ONE)
    out = t * np.float32(-2.0)
    out += np.float32(3.0)
    out *= t
    out *= t
    return out


def rounded(t: Array) -> Array:
    """0 below 0, rising steeply and levelling at 1: the depth of a round body seen edge on."""
    t = _clip(t, _ZERO, _ONE)
    out = np.float32(2.0) - t
    out *= t
    return out


def bump(t: Array) -> Array:
    """(1 - t^2)^2 inside |t| < 1, else 0."""
    t = t * t
    np.subtract(_ONE, t, out=t)
    np.maximum(t, _ZERO, out=t)
    t *= t
    return t


@dataclass
class Scene:
    """Anatomy of `n` images: per-image numbers `p[name]` of shape [n, 1, 1], and the maps every painter needs."""

    size: int
    f: dict[str, Array]
    p: dict[str, Array]
    x: Array
    v: Array
    a: Array
    left: Array
    lung: Array
    lateral: Array
    medial: Array
    dome: Array
    height: Array
    heart: Array

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, rows: Array) -> Scene:
        """The scene of some of the images."""
        if len(rows) == len(self):
            return self
        whole = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        pick = {name: value if name == "v" else value[rows] for name, value in whole.items()}
        f = {name: value[rows] for name, value in self.f.items()}
        p = {name: value[rows] for name, value in self.p.items()}
        return Scene(size=self.size, f=f, p=p, **pick)

    def window(self, top: float, bottom: float, start: float = 0.0, stop: float = 1.0) -> tuple[tuple, Scene]:
        """A view of part of the image (in image sides): (index into [n, row, column] maps, scene)."""
        r, c = (
            slice(int(top * self.size), int(bottom * self.size)),
            slice(int(start * self.size), int(stop * self.size)),
        )
        maps = {
            name: value[:, r if value.shape[1] > 1 else slice(None), c if value.shape[2] > 1 else slice(None)]
            for name, value in vars(self).items()
            if isinstance(value, np.ndarray)
        }
        return (slice(None), r, c), Scene(size=self.size, f=self.f, p=self.p, **maps)

    def side(self, which: Array) -> Array:
        """1 on the half of side `which` (0 right, 1 left, 2 both), else 0."""
        w = which[:, None, None]
        return np.where(w == 2, True, self.left == (w == 1)).astype(np.float32)

    def column(self, x: Array) -> Array:
        """Pixel column of midline coordinate `x` [n, k] at height `v` = 0.5 (tilt is small)."""
        return ((x + self.p["cx"][:, :, 0]) * self.size - 0.5).astype(np.float32)


@lru_cache(maxsize=4)
def _axis(size: int) -> Float32[Array, " size"]:
    return ((np.arange(size) + 0.5) / size).astype(np.float32)


_PATIENT = {  # name: (mean, spread); varies between patients
    "hw": (0.378, 0.026),
    "apex": (0.125, 0.018),
    "dome": (0.765, 0.032),
    "dome_step": (0.028, 0.008),
    "body": (0.475, 0.020),
    "knob": (0.078, 0.008),
    "heart_r": (0.172, 0.010),
    "heart_tilt": (0.75, 0.12),
    "rib_gap": (0.0800, 0.0035),
    "rib_slope": (0.36, 0.06),
    "bone": (1.0, 0.15),
    "clavicle": (0.02, 0.012),
    "vessel": (1.0, 0.18),
    "fat": (1.0, 0.18),
    "gas": (0.0, 1.0),
}
_IMAGE = {  # varies between images of a patient: position and breath
    "cx": (0.5, 0.014),
    "tilt": (0.0, 0.022),
    "breath": (0.0, 0.012),
    "top": (0.0, 0.012),
}


def _numbers(seed: int, f: Mapping[str, Array]) -> dict[str, Array]:
    p = {}
    for table, key in ((_PATIENT, "patient"), (_IMAGE, "image")):
        drawn = normal(seed, [f"anatomy/{name}" for name in table], f[key])
        for (name, (mean, spread)), value in zip(table.items(), drawn, strict=True):
            p[name] = mean + spread * value
    ap, male, age = f["view"], f["sex"], (f["age"] - 55) / 35.0
    p["hw"] = p["hw"] * (1 + 0.02 * male) - 0.012 * ap
    p["apex"] = p["apex"] + p["top"] - 0.012 * ap
    p["dome"] = p["dome"] + p["breath"] - 0.035 * ap
    p["body"] = np.maximum(p["body"] * (1 + 0.03 * male), p["hw"] + 0.055)
    p["knob"] = p["knob"] + 0.012 * age + 0.006 * ap
    p["heart_r"] = p["heart_r"] * (1 + 0.10 * ap)
    p["heart_r"] = np.where(f["cardiomegaly"] == 1, p["heart_r"] * (1.32 + 0.2 * f["cardiomegaly_size"]), p["heart_r"])
    p["bone"] = p["bone"] * (1.0 - 0.15 * age)
    p["roll"] = np.floor(uniform(seed, "roll", f["image"]) * 2**20)
    return {name: value.astype(np.float32)[:, None, None] for name, value in p.items()}


def make_scene(seed: int, size: int, f: Mapping[str, Array]) -> Scene:
    """Lay out the chunk whose factor columns are `f` (arrays of one value per image)."""
    p = _numbers(seed, f)
    v = _axis(size)[None, :, None]
    x = _axis(size)[None, None, :] - p["cx"] + p["tilt"] * (v - 0.5)
    a, left = np.abs(x), x > 0
    fraction = np.clip((v - p["apex"]) / (p["dome"] + 0.06 - p["apex"]), 0.0, 1.0)
    top = np.float32(0.155)
    lateral = top + (p["hw"] - top) * (1.0 - (1.0 - fraction) ** 2.4) ** 0.62
    low = np.clip(fraction / 0.30, 0.0, 1.0)
    medial = top - (top - 0.05) * np.sqrt(1.0 - (1.0 - low) ** 2)
    # dome: highest at the middle of each side, falling to the lateral sulcus and a little to the heart
    centre = np.where(left, np.float32(0.19), np.float32(0.16))
    out = (a - centre) / (p["hw"] - centre)
    dome = (
        p["dome"]
        + np.where(left, p["dome_step"], np.float32(0.0))
        + np.where(out > 0, np.float32(0.105), np.float32(0.035)) * out * out
    )
    height = dome - v
    lung = rounded((lateral - a) * 9.0) * rounded((a - medial) * 16.0) * rounded(height * 22.0)
    lung *= smooth((v - p["apex"]) * 40.0)
    s = Scene(size, dict(f), p, x, v, a, left, lung, lateral, medial, dome, height, np.zeros_like(lung))
    where, below = s.window(0.25, 1.0)
    s.heart[where] = _heart(p, below.x, below.v)
    return s


def _heart(p: Mapping[str, Array], x: Array, v: Array) -> Array:
    """Depth of the heart in [0, 1]: an ellipse leaning to the patient's left, resting on the diaphragm."""
    r = p["heart_r"]
    dx, dv = x - (0.24 * r + 0.014), v - (p["dome"] - 0.42 * r + 0.012)
    turn = p["heart_tilt"]
    along, across = dx + 0.75 * turn * dv, dv - 0.55 * turn * dx
    d2 = (along / (1.04 * r)) ** 2 + (across / (0.78 * r + 0.006)) ** 2
    return rounded((1.0 - d2) * 1.15)
