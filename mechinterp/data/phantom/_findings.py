"""Findings as changes of the attenuation map. Each painter returns its own weight map in [0, 1], which is its mask.

Nothing hides another finding: nodules lie in the upper and middle zones, in another zone than a consolidation of the
same side; a consolidation or a plate of atelectasis lies above the effusion of its side; a pneumothorax is apical.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

from mechinterp.data.phantom._anatomy import cut
from mechinterp.data.phantom._banks import texture
from mechinterp.data.phantom._random import uniform
from mechinterp.data.phantom._scene import Scene, bump, ramp, rounded, smooth

__all__ = ["atelectasis", "consolidation", "edema", "effusion", "nodule", "pneumothorax"]

Map = Float32[np.ndarray, "n height width"]


def _of(s: Scene, name: str) -> np.ndarray:
    return s.f[name].astype(np.float32)[:, None, None]


def _draw(s: Scene, seed: int, name: str, low: float, high: float) -> np.ndarray:
    value = low + (high - low) * uniform(seed, name, s.f["image"])
    return value.astype(np.float32)[:, None, None]


def _level(s: Scene) -> np.ndarray:
    """Height of the fluid above the dome, in image sides."""
    return 0.095 + 0.215 * _of(s, "effusion_size")


def effusion(s: Scene, seed: int) -> Map:
    """Fluid from the dome up to a meniscus that climbs at the chest wall."""
    wall = np.clip(1.0 - (s.lateral - s.a) / 0.16, 0.0, 1.0)
    level = _level(s) + 0.13 * wall * wall - 0.02 + 0.4 * (s.dome - s.p["dome"] - 0.02)
    chest = ramp((s.lateral + 0.004 - s.a) * 60.0) * ramp((s.a - s.medial + 0.01) * 40.0)
    fluid = smooth((level - s.height) * 13.0) * ramp((s.height + 0.05) * 30.0)
    return fluid * chest * s.side(s.f["effusion_side"])


def pneumothorax(s: Scene, seed: int) -> tuple[Map, Map]:
    """Air between chest wall and lung: (weight of the airless-of-vessels rim, the thin line of the visceral pleura)."""
    deep = 0.072 + 0.075 * _of(s, "pneumothorax_size")
    t = np.clip((s.v - s.p["apex"]) / (s.p["dome"] - s.p["apex"]), 0.0, 1.0)
    gone = smooth((0.93 - t) * 4.0)
    rim = deep * (1.05 - 0.55 * t)
    edge = np.minimum(
        s.lateral - s.a - rim * gone, (s.v - s.p["apex"] - 1.25 * deep + 0.25 * np.maximum(0.2 - s.a, 0.0))
    )
    here = s.side(s.f["pneumothorax_side"]) * ramp((s.lateral - s.a + 0.003) * 90.0)
    here = here * ramp((s.a - s.medial) * 60.0) * ramp((s.height - 0.02) * 30.0) * ramp((s.v - s.p["apex"]) * 60.0)
    return smooth(-edge * 90.0) * here, bump(edge / 0.011) * here * ramp((s.a - s.medial - 0.02) * 30.0)


def _centre(s: Scene, seed: int, name: str, zone: np.ndarray, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Where a finding of zone 0, 1 or 2 sits: (v, |x|), within the lung."""
    low = s.p["apex"] + (0.26 + 0.24 * zone) * (s.p["dome"] - s.p["apex"])
    v = low + _draw(s, seed, f"{name}/v", -spread, spread)
    return v, 0.185 + 0.02 * zone + _draw(s, seed, f"{name}/x", -0.03, 0.045)


def consolidation(s: Scene, seed: int) -> Map:
    """A fluffy opacity with ragged edge."""
    v, a = _centre(s, seed, "consolidation", _of(s, "consolidation_zone"), 0.025)
    r = 0.095 + 0.045 * _of(s, "consolidation_size")
    d = np.sqrt(((s.a - a) / (1.12 * r)) ** 2 + ((s.v - v) / r) ** 2)
    ragged = 0.20 * np.clip(cut(texture(), s.p["roll"], s.size, 2), -2.0, 2.0)
    return smooth((1.12 - d + ragged) * 1.7) * smooth((1.7 - d) * 4.0) * s.lung * s.side(s.f["consolidation_side"])


def nodule(s: Scene, seed: int) -> Map:
    """A round, well-defined density of radius 0.03 to 0.05 image sides."""
    v, a = _centre(s, seed, "nodule", _of(s, "nodule_zone") * 1.15, 0.035)
    r = 0.030 + 0.020 * _of(s, "nodule_size")
    d2 = ((s.a - a) / r) ** 2 + ((s.v - v) / (r * _draw(s, seed, "nodule/oval", 0.88, 1.12))) ** 2
    return rounded((1.0 - d2) * 1.3) * s.side(s.f["nodule_side"])


def atelectasis(s: Scene, seed: int) -> Map:
    """Two or three plates: thick, slightly oblique lines above the dome (above the fluid that its side may hold)."""
    side = s.f["atelectasis_side"]
    wet = (s.f["effusion_side"] == 2) | (s.f["effusion_side"] == side)
    base = 0.085 + np.where(wet[:, None, None], _level(s) + 0.02, np.float32(0.0))
    tilt = _draw(s, seed, "atelectasis/tilt", -0.35, 0.15)
    size = _of(s, "atelectasis_size")
    out = np.zeros_like(s.lung)
    for plate in range(3):
        up = base + 0.048 * plate + _draw(s, seed, f"atelectasis/{plate}", 0.0, 0.012)
        middle = 0.225 + _draw(s, seed, f"atelectasis/x{plate}", -0.03, 0.03)
        off = s.p["dome"] - up + tilt * (s.a - middle) - s.v
        reach = ramp((0.085 + 0.045 * size - np.abs(s.a - middle)) * 25.0)
        strength = np.where((plate < 2) | (size > 0.5), np.float32(1.0), np.float32(0.0))
        out = np.maximum(out, strength * bump(off / (0.014 + 0.006 * size)) * reach)
    return out * np.minimum(s.lung * 1.6, 1.0) * s.side(side)


def edema(s: Scene, seed: int) -> Map:
    """Perihilar haze, thick reticular lines and short septal lines at the bases, on both sides."""
    size = _of(s, "edema_size")
    hilum = s.p["apex"] + 0.29
    d = np.sqrt(((s.a - 0.10) / 0.21) ** 2 + ((s.v - hilum - 0.07) / 0.27) ** 2)
    haze = smooth((1.35 - d) * 1.1)
    net = np.abs(cut(texture(), s.p["roll"], s.size, 3))
    lines = smooth((0.30 - net) * 3.5)
    septa = (s.height * 1.0 + 0.25 * s.a) / 0.030
    septa = np.abs(septa - np.floor(septa) - 0.5) * 2.0
    septa = smooth((0.42 - septa) * 4.0) * ramp((s.a - s.lateral + 0.075) * 40.0) * smooth((0.24 - s.height) * 20.0)
    whole = (0.75 + 0.30 * size) * haze + (0.42 + 0.2 * size) * lines * (0.4 + 0.6 * haze) + 0.5 * septa
    return np.minimum(whole, 1.6) * s.lung * (1.0 - 0.6 * s.heart)
