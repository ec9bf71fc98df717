"""Which latents are in play on which rows of a batch, and the four products that a training step needs of them.

A step knows its codes by support only; values live beside it, one number for each code. For top-k kinds about
`k / width` of all pairs are in play, so every product costs `rows * k * d`, not `rows * width * d`: embedding bags do
three of them, a sampled product the fourth. Where most pairs are in play (early in the training of a gated SAE) the
same four products are dense, behind the same names.
"""

from __future__ import annotations

import itertools
import warnings
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from scipy.sparse import csr_array
from torch import Tensor

__all__ = ["Codes", "DenseCodes", "SparseCodes"]

PART = 2**20
"""Entries of a gradient that are made at one time on a CPU: 4 MiB. A result of more than 32 MiB is new memory in each
step, whose pages the system has to find and clear; that costs as much as the sums themselves."""


class SparseCodes:
    """Pairs (row, latent), sorted by row and then by latent.

    Args:
        row, latent: of each code.
        rows, width: how many there are.
    """

    def __init__(self, row: Int64[Tensor, " code"], latent: Int64[Tensor, " code"], rows: int, width: int):
        self.row, self.latent, self.rows, self.width = row, latent, rows, width

    @cached_property
    def _starts(self) -> Int64[Tensor, " row"]:
        return torch.searchsorted(self.row, torch.arange(self.rows, device=self.row.device))

    @cached_property
    def _by_latent(self) -> tuple[Int64[Tensor, " code"], Int64[Tensor, " code"], Int64[Tensor, " latent"]]:
        """The order of the codes by latent, their rows in it, and where each latent starts."""
        if self.latent.device.type == "cpu":
            return self._counted()
        latent, order = self.latent.sort(stable=True)
        starts = torch.searchsorted(latent, torch.arange(self.width, device=latent.device))
        return order, self.row[order], starts

    def _counted(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same, by counting: as the transpose of a sparse matrix, a third of the time of sorting or less."""
        count = len(self.latent)
        ends = torch.cat([self._starts, torch.tensor([count])])
        number = np.arange(count, dtype=np.int32)
        by_row = csr_array((number, self.latent.numpy(), ends.numpy()), shape=(self.rows, self.width))
        by_latent = by_row.tocsc()
        order, row, starts = by_latent.data, by_latent.indices, by_latent.indptr[:-1]
        return torch.from_numpy(order).long(), torch.from_numpy(row).long(), torch.from_numpy(starts).long()

    @cached_property
    def _pattern(self) -> Tensor:
        """The support as a sparse CSR matrix of zeros, `[latent, row]`."""
        _, row, starts = self._by_latent
        end = torch.full((1,), len(row), device=row.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "CSR is in beta"
            return torch.sparse_csr_tensor(
                torch.cat([starts, end]),
                row,
                torch.zeros(len(row), device=row.device),
                (self.width, self.rows),
                check_invariants=False,
            )

    def split(self, levels: tuple[int, ...]) -> SparseCodes:
        """Each row as `len(levels)` rows, one for the latents of each level (levels are the ends of the ranges)."""
        ends = torch.tensor(levels).to(self.latent.device)
        level = torch.bucketize(self.latent, ends, right=True)
        split = SparseCodes(self.row * len(levels) + level, self.latent, self.rows * len(levels), self.width)
        order, _, starts = self._by_latent
        split._by_latent = (order, split.row.index_select(0, order), starts)
        return split

    def take(self, of_latent: Float[Tensor, " latent"]) -> Float[Tensor, " code"]:
        """What each code's latent has."""
        return of_latent.index_select(0, self.latent)

    def decode(self, value: Float[Tensor, " code"], W: Float[Tensor, "latent d"]) -> Float[Tensor, "row d"]:
        """`sum_j value_nj W_j` for each row n."""
        return F.embedding_bag(self.latent, W, self._starts, mode="sum", per_sample_weights=value)

    def pair(self, of_row: Float[Tensor, "row d"], W: Float[Tensor, "latent d"]) -> Float[Tensor, " code"]:
        """`<of_row_n, W_j>` for each code (n, j).

        Taken latent by latent: the rows then come from all over memory, and they are fewer bytes than `W`.
        """
        order, _, _ = self._by_latent
        found = torch.sparse.sampled_addmm(self._pattern, W, of_row.T, beta=0.0).values()
        return torch.empty_like(found).scatter_(0, order, found)

    def gather(
        self, value: Float[Tensor, " code"], of_row: Float[Tensor, "row d"], out: Float[Tensor, "latent d"]
    ) -> Float[Tensor, "latent d"]:
        """`sum_n value_nj of_row_n` for each latent j, written to `out`."""
        order, row, starts = self._by_latent
        value = value.index_select(0, order)
        if out.device.type != "cpu":
            return out.copy_(F.embedding_bag(row, of_row, starts, mode="sum", per_sample_weights=value))
        part = max(1, PART // of_row.shape[1])
        ends = [*starts[::part].tolist(), len(row)]
        for number, (first, last) in enumerate(itertools.pairwise(ends)):
            here = slice(number * part, (number + 1) * part)
            bags, weights = starts[here] - first, value[first:last]
            out[here] = F.embedding_bag(row[first:last], of_row, bags, mode="sum", per_sample_weights=weights)
        return out

    def total(self, value: Float[Tensor, " code"]) -> Float[Tensor, " latent"]:
        """`sum_n value_nj` for each latent j."""
        order, row, starts = self._by_latent
        return F.embedding_bag(
            row * 0, value.new_ones(1, 1), starts, mode="sum", per_sample_weights=value.index_select(0, order)
        )[:, 0]

    def row_total(self, value: Float[Tensor, " code"]) -> Float[Tensor, " row"]:
        """`sum_j value_nj` for each row n."""
        one = value.new_ones(1, 1)
        return F.embedding_bag(self.latent * 0, one, self._starts, mode="sum", per_sample_weights=value)[:, 0]

    def of_rows(self, of_row: Float[Tensor, " row"]) -> Float[Tensor, " code"]:
        """What each code's row has."""
        return of_row.index_select(0, self.row)


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
