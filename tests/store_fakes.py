"""A model and a data folder of a few lines, for tests of the store and of training that need no transformers model."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch

from mechinterp.types import ImageTextBatch

GRID, D, LAYERS = 4, 16, 3
RESID = [f"vision.blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]


class FakeModel:
    """A vision tower: CLS and 16 patch tokens, three blocks, a pooled vector. `ran` counts the blocks that ran."""

    family = "vit"

    def __init__(self, seed: int = 0, delay: float = 0.0):
        generator = torch.Generator().manual_seed(seed)
        self.embed = torch.randn(16, D, generator=generator)
        self.blocks = [torch.randn(D, D, generator=generator) / 4 for _ in range(LAYERS)]
        self.sha256 = hashlib.sha256(self.embed.numpy().tobytes()).hexdigest()
        self.ran, self.delay, self.active = 0, delay, {}

    def sites(self, pattern="*"):
        return [*RESID, "vision.blocks.0.attn.hook_z", "vision.blocks.0.attn.hook_pattern", "vision.hook_pooled"]

    def preprocess(self, pixels, texts=None, ids=()):
        return ImageTextBatch(torch.from_numpy(pixels)[:, None], ids=tuple(ids))

    def patch_tokens(self, batch):
        return slice(1, None)

    @contextmanager
    def hooks(self, fwd_hooks):
        self.active = dict(fwd_hooks)
        try:
            yield self
        finally:
            self.active = {}

    def _point(self, name, value):
        if name in self.active:
            self.active[name](value, SimpleNamespace(name=name))
        return value

    def forward(self, batch):
        if self.delay:
            import time

            time.sleep(self.delay)
        size = batch.pixel_values.shape[-1] // GRID
        patches = batch.pixel_values.unfold(2, size, size).unfold(3, size, size).flatten(4).flatten(2, 3)[:, 0]
        x = patches @ self.embed[: patches.shape[-1]]
        x = torch.cat([x.mean(1, keepdim=True), x], 1)
        self._point("vision.blocks.0.attn.hook_z", x.unflatten(2, (4, 4)))
        self._point("vision.blocks.0.attn.hook_pattern", torch.ones(len(x), 2, 17, 17))
        for name, block in zip(RESID, self.blocks, strict=True):
            self.ran += 1
            x = self._point(name, x + torch.tanh(x @ block))
        return self._point("vision.hook_pooled", x[:, 0])


class FakeData:
    """`n` random 16 px images of two-image patients; 70 % train, 15 % val, 15 % test."""

    def __init__(self, n: int = 40, seed: int = 0):
        self._pixels = np.random.default_rng(seed).random((n, 16, 16), np.float32)
        self.images = tuple(f"image{i:03d}.png" for i in range(n))
        self.patients = tuple(f"p{i // 2}" for i in range(n))
        share = np.arange(n) / n
        self.split = np.where(share < 0.7, "train", np.where(share < 0.85, "val", "test"))
        self.sha256 = hashlib.sha256(self._pixels.tobytes()).hexdigest()

    def __len__(self):
        return len(self.images)

    def pixels(self, rows, size=None):
        return self._pixels[np.asarray(rows)]


def hashes(folder) -> dict[str, str]:
    """sha256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
