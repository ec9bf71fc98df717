"""Support: how much of what speaks for the outputs passes through each node, absolute values left out.

Influence adds up sizes, so a path that lowers an output counts as much as one that raises it, and two that cancel count
twice. Support is the same sum with negative edges clamped to 0 in place of absolute values (Ameisen et al. 2025,
"Circuit Tracing", methods, on pruning, have both):

    w ((I - P)^-1 - I),   P[t, s] = max(W[t, s], 0) / sum_s max(W[t, s], 0).

Read it as conservation: the positive in-edges of a node are all that drives it, the negative ones are held against it,
and `P` shares out the drive. Every step of a counted path raises the next node, so the leaves' supports sum to 1 (less
where a node has no positive in-edge at all: nothing below drives it). It is a probability over inputs, as influence is,
and never larger than 1, which signed total effects are not: those divide by activations and grow where large edges
cancel. What inhibits is not in it; `total_effect` has both signs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from graphs.influence import Edges, edges_of, output_weights

if TYPE_CHECKING:
    from graphs.graph import AttributionGraph

__all__ = ["support"]


def support(graph: AttributionGraph, edges: Edges | None = None) -> Float[Tensor, " node"]:
    """Support of every node for the outputs, float64, in [0, 1]; outputs themselves have 0.

    Args:
        graph: whole or pruned; edges that are not stored (`rest`) take no part.
        edges: `edges_of(graph)`, where it is at hand.

    Raises UsageError when an edge does not run upwards.
    """
    edges = edges or edges_of(graph)
    drive = edges.weight.clamp_min(0)
    share = drive / edges.sum_into(drive)[edges.target].clamp_min(torch.finfo(torch.float64).tiny)
    start = output_weights(graph)
    value = start.clone()
    for level in edges.levels():
        value.index_add_(0, edges.source[level], share[level] * value[edges.target[level]])
    return value - start
