"""The normal chest as attenuation along the ray (1 = the soft tissue of a mid-chest ray)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

from mechinterp.data.phantom._banks import TREES, texture, vessels
from mechinterp.data.phantom._scene import Scene, bump, ramp, rounded, smooth

__all__ = ["breasts", "cut", "soft_tissue", "vascular"]


def cut(tile: np.ndarray, roll: np.ndarray, size: int, stream: int) -> Float32[np.ndarray, "n size size"]:
    """One window per image of a doubled 512-periodic tile, at an offset from the image's own number."""
    out = np.empty((len(roll), size, size), np.float32)
    for i, number in enumerate(roll.ravel().astype(np.int64)):
        code = int(number) * 2654435761 + stream * 40503
        top, start = (code >> 3) % 512, (code >> 13) % 512
        out[i] = tile[top : top + size, start : start + size]
    return out


def soft_tissue(s: Scene) -> Float32[np.ndarray, "n height width"]:
    """Torso, neck, arms, air of the lungs, mediastinum, heart, abdomen, spine, ribs, clavicles, scapulae, breasts."""
    solid = _torso(s)
    where, below = s.window(0.6, 1.0)
    solid[where] += 0.34 * smooth(-below.height * 14.0) * smooth((s.p["body"] - below.a) * 12.0)
    covered = 0.92 * s.heart
    where, centre = s.window(0.0, 1.0, 0.25, 0.75)
    media = _mediastinum(centre)
    np.maximum(covered[where], media, out=covered[where])
    solid -= 0.62 * s.lung * (1.0 - covered)
    solid += 0.16 * s.heart
    solid[where] += 0.20 * media * smooth((0.9 - s.v) * 4.0)
    solid += _ribs(s)
    for painter, sign, part in _PARTS:
        where, there = s.window(*part)
        solid[where] += sign * painter(there)
    return solid


def _torso(s: Scene) -> np.ndarray:
    p, v, a = s.p, s.v, s.a
    shoulder = p["apex"] - 0.035
    male = s.f["sex"].astype(np.float32)[:, None, None]
    neck = 0.115 + 0.012 * male
    slope = np.clip((v - shoulder + 0.13) / 0.19, 0.0, 1.0)
    wide = neck + (0.54 + 0.02 * male - neck) * slope ** (1.6 - 0.3 * male)
    armpit = smooth((v - 0.36) * 3.2)
    width = wide * (1 - armpit) + p["body"] * armpit
    depth = rounded((width - a) * 6.5)
    solid = (0.30 + 0.58 * p["fat"]) * depth * (0.80 + 0.20 * smooth((v - 0.05) * 4.0))
    hang = np.where(s.f["view"].astype(bool), 0.035, 0.06).astype(np.float32)[:, None, None]
    inner = p["body"] + hang + 0.02 * (1 - v)
    arm = rounded((a - inner) * 11.0) * smooth((v - 0.34) * 6.0)
    return np.maximum(solid, 0.62 * arm)


def _mediastinum(s: Scene) -> np.ndarray:
    p, v = s.p, s.v
    arch = p["apex"] + 0.165
    right = 0.052 + 0.010 * bump((v - arch + 0.02) / 0.13) + 0.03 * smooth((v - p["dome"] + 0.16) * 7.0)
    knob = (p["knob"] - 0.050) * bump((v - arch) / 0.085)
    left = 0.047 + knob + 0.022 * bump((v - arch - 0.13) / 0.13) + 0.055 * smooth((v - arch - 0.06) * 4.0)
    edge = np.where(s.left, left, right)
    return rounded((edge - s.a) * 20.0) * smooth((v - p["apex"] + 0.10) * 9.0)


def _spine(s: Scene) -> np.ndarray:
    v, a = s.v, s.a
    column = ramp((0.042 - a) * 90.0)
    discs = np.cos(v * np.float32(2 * np.pi / 0.058)) * 0.5 + 0.5
    level = 0.17 - 0.09 * smooth((v - s.p["apex"] - 0.1) * 5.0)
    return column * s.p["bone"] * level * (0.7 + 0.45 * discs * discs)


def _ribs(s: Scene) -> np.ndarray:
    """Posterior ribs from the spine, nearly level then falling at the wall; anterior ribs falling to the midline."""
    p, v, a = s.p, s.v, s.a
    out = a / p["hw"]
    gap = p["rib_gap"]
    cage = ramp((s.lateral + 0.020 - a) * 55.0) * ramp((v - p["apex"] + 0.025) * 30.0)
    below = smooth((p["dome"] + 0.17 - v) * 12.0)
    fall = p["rib_slope"] * (0.05 + 0.16 * v)
    out2 = out * out
    back = (v - p["apex"] + 0.02 - fall * (out2 * 1.15 - 0.25) - 0.10 * np.maximum(out - 0.72, 0.0)) / gap
    front = (v - p["apex"] - 0.05 + out2 * (0.17 + 0.14 * out) - 0.30 * out) / (gap * 1.12)
    bones = np.take(_RIB, _phase(back)) * ramp((a - 0.03) * 30.0)
    bones += np.take(_PLATE, _phase(front)) * smooth((out - 0.42) * 4.5)
    bones *= cage
    bones *= below * p["bone"]
    return bones


def _phase(turns: np.ndarray) -> np.ndarray:
    """Fraction of a turn in 256 steps, for turns above -16."""
    return ((turns + 16.0) * 256.0).astype(np.int32) & 255


