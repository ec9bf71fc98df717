"""Random features that could have been picked instead: the null of every suppression.

A match is active on the same image, at the same layer and class of position (class token, patch, word), and writes
about as strongly (activation and decoder norm, both in logs). What it lacks is the graph's word that it matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from graphs.graph import AttributionGraph
from graphs.nodes import NodeType

__all__ = ["MatchedSets", "matched_sets", "position_class"]

POOL = 20
SMALLEST_POOL = 4


@dataclass(frozen=True)
class MatchedSets:
    """Random node sets.

    Fields:
        sets: rows of the node table, each set as large as the one that it matches.
        relaxed: members for which too few features were active at their class of position, so that any position of the
            layer was taken.
        unmatched: members with fewer than four candidates even so; they were left out of the sets.
    """

    sets: tuple[tuple[int, ...], ...]
    relaxed: int
    unmatched: int


def position_class(graph: AttributionGraph) -> Callable[[int], str]:
    """The class of a node's position: "cls", "image" or "word", from the inputs of its tower."""
    nodes = graph.nodes
    known: dict[tuple[int, int], str] = {}
    for kind, name in ((NodeType.CLS, "cls"), (NodeType.PATCH, "image"), (NodeType.TOKEN, "word")):
        for i in (nodes.type == kind).nonzero()[:, 0].tolist():
            known[int(nodes.tower[i]), int(nodes.pos[i])] = name
    return lambda node: known.get((int(nodes.tower[node]), int(nodes.pos[node])), "image")


def matched_sets(
    graph: AttributionGraph,
    members: Sequence[int],
    decoder_norm: Callable[[int], float],
    n: int = 100,
    seed: int = 0,
    exclude: Sequence[int] = (),
) -> MatchedSets:
    """`n` random sets that match `members` one by one; within a set no feature comes twice.

    Args:
        graph: with all active features as nodes (not pruned).
        members: feature nodes.
        decoder_norm: norm of the decoder row of a node.
        n: number of sets.
        seed: of the draws.
        exclude: nodes that no set may hold, besides the members.
    """
    features = graph.nodes.is_type(NodeType.FEATURE).nonzero()[:, 0].tolist()
    taken = set(members) | set(exclude)
    where = position_class(graph)
    strict: dict[tuple, list[int]] = {}
    loose: dict[tuple, list[int]] = {}
    for i in features:
        if i not in taken:
            place = (int(graph.nodes.tower[i]), int(graph.nodes.layer[i]))
            strict.setdefault((*place, where(i)), []).append(i)
            loose.setdefault(place, []).append(i)
    traits = _traits(graph, features, decoder_norm)
    relaxed, pools = 0, []
    for member in members:
        place = (int(graph.nodes.tower[member]), int(graph.nodes.layer[member]))
        candidates = strict.get((*place, where(member)), [])
        if len(candidates) < SMALLEST_POOL:
            candidates = loose.get(place, [])
            relaxed += 1
        if len(candidates) >= SMALLEST_POOL:
            distance = (traits[candidates] - traits[member]).norm(dim=1)
            nearest = distance.argsort(stable=True)[: max(POOL, len(candidates) // 10)].tolist()
            pools.append([candidates[j] for j in nearest])
    draws = np.random.default_rng(seed)
    sets = tuple(_draw(pools, draws) for _ in range(n)) if pools else ()
    return MatchedSets(sets, relaxed, len(members) - len(pools))


def _traits(
    graph: AttributionGraph, features: list[int], decoder_norm: Callable[[int], float]
) -> Float[Tensor, "node 2"]:
    """Log activation and log decoder norm of every feature, each divided by its standard deviation."""
    found = torch.zeros(len(graph.nodes), 2, dtype=torch.float64)
    norms = torch.tensor([decoder_norm(i) for i in features], dtype=torch.float64)
    values = torch.stack([graph.nodes.activation[features].double().abs(), norms], dim=1).clamp_min(1e-9).log()
    found[features] = values / values.std(0, correction=0).clamp_min(1e-9)
    return found


def _draw(pools: list[list[int]], draws: np.random.Generator) -> tuple[int, ...]:
    """One candidate of each pool, without repetition while the pool allows it."""
    drawn: list[int] = []
    for place in draws.permutation(len(pools)):
        free = [i for i in pools[place] if i not in drawn]
        if free:
            drawn.append(free[int(draws.integers(len(free)))])
    return tuple(drawn)
