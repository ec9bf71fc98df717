"""From rows to codes: the dense encoder product, and which of its entries are in play.

The product is made in tiles (`product.py`), so that it never leaves the cache before its entries are chosen. On a CPU
`torch.topk` over a whole row costs more than half of the product itself; here

- top k of each row: the maxima of some groups of latents are taken (vectorised), and the k-th largest of them is a
  lower bound of the k-th largest entry, which rises from tile to tile. Few more than k entries reach it, and the exact
  choice is made among those;
- top k of the batch: entries above a guess (what the last batch's bound says, lowered) are collected, and the exact
  bound is found among them. A guess that was too high is lowered and the product made again.

Either way the choice is the one that `torch.topk` makes, up to ties. The guess changes the time, never the result.

Where the processor multiplies in bf16, the product of the tiles is one of upper bounds in bf16 (`screen.py`), which has
half the bytes and takes half the time; what reaches a bound there is multiplied again, exactly, and chosen among.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int16, Int64
from torch import Tensor

from saes.engine.codes import SparseCodes, warned
from saes.engine.product import Products, Tiles, multiplies_bf16
from saes.engine.screen import ROUNDED, Screen, bits_below, from_bits

__all__ = ["Encoder"]

Found = tuple[Int64[Tensor, " code"], Int64[Tensor, " code"], Float[Tensor, " code"]]
"""Rows, latents and values of codes, by row and latent."""

GROUPS = 4
"""Groups of latents for each entry that is wanted of a row: with more, fewer entries reach the bound."""

SAMPLE = 512
"""Rows that a first guess is made from."""

MARGIN = 0.9
"""How far below the last batch's bound the guess is."""