_OFF = np.abs((np.arange(256, dtype=np.float32) + 0.5) / 128.0 - 1.0)  # 0 in the middle of a rib, 1 between two
_RIB = 0.135 * smooth((0.52 - _OFF) * 7.0) * (0.62 + 0.38 * smooth((_OFF - 0.20) * 5.0))
_PLATE = 0.062 * smooth((0.55 - _OFF) * 4.0)


def _clavicles(s: Scene) -> np.ndarray:
    p, v, a = s.p, s.v, s.a
    ap = s.f["view"].astype(np.float32)[:, None, None]
    start = p["apex"] + 0.062 - 0.035 * ap
    t = (a - 0.035) / 0.34
    path = start - (0.075 + p["clavicle"] - 0.035 * ap) * t - 0.022 * np.sin(t * np.float32(2 * np.pi)) * (1 + ap * 0.4)
    off = np.abs(v - path) / (0.0165 + 0.006 * np.abs(t - 0.5))
    inside = smooth(t * 12.0) * smooth((1.02 - t) * 12.0)
    head = rounded(1.0 - ((a - 0.435) / 0.062) ** 2 - ((v - start + 0.005) / 0.066) ** 2)
    return p["bone"] * (0.21 * smooth((1.0 - off) * 3.0) * (0.72 + 0.28 * smooth(off * 1.6)) * inside + 0.17 * head)


def _scapulae(s: Scene) -> np.ndarray:
    """A blade lateral to the ribs; in AP it lies over the upper lung."""
    p, v, a = s.p, s.v, s.a
    ap = s.f["view"].astype(np.float32)[:, None, None]
    t = (v - p["apex"] - 0.02) / 0.34
    inner = 0.345 - 0.075 * ap + 0.055 * t
    outer = 0.435 - 0.045 * ap - 0.045 * t
    blade = ramp((a - inner) * 60.0) * ramp((outer - a) * 40.0) * smooth(t * 9.0) * smooth((1.0 - t) * 9.0)
    rim = bump((a - outer) / 0.014) * smooth(t * 9.0) * smooth((1.0 - t) * 9.0)
    return p["bone"] * (0.075 * blade + 0.10 * rim)


def breasts(s: Scene) -> np.ndarray:
    """Two soft shadows, densest at the lower fold."""
    size = s.f["breast"].astype(np.float32)[:, None, None]
    r = 0.10 + 0.065 * size
    dx, dv = s.a - 0.215 - 0.02 * size, s.v - (s.p["dome"] - 0.085 + 0.05 * size)
    d2 = (dx / (1.12 * r)) ** 2 + (dv / r) ** 2
    fold = smooth((dv / r + 0.9) * 0.9)
    return np.where(size > 0, (0.10 + 0.18 * size) * rounded((1.0 - d2) * 1.6) * fold, np.float32(0.0))


def _trachea(s: Scene) -> np.ndarray:
    p, v = s.p, s.v
    carina = p["apex"] + 0.20
    tube = (
        ramp((0.024 - np.abs(s.x + 0.004)) * 90.0) * smooth((carina - v) * 18.0) * smooth((v - p["apex"] + 0.16) * 9.0)
    )
    fork = s.a - 0.008 - (v - carina + 0.012) * np.where(s.left, np.float32(1.25), np.float32(0.8))
    bronchus = bump(fork / 0.02) * ramp((v - carina + 0.015) * 40.0) * smooth((carina + 0.085 - v) * 20.0)
    return 0.17 * tube + 0.09 * bronchus


def _gas(s: Scene) -> np.ndarray:
    """The gastric bubble below the left dome, in about half of the patients."""
    amount = np.clip(s.p["gas"], 0.0, 1.0)
    d2 = ((s.x - 0.17) / 0.075) ** 2 + ((s.v - s.p["dome"] - s.p["dome_step"] - 0.075) / 0.038) ** 2
    return 0.28 * amount * rounded(1.0 - d2)


# painter, sign, and the window (top, bottom, start, stop) that holds it in every patient
_PARTS = (
    (_spine, 1, (0.0, 1.0, 0.36, 0.64)),
    (_clavicles, 1, (0.0, 0.36)),
    (_scapulae, 1, (0.05, 0.58)),
    (breasts, 1, (0.40, 1.0)),
    (_trachea, -1, (0.0, 0.56, 0.3, 0.7)),
    (_gas, -1, (0.70, 1.0, 0.45, 0.9)),
)


def vascular(s: Scene) -> Float32[np.ndarray, "n height width"]:
    """Vessels branching from the hila plus parenchymal texture; to be multiplied by the air they lie in."""
    n, size = len(s), s.size
    bank, out = vessels(size), np.zeros((n, size, size), np.float32)
    hilum_v = (s.p["apex"] + 0.265).ravel()
    for i in range(n):
        number = int(s.f["patient"][i])
        top = round(size * 0.75) - int(hilum_v[i] * size)
        middle = int(s.p["cx"][i, 0, 0] * size)
        for side in (0, 1):
            tree = bank[(number * 7 + side * 5) % TREES, top : top + size]
            if side:
                room = size - middle
                out[i, :, middle:] = tree[:, :room]
            else:
                out[i, :, :middle] = tree[:, :middle][:, ::-1]
    out *= 0.62 * s.p["vessel"]
    out += 0.022 * cut(texture(), s.p["roll"], size, 1)
    return out
