"""A relevance map as a picture and as numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import UsageError
from mechinterp.storage import atomic_path, save_tensors

__all__ = ["save_map"]


def save_map(
    relevance: Float[Tensor, "height width"], pixels: Float[np.ndarray, "rows columns"], out: Path, title: str = ""
) -> Path:
    """Write `out/map.png` (the image, the map over it, and its scale) and `out/map.safetensors` (the numbers).

    Red speaks for the target, blue against it; the colours are symmetric around 0. The map lies on the image only
    where both have one shape of frame; where preprocessing cropped the image, the two stand side by side.

    Args:
        relevance: one image's map, on the pixels that the model sees.
        pixels: the image as read, grey, in [0, 1].
        title: plain text above the picture.

    Raises UsageError when the map is not finite, StorageError when `out` cannot be written.
    """
    from matplotlib.figure import Figure

    values = relevance.detach().float().cpu().numpy()
    if not np.isfinite(values).all():
        raise UsageError("the map is not finite", where="relevance", hint="check_map says what is wrong with a map")
    rows, columns = pixels.shape
    size = (columns, rows) if abs(rows / columns - values.shape[0] / values.shape[1]) < 0.01 else values.shape[::-1]
    frame = (0, size[0], size[1], 0)
    limit = max(float(np.abs(values).max()), 1e-12)
    figure = Figure(figsize=(9, 4.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    if size == (columns, rows):
        right.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=frame)
    alpha = 0.15 + 0.7 * np.abs(values) / limit if size == (columns, rows) else None
    shown = right.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=alpha, extent=frame)
    for axes, name in ((left, "image"), (right, "relevance")):
        axes.set_axis_off()
        axes.set_title(name, fontsize=9)
    figure.colorbar(shown, ax=right, shrink=0.8, label="relevance to the score")
    figure.suptitle(title, fontsize=10, parse_math=False)
    with atomic_path(Path(out) / "map.png") as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})
    save_tensors(Path(out) / "map.safetensors", {"relevance": relevance}, {"title": title})
    return Path(out) / "map.png"
