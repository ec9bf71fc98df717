"""Which token of the vision tower owns which pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import ModelError, UsageError
from mechinterp.models.preprocess import Preprocessor
from mechinterp.models.tables import Family

__all__ = ["Grid"]


@dataclass(frozen=True)
class Grid:
    """Patches `shape` (rows, columns) of `patch` pixels, row by row, after the CLS token where there is one."""

    shape: tuple[int, int]
    patch: tuple[int, int]
    cls: int | None
    preprocessor: Preprocessor

    @classmethod
    def of(cls, hf: Any, family: Family, preprocessor: Preprocessor) -> Grid:
        """Read it from the config; raise ModelError when the preprocessor makes images the model does not take."""
        config = getattr(hf.config, "vision_config", hf.config)
        height, width = _both(config.image_size)
        patch = _both(config.patch_size)
        if len(preprocessor.mean) != config.num_channels:
            raise ModelError(
                f"makes {len(preprocessor.mean)} channels for a model of {config.num_channels}",
                where="preprocessor_config.json",
                hint="image_mean and image_std need one value a channel",
            )
        made = preprocessor.output_size()
        if family.name == "dinov2" and made is not None:  # it interpolates its positions to any size
            height, width = made
        elif made is not None and made != (height, width):
            raise ModelError(
                f"makes images of {made[0]} x {made[1]} for a model of {height} x {width}",
                where="preprocessor_config.json",
                hint="size or crop_size belongs to another model",
            )
        return cls((height // patch[0], width // patch[1]), patch, 0 if family.has_cls else None, preprocessor)

    @property
    def tokens(self) -> slice:
        """Positions of the patch tokens."""
        first = 0 if self.cls is None else 1
        return slice(first, first + self.shape[0] * self.shape[1])

    def check(self, values: Float[Tensor, "n channel height width"]) -> None:
        """Raise UsageError when preprocessed images do not fill the grid (images of odd shape, and no crop)."""
        rows, columns = values.shape[-2] // self.patch[0], values.shape[-1] // self.patch[1]
        if (rows, columns) != self.shape:
            raise UsageError(
                f"images become {values.shape[-2]} x {values.shape[-1]} pixels, a grid of {rows} x {columns} patches",
                hint=f"the model's grid is {self.shape[0]} x {self.shape[1]}: give square images",
            )

    def owners(self, height: int, width: int) -> Int[Tensor, "height width"]:
        """Position of the token that owns each pixel of an image of this size; -1 where it is cropped away."""
        rows, columns = self.preprocessor.locate(height, width)
        row, column = (torch.floor(at / p).long() for at, p in zip((rows, columns), self.patch, strict=True))
        inside = ((row >= 0) & (row < self.shape[0]))[:, None] & ((column >= 0) & (column < self.shape[1]))[None]
        token = row[:, None] * self.shape[1] + column[None] + self.tokens.start
        return torch.where(inside, token, -1)


def _both(value: Any) -> tuple[int, int]:
    height, width = value if isinstance(value, list | tuple) else (value, value)
    return int(height), int(width)