class Encoder:
    """The choice among the entries of `x @ W.T`, with its buffers and the last bound kept between steps."""

    def __init__(self):
        warned()
        self._products = Products()
        self._scaled = torch.empty(0, 0)
        self._guess = -1.0
        self._kept: dict[str, Tensor] = {}

    def kept(self, name: str, like: Tensor) -> Tensor:
        """Room for a tensor of that shape, the same memory in each step."""
        if name not in self._kept or self._kept[name].shape != like.shape or self._kept[name].device != like.device:
            self._kept[name] = torch.empty_like(like)
        return self._kept[name]

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
        found = self._screened_topk(x, W, b, gain, k) if _screened(x) and width >= 8 * k else None
        if found is not None:
            return SparseCodes(*found[:2], len(x), width), found[2]
        if self._scaled.shape != (width, d + 1) or self._scaled.device != W.device:
            self._scaled = W.new_empty(width, d + 1)
        torch.mul(W, gain[:, None], out=self._scaled[:, :d])
        torch.mul(b, gain, out=self._scaled[:, d])  # a column of ones in x takes b along in the product
        x, W = torch.cat([x, x.new_ones(len(x), 1)], dim=1), self._scaled
        refined = x.device.type == "cpu" and width >= 8 * k
        choose, least = (_refined, 8 * k) if refined else (_by_topk, width)
        found = self._products.each(x, W, lambda first, rows, tiles: choose(first, rows, tiles, k), least)
        assert found is not None  # none was refused
        row, latent, value = _joined(found)
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
        screen = Screen(x, W, b, gain) if _screened(x) else None
        while True:
            found = self._above_guess(x, W, b, gain, guess, screen)
            row, latent, value = found
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
        """Entries above their latent's bound; the dense product and no codes if some rows have over `share` of them."""
        found = self._exceeding(x, W, b, bound, share)
        if found is None:
            return None, torch.addmm(b, x, W.T)
        row, latent, value = found
        return SparseCodes(row, latent, len(x), len(W)), value

    def _screened_topk(self, x: Tensor, W: Tensor, b: Tensor, gain: Tensor, k: int) -> Found | None:
        """As `row_topk`; None if too few upper bounds of a row are positive to tell."""
        screen = Screen(x, W, b, gain)
        slack = screen.slack.numpy()

        def choose(first: int, rows: int, tiles: Tiles) -> Found | None:
            here = slice(first, first + rows)
            near = _near(rows, tiles, k, slack[here])
            if near is None:
                return None
            row, latent = near
            value = _exact(x[here], W, b, gain, row, latent)
            keep = _kept(row, value, rows, k)
            return _tensors(row.take(keep) + first, latent.take(keep), value.take(keep))

        found = self._products.each(screen.rows, screen.latents, choose, 8 * k)
        return None if found is None else _joined(found)

    def _above_guess(self, x: Tensor, W: Tensor, b: Tensor, gain: Tensor, guess: float, screen: Screen | None) -> Found:
        """Row, latent and value of the entries of `(x @ W.T + b) * gain` above a guess."""
        if screen is None or guess <= 0:
            # bounds of both signs have no order as bits; every value is made by `_exact` all the same, as a run that
            # goes on from a checkpoint may have another guess and has to end in the same bytes
            least = guess if screen is None else -float(screen.slack.max())
            found = self._exceeding(x, W, b, least / gain.clamp(min=1e-30))
            assert found is not None  # no share was asked for
            row, latent, value = found
            if screen is None:
                return row, latent, value.mul_(gain.index_select(0, latent))
            value = torch.from_numpy(_exact(x, W, b, gain, row.numpy(), latent.numpy()))
            return row[value > 0], latent[value > 0], value[value > 0]
        bound = bits_below(np.asarray(guess, np.float32))

        def exceeding(first: int, rows: int, tiles: Tiles) -> Found:
            found = []
            for begin, tile in tiles:
                flat = _where(np.greater_equal(_bits(tile), bound))
                row = _rows(flat, rows, tile.shape[1])
                found.append((row, flat - row * tile.shape[1] + begin))
            row, latent = _by_row(found)
            value = _exact(x[first : first + rows], W, b, gain, row, latent)
            keep = np.flatnonzero(value > guess)
            return _tensors(row.take(keep) + first, latent.take(keep), value.take(keep))

        found = self._products.each(screen.rows, screen.latents, exceeding)
        assert found is not None  # none was refused
        return _joined(found)

    def _first_guess(self, x: Tensor, W: Tensor, b: Tensor, gain: Tensor, k: int) -> float:
        """A bound that some `k` entries a row exceed, from the first rows of the batch."""
        part = x[:SAMPLE]
        entries = torch.addmm(b, part, W.T).mul_(gain).reshape(-1)
        return max(0.0, MARGIN * _kth_largest(entries, min(len(entries), k * len(part))))

    def _exceeding(
        self, x: Tensor, W: Tensor, b: Tensor, bound: Float[Tensor, " latent"], share: float = 1.0
    ) -> Found | None:
        """Row, latent and value of the entries of `x @ W.T + b` above their latent's bound.

        None if some rows have more than a share of theirs. The product goes without `b`, which moves the bound instead.
        """
        width = len(W)

        def exceeding(first: int, rows: int, tiles: Tiles) -> Found | None:
            found, count = [], 0
            for begin, tile in tiles:
                flat = _flatnonzero(tile, (bound - b)[begin : begin + tile.shape[1]])
                count += len(flat)
                if count > share * rows * width:
                    return None
                row, latent = _unravel(flat, rows, tile.shape[1])
                found.append((row + first, latent + begin, tile.reshape(-1).take(flat)))
            return found[0] if len(found) == 1 else _tensors(*_by_row([[p.numpy() for p in parts] for parts in found]))

        found = self._products.each(x, W, exceeding)
        if found is None:
            return None
        row, latent, value = _joined(found)
        return row, latent, value.add_(b.index_select(0, latent))


