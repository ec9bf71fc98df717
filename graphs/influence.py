"""How much each node matters for the outputs: one substitution from the top of the graph down to its inputs.

Nodes stand in topological order, so `(I - A)^-1` is never formed and nothing is iterated to convergence: the value of a
node is final when the levels above it are done, and each stored edge is used once. Two quantities share that
substitution (`W[t, s]`: signed edge from source `s` to target `t`; `w`: weights of the outputs):

- influence (Ameisen et al. 2025, "Circuit Tracing", transformer-circuits.pub/2025/attribution-graphs/methods.html, on
  pruning): `w (A + A^2 + ...) = w ((I - A)^-1 - I)` with `A[t, s] = |W[t, s]| / sum_s |W[t, s]|`.
- total effect: `w ((I - R)^-1 - I)` with `R[t, s] = W[t, s] / activation[t]` for a feature `t` and `W[t, s]` for an
  output: what the outputs lose when `s` is taken away and every feature above it follows. It is exact while attention
  and norms are held and each feature moves one to one with its pre-activation (ReLU, JumpReLU and TopK features do, as
  long as none of them starts or stops to fire).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from graphs.nodes import NodeType
from mechinterp.errors import UsageError

if TYPE_CHECKING:
    from graphs.graph import AttributionGraph

__all__ = [
    "Edges",
    "edges_of",
    "influence",
    "known_effect",
    "output_weights",
    "relative",
    "shares",
    "substitute",
    "total_effect",
    "with_influence",
]


@dataclass(frozen=True)
class Edges:
    """The stored edges of a graph, row by row, lowest target first; weights in float64.

    Attributes:
        target, source: node of each end.
        weight: signed contribution of the source to the target.
        starts: `starts[i]:starts[i + 1]` are the edges into the targets of one tower and layer, which no edge connects.
        n: number of nodes.
    """

    target: Int[Tensor, " edge"]
    source: Int[Tensor, " edge"]
    weight: Float[Tensor, " edge"]
    starts: tuple[int, ...]
    n: int

    def levels(self) -> Iterator[slice]:
        """The edges of each level, from the outputs down."""
        for start, end in zip(self.starts[-2::-1], self.starts[:0:-1], strict=True):
            yield slice(start, end)

    def only(self, picked: Bool[Tensor, " edge"]) -> Edges:
        """Some of the edges, in the same order."""
        at = picked.nonzero()[:, 0]
        starts = torch.searchsorted(at, torch.tensor(self.starts)).tolist()
        target, source, weight = (column.index_select(0, at) for column in (self.target, self.source, self.weight))
        return Edges(target, source, weight, tuple(starts), self.n)

    def at_target(self, values: Float[Tensor, " node"] | Bool[Tensor, " node"]) -> Tensor:
        """The value of each edge's target."""
        return values.index_select(0, self.target)  # a third of the time of `values[self.target]`

    def at_source(self, values: Float[Tensor, " node"] | Bool[Tensor, " node"]) -> Tensor:
        """The value of each edge's source."""
        return values.index_select(0, self.source)

    def sum_into(self, values: Float[Tensor, " edge"]) -> Float[Tensor, " node"]:
        """Sum of a value of each edge over the in-edges of each node."""
        return torch.zeros(self.n, dtype=torch.float64).index_add_(0, self.target, values)


def edges_of(graph: AttributionGraph) -> Edges:
    """The edges of a graph in topological order.

    Raises UsageError when an edge does not run upwards; then influence has no meaning.
    """
    target, source, weight = graph.edges
    nodes, expanded = graph.nodes, graph.expanded
    level = torch.stack([nodes.tower.long(), nodes.layer.long(), (nodes.type == NodeType.OUTPUT).long()], dim=1)
    level = level[graph.targets]
    rows = [0, *((level[1:] != level[:-1]).any(1).nonzero()[:, 0] + 1).tolist(), len(level)]
    starts = graph.weights.crow_indices()[rows].tolist() if len(level) else [0]
    for start, end in pairwise(starts):
        late = source[start:end] >= target[start:end][:1]  # the lowest of the level
        wrong = late.nonzero()[:, 0] + start
        wrong = wrong[expanded[source[wrong]]]
        if len(wrong):
            first = int(wrong[0])
            below, above = nodes.ids[int(source[first])], nodes.ids[int(target[first])]
            raise UsageError(
                f"the edge from {below} to {above} does not run upwards",
                where="AttributionGraph.weights",
                hint="a graph of supernodes is a summary: compute influence on the graph that it was made from",
            )
    return Edges(target, source, weight.double(), tuple(starts), len(nodes))


