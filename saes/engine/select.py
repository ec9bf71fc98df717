"""From rows to codes: the dense encoder product, and which of its entries are in play.

The product is made a block of rows at a time, so that it never leaves the cache before its entries are chosen. On a
CPU `torch.topk` over a whole row costs more than half of the product itself; here

- top k of each row: the maxima of some 2k groups of latents are taken (vectorised), and the k-th largest of them is a
  lower bound of the k-th largest entry. Few more than k entries reach it, and the exact choice is made among those;
- top k of the batch: entries above a guess (what the last batch's bound says, lowered) are collected, and the exact
  bound is found among them. A guess that was too high is lowered and the product made again.

Either way the choice is the one that `torch.topk` makes, up to ties. The guess changes the time, never the result.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saes.engine.codes import SparseCodes
from saes.engine.product import product

__all__ = ["Encoder"]

LEAST = 512
"""Rows that a block has at least on a CPU: the product then runs at full speed."""

ENTRIES = 2**22
"""Entries of a block where that is more rows: 16 MiB, which a last-level cache holds."""

MARGIN = 0.9
"""How far below the last batch's bound the guess is."""


class Encoder:
    """`x @ W.T` in blocks, with its buffers and the last bound kept between steps."""

    def __init__(self):
        self._buffer = torch.empty(0, 0)
        self._scaled = torch.empty(0, 0)
        self._guess = -1.0

    def row_topk(
        self,
        x: Float[Tensor, "row d"],
        W: Float[Tensor, "latent d"],
        b: Float[Tensor, " latent"],
        gain: Float[Tensor, " latent"],
        k: int,
    ) -> tuple[SparseCodes, Float[Tensor, " code"]]:
        """The `k` largest entries of each row of `(x @ W.T + b) * gain` and their values, those that are positive."""
        width, d = W.shape
        if self._scaled.shape != (width, d + 1) or self._scaled.device != W.device:
            self._scaled = W.new_empty(width, d + 1)
        torch.mul(W, gain[:, None], out=self._scaled[:, :d])
        torch.mul(b, gain, out=self._scaled[:, d])  # a column of ones in x takes b along in the product
        x, W = torch.cat([x, x.new_ones(len(x), 1)], dim=1), self._scaled
        found = [_row_topk(block, k) for _, block in self._blocks(x, W)]
        firsts = torch.arange(len(found)) * _rows_of_block(x, len(W))
        row = torch.cat([row + first for (row, _, _), first in zip(found, firsts.tolist(), strict=True)])
        latent, value = torch.cat([f[1] for f in found]), torch.cat([f[2] for f in found])
        return SparseCodes(row, latent, len(x), len(W)), value

    def batch_topk(
        self,
        x: Float[Tensor, "row d"],
        W: Float[Tensor, "latent d"],
        b: Float[Tensor, " latent"],
        gain: Float[Tensor, " latent"],
        k: int,
    ) -> tuple[SparseCodes, Float[Tensor, " code"]]:
        """The `k * rows` largest entries of `(x @ W.T + b) * gain` and their values, those that are positive.

        `b` and `gain` (not negative) enter the bound of each latent and the values that pass it, never the product.
        """
        wanted = k * len(x)
        guess = self._guess if self._guess >= 0 else self._first_guess(x, W, b, gain, k)
        while True:
            found = self._exceeding(x, W, b, guess / gain.clamp(min=1e-30))
            assert found is not None  # no share was asked for
            row, latent, value = found
            value *= gain[latent]
            if len(value) >= wanted or guess <= 0:
                break
            guess = guess * 0.5 if guess > 1e-3 else 0.0
        keep = value > 0
        bound = _kth_largest(value, wanted) if len(value) > wanted else 0.0
        if bound > 0:
            keep = value > bound
            ties = (value == bound).nonzero()[:, 0][: wanted - int(keep.sum())]
            keep[ties] = True
        row, latent, value = row[keep], latent[keep], value[keep]
        self._guess = 0.0 if len(value) < wanted else float(value.min()) * MARGIN
        return SparseCodes(row, latent, len(x), len(W)), value

    def above(
        self,
        x: Float[Tensor, "row d"],
        W: Float[Tensor, "latent d"],
        b: Float[Tensor, " latent"],
        bound: Float[Tensor, " latent"],
        share: float,
    ) -> tuple[SparseCodes | None, Float[Tensor, " code"] | Float[Tensor, "row latent"]]:
        """Entries above their latent's bound; if more than `share` of all are, the dense product and no codes."""
        found = self._exceeding(x, W, b, bound, share)
        if found is None:
            return None, torch.addmm(b, x, W.T)
        row, latent, value = found
        return SparseCodes(row, latent, len(x), len(W)), value

    def _first_guess(self, x: Tensor, W: Tensor, b: Tensor, gain: Tensor, k: int) -> float:
        """A bound that some `k` entries a row exceed, from the first rows of the batch."""
        part = x[: _rows_of_block(x, len(W))]
        entries = torch.addmm(b, part, W.T).mul_(gain).reshape(-1)
        return max(0.0, MARGIN * _kth_largest(entries, min(len(entries), k * len(part))))

    def _exceeding(
        self, x: Tensor, W: Tensor, b: Tensor, bound: Float[Tensor, " latent"], share: float = 1.0
    ) -> tuple[Int64[Tensor, " code"], Int64[Tensor, " code"], Float[Tensor, " code"]] | None:
        """Row, latent and value of the entries of `x @ W.T + b` above their latent's bound.

        None if a block has more than a share of them. The product goes without `b`, which moves the bound instead.
        """
        flats, values = [], []
        for first, block in self._blocks(x, W):
            flat = _flatnonzero(block, bound - b)
            if len(flat) > share * block.numel():
                return None
            flats.append(flat + first * len(W))
            values.append(block.reshape(-1)[flat])
        row, latent = _unravel(torch.cat(flats), len(x), len(W))
        return row, latent, torch.cat(values).add_(b[latent])

    def _blocks(self, x: Tensor, W: Tensor) -> Iterator[tuple[int, Float[Tensor, "block latent"]]]:
        """First row of each block, and its entries of `x @ W.T`; a block is overwritten by the next."""
        rows = _rows_of_block(x, len(W))
        if self._buffer.shape != (rows, len(W)) or self._buffer.device != x.device:
            self._buffer = torch.empty(rows, len(W), device=x.device)
        for first in range(0, len(x), rows):
            part = x[first : first + rows]
            yield first, product(part, W, self._buffer[: len(part)])


