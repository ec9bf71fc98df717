"""Where in an image a map has its mass, in words; left and right are the image's, not the patient's."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

__all__ = ["IN_BORDER", "border_share", "place_of"]

BORDER = 0.125  # of width and height: where a chest film shows marks and letters rather than the chest
IN_BORDER = 0.7


def place_of(heat: Float[np.ndarray, "rows columns"], after: str = "") -> str:
    """A non-negative map in words, `after` ("of the image") behind the zone names; "" for an empty map."""
    mass = float(heat.sum())
    if mass == 0:
        return ""
    half = np.searchsorted(np.cumsum(np.sort(heat.ravel())[::-1]), mass / 2) + 1  # patches that hold half of it
    if half / heat.size > 0.25:
        return "all over the image"
    return " and ".join(_zones(heat)) + after + (", at the border" if border_share(heat) > IN_BORDER else "")


def border_share(heat: Float[np.ndarray, "rows columns"]) -> float:
    """Share of the map's mass in the border of the image; 0 for an empty map."""
    mass, (rows, columns) = float(heat.sum()), heat.shape
    edge_y, edge_x = max(1, round(rows * BORDER)), max(1, round(columns * BORDER))
    return 1 - float(heat[edge_y : rows - edge_y, edge_x : columns - edge_x].sum()) / mass if mass else 0.0


def _zones(heat: Float[np.ndarray, "rows columns"]) -> list[str]:
    """The ninth of the image that holds most of the mass, and a second one that holds nearly as much."""
    ninths = {}
    for row, vertical in zip(np.array_split(heat, 3, axis=0), ("upper", "middle", "lower"), strict=True):
        for part, side in zip(np.array_split(row, 3, axis=1), ("left", "centre", "right"), strict=True):
            name = "centre" if (vertical, side) == ("middle", "centre") else f"{vertical} {side}"
            ninths[name] = float(part.sum())
    ranked = sorted(ninths, key=lambda name: -ninths[name])
    return [name for name in ranked[:2] if ninths[name] >= 0.6 * ninths[ranked[0]]]
