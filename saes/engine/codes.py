"""Which latents are in play on which rows of a batch, and the four products that a training step needs of them.

A step knows its codes by support only; values live beside it, one number for each code. For top-k kinds about
`k / width` of all pairs are in play, so every product costs `rows * k * d`, not `rows * width * d`: embedding bags do
three of them, a sampled product the fourth. Where most pairs are in play (early in the training of a gated SAE) the
same four products are dense, behind the same names.
"""

from __future__ import annotations

import warnings
from functools import cache, cached_property

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from scipy.sparse import csr_array
from torch import Tensor

from saes.engine.team import around

__all__ = ["Codes", "DenseCodes", "SparseCodes", "warned"]

PART = 2**20
"""Entries of a gradient that are made at one time on a CPU: 4 MiB. A result of more than 32 MiB is new memory in each
step, whose pages the system has to find and clear; that costs as much as the sums themselves."""

NEAR = 2**20
"""Entries of a matrix whose rows can be taken in any order on a CPU: 4 MiB, which the caches near a core hold."""


class SparseCodes:
    """Pairs (row, latent), sorted by row and then by latent.

    Args:
        row, latent: of each code.
        rows, width: how many there are.
    """

    def __init__(self, row: Int64[Tensor, " code"], latent: Int64[Tensor, " code"], rows: int, width: int):
        self.row, self.latent, self.rows, self.width = row, latent, rows, width

    @cached_property
    def _ends(self) -> Int64[Tensor, " end"]:
        """Where each row starts, and where the last one ends."""
        return torch.searchsorted(self.row, torch.arange(self.rows + 1, device=self.row.device))

    @cached_property
    def _by_latent(self) -> tuple[Int64[Tensor, " code"], Int64[Tensor, " code"], Int64[Tensor, " end"]]:
        """The order of the codes by latent, their rows in it, where each latent starts, and where the last one ends."""
        if self.latent.device.type == "cpu":
            return self._counted()
        latent, order = self.latent.sort(stable=True)
        return order, self.row[order], torch.searchsorted(latent, torch.arange(self.width + 1, device=latent.device))

    def _counted(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same, by counting: as the transpose of a sparse matrix, a third of the time of sorting or less."""
        number = np.arange(len(self.latent), dtype=np.int32)
        by_row = csr_array((number, self.latent.numpy(), self._ends.numpy()), shape=(self.rows, self.width))
        by_latent = by_row.tocsc()
        order, row, ends = by_latent.data, by_latent.indices, by_latent.indptr
        return torch.from_numpy(order).long(), torch.from_numpy(row).long(), torch.from_numpy(ends).long()

    def split(self, levels: tuple[int, ...]) -> SparseCodes:
        """Each row as `len(levels)` rows, one for the latents of each level (levels are the ends of the ranges)."""
        ends = torch.tensor(levels).to(self.latent.device)
        level = torch.bucketize(self.latent, ends, right=True)
        split = SparseCodes(self.row * len(levels) + level, self.latent, self.rows * len(levels), self.width)
        order, _, ends = self._by_latent
        split._by_latent = (order, split.row.index_select(0, order), ends)
        return split

    def take(self, of_latent: Float[Tensor, " latent"]) -> Float[Tensor, " code"]:
        """What each code's latent has."""
        return of_latent.index_select(0, self.latent)

    def decode(self, value: Float[Tensor, " code"], W: Float[Tensor, "latent d"]) -> Float[Tensor, "row d"]:
        """`sum_j value_nj W_j` for each row n."""
        out = W.new_empty(self.rows, W.shape[1])
        _bags(self._ends, self.latent, W, value, out, self.rows)
        return out

    def pair(self, of_row: Float[Tensor, "row d"], W: Float[Tensor, "latent d"]) -> Float[Tensor, " code"]:
        """`<of_row_n, W_j>` for each code (n, j).

        Taken latent by latent, unless `W` is small: the rows then come from all over memory, and they are fewer bytes
        than `W`.
        """
        if W.numel() <= NEAR:
            return _sampled(self._ends, self.latent, of_row, W)
        order, row, ends = self._by_latent
        found = _sampled(ends, row, W, of_row)
        return torch.empty_like(found).scatter_(0, order, found)

    def gather(
        self, value: Float[Tensor, " code"], of_row: Float[Tensor, "row d"], out: Float[Tensor, "latent d"]
    ) -> Float[Tensor, "latent d"]:
        """`sum_n value_nj of_row_n` for each latent j, written to `out`."""
        order, row, ends = self._by_latent
        _bags(ends, row, of_row, value.index_select(0, order), out, max(1, PART // of_row.shape[1]))
        return out

    def total(self, value: Float[Tensor, " code"]) -> Float[Tensor, " latent"]:
        """`sum_n value_nj` for each latent j."""
        order, row, ends = self._by_latent
        value = value.index_select(0, order)
        return F.embedding_bag(row * 0, value.new_ones(1, 1), ends[:-1], mode="sum", per_sample_weights=value)[:, 0]

    def row_total(self, value: Float[Tensor, " code"]) -> Float[Tensor, " row"]:
        """`sum_j value_nj` for each row n."""
        one = value.new_ones(1, 1)
        return F.embedding_bag(self.latent * 0, one, self._ends[:-1], mode="sum", per_sample_weights=value)[:, 0]

    def of_rows(self, of_row: Float[Tensor, " row"]) -> Float[Tensor, " code"]:
        """What each code's row has."""
        return of_row.index_select(0, self.row)


def _bags(
    ends: Int64[Tensor, " end"],
    inside: Int64[Tensor, " code"],
    W: Float[Tensor, "n d"],
    value: Float[Tensor, " code"],
    out: Float[Tensor, "bag d"],
    most: int,
) -> None:
    """Of each bag, the sum of the rows of `W` that are inside times their values, to `out`; `most` bags at a time."""
    workers = around()
    parts = workers.parts(out, most if out.device.type == "cpu" else None)
    if len(parts) == 1:  # without a look at `ends`, for which a GPU would have to be waited for
        out.copy_(F.embedding_bag(inside, W, ends[:-1], mode="sum", per_sample_weights=value))
        return

    def make(part: slice) -> None:
        first, last = int(ends[part.start]), int(ends[part.stop])
        begin, weights = ends[part] - first, value[first:last]
        out[part] = F.embedding_bag(inside[first:last], W, begin, mode="sum", per_sample_weights=weights)

    workers.map(make, parts)


def _sampled(
    ends: Int64[Tensor, " end"], column: Int64[Tensor, " code"], A: Float[Tensor, "n d"], B: Float[Tensor, "m d"]
) -> Float[Tensor, " code"]:
    """`<A_i, B_j>` for the columns j of each row i."""
    workers = around()
    parts = workers.parts(A)
    cuts = [(0, len(column))] if len(parts) == 1 else [(int(ends[p.start]), int(ends[p.stop])) for p in parts]
    warned()
    patterns = [
        torch.sparse_csr_tensor(
            ends[part.start : part.stop + 1] - first,
            column[first:last],
            A.new_zeros(last - first),
            (part.stop - part.start, len(B)),
            check_invariants=False,
        )
        for part, (first, last) in zip(parts, cuts, strict=True)
    ]
    both = list(zip(patterns, parts, strict=True))
    return torch.cat(
        workers.map(lambda one: torch.sparse.sampled_addmm(one[0], A[one[1]], B.T, beta=0.0).values(), both)
    )


@cache
def warned() -> None:
    """Have torch say, once for all and to nobody, that CSR is in beta.

    Before threads share a step out: they share the filters of warnings too, and would leave each other's behind.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        none = torch.zeros(1, dtype=torch.long)
        torch.sparse_csr_tensor(none, none[:0], torch.zeros(0), (0, 0), check_invariants=False)


class DenseCodes:
    """Every pair (row, latent); a value is a `[row, latent]` matrix with zeros where nothing fires."""

    def __init__(self, rows: int, width: int):
        self.rows, self.width = rows, width

    def take(self, of_latent: Float[Tensor, " latent"]) -> Float[Tensor, "1 latent"]:
        """What each code's latent has."""
        return of_latent[None]

    def decode(self, value: Float[Tensor, "row latent"], W: Float[Tensor, "latent d"]) -> Float[Tensor, "row d"]:
        """`sum_j value_nj W_j` for each row n."""
        return value @ W

    def pair(self, of_row: Float[Tensor, "row d"], W: Float[Tensor, "latent d"]) -> Float[Tensor, "row latent"]:
        """`<of_row_n, W_j>` for each code (n, j)."""
        return of_row @ W.T

    def gather(
        self, value: Float[Tensor, "row latent"], of_row: Float[Tensor, "row d"], out: Float[Tensor, "latent d"]
    ) -> Float[Tensor, "latent d"]:
        """`sum_n value_nj of_row_n` for each latent j, written to `out`."""
        return torch.mm(value.T, of_row, out=out)

    def total(self, value: Float[Tensor, "row latent"]) -> Float[Tensor, " latent"]:
        """`sum_n value_nj` for each latent j."""
        return value.sum(0)

    def row_total(self, value: Float[Tensor, "row latent"]) -> Float[Tensor, " row"]:
        """`sum_j value_nj` for each row n."""
        return value.sum(1)

    def of_rows(self, of_row: Float[Tensor, " row"]) -> Float[Tensor, "row 1"]:
        """What each code's row has."""
        return of_row[:, None]


Codes = SparseCodes | DenseCodes
