"""Images of several sizes, brought to one square so that they can share a batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float

from mechinterp.data import ImageData
from mechinterp.models import HookedVLM

__all__ = ["SquareData", "one_size"]

LOOKED_AT = 256


@dataclass(frozen=True, eq=False)
class SquareData(ImageData):
    """Image data whose pixels come as `side` x `side`, antialiased, unless another size is asked for."""

    side: int = 224

    def pixels(
        self, rows: slice | Iterable[int] | np.ndarray | None = None, size: int | None = None
    ) -> Float[np.ndarray, "image height width"]:
        """See ImageData.pixels."""
        return super().pixels(rows, size or self.side)


def one_size(model: HookedVLM, data: ImageData) -> ImageData:
    """`data` itself where its images have one size (the model's own preprocessing then does the rest), else squares.

    Looks at up to 256 images, evenly spread. The side is the model's input size; a note says what was done.
    """
    rows = np.unique(np.linspace(0, len(data) - 1, min(len(data), LOOKED_AT)).astype(int)) if len(data) else []
    shapes = {data.pixels([int(row)]).shape[1:] for row in rows}
    if len(shapes) <= 1:
        return data
    config = getattr(model.hf.config, "vision_config", model.hf.config)
    side = config.image_size if isinstance(config.image_size, int) else max(config.image_size)
    kept = {field.name: getattr(data, field.name) for field in fields(ImageData)}
    kept["notes"] = [*data.notes, f"images of {len(shapes)} or more sizes were resized to {side} x {side}"]
    return SquareData(**kept, side=side)
