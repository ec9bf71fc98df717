"""The dense encoder product in tiles, each handed on while it is in the cache.

A tile is some rows by some latents. With several threads each takes whole rows and works on their tiles alone, with one
thread of BLAS: what follows the product (the choice of its largest entries, in NumPy) is then shared out too, and
nothing waits between the two.

torch brings Intel's MKL, NumPy its own OpenBLAS. On AMD processors OpenBLAS does this product in about nine tenths of
MKL's time at d = 256 and 768 on Zen 3 (latents x16; at d = 128 it needs up to a tenth more) and in two thirds of it on
Zen 4, whose longer vectors MKL leaves out, so it is taken there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from threadpoolctl import ThreadpoolController
from torch import Tensor

from saes.engine.team import Team, team

__all__ = ["Products", "multiplies_bf16"]

T = TypeVar("T")

Tiles = Iterator[tuple[int, Float[Tensor, "row latent"]]]
"""Number of the first latent, and the tile; the next tile overwrites it."""

ROWS = 1024
"""Rows of a tile on a CPU, if there are as many for each thread: the product then runs at full speed."""

BYTES = 2**24
"""Size of the tiles of all threads, which a last-level cache holds."""

SMALL = 16**3
"""Of so many multiplications or fewer, torch adds up bf16 products in bf16; of more, in fp32."""


class Products:
    """`x @ W.T` in tiles. Its buffers are kept from call to call."""

    def __init__(self):
        self._buffers = torch.empty(0, 0)

    def each(
        self,
        x: Float[Tensor, "row d"],
        W: Float[Tensor, "latent d"],
        use: Callable[[int, int, Tiles], T | None],
        least: int = 1,
    ) -> list[T] | None:
        """What `use` makes of some rows, in the order of the rows.

        Args:
            x, W: what to multiply.
            use: is given the number of the first row, how many rows they are, and their tiles in the order of the
                latents. It is called by several threads at once; a torch operation in it has one thread then.
            least: how many latents a tile has at least, the last one of a row excepted.

        Returns None as soon as `use` gives None for some rows.
        """
        with team() as workers:
            return self._shared(x, W, use, least, workers)

    def _shared(
        self, x: Tensor, W: Tensor, use: Callable[[int, int, Tiles], T | None], least: int, workers: Team
    ) -> list[T] | None:
        threads = workers.size if x.device.type == "cpu" else 1
        rows, latents = _tile(x, len(W), threads, least)
        firsts = range(0, len(x), rows)
        threads = min(threads, len(firsts))
        if self._buffers.shape != (threads, rows * latents) or not _alike(self._buffers, x):
            self._buffers = x.new_empty(threads, rows * latents)
        free: SimpleQueue[Tensor] = SimpleQueue()
        for buffer in self._buffers:
            free.put(buffer)
        stopped = False

        def made(first: int) -> T | None:
            nonlocal stopped
            if stopped:
                return None
            buffer, part = free.get(), x[first : first + rows]
            try:
                found = use(first, len(part), _tiles(part, W, latents, buffer))
            finally:
                free.put(buffer)
            if found is None:  # set and never cleared: two threads may be here at once
                stopped = True
            return found

        with _one_thread_of_openblas() if _by_openblas(x, W) else nullcontext():
            found = workers.map(made, firsts)
        whole = [one for one in found if one is not None]
        return whole if len(whole) == len(found) else None


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.device, a.dtype) == (b.device, b.dtype)


def _tile(x: Tensor, width: int, threads: int, least: int) -> tuple[int, int]:
    """Rows and latents of a tile."""
    if x.device.type != "cpu":
        return len(x), width
    entries = BYTES // x.element_size() // threads
    rows = min(max(ROWS, entries // width), -(-len(x) // threads))
    return rows, min(width, max(least, entries // rows))


def _tiles(x: Float[Tensor, "row d"], W: Float[Tensor, "latent d"], latents: int, buffer: Tensor) -> Tiles:
    for first in range(0, len(W), latents):
        part = W[first : first + latents]
        yield first, _product(x, part, buffer[: len(x) * len(part)].view(len(x), len(part)))


def _product(
    x: Float[Tensor, "row d"], W: Float[Tensor, "latent d"], out: Float[Tensor, "row latent"]
) -> Float[Tensor, "row latent"]:
    """`x @ W.T`, written to `out`."""
    if _by_openblas(x, W):
        with np.errstate(all="ignore"):  # what is not finite is found by its loss
            np.matmul(x.numpy(), W.numpy().T, out=out.numpy())
        return out
    if x.dtype == torch.bfloat16 and not (multiplies_bf16() and out.numel() * x.shape[1] > SMALL):
        return out.copy_(x.float() @ W.float().T)
    return torch.mm(x, W.T, out=out)


@cache
def multiplies_bf16() -> bool:
    """Whether the processor does. The same in every run on a machine."""
    return "avx512_bf16" in _cpuinfo()


def _by_openblas(x: Tensor, W: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == W.dtype == torch.float32 and _openblas_is_faster()


@cache
def _openblas_is_faster() -> bool:
    """Whether the processor is AMD's and NumPy brings OpenBLAS. The same in every run on a machine."""
    return "AuthenticAMD" in _cpuinfo() and len(_openblas()) == 1


def _cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""


@cache
def _openblas() -> ThreadpoolController:
    pools = ThreadpoolController().select(internal_api="openblas")
    files = [pool["filepath"] for pool in pools.info() if "numpy" in pool["filepath"]]
    return pools.select(filepath=files)


def _one_thread_of_openblas():
    return _openblas().limit(limits=1)
