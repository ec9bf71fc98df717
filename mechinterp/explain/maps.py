"""The one signature of an explainer, and the checks that every map goes through."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import DataError, NonFiniteError
from mechinterp.models import HookedVLM
from mechinterp.types import ImageTextBatch, Target

__all__ = ["Explainer", "MapStatus", "check_map"]

MapStatus = Literal["ok", "all_zero", "constant", "non_finite"]


@runtime_checkable
class Explainer(Protocol):
    """What every explainer is: one relevance per pixel of the model's input, for one target."""

    def __call__(self, model: HookedVLM, batch: ImageTextBatch, target: Target) -> Float[Tensor, "batch height width"]:
        """Relevance of every pixel of `batch.pixel_values` (channels summed) to `model.score(batch, [target])`."""
        ...


def check_map(relevance: Float[Tensor, "height width"]) -> MapStatus:
    """What is wrong with one image's map, if anything; a map that is not "ok" explains nothing.

    "all_zero" and "constant" rank no pixel above another; metrics must report such maps and not average them away.
    """
    if not torch.isfinite(relevance).all():
        return "non_finite"
    if not relevance.any():
        return "all_zero"
    spread = relevance.max() - relevance.min()
    return "constant" if spread <= 1e-7 * relevance.abs().max() else "ok"


def grid(model: HookedVLM, batch: ImageTextBatch) -> tuple[int, int, int, int]:
    """Rows and columns of the patch grid, and height and width of a patch in pixels."""
    height, width = batch.pixel_values.shape[-2:]
    rows, columns = model.grid_shape
    if height % rows or width % columns:
        raise DataError(f"{height} x {width} pixels do not fall into {rows} x {columns} patches", where="pixel_values")
    return rows, columns, height // rows, width // columns


def finite(
    relevance: Float[Tensor, "batch height width"], batch: ImageTextBatch, method: str
) -> Float[Tensor, "batch height width"]:
    """The map, detached, in float32. Raises NonFiniteError naming the images whose map is not finite."""
    bad = ~torch.isfinite(relevance).flatten(1).all(1)
    if bad.any():
        ids = batch.ids or tuple(str(i) for i in range(len(batch)))
        images = [ids[i] for i in bad.nonzero()[:, 0].tolist()]
        raise NonFiniteError("relevance is not finite", images=images, where=method)
    return relevance.detach().float()
