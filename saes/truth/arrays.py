"""An activation store of rows that no image model made, so that everything which reads stores can read them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped

from mechinterp.activations import ActivationStore, extract
from mechinterp.types import ImageTextBatch

__all__ = ["SITE", "store_of"]

SITE = "vision.hook_pooled"


def store_of(
    rows: Float[np.ndarray, "row d"],
    split: Sequence[str] | Shaped[np.ndarray, " row"],
    folder: Path | str,
    patients: Sequence[str] | None = None,
) -> ActivationStore:
    """Write `rows` to a store at `SITE`, one row an "image".

    Args:
        rows: what to store.
        split: train, val or test of each row.
        folder: of the store.
        patients: of each row; default: every row its own.
    """
    return extract(_Through(), _Rows(rows, split, patients), [SITE], folder, tokens="all", batch_size=4096)


class _Through:
    """A "model" that passes at `SITE` what it is given."""

    family = "vit"
    sha256 = hashlib.sha256(b"rows as they are").hexdigest()

    def __init__(self) -> None:
        self._hooks: dict[str, Any] = {}

    def sites(self, pattern: str = "*") -> list[str]:
        return [SITE]

    def preprocess(self, pixels: np.ndarray, texts: Any = None, ids: Sequence[str] = ()) -> ImageTextBatch:
        return ImageTextBatch(torch.from_numpy(np.ascontiguousarray(pixels, np.float32))[:, None], ids=tuple(ids))

    def patch_tokens(self, batch: Any = None) -> slice:
        return slice(0, None)

    @contextmanager
    def hooks(self, fwd_hooks: Any):
        self._hooks = dict(fwd_hooks)
        try:
            yield self
        finally:
            self._hooks = {}

    def forward(self, batch: ImageTextBatch) -> torch.Tensor:
        value = batch.pixel_values[:, 0, 0]
        for name, hook in self._hooks.items():
            hook(value, SimpleNamespace(name=name))
        return value


class _Rows:
    """Rows as "images" of one line of pixels."""

    def __init__(self, rows: np.ndarray, split: Any, patients: Sequence[str] | None):
        self._rows = np.asarray(rows, np.float32)
        self.images = tuple(f"row{i:07d}" for i in range(len(rows)))
        self.patients = self.images if patients is None else tuple(patients)
        self.split = np.asarray(split, dtype=str)
        digest = hashlib.sha256(np.ascontiguousarray(self._rows).tobytes())
        digest.update("\n".join([*self.patients, *self.split]).encode())
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def pixels(self, rows: Any, size: int | None = None) -> np.ndarray:
        return self._rows[np.asarray(rows)][:, None, :]
