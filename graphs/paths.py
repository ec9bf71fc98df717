"""The strongest paths from inputs to an output, in order, without listing the others.

The number of paths is astronomic, but the best completion of every partial path is known: one pass from the inputs up
gives for each node the strength of its best path down. A best-first search from the output with that exact bound takes
out complete paths in order of strength and opens little more than the nodes on them (Hart, Nilsson and Raphael 1968).
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from graphs.influence import Edges, edges_of, relative, shares
from graphs.nodes import NodeType
from graphs.scores import CONTENT
from mechinterp.errors import UsageError

if TYPE_CHECKING:
    from graphs.graph import AttributionGraph

__all__ = ["Path", "paths_of_score", "strongest_paths"]


@dataclass(frozen=True)
class Path:
    """One way from an input to an output.

    Attributes:
        nodes: node indices, input first, output last.
        ids: their names.
        share: product of the edges' shares of their targets' in-edges: how much of the output's influence goes this
            way.
        contribution: what the path adds to the output (the product of the signed edges, each as a part of its target's
            activation). The contributions of all paths, and the constants, sum to the output.
    """

    nodes: tuple[int, ...]
    ids: tuple[str, ...]
    share: float
    contribution: float

    def __str__(self) -> str:
        return f"{self.contribution:+.4g} ({100 * self.share:.2g} %): " + " -> ".join(self.ids)


def strongest_paths(
    graph: AttributionGraph,
    k: int = 10,
    source: NodeType | tuple[NodeType, ...] | Bool[Tensor, " node"] = CONTENT,
    output: int = 0,
    by: Literal["share", "contribution"] = "share",
) -> list[Path]:
    """The `k` strongest paths from inputs to one output, strongest first; fewer where there are fewer.

    Args:
        graph: whole or pruned.
        k: how many.
        source: where paths begin: a NodeType, several, or a mask of nodes. Default patches and words.
        output: number of the output.
        by: "share" of influence, or absolute "contribution" to the output.
    """
    if k < 1:
        raise UsageError(f"is {k}", where="k", hint="ask for at least one path")
    if not 0 <= output < len(graph.outputs):
        raise UsageError(f"there is no output {output}", where="output", hint=f"there are {len(graph.outputs)}")
    start = source if isinstance(source, Tensor) else graph.nodes.is_type(*_types(source))
    edges = edges_of(graph)
    share, signed = shares(edges), relative(graph, edges)
    size = share if by == "share" else signed.abs()
    bound = _best_below(edges, size, start)
    rows = graph.weights.crow_indices().tolist()
    row_of = graph.row_of.tolist()
    log_size, log_bound = size.log().tolist(), bound.tolist()
    sources, begins = edges.source.tolist(), start.tolist()

    found: list[Path] = []
    # (minus the log strength of the best completion, ties broken by order of entry, log strength so far, edges so far)
    top = graph.outputs[output].node
    queue: list[tuple[float, int, float, int, tuple[int, ...]]] = [(-log_bound[top], 0, 0.0, top, ())]
    entered = 1
    while queue and len(found) < k:
        _, _, strength, node, taken = heapq.heappop(queue)
        if node < 0:
            found.append(_path(graph, edges, share, signed, taken, top))
            continue
        if begins[node]:  # a path may end here; it competes at its own strength
            heapq.heappush(queue, (-strength, entered, strength, -1, taken))
            entered += 1
        row = row_of[node]
        for i in range(rows[row], rows[row + 1]) if row >= 0 else ():
            best = strength + log_size[i] + log_bound[sources[i]]
            if best > -math.inf:
                heapq.heappush(queue, (-best, entered, strength + log_size[i], sources[i], (*taken, i)))
                entered += 1
    return found


def paths_of_score(whole: AttributionGraph, pruned: AttributionGraph, k: int = 10) -> list[Path]:
    """The strongest paths from patches and words to all outputs together, strongest first.

    They are looked for in the pruned graph and told in numbers of the whole one: `share` is of all influence (the share
    of the output times those of the edges among all in-edges of their targets), `contribution` is to the weighted sum
    of the outputs, of which the halves of a similarity are half each. `nodes` are rows of the pruned graph.
    """
    found = []
    shares_ = pruned.outputs.shares.tolist()
    for number, (output, begins) in enumerate(zip(pruned.outputs, shares_, strict=True)):
        for path in strongest_paths(pruned, k, output=number):
            share = begins
            for source, target in zip(path.ids, path.ids[1:], strict=False):
                sources, weights = whole.in_edges(whole.nodes.index(target))
                size = weights.abs().double()
                share *= float(size[sources == whole.nodes.index(source)].sum() / size.sum())
            found.append(replace(path, share=share, contribution=output.weight * path.contribution))
    return sorted(found, key=lambda path: -path.share)[:k]


def _types(source: NodeType | tuple[NodeType, ...]) -> tuple[NodeType, ...]:
    return (source,) if isinstance(source, NodeType) else source


def _best_below(edges: Edges, size: Float[Tensor, " edge"], start: Bool[Tensor, " node"]) -> Float[Tensor, " node"]:
    """Log strength of the best path from a start up to each node; minus infinity where there is none."""
    best = torch.where(start, 0.0, -math.inf).double()
    log_size = size.log()
    for level in reversed(list(edges.levels())):
        through = log_size[level] + best[edges.source[level]]
        best.scatter_reduce_(0, edges.target[level], through, "amax")
    return best


def _path(
    graph: AttributionGraph,
    edges: Edges,
    share: Float[Tensor, " edge"],
    signed: Float[Tensor, " edge"],
    taken: tuple[int, ...],
    top: int,
) -> Path:
    steps = torch.tensor(taken, dtype=torch.long)
    nodes = (*edges.source[steps].tolist()[::-1], top)
    ids = tuple(graph.nodes.ids[i] for i in nodes)
    return Path(nodes, ids, float(share[steps].prod()), float(signed[steps].prod()))
