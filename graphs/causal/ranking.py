"""How well single features' effects on the output can be told in advance: influence beside simpler predictions."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from graphs.causal.changes import features_of, scaled
from graphs.causal.lab import Lab
from graphs.causal.relations import spearman
from graphs.graph import AttributionGraph
from graphs.influence import influence, total_effect
from graphs.nodes import NodeType
from graphs.prune import prune

__all__ = ["REACH", "node_effects", "rankings"]

REACH = 1e-6
"""Influence below which a feature does not reach the outputs (all influences of one layer sum to at most 1)."""


def node_effects(
    lab: Lab,
    graph: AttributionGraph,
    n_nodes: int = 200,
    seed: int = 0,
    known: dict[str, Float[np.ndarray, " node"]] | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Free ablation of single features against what predicts it: Spearman by sample and ranking, and sample sizes.

    Samples: "active", drawn from all active features with influence (those that cannot reach the output are left out,
    being predicted without effort); "pruned", the most influential of the pruned graph, at most `n_nodes`; and the part
    of each that lies in one tower ("active, vision"). `known` are the `rankings`, where they have been made already; a
    seed means the same sample with them and without.
    """
    strength = influence(graph).numpy()
    scores = rankings(lab, graph, np.random.default_rng(seed)) if known is None else known
    draws = np.random.default_rng(seed)
    draws.random(len(graph.nodes))  # those of the random ranking: with rankings known or not, the sample is the same
    nodes = graph.nodes.is_type(NodeType.FEATURE).nonzero()[:, 0].numpy()
    moved = nodes[strength[nodes] > REACH]
    pruned = {graph.nodes.index(name) for name in prune(graph).nodes.ids}
    best = [i for i in moved[np.argsort(-strength[moved], kind="stable")].tolist() if i in pruned]
    samples = {
        "active": draws.choice(moved, min(n_nodes, len(moved)), replace=False),
        "pruned": np.array(best[:n_nodes], dtype=int),
    }
    every = np.unique(np.concatenate(list(samples.values())).astype(int))
    effect = np.zeros(len(graph.nodes))
    effect[every] = np.abs(lab.effects([scaled(graph, [i]) for i in every.tolist()])[:, 0].numpy())
    for name in ("active", "pruned"):
        towers = np.array([graph.nodes.towers[t] for t in graph.nodes.tower[samples[name]].tolist()])
        if len(set(towers)) > 1:
            samples |= {f"{name}, {tower}": samples[name][towers == tower] for tower in sorted(set(towers))}
    found = {
        name: {ranking: spearman(score[sample], effect[sample]) for ranking, score in scores.items()}
        for name, sample in samples.items()
    }
    return found, {name: len(sample) for name, sample in samples.items()}


def rankings(lab: Lab, graph: AttributionGraph, draws: np.random.Generator) -> dict[str, Float[np.ndarray, " node"]]:
    """What an effect on the output could be predicted from, for every node."""
    features = graph.nodes.is_type(NodeType.FEATURE).nonzero()[:, 0]
    gradient = np.zeros(len(graph.nodes))
    gradient[features.numpy()] = lab.gradients(features_of(graph, features.tolist()))[:, 0].abs().numpy()
    edge = np.zeros(len(graph.nodes))
    for output in graph.outputs:
        sources, weights = graph.in_edges(output.node)
        edge[sources.numpy()] += weights.abs().double().numpy()
    whole = total_effect(graph).abs().numpy()
    return {
        "influence": influence(graph).numpy(),
        "total effect": whole,
        "direct edge": edge,
        "activation": graph.nodes.activation.abs().double().numpy(),
        "gradient x activation": gradient,
        "random": draws.random(len(graph.nodes)),
    }