def _rows_of_block(x: Tensor, width: int) -> int:
    return min(len(x), max(LEAST, ENTRIES // width)) if x.device.type == "cpu" else len(x)


def _row_topk(block: Float[Tensor, "row latent"], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, latent and value of the positive ones among each row's `k` largest, by row and latent."""
    rows, width = block.shape
    if block.device.type == "cpu" and width >= 8 * k:
        row, latent, value = _refined(block, k)
        return torch.from_numpy(row), torch.from_numpy(latent), torch.from_numpy(value)
    latent = block.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    value = block.gather(1, latent)
    positive = value > 0
    row = torch.arange(rows, device=block.device)[:, None].expand(rows, k)
    return row[positive], latent[positive], value[positive]


def _refined(block: Float[Tensor, "row latent"], k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same, chosen among the entries that reach a lower bound of their row's `k`-th largest.

    In numpy, whose `partition` is six times as fast as torch's `topk` here. Raises FloatingPointError on a NaN.
    """
    rows, width = block.shape
    groups = 2 * k
    maxima = block[:, : width // groups * groups].view(rows, -1, groups).amax(1)
    if bool(maxima.isnan().any()):
        raise FloatingPointError("an encoder pre-activation is not a number")
    flat = np.flatnonzero(np.greater_equal(block.numpy(), _kth_of_rows(maxima.numpy(), k)[:, None]))
    value = block.numpy().reshape(-1)[flat]
    starts = np.searchsorted(flat, np.arange(rows + 1) * width)
    row = np.repeat(np.arange(rows), starts[1:] - starts[:-1])
    table = np.full((rows, int((starts[1:] - starts[:-1]).max())), -np.inf, np.float32)
    table.reshape(-1)[np.arange(len(flat)) + (np.arange(rows) * table.shape[1] - starts[:-1])[row]] = value
    least = _kth_of_rows(table, k)[row]
    keep = (value >= least) & (value > 0)
    if int(np.add.reduceat(keep, starts[:-1], dtype=np.int64).max()) > k:
        keep = _without_surplus(keep, value == least, starts[:-1], row, k)
    row = row[keep]
    return row, flat[keep] - row * width, value[keep]


def _without_surplus(keep: np.ndarray, ties: np.ndarray, starts: np.ndarray, row: np.ndarray, k: int) -> np.ndarray:
    """Of the entries that equal their row's `k`-th largest, the first ones, so that `k` are kept."""
    above = np.add.reduceat(keep & ~ties, starts, dtype=np.int64)
    number = np.cumsum(ties)
    number -= (number - ties)[starts][row]  # 1 for the first of its row
    return keep & (~ties | (number <= (k - above)[row]))


def _kth_of_rows(x: Float[np.ndarray, "row entry"], k: int) -> Float[np.ndarray, " row"]:
    at = x.shape[1] - k
    return np.partition(x, at, axis=1)[:, at]


def _flatnonzero(x: Float[Tensor, "row latent"], bound: Float[Tensor, " latent"]) -> Int64[Tensor, " code"]:
    """Flat numbers of the entries that exceed their latent's bound."""
    if x.device.type == "cpu":  # numpy's loops are twice as fast as torch's here
        return torch.from_numpy(np.flatnonzero(np.greater(x.numpy(), bound.numpy())))
    return (x > bound).reshape(-1).nonzero()[:, 0]


def _kth_largest(value: Float[Tensor, " code"], k: int) -> float:
    if value.device.type == "cpu":
        return float(np.partition(value.numpy(), len(value) - k)[len(value) - k])
    return float(value.topk(k, sorted=False).values.min())


def _unravel(flat: Int64[Tensor, " code"], rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Row and latent of flat numbers in increasing order; without a division for each."""
    starts = torch.searchsorted(flat, torch.arange(rows + 1, device=flat.device) * width)
    row = torch.repeat_interleave(torch.arange(rows, device=flat.device), starts.diff())
    return row, flat - row * width
