"""The attribution graph: nodes, signed edges in sparse rows, and a remainder that keeps every row adding up."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from graphs.nodes import N_TYPES, NodeTable, NodeType
from mechinterp.errors import UsageError

__all__ = ["AttributionGraph", "GraphOutput", "Outputs", "csr"]


@dataclass(frozen=True)
class GraphOutput:
    """An output of a graph.

    Args:
        name: what is said, such as "pneumonia" or "similarity (image half)".
        kind: "logit", "contrast", "similarity", "report token", "feature", ...
        weight: `weight * value` over the outputs of one score adds up to the score.
        value: the model's own number.
        node: its row in the NodeTable.
        share: of the influence, what begins here (`graphs.halves`); None where that is |weight|.
    """

    name: str
    kind: str
    weight: float
    value: float
    node: int
    share: float | None = None


class Outputs(tuple[GraphOutput, ...]):
    """The outputs of a graph, in the order of their nodes."""

    @property
    def weights(self) -> Float[Tensor, " output"]:
        """Weight of each output, float64."""
        return torch.tensor([o.weight for o in self], dtype=torch.float64)

    @property
    def shares(self) -> Float[Tensor, " output"]:
        """What part of the influence begins at each output: non-negative, summing to 1, float64."""
        found = torch.tensor([abs(o.weight) if o.share is None else o.share for o in self], dtype=torch.float64)
        return found / found.sum()

    @property
    def nodes(self) -> Int[Tensor, " output"]:
        """Node of each output."""
        return torch.tensor([o.node for o in self], dtype=torch.long)


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """Direct effects between nodes at one input, everything but the features' nonlinearity being held.

    For every row: `sum of the row + rest.sum() + constant == pre` (of the row's target node).

    Args:
        nodes: the nodes, sources before targets.
        weights: sparse CSR `[n_targets, n_nodes]`; entry (t, s) is the contribution of node s to `pre` of target t.
        targets: node of each row, ascending. A feature without a row was not expanded: it is a leaf.
        rest: `[n_targets, n_types]`, sum of the edges that are not stored, by NodeType of their source.
        outputs: what the graph explains.
        meta: how it was made: model and dictionary hashes, freezes, dtype, mode, seeds, residuals; JSON values only.
    """

    nodes: NodeTable
    weights: Tensor
    targets: Int[Tensor, " target"]
    rest: Float[Tensor, "target type"]
    outputs: Outputs
    meta: dict[str, Any]

    def __post_init__(self) -> None:
        n_targets = len(self.targets)
        if self.weights.layout != torch.sparse_csr or tuple(self.weights.shape) != (n_targets, len(self.nodes)):
            raise UsageError(
                f"is {self.weights.layout} of shape {tuple(self.weights.shape)}", where="AttributionGraph.weights"
            )
        if tuple(self.rest.shape) != (n_targets, N_TYPES):
            raise UsageError(f"has shape {tuple(self.rest.shape)}", where="AttributionGraph.rest")
        missing = [o.name for o in self.outputs if self.row_of[o.node] < 0]
        if missing:
            raise UsageError(f"outputs without a row: {missing}", where="AttributionGraph.outputs")

    def __repr__(self) -> str:
        names = ", ".join(o.name for o in self.outputs)
        return f"AttributionGraph({len(self.nodes)} nodes, {self.n_edges} edges, {len(self.targets)} rows; {names})"

    @property
    def n_edges(self) -> int:
        """Number of stored edges."""
        return self.weights.values().numel()

    @cached_property
    def row_of(self) -> Int[Tensor, " node"]:
        """Row of `weights` that holds the in-edges of each node, -1 for nodes without one."""
        rows = torch.full((len(self.nodes),), -1, dtype=torch.long)
        rows[self.targets] = torch.arange(len(self.targets))
        return rows

    @property
    def expanded(self) -> Bool[Tensor, " node"]:
        """Mask of the nodes whose in-edges are known."""
        return self.row_of >= 0

    @property
    def leaves(self) -> Bool[Tensor, " node"]:
        """Mask of the features that were not expanded: what passes through them is unexplained."""
        return self.nodes.is_type(NodeType.FEATURE) & ~self.expanded

    @cached_property
    def edges(self) -> tuple[Int[Tensor, " edge"], Int[Tensor, " edge"], Float[Tensor, " edge"]]:
        """Every stored edge as (target node, source node, weight), row by row."""
        counts = self.weights.crow_indices().long().diff()
        targets = torch.from_numpy(
            np.repeat(self.targets.numpy(), counts.numpy())
        )  # torch's own takes ten times as long
        return targets, self.weights.col_indices(), self.weights.values()

    def in_edges(self, node: int) -> tuple[Int[Tensor, " edge"], Float[Tensor, " edge"]]:
        """Source nodes and weights of the stored in-edges of a node; empty for leaves and inputs."""
        row = int(self.row_of[node])
        if row < 0:
            return torch.zeros(0, dtype=torch.long), self.weights.values()[:0]
        start, end = self.weights.crow_indices()[row : row + 2].tolist()
        return self.weights.col_indices()[start:end], self.weights.values()[start:end]

    def out_edges(self, node: int) -> tuple[Int[Tensor, " edge"], Float[Tensor, " edge"]]:
        """Target nodes and weights of the stored out-edges of a node."""
        targets, sources, weights = self.edges
        picked = sources == node
        return targets[picked], weights[picked]

    def dense(self) -> Float[Tensor, "target node"]:
        """The rows as a dense matrix."""
        return self.weights.to_dense()

    def row_sums(self) -> Float[Tensor, " target"]:
        """Sum of each row's stored edges, in float64."""
        crow = self.weights.crow_indices().long()
        sums = torch.zeros(len(self.targets), dtype=torch.float64)
        filled = crow[1:] > crow[:-1]
        if filled.any():
            values = self.weights.values().detach().numpy()
            sums[filled] = torch.from_numpy(np.add.reduceat(values, crow[:-1][filled].numpy(), dtype=np.float64))
        return sums

    def residuals(self) -> Float[Tensor, " target"]:
        """`row sum + rest + constant - pre` of each row, in float64: zero when the graph adds up."""
        pre = self.nodes.pre[self.targets].double()
        constant = self.nodes.constant[self.targets].double()
        return self.row_sums() + self.rest.double().sum(1) + constant - pre

    def output_weights(self) -> Float[Tensor, " node"]:
        """The weight of each output at its node, 0 elsewhere."""
        weights = torch.zeros(len(self.nodes), dtype=self.rest.dtype)
        for output in self.outputs:
            weights[output.node] += output.weight
        return weights

    def with_nodes(self, nodes: NodeTable) -> AttributionGraph:
        """The same graph with other columns or labels on its nodes (same length, same order)."""
        return replace(self, nodes=nodes)

    def subgraph(
        self, keep_nodes: Bool[Tensor, " node"], keep_edges: Bool[Tensor, " edge"] | None = None
    ) -> AttributionGraph:
        """The graph of some nodes and some edges (in the order of `edges`); what a row loses goes to its `rest`.

        Outputs are always kept.
        """
        keep_nodes = keep_nodes.clone()
        keep_nodes[self.outputs.nodes] = True
        kept = keep_nodes.nonzero()[:, 0]
        place = torch.full((len(self.nodes),), -1, dtype=torch.long)
        place[kept] = torch.arange(len(kept))

        row_kept = keep_nodes[self.targets]
        counts = self.weights.crow_indices().long().diff()
        inside = torch.from_numpy(np.repeat(row_kept.numpy(), counts.numpy())).nonzero()[:, 0]
        sources, weights = (part[inside] for part in (self.weights.col_indices(), self.weights.values()))
        rows = torch.arange(int(row_kept.sum())).repeat_interleave(counts[row_kept])
        stored = keep_nodes[sources] if keep_edges is None else keep_nodes[sources] & keep_edges[inside]
        rest = self.rest[row_kept]
        dropped = ~stored
        at = rows[dropped] * N_TYPES + self.nodes.type[sources[dropped]].long()
        rest.view(-1).index_add_(0, at, weights[dropped])

        counts = torch.bincount(rows[stored], minlength=len(rest))
        crow = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        shape = (len(rest), len(kept))
        return AttributionGraph(
            nodes=self.nodes.take(kept),
            weights=csr(crow, place[sources[stored]], weights[stored], shape),
            targets=place[self.targets[row_kept]],
            rest=rest,
            outputs=Outputs(replace(o, node=int(place[o.node])) for o in self.outputs),
            meta=dict(self.meta),
        )

    def equal(self, other: AttributionGraph) -> bool:
        """Whether everything is the same, to the bit."""
        mine, theirs = self.weights, other.weights
        return (
            self.nodes.equal(other.nodes)
            and torch.equal(self.targets, other.targets)
            and torch.equal(mine.crow_indices(), theirs.crow_indices())
            and torch.equal(mine.col_indices(), theirs.col_indices())
            and torch.equal(mine.values(), theirs.values())
            and torch.equal(self.rest, other.rest)
            and self.outputs == other.outputs
            and self.meta == other.meta
        )

    def save(self, folder: Path | str) -> Path:
        """Write `graph.safetensors`, `graph.json` and a manifest; same graph, same bytes. Raises StorageError."""
        from graphs.storage import save_graph

        return save_graph(self, Path(folder))

    @classmethod
    def load(cls, folder: Path | str) -> AttributionGraph:
        """Read a graph folder. Raises StorageError when it is damaged or no graph."""
        from graphs.storage import load_graph

        return load_graph(Path(folder))


def csr(
    crow: Int[Tensor, " rows_and_one"],
    col: Int[Tensor, " edge"],
    values: Float[Tensor, " edge"],
    shape: tuple[int, int],
    check: bool = False,
) -> Tensor:
    """A sparse CSR matrix, without torch's notice that the layout is young. `check`: refuse indices that lie."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
        return torch.sparse_csr_tensor(crow, col, values, size=shape, check_invariants=check)
