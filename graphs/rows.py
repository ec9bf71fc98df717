"""Rows of a graph while it grows: dense blocks of targets that share their sources."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from graphs.graph import csr
from graphs.layout import Layout
from graphs.nodes import N_TYPES
from graphs.sweep import Batch

__all__ = ["Rows"]

Columns = slice | Int[np.ndarray, " source"]


@dataclass(frozen=True, eq=False)
class _Block:
    """Targets with the same possible sources."""

    nodes: Int[Tensor, " target"]
    columns: Columns
    values: Float[Tensor, "target source"]


class Rows:
    """What is known of the edges so far."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self._blocks: list[_Block] = []
        self._turned_memory = layout.nodes.activation.new_empty(0)
        self._memory, self._free = layout.nodes.activation.new_empty(0), 0

    def reserve(self, targets: Int[Tensor, " target"]) -> None:
        """Memory in one piece for rows of features that will be added next.

        Where there are no such rows yet it has room for those of outputs too, at its end, and `assemble` may hand it
        out.
        """
        size = 0 if self._has_features() else sum(block.values.numel() for block in self._blocks)
        for _, count, columns in self._groups(targets.sort().values):
            size += count * (columns.stop - columns.start if isinstance(columns, slice) else len(columns))
        self._memory, self._free = self._memory.new_empty(size), 0

    def add(self, batch: Batch) -> None:
        """Take over a batch of the sweep."""
        nodes, edges = batch
        if int(nodes[0]) >= self.layout.outputs:
            for i in range(len(nodes)):
                columns = edges[:, i].numpy().nonzero()[0]
                self._append(nodes[i : i + 1], columns, edges[columns, i][None])
            return
        causal = self.layout.causal[int(self.layout.stack_of[nodes[0]])]
        rows = self._turned(edges[: int(nodes[0])]) if causal else edges.T  # sources stand before their targets
        for start, count, columns in self._groups(nodes):
            mine = rows[start : start + count]
            self._append(nodes[start : start + count], columns, self._taken(mine, columns))

    def _groups(self, nodes: Int[Tensor, " target"]) -> Iterator[tuple[int, int, Columns]]:
        """Runs of features that have the same possible sources: the first of them, how many, which."""
        table, stacks = self.layout.nodes, self.layout.stack_of[nodes]
        causal = torch.tensor(self.layout.causal)[stacks]
        layers, positions = table.layer[nodes].long(), torch.where(causal, table.pos[nodes].long(), -1)
        _, counts = ((stacks << 48) + (layers << 32) + positions).unique_consecutive(return_counts=True)
        starts = counts.cumsum(0) - counts
        keys = torch.stack([stacks, layers, positions], 1)[starts].tolist()
        for start, count, (number, layer, pos) in zip(starts.tolist(), counts.tolist(), keys, strict=True):
            yield start, count, self.layout.columns(number, layer, pos)

    def _turned(self, edges: Float[Tensor, "node target"]) -> Float[Tensor, "target node"]:
        """A batch row by row, in memory that all batches share."""
        if self._turned_memory.numel() < edges.numel():
            self._turned_memory = torch.empty_like(edges).view(-1)
        return self._turned_memory[: edges.numel()].view(edges.shape[::-1]).copy_(edges.T)

    def _taken(self, rows: Float[Tensor, "target node"], columns: Columns) -> Float[Tensor, "target source"]:
        """Some columns, in memory of their own; torch's own indexing by number takes three times as long."""
        n = columns.stop - columns.start if isinstance(columns, slice) else len(columns)
        values = self._memory[self._free : self._free + len(rows) * n].view(len(rows), n)
        self._free += len(rows) * n
        if isinstance(columns, slice):
            return values.copy_(rows[:, columns])
        np.take(rows.numpy(), columns, axis=1, out=values.numpy(), mode="clip")  # "raise" would go through a buffer
        return values

    def _append(self, nodes: Int[Tensor, " target"], columns: Columns, values: Float[Tensor, "target source"]) -> None:
        self._blocks.append(_Block(nodes, columns, values))

    def _has_features(self) -> bool:
        return any(int(block.nodes[0]) < self.layout.outputs for block in self._blocks)

    def expanded(self) -> Bool[Tensor, " node"]:
        """Mask of the nodes that have a row."""
        found = torch.zeros(len(self.layout.nodes), dtype=torch.bool)
        for block in self._blocks:
            found[block.nodes] = True
        return found

    def influence(self, weights: Float[Tensor, " node"]) -> Float[Tensor, " node"]:
        """Influence of every node on the outputs of these weights: one substitution from the top.

        `w ((I - A)^-1 - I)`, `A[t, s] = |W[t, s]| / sum_s |W[t, s]|` (Ameisen et al. 2025). A node's value is final
        when all that stands above it is done, so each block is used once.
        """
        value = weights.clone()
        for block in sorted(self._blocks, key=lambda b: int(b.nodes[0]), reverse=True):
            size = block.values.abs()  # stays in the cache for both of its uses
            flow = value[block.nodes] / size.sum(1).clamp_min(torch.finfo(size.dtype).tiny)
            value[block.columns] += flow @ size
        return value - weights

    def assemble(self, row_mass: float | None = None) -> tuple[Tensor, Int[Tensor, " row"], Float[Tensor, "row type"]]:
        """Everything as (sparse CSR, target nodes ascending, rest by type). The rows are gone after it.

        `row_mass`: keep, in each row, the largest edges that together have this share of its absolute weight.
        """
        n = len(self.layout.nodes)
        blocks = sorted(self._blocks, key=lambda block: int(block.nodes[0]))
        targets = self.expanded().nonzero()[:, 0]
        place = torch.full((n,), -1, dtype=torch.long)
        place[targets] = torch.arange(len(targets))
        rest = self.layout.nodes.activation.new_zeros(len(targets), N_TYPES)
        every = np.arange(n, dtype=np.int32)
        kept = [None if row_mass is None else _largest(b.values, row_mass) for b in blocks]

        counts = torch.zeros(len(targets), dtype=torch.long)
        for block, mask in zip(blocks, kept, strict=True):
            counts[place[block.nodes]] = block.values.shape[1] if mask is None else mask.sum(1)
        crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        columns = torch.empty(int(crow[-1]), dtype=torch.int32)
        starts = crow.tolist()
        came = [int(block.nodes[0]) for block in self._blocks if int(block.nodes[0]) < self.layout.outputs]
        # rows that were reserved all together and came in their order stand where they belong already
        in_place = row_mass is None and len(self._memory) == len(columns) and came == sorted(came)
        values = self._memory if in_place else rest.new_empty(len(columns))
        for block, mask in zip(blocks, kept, strict=True):
            sources = torch.from_numpy(every[block.columns])
            at = place[block.nodes].tolist()
            if mask is None and at[-1] - at[0] == len(at) - 1:  # rows that follow each other: one copy
                span = slice(starts[at[0]], starts[at[-1] + 1])
                if values[span].data_ptr() != block.values.data_ptr():
                    values[span].view(block.values.shape)[:] = block.values
                columns[span].view(block.values.shape)[:] = sources
                continue
            types = self.layout.nodes.type[block.columns].long()
            for i, row in enumerate(at):
                span = slice(starts[row], starts[row + 1])
                if mask is None:
                    values[span], columns[span] = block.values[i], sources
                else:
                    values[span], columns[span] = block.values[i][mask[i]], sources[mask[i]]
                    rest[row].index_add_(0, types[~mask[i]], block.values[i][~mask[i]])
        self._blocks = []
        if not values.numpy().all():  # a fifth of the time that a mask takes
            present = values != 0
            rows = torch.arange(len(targets)).repeat_interleave(counts)[present]
            counts = torch.bincount(rows, minlength=len(targets))
            crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            values, columns = values[present], columns[present]
        if len(values) < 2**31:
            crow = crow.int()
        else:
            columns = columns.long()
        return csr(crow, columns, values, (len(targets), n)), targets, rest


def _largest(values: Float[Tensor, "target source"], mass: float) -> Bool[Tensor, "target source"]:
    """Mask of the largest entries of each row that together have `mass` of its absolute weight."""
    size, order = values.abs().sort(dim=1, descending=True)
    before = size.cumsum(1) - size
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, before < mass * size.sum(1, keepdim=True))
