"""How much of an explanation is features, and how much is error: completeness and replacement.

Formulas and names from Ameisen et al. 2025 ("Circuit Tracing", methods, "Graph completeness and replacement scores");
`A[t, s] = |W[t, s]| / sum_s |W[t, s]|`, `I` the influence, `w` the output weights, `e` the unexplained nodes: errors,
features that were not expanded, and, in a pruned graph, what was pruned.

- completeness (strict) `= sum_t (I_t + w_t) (1 - sum_e A[t, e]) / sum_t (I_t + w_t)` over targets `t` with in-edges.
- completeness as circuit-tracer 0.5.0 counts it (`compute_graph_scores`): the same sum over all nodes, so that inputs
  and errors, which have no in-edges, count as completely explained. It is always the larger one.
- replacement `= I(inputs) / (I(inputs) + I(e))`: the part of all paths that reaches an input without an error on the
  way.

Position embeddings, the class token and biases are inputs here: nothing about them is unexplained. They say nothing
about this image either, so `replacement_content` counts patches and words only, and `influence_by_type` shows each.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from graphs.influence import Edges, edges_of, output_weights, substitute
from graphs.nodes import NodeType

if TYPE_CHECKING:
    from graphs.graph import AttributionGraph

__all__ = ["CONTENT", "INPUTS", "Scores", "scores"]

CONTENT = (NodeType.PATCH, NodeType.TOKEN)
INPUTS = (*CONTENT, NodeType.POSITION, NodeType.CLS, NodeType.BIAS)


@dataclass(frozen=True)
class Scores:
    """The scores of a graph, each between 0 and 1.

    Attributes:
        completeness: strict: over nodes that have in-edges.
        completeness_circuit_tracer: over all nodes, as circuit-tracer counts it.
        replacement: influence that ends in inputs, of all that ends somewhere.
        replacement_content: the same, counting only patches and words as inputs; the rest is left out of the sum.
        influence_by_type: where all influence ends: patch, token, position, cls, bias, error, and `unexpanded`
            (features whose in-edges are unknown) and `pruned`; sums to 1.
        errors_by_layer: where what ends in errors ends, by tower and layer ("vision.L2"): what the transcoder of that
            MLP, or the dictionary of that layer, costs the graph; sums to `influence_by_type["error"]`.
    """

    completeness: float
    completeness_circuit_tracer: float
    replacement: float
    replacement_content: float
    influence_by_type: dict[str, float]
    errors_by_layer: dict[str, float]

    def to_dict(self) -> dict[str, float | dict[str, float]]:
        """As JSON."""
        return asdict(self)


def scores(graph: AttributionGraph, kept: Bool[Tensor, " node"] | None = None, edges: Edges | None = None) -> Scores:
    """Score a graph.

    Args:
        graph: best a whole one. In a pruned graph the edges that are only in `rest` are known as signed sums by type;
            they count as unexplained with the absolute values of those sums, which is the least they can be.
        kept: mask of nodes that count; the others count as errors, as the paper scores a pruned graph. Score the whole
            graph with the mask of the pruned one: then nothing is underestimated.
        edges: `edges_of(graph)`, where it is at hand.
    """
    nodes, n = graph.nodes, len(graph.nodes)
    kept = torch.ones(n, dtype=torch.bool) if kept is None else kept
    unexplained = (nodes.type == NodeType.ERROR) | graph.leaves | ~kept
    edges = edges or edges_of(graph)
    if (unexplained & graph.expanded).any():  # nothing passes through these, so what they read does not matter
        edges = edges.only(edges.at_target(~unexplained))
    size = edges.weight.abs()
    lost = torch.zeros(n, dtype=torch.float64)
    lost[graph.targets] = graph.rest.double().abs().sum(1)
    everything = edges.sum_into(size) + lost
    total = everything.clamp_min(torch.finfo(torch.float64).tiny)
    share = size.div_(edges.at_target(total))
    wrong = (edges.sum_into(share * edges.at_source(unexplained)) + lost / total).clamp(max=1)

    through = substitute(edges, share, output_weights(graph)) + output_weights(graph)
    has_edges = graph.expanded & ~unexplained & (everything > 0)
    strict = _mean(1 - wrong, through, has_edges)
    everywhere = _mean(torch.where(has_edges, 1 - wrong, 1.0), through, torch.ones_like(kept))

    ends = {t.name.lower(): float(through[(nodes.type == t) & kept].sum()) for t in (*INPUTS, NodeType.ERROR)}
    ends["unexpanded"] = float(through[graph.leaves & kept].sum())
    ends["pruned"] = float(through[~kept].sum() + (through * lost / total)[graph.expanded & ~unexplained].sum())
    by_layer = _by_layer(graph, through * ((nodes.type == NodeType.ERROR) & kept))
    errors = ends["error"] + ends["unexpanded"] + ends["pruned"]
    inputs, content = (sum(ends[t.name.lower()] for t in types) for types in (INPUTS, CONTENT))
    return Scores(strict, everywhere, _part(inputs, errors), _part(content, errors), ends, by_layer)


def _by_layer(graph: AttributionGraph, value: Float[Tensor, " node"]) -> dict[str, float]:
    """Sums over the error nodes of each layer, in the order of the graph."""
    nodes, found = graph.nodes, {}
    for i in (nodes.type == NodeType.ERROR).nonzero()[:, 0].tolist():
        name = f"{nodes.towers[int(nodes.tower[i])]}.L{int(nodes.layer[i])}"
        found[name] = found.get(name, 0.0) + float(value[i])
    return found


def _mean(values: Tensor, weights: Tensor, over: Bool[Tensor, " node"]) -> float:
    total = float(weights[over].sum())
    return float((values * weights)[over].sum()) / total if total else 0.0


def _part(some: float, others: float) -> float:
    return some / (some + others) if some + others else 0.0