def _joined(found: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """What several ranges of rows gave, as one."""
    row, latent, value = (torch.cat(parts) for parts in zip(*found, strict=True))
    return row, latent, value


def _screened(x: Tensor) -> bool:
    """Whether a product in bf16 comes first."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and multiplies_bf16()


def _near(
    rows: int, tiles: Tiles, k: int, slack: Float[np.ndarray, " row"]
) -> tuple[Int64[np.ndarray, " code"], Int64[np.ndarray, " code"]] | None:
    """Rows and latents, sorted by both, among which the `k` largest entries of each row are, by upper bounds.

    The k-th largest upper bound, less what upper bounds can be too high, is a lower bound of the k-th largest entry.
    None if it is not positive for some row.
    """
    largest, found = np.empty((rows, 0), np.int16), []
    for begin, tile in tiles:
        bits = _bits(tile)
        largest = _largest(np.concatenate([largest, _maxima(bits, k)], axis=1), k)
        least = bits_below(from_bits(largest[:, 0]) * np.float32(1 - ROUNDED) - slack)
        if least.min() < 0:
            return None
        flat = _where(np.greater_equal(bits, least[:, None]))
        row = _rows(flat, rows, tile.shape[1])
        found.append((row, flat - row * tile.shape[1] + begin, bits.reshape(-1).take(flat)))
    if len(found) > 1:  # the bound has risen since
        reach = [np.flatnonzero(bits >= least.take(row)) for row, _, bits in found]
        found = [[part.take(at) for part in parts] for parts, at in zip(found, reach, strict=True)]
    row, latent, _ = _by_row(found)
    return row, latent


def _exact(
    x: Float[Tensor, "row d"],
    W: Float[Tensor, "latent d"],
    b: Float[Tensor, " latent"],
    gain: Float[Tensor, " latent"],
    row: Int64[np.ndarray, " code"],
    latent: Int64[np.ndarray, " code"],
) -> Float[np.ndarray, " code"]:
    """Some entries of `(x @ W.T + b) * gain`."""
    codes = SparseCodes(torch.from_numpy(row), torch.from_numpy(latent), len(x), len(W))
    return codes.pair(x, W).add_(codes.take(b)).mul_(codes.take(gain)).numpy()


def _bits(tile: Tensor) -> Int16[np.ndarray, "row latent"]:
    return tile.view(torch.int16).numpy()


def _by_topk(first: int, rows: int, tiles: Tiles, k: int) -> Found:
    """Row, latent and value of the positive ones among each row's `k` largest, by row and latent.

    There are `rows` rows from number `first` on, whose entries are one tile.
    """
    [(_, tile)] = tiles
    latent = tile.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    value = tile.gather(1, latent)
    positive = value > 0
    row = torch.arange(first, first + rows, device=tile.device)[:, None].expand(rows, k)
    return row[positive], latent[positive], value[positive]


def _refined(first: int, rows: int, tiles: Tiles, k: int) -> Found:
    """The same of any tiles, chosen among the entries that reach a lower bound of their row's `k`-th largest.

    In numpy, whose `partition` is six times as fast as torch's `topk` here. Raises FloatingPointError on a NaN.
    """
    largest, found = np.empty((rows, 0), np.float32), []
    for begin, tile in tiles:
        largest = _largest(np.concatenate([largest, _maxima(tile.numpy(), k)], axis=1), k)
        if np.isnan(largest.sum()):
            raise FloatingPointError("an encoder pre-activation is not a number")
        flat = _where(np.greater_equal(tile.numpy(), largest[:, :1]))
        row = _rows(flat, rows, tile.shape[1])
        found.append((row, flat - row * tile.shape[1] + begin, tile.numpy().reshape(-1).take(flat)))
    if len(found) > 1:  # the bound has risen since
        reach = [np.flatnonzero(value >= largest[:, 0].take(row)) for row, _, value in found]
        found = [[part.take(at) for part in parts] for parts, at in zip(found, reach, strict=True)]
    row, latent, value = _by_row(found)
    keep = _kept(row, value, rows, k)
    return _tensors(row.take(keep) + first, latent.take(keep), value.take(keep))


def _maxima(tile: np.ndarray, k: int) -> np.ndarray:
    """Of some 4 k groups of latents, or of groups of 4. By torch, whose loop is the faster one."""
    rows, width = tile.shape
    groups = min(GROUPS * k, max(1, width // 4))
    return torch.from_numpy(tile)[:, : width // groups * groups].view(rows, -1, groups).amax(1).numpy()


def _kept(row: np.ndarray, value: np.ndarray, rows: int, k: int) -> np.ndarray:
    """Which entries, sorted by row, are positive and among the `k` largest of their row. Rows have at least `k`."""
    starts = np.searchsorted(row, np.arange(rows + 1))
    table = np.full((rows, int((starts[1:] - starts[:-1]).max())), -np.inf, np.float32)
    table.reshape(-1)[np.arange(len(row)) + (np.arange(rows) * table.shape[1] - starts[:-1]).take(row)] = value
    least = _largest(table, k)[:, 0].take(row)
    keep = (value >= least) & (value > 0)
    if int(np.add.reduceat(keep, starts[:-1], dtype=np.int64).max()) > k:
        keep = _without_surplus(keep, value == least, starts[:-1], row, k)
    return np.flatnonzero(keep)


def _without_surplus(keep: np.ndarray, ties: np.ndarray, starts: np.ndarray, row: np.ndarray, k: int) -> np.ndarray:
    """Of the entries that equal their row's `k`-th largest, the first ones, so that `k` are kept."""
    above = np.add.reduceat(keep & ~ties, starts, dtype=np.int64)
    number = np.cumsum(ties)
    number -= (number - ties)[starts][row]  # 1 for the first of its row
    return keep & (~ties | (number <= (k - above)[row]))


def _largest(x: np.ndarray, k: int) -> np.ndarray:
    """The `k` largest of each row, the least of them first; the others in no order."""
    at = x.shape[1] - k
    return np.partition(x, at, axis=1)[:, at:]


def _rows(flat: np.ndarray, rows: int, width: int) -> np.ndarray:
    """Rows of flat numbers in increasing order; without a division for each."""
    starts = np.searchsorted(flat, np.arange(rows + 1) * width)
    return np.repeat(np.arange(rows), starts[1:] - starts[:-1])


def _by_row(found: Sequence[Sequence[np.ndarray]]) -> Sequence[np.ndarray]:
    """Rows, latents and values of several tiles of the same rows, by row and latent; each is sorted already."""
    if len(found) == 1:
        return found[0]
    parts = [np.concatenate(part) for part in zip(*found, strict=True)]
    row = parts[0]
    short = (row - row.min(initial=0)).astype(np.uint16) if len(row) else row  # sorted by counting, in linear time
    order = np.argsort(short, kind="stable")
    return [part.take(order) for part in parts]


def _tensors(row: np.ndarray, latent: np.ndarray, value: np.ndarray) -> Found:
    return torch.from_numpy(row), torch.from_numpy(latent), torch.from_numpy(value)


def _flatnonzero(x: Float[Tensor, "row latent"], bound: Float[Tensor, " latent"]) -> Int64[Tensor, " code"]:
    """Flat numbers of the entries that exceed their latent's bound."""
    if x.device.type == "cpu":  # numpy's loops are twice as fast as torch's here
        return torch.from_numpy(_where(np.greater(x.numpy(), bound.numpy())))
    return (x > bound).reshape(-1).nonzero()[:, 0]


def _where(flags: Bool[np.ndarray, "row latent"]) -> Int64[np.ndarray, " code"]:
    """Flat numbers of the flags that are set: of eight at a time first, as few are, in half of `flatnonzero`'s time."""
    flags = flags.reshape(-1)
    if np.count_nonzero(flags) > len(flags) // 16:
        return np.flatnonzero(flags)
    eights = len(flags) // 8 * 8
    some = np.flatnonzero(flags[:eights].view(np.uint64) != 0)
    inside = np.flatnonzero(flags[:eights].view(np.uint64).take(some).view(bool))
    found = (some.take(inside >> 3) << 3) + (inside & 7)
    return found if eights == len(flags) else np.concatenate([found, np.flatnonzero(flags[eights:]) + eights])


def _kth_largest(value: Float[Tensor, " code"], k: int) -> float:
    if value.device.type == "cpu":
        return float(np.partition(value.numpy(), len(value) - k)[len(value) - k])
    return float(value.topk(k, sorted=False).values.min())


def _unravel(flat: Int64[Tensor, " code"], rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Row and latent of flat numbers in increasing order; without a division for each."""
    starts = torch.searchsorted(flat, torch.arange(rows + 1, device=flat.device) * width)
    row = torch.repeat_interleave(torch.arange(rows, device=flat.device), starts.diff())
    return row, flat - row * width
