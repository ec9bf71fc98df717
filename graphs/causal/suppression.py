"""Suppress a supernode, and see what falls, what rises, and whether random supernodes would have done the same.

After the preeclampsia experiment of Lindsey et al. 2025 ("On the Biology of a Large Language Model"): with the features
of the diagnosis suppressed, those of its criteria fall, those of the competing diagnosis rise, and the answer changes.
Suppression steers to -1 times the activation by default, not to 0, because what the dictionary did not explain shares
the direction (Ameisen et al. 2025, "Circuit Tracing", on interventions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from graphs.causal.changes import FeatureAt, features_of, scaled
from graphs.causal.controls import matched_sets
from graphs.causal.lab import Lab
from graphs.causal.relations import total_effects
from graphs.causal.sites import Mode
from graphs.graph import AttributionGraph
from graphs.nodes import NodeType
from mechinterp.errors import UsageError
from mechinterp.metrics.statistics import permutation_p

__all__ = ["Measured", "Suppression", "predicted", "suppress"]


@dataclass(frozen=True)
class Measured:
    """Something that is looked at while a supernode is suppressed.

    Fields:
        name: of a supernode (its total activation) or of an output.
        kind: "supernode" or "output".
        before, after: the value without and with the suppression.
        random: the value with each matched random supernode suppressed instead.
        p: of a change at least as large in size.
    """

    name: str
    kind: str
    before: float
    after: float
    random: tuple[float, ...]
    p: float


@dataclass(frozen=True)
class Suppression:
    """What one suppression did. `relaxed` and `unmatched`: see `matched_sets`."""

    name: str
    members: int
    factor: float
    mode: Mode
    measured: tuple[Measured, ...]
    relaxed: int
    unmatched: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def suppress(
    lab: Lab,
    graph: AttributionGraph,
    members: Sequence[int],
    watched: Mapping[str, Sequence[FeatureAt]],
    *,
    name: str = "supernode",
    factor: float = -1.0,
    mode: Mode = "free",
    n_random: int = 100,
    seed: int = 0,
) -> Suppression:
    """Multiply the activations of a supernode by `factor` and watch other supernodes and the outputs.

    Args:
        lab: the image.
        graph: its graph, not pruned.
        members: feature nodes of the supernode.
        watched: other supernodes by name, as features at positions; they may be silent before.
        name: of the supernode.
        factor: 0 ablates, -1 steers to the opposite.
        mode: what is held meanwhile.
        n_random: matched random supernodes.
        seed: of their draws.

    Raises UsageError when a watched feature is itself a member.
    """
    own = set(features_of(graph, members))
    everything = [feature for features in watched.values() for feature in features]
    if own & set(everything):
        raise UsageError("a watched feature is suppressed itself", where="watched")

    def decoder_norm(node: int) -> float:
        (feature,) = features_of(graph, [node])
        return float(lab.dictionary(feature).dictionary.W_dec[feature.index].norm())

    spared = [graph.nodes.index(i) for f in everything if (i := _node_name(f)) in graph.nodes]
    matched = matched_sets(graph, members, decoder_norm, n_random, seed, exclude=spared)
    changes = [scaled(graph, members, factor), *(scaled(graph, s, factor) for s in matched.sets)]
    result = lab.run(changes, mode, everything)
    _, clean = lab.clean_state(everything)
    measured, start = [], 0
    for label, features in watched.items():
        columns = slice(start, start + len(features))
        start += len(features)
        measured.append(_measured(label, "supernode", float(clean[columns].sum()), result.acts[:, columns].sum(1)))
    for column, output in enumerate(lab.outputs):
        label = getattr(getattr(output, "target", None), "name", f"output {column}")
        measured.append(_measured(label, "output", float(lab.values[column]), result.outputs[:, column]))
    return Suppression(name, len(members), factor, mode, tuple(measured), matched.relaxed, matched.unmatched)


def predicted(graph: AttributionGraph, members: Sequence[int], n: int = 8) -> dict[str, tuple[FeatureAt, ...]]:
    """What the graph says of a suppression: active features that should fall ("promoted") and rise ("inhibited").

    The `n` expanded features with the largest total effect of the members together, of each sign.
    """
    effect = total_effects(graph, members).sum(1).numpy()
    allowed = (graph.nodes.is_type(NodeType.FEATURE) & graph.expanded).numpy()
    allowed[list(members)] = False
    order = np.argsort(-np.where(allowed, effect, 0.0), kind="stable")
    promoted = [i for i in order[:n].tolist() if allowed[i] and effect[i] > 0]
    inhibited = [i for i in order[::-1][:n].tolist() if allowed[i] and effect[i] < 0]
    found = {"promoted": features_of(graph, promoted), "inhibited": features_of(graph, inhibited)}
    return {name: features for name, features in found.items() if features}


def _node_name(feature: FeatureAt) -> str:
    return f"{feature.tower}.L{feature.layer}.P{feature.pos}.F{feature.index}"


def _measured(name: str, kind: str, before: float, values: torch.Tensor) -> Measured:
    after, random = float(values[0]), values[1:].double().numpy()
    p = permutation_p(abs(after - before), np.abs(random - before))
    return Measured(name, kind, before, after, tuple(random.tolist()), p)