def output_weights(graph: AttributionGraph) -> Float[Tensor, " node"]:
    """The share of each output at its node: non-negative, summing to 1; 0 for every other node."""
    found = torch.zeros(len(graph.nodes), dtype=torch.float64)
    return found.index_add_(0, graph.outputs.nodes, graph.outputs.shares)


def shares(edges: Edges) -> Float[Tensor, " edge"]:
    """`|W[t, s]| / sum_s |W[t, s]|` of each edge."""
    size = edges.weight.abs()
    return size.div_(edges.at_target(edges.sum_into(size).clamp_min(torch.finfo(torch.float64).tiny)))


def relative(graph: AttributionGraph, edges: Edges) -> Float[Tensor, " edge"]:
    """Each edge as a part of its target's activation; as it stands where the target is an output.

    A feature that is silent passes nothing on: its edges count 0.
    """
    unit = graph.nodes.activation.double()
    unit = torch.where(graph.nodes.type == NodeType.OUTPUT, torch.ones_like(unit), unit)[edges.target]
    return torch.where(unit == 0, 0.0, edges.weight / torch.where(unit == 0, 1.0, unit))


def influence(graph: AttributionGraph, edges: Edges | None = None) -> Float[Tensor, " node"]:
    """Influence of every node on the outputs, float64; outputs themselves have 0, as nothing is above them.

    Every node passes on what it receives in the proportion of its in-edges' sizes, so the leaves' influences sum to 1.
    Edges that are not stored (`rest`) take no part.
    """
    edges = edges or edges_of(graph)
    return substitute(edges, shares(edges), output_weights(graph))


def total_effect(
    graph: AttributionGraph, output: int | None = None, edges: Edges | None = None
) -> Float[Tensor, " node"]:
    """Signed effect of each node on one output (by its number), or on the weighted sum of all of them, float64.

    In a graph that is expanded completely, and whose features' activations are their pre-activations, the total effects
    of the leaves and of the constants of the features above them sum to the output minus its own constant.
    """
    if output is None:
        seed = graph.output_weights().double()
    elif 0 <= output < len(graph.outputs):
        seed = torch.zeros(len(graph.nodes), dtype=torch.float64)
        seed[graph.outputs[output].node] = 1.0
    else:
        raise UsageError(f"there is no output {output}", where="output", hint=f"there are {len(graph.outputs)}")
    edges = edges or edges_of(graph)
    return substitute(edges, relative(graph, edges), seed)


def known_effect(graph: AttributionGraph) -> Float[Tensor, " node"]:
    """Total effect on the weighted outputs: what pruning kept of the whole graph's, else that of this graph."""
    kept = graph.nodes.effect.double()
    return kept if bool(kept.any()) else total_effect(graph)


def substitute(
    edges: Edges, coefficient: Float[Tensor, " edge"], seed: Float[Tensor, " node"]
) -> Float[Tensor, " node"]:
    """`seed ((I - C)^-1 - I)` for coefficients `C` of the edges, level by level from the top."""
    value = seed.clone()
    for level in edges.levels():
        passed = value.index_select(0, edges.target[level]).mul_(coefficient[level])
        value.index_add_(0, edges.source[level], passed)
    return value - seed


def with_influence(graph: AttributionGraph) -> AttributionGraph:
    """The same graph with the influence of every node in its table."""
    return graph.with_nodes(graph.nodes.with_influence(influence(graph)))
