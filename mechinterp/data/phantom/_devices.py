"""Tubes, wires and boxes as strokes: soft dots along a curve, joined by their maximum (independent of order)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float32

from mechinterp.data.phantom._random import uniform
from mechinterp.data.phantom._scene import Scene, smooth

__all__ = ["drain", "ecg_leads", "line", "pacemaker", "stroke"]

Map = Float32[np.ndarray, "n height width"]


def stroke(canvas: Map, x: np.ndarray, v: np.ndarray, width: float) -> None:
    """Draw curves (points `x`, `v` of shape [n, k] in image sides) into `canvas` with half-width `width` sides."""
    n, size, _ = canvas.shape
    w = max(width * size, 0.9)
    r = int(np.ceil(w)) + 1
    col, row = (x * size - 0.5).astype(np.float32), (v * size - 0.5).astype(np.float32)
    c0, r0 = np.floor(col), np.floor(row)
    step = np.arange(-r + 1, r + 1, dtype=np.float32)
    near_c, near_r = c0[:, :, None] + step, r0[:, :, None] + step
    d2 = ((near_r - row[:, :, None]) ** 2)[..., None] + ((near_c - col[:, :, None]) ** 2)[:, :, None]
    value = 1.0 - d2 * np.float32(1.0 / (w + 0.5) ** 2)
    inside = ((near_r >= 0) & (near_r < size))[..., None] & ((near_c >= 0) & (near_c < size))[:, :, None]
    keep = inside & (value > 0)
    start = np.arange(n)[:, None, None] * size
    flat = ((start + near_r.astype(np.int64)) * size)[..., None] + near_c.astype(np.int64)[:, :, None]
    np.maximum.at(canvas.reshape(-1), flat[keep], value[keep])


@lru_cache(maxsize=64)
def _spline(knots: int, samples: int) -> np.ndarray:
    """Weights [knot, sample] of a Catmull-Rom spline through the knots, its ends extended straight on."""
    t = np.linspace(0, knots - 1 - 1e-9, samples)
    i, u = t.astype(int), t - t.astype(int)
    pieces = (-u + 2 * u**2 - u**3, 2 - 5 * u**2 + 3 * u**3, u + 4 * u**2 - 3 * u**3, -(u**2) + u**3)
    padded = np.zeros((knots + 2, samples))
    for k, piece in enumerate(pieces):
        padded[i + k, np.arange(samples)] += 0.5 * piece
    weights = padded[1:-1].copy()
    for inner, outer, first, second in ((0, 0, 0, 1), (-1, -1, -1, -2)):
        weights[first] += 2 * padded[outer]
        weights[second] -= padded[inner]
    return weights


def _curve(points: Sequence[np.ndarray], samples: int) -> np.ndarray:
    """The spline through coordinates `points` (each [n]), as [n, samples]."""
    weights = _spline(len(points), samples)
    out = points[0][:, None] * weights[0]
    for point, weight in zip(points[1:], weights[1:], strict=True):
        out += point[:, None] * weight
    return out


class _Pen:
    """Positions for one chunk: midline x -> image x, and per-image random offsets."""

    def __init__(self, s: Scene, seed: int, name: str):
        self.s, self.seed, self.name, self.drawn = s, seed, name, 0
        self.canvas = np.zeros((len(s), s.size, s.size), np.float32)
        self.samples = int(1.1 * s.size)

    def p(self, name: str) -> np.ndarray:
        return self.s.p[name].ravel().astype(np.float64)

    def jitter(self, spread: float) -> np.ndarray:
        self.drawn += 1
        return spread * (2 * uniform(self.seed, f"{self.name}/{self.drawn}", self.s.f["image"]) - 1)

    def path(self, points: list, width: float, share: float = 1.0) -> None:
        cx = self.p("cx")
        samples = int(self.samples * share)
        x, v = _curve([cx + px for px, _ in points], samples), _curve([cx * 0 + pv for _, pv in points], samples)
        stroke(self.canvas, x, v, width)


def drain(s: Scene, seed: int) -> Map:
    """A chest drain: from the lateral wall up into the pleural space; a tube with a dense stripe."""
    pen = _Pen(s, seed, "drain")
    sign = np.where(s.f["drain_side"] == 1, 1.0, -1.0)
    hw, apex, dome = pen.p("hw"), pen.p("apex"), pen.p("dome")
    enter = dome - 0.10 + pen.jitter(0.04)
    tip = apex + 0.13 + pen.jitter(0.05)
    points = [
        (sign * 0.50, enter + 0.06),
        (sign * (hw + 0.03), enter),
        (sign * (hw - 0.055 + pen.jitter(0.015)), (enter * 0.6 + tip * 0.4)),
        (sign * (0.205 + pen.jitter(0.03)), tip),
    ]
    pen.path(points, 0.0125)
    return pen.canvas


def pacemaker(s: Scene, seed: int) -> Map:
    """A generator below the clavicle and two leads to the right atrium and ventricle."""
    pen = _Pen(s, seed, "pacemaker")
    sign = np.where(s.f["pacemaker_side"] == 1, 1.0, -1.0)
    apex, dome = pen.p("apex"), pen.p("dome")
    gx, gv = 0.320 + pen.jitter(0.012), apex + 0.090 + pen.jitter(0.015)
    dx = (s.x - (sign * gx)[:, None, None].astype(np.float32)) / np.float32(0.056)
    dv = (s.v - gv[:, None, None].astype(np.float32)) / np.float32(0.043)
    box = smooth((1.0 - (dx**4 + dv**4)) * 2.5)
    start = (sign * (gx - 0.02), gv - 0.03)
    vein = (sign * 0.13, apex + 0.045)
    cava = (-0.030 + 0 * gx, apex + 0.20)
    atrium = [start, vein, cava, (-0.055 + 0 * gx, dome - 0.17), (-0.035 + 0 * gx, dome - 0.20)]
    ventricle = [start, vein, cava, (-0.02 + 0 * gx, dome - 0.10), (0.085 + pen.jitter(0.01), dome - 0.045)]
    pen.path(atrium, 0.0055)
    pen.path(ventricle, 0.0055)
    # the generator is denser than the leads: 1 against 0.6
    return np.maximum(box, 0.6 * pen.canvas)


def ecg_leads(s: Scene, seed: int) -> Map:
    """Three electrodes and their thin wires, leaving below or at the side."""
    pen = _Pen(s, seed, "ecg_leads")
    apex, dome = pen.p("apex"), pen.p("dome")
    exit_x = 0.10 + pen.jitter(0.22)
    spots = [(-0.255, apex + 0.07), (0.265, apex + 0.085), (0.285, dome - 0.02)]
    for x0, v0 in spots:
        ex, ev = x0 + pen.jitter(0.03), v0 + pen.jitter(0.025)
        half = ((ex * 0.4 + exit_x * 0.6) + pen.jitter(0.07), ev * 0.45 + 0.55 + pen.jitter(0.02))
        pen.path(
            [(ex, ev), ((ex * 0.8 + exit_x * 0.2) + pen.jitter(0.04), ev + 0.14), half, (exit_x, 1.02)], 0.0042, 0.9
        )
        turn = np.linspace(0, 2 * np.pi, 28)[None, :]
        cx = pen.p("cx")[:, None]
        stroke(pen.canvas, cx + ex[:, None] + 0.017 * np.cos(turn), ev[:, None] + 0.017 * np.sin(turn), 0.007)
    return pen.canvas


def line(s: Scene, seed: int) -> Map:
    """A central line: from the neck along the great vein, its tip in the superior vena cava."""
    pen = _Pen(s, seed, "line")
    sign = np.where(s.f["line_side"] == 1, 1.0, -1.0)
    apex = pen.p("apex")
    points = [
        (sign * (0.115 + pen.jitter(0.015)), apex * 0 - 0.02),
        (sign * (0.085 + pen.jitter(0.01)), apex - 0.05),
        (np.where(sign > 0, 0.03, -0.048) + pen.jitter(0.004), apex + 0.07),
        (-0.045 + pen.jitter(0.005), apex + 0.17),
        (-0.040 + pen.jitter(0.005), apex + 0.235 + pen.jitter(0.02)),
    ]
    pen.path(points, 0.0068)
    return pen.canvas
