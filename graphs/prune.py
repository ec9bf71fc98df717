"""Keep the part of a graph that carries most of the influence; what each row loses stays in its `rest`.

The procedure and its defaults are those of Ameisen et al. 2025, as circuit-tracer 0.5.0 has them in `prune_graph`, on
sparse edges: the sort is over the edges that exist, never over all pairs of nodes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from graphs.influence import Edges, edges_of, influence, output_weights, shares, total_effect
from graphs.nodes import NodeType
from graphs.scores import scores
from mechinterp.errors import UsageError

if TYPE_CHECKING:
    from graphs.graph import AttributionGraph

__all__ = ["prune", "prune_masks", "threshold_of"]


def prune(graph: AttributionGraph, node: float | int = 0.8, edge: float | int = 0.98) -> AttributionGraph:
    """The nodes that carry a share `node` of the influence, and of the edges between them those that carry `edge`.

    Outputs, patches and words stay in any case. Every row still adds up, `row sum + rest + constant == pre`. The nodes
    keep the influence and the total effect that they have in the whole graph: through what pruning takes away as well.
    `meta["pruning"]` holds the thresholds, the sizes, and the scores of what is left with everything else counted as
    error (`graphs.scores`); `meta["scores"]` those of the whole graph.

    Raises UsageError when a threshold is not in `[0, 1]`.
    """
    edges = edges_of(graph)
    keep_nodes, keep_edges = prune_masks(graph, node, edge, edges)
    found = influence(graph, edges)
    known = graph.nodes.with_influence(found).with_effect(total_effect(graph, edges=edges))
    pruned = graph.with_nodes(known).subgraph(keep_nodes, keep_edges)
    about = {
        "node_threshold": node,
        "edge_threshold": edge,
        "nodes_before": len(graph.nodes),
        "edges_before": graph.n_edges,
        "nodes": len(pruned.nodes),
        "edges": pruned.n_edges,
        "scores": scores(graph, keep_nodes, edges).to_dict(),
    }
    return replace(pruned, meta={**graph.meta, "pruning": about, "scores": scores(graph, edges=edges).to_dict()})


def prune_masks(
    graph: AttributionGraph, node: float | int = 0.8, edge: float | int = 0.98, edges: Edges | None = None
) -> tuple[Bool[Tensor, " node"], Bool[Tensor, " edge"]]:
    """Which nodes, and which edges in the order of `graph.edges`, pruning keeps.

    1. nodes: the fewest whose influence is a share `node` of the sum over all nodes; and outputs, patches, words.
    2. edges: on the graph of those nodes, with shares and influence computed anew, the fewest whose scores
       `share(t, s) * (influence(t) + weight(t))` sum to a share `edge` of all scores.
    3. features, errors, positions, class token and biases without an out-edge go, and features whose in-edges all
       went, until nothing changes. A feature that was never expanded stays: its in-edges are unknown, not absent.
    """
    for name, value in (("node", node), ("edge", edge)):
        if not 0 <= value <= 1:
            raise UsageError(f"is {value}", where=f"threshold for {name}s", hint="a share between 0 and 1")
    edges = edges or edges_of(graph)
    nodes = graph.nodes
    found = influence(graph, edges)
    fixed = nodes.is_type(NodeType.OUTPUT, NodeType.PATCH, NodeType.TOKEN)
    keep = (found >= threshold_of(found, node)) & (found > 0) | fixed

    inside = edges.at_target(keep) & edges.at_source(keep)
    at, within = inside.nonzero()[:, 0], edges.only(inside)
    score = shares(within) * within.at_target(influence(graph, within) + output_weights(graph))
    strong = (score >= threshold_of(score, edge)) & (score > 0)
    at, within = at[strong], within.only(strong)
    grown = graph.expanded & ~fixed
    while True:
        used, reached = torch.zeros_like(keep), torch.zeros_like(keep)
        used[within.source], reached[within.target] = True, True
        still = keep & (used | fixed) & (reached | ~grown)
        if bool((still == keep).all()):
            return keep, torch.zeros_like(inside).index_fill_(0, at, True)
        keep = still
        left = within.at_target(keep) & within.at_source(keep)
        at, within = at[left], within.only(left)


def threshold_of(values: Float[Tensor, " n"], share: float | int) -> float:
    """The largest value such that all values at or above it sum to at least `share` of the total."""
    if not len(values) or share == 0:
        return float("inf")
    ordered = values.double().sort(descending=True).values
    cumulative = ordered.cumsum(0)
    at = int(torch.searchsorted(cumulative, share * cumulative[-1]))
    return float(ordered[min(at, len(ordered) - 1)])
