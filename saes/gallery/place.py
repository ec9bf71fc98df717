"""Where in the image a feature fires, in words."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

__all__ = ["place_of"]

BORDER = 0.125  # of width and height: where a chest film shows marks and letters rather than the chest
IN_BORDER = 0.7


def place_of(heat: Float[np.ndarray, "rows columns"]) -> str:
    """A mean activation map in words; left and right are the image's, not the patient's. "" for an empty map."""
    mass = float(heat.sum())
    if mass == 0:
        return ""
    rows, columns = heat.shape
    half = np.searchsorted(np.cumsum(np.sort(heat.ravel())[::-1]), mass / 2) + 1  # patches that hold half of it
    if half / heat.size > 0.25:
        return "all over the image"
    edge_y, edge_x = max(1, round(rows * BORDER)), max(1, round(columns * BORDER))
    border = 1 - float(heat[edge_y : rows - edge_y, edge_x : columns - edge_x].sum()) / mass
    zones = {}
    for row, vertical in zip(np.array_split(heat, 3, axis=0), ("upper", "middle", "lower"), strict=True):
        for part, side in zip(np.array_split(row, 3, axis=1), ("left", "centre", "right"), strict=True):
            name = "centre" if (vertical, side) == ("middle", "centre") else f"{vertical} {side}"
            zones[name] = float(part.sum())
    ranked = sorted(zones, key=lambda name: -zones[name])
    named = [name for name in ranked[:2] if zones[name] >= 0.6 * zones[ranked[0]]]
    return " and ".join(named) + (", at the border" if border > IN_BORDER else "")
