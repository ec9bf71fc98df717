"""From factors to pixels and masks, chunk by chunk.

Pixels are made point by point after the layers are summed (no normalisation or filter over the image), so that a
change in one place stays in that place; noise is a window of a fixed field at an offset of the image's own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from mechinterp.data.phantom import _devices, _findings, _marks
from mechinterp.data.phantom._anatomy import breasts, cut, soft_tissue, vascular
from mechinterp.data.phantom._banks import grain
from mechinterp.data.phantom._scene import Scene, make_scene

__all__ = ["CHUNK", "factor_mask", "render_chunk"]

CHUNK = 16  # images; small enough for the layers to stay near the cache; never changes a pixel

_DEVICES: dict[str, tuple[Callable, float, float]] = {  # painter, opacity, brightness
    "drain": (_devices.drain, 0.68, 0.98),
    "line": (_devices.line, 0.85, 1.0),
    "ecg_leads": (_devices.ecg_leads, 0.72, 1.0),
    "pacemaker": (_devices.pacemaker, 0.97, 1.0),
}
_THRESHOLD = 0.12  # of a layer's weight, above which its mask holds; less where the edge is soft
_SOFT = {"effusion": 0.02, "consolidation": 0.012, "edema": 0.012}


def _present(s: Scene, name: str) -> np.ndarray:
    return np.flatnonzero(s.f[name] == 1)


def _attenuation(s: Scene, seed: int) -> Float32[np.ndarray, "n height width"]:
    total = soft_tissue(s)
    air = s.lung * (1.0 - 0.92 * s.heart)
    detail = vascular(s) * air
    rows = _present(s, "edema")
    if len(rows):
        detail[rows] *= 0.85
        detail[rows] += 0.27 * _findings.edema(s.rows(rows), seed)
    rows = _present(s, "atelectasis")
    if len(rows):
        detail[rows] += 0.42 * _findings.atelectasis(s.rows(rows), seed)
    rows = _present(s, "consolidation")
    if len(rows):
        weight = _findings.consolidation(s.rows(rows), seed) * (1.0 - 0.5 * s.heart[rows])
        detail[rows] = detail[rows] * (1.0 - 0.6 * weight) + 0.50 * weight
    rows = _present(s, "pneumothorax")
    if len(rows):
        gap, pleura = _findings.pneumothorax(s.rows(rows), seed)
        detail[rows] = detail[rows] * (1.0 - gap) - 0.105 * gap * s.lung[rows] + 0.17 * pleura
    rows = _present(s, "effusion")
    if len(rows):
        weight = _findings.effusion(s.rows(rows), seed) * np.minimum(1.5 * s.lung[rows], 1.0)
        detail[rows] = detail[rows] * (1.0 - 0.9 * weight) + weight * (0.58 * air[rows] + 0.09)
    rows = _present(s, "nodule")
    if len(rows):
        detail[rows] += 0.34 * _findings.nodule(s.rows(rows), seed)
    total += detail
    return total


def _tone(s: Scene, depth: np.ndarray) -> np.ndarray:
    """Detector and display: a saturating curve, steeper on scanner beta; exposure scales the attenuation."""
    beta = s.f["scanner"].astype(np.float32)[:, None, None]
    exposure = s.f["exposure"].astype(np.float32)[:, None, None]
    z = np.maximum(depth, 0.0) * (1.0 + 0.20 * exposure)
    z = z * (1.05 - 0.22 * beta + (0.55 + 0.42 * beta) * z)
    value = 0.015 + 0.935 * (1.0 - np.exp(-z))
    vignette = 1.0 - 0.30 * (1.0 - 0.4 * beta) * ((s.v - 0.5) ** 2 + s.x * s.x)
    return value * vignette


def render_chunk(f: dict[str, np.ndarray], seed: int, size: int) -> UInt8[np.ndarray, "n size size"]:
    """Render the images whose factor columns are `f`."""
    s = make_scene(seed, size, f)
    value = _tone(s, _attenuation(s, seed))
    for name, (painter, opacity, bright) in _DEVICES.items():
        rows = _present(s, name)
        if len(rows):
            weight = opacity * painter(s.rows(rows), seed)
            value[rows] += weight * (bright - value[rows])
    sigma = (0.006 + 0.014 * s.f["noise"]).astype(np.float32)[:, None, None]
    value += sigma * (0.45 + 0.8 * value) * cut(grain(), s.p["roll"], size, 4)
    rows = _present(s, "scanner")
    if len(rows):
        value[rows] *= _marks.border(s.rows(rows), seed)
    value[_marks.letter(s, seed)] = 0.98
    rows = _present(s, "portable")
    if len(rows):
        burned = value[rows]
        burned[_marks.portable(s.rows(rows), seed)] = 0.98
        value[rows] = burned
    return (np.clip(value, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _weights(s: Scene, seed: int, name: str) -> np.ndarray:
    """The layer of a local factor, where it is present in every image of `s`."""
    if name in _DEVICES:
        return _DEVICES[name][0](s, seed)
    match name:
        case "cardiomegaly":
            return s.heart
        case "pneumothorax":
            gap, pleura = _findings.pneumothorax(s, seed)
            return np.maximum(gap, pleura)
        case "effusion" | "consolidation":
            return getattr(_findings, name)(s, seed) * np.minimum(1.5 * s.lung, 1.0)
        case "portable":
            return _marks.portable(s, seed).astype(np.float32)
        case _:
            return getattr(_findings, name)(s, seed)


def factor_mask(f: dict[str, np.ndarray], seed: int, size: int, name: str) -> Bool[np.ndarray, "n size size"]:
    """Where a local factor is, in each image; nowhere where it is absent."""
    s = make_scene(seed, size, f)
    if name == "letter":
        return _marks.letter(s, seed)
    if name == "hospital":
        return _marks.signature(s, seed)
    if name == "breast":
        return breasts(s) > 0.01
    out = np.zeros((len(s), size, size), bool)
    rows = _present(s, name)
    if len(rows):
        out[rows] = _weights(s.rows(rows), seed, name) > _SOFT.get(name, _THRESHOLD)
    return out
