"""What a graph of the planted model must show, worked out forwards from the concepts, and how well a graph shows it.

Nothing here uses the graph room's sweep: every source's vector is pushed forward through the heads that were planted,
in coordinates of concepts, and read by the neurons that were planted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from graphs.nodes import NodeType, node_id
from graphs.planted.circuit import Circuit, Head
from graphs.planted.model import GRID, SCORE, PlantedModel
from mechinterp.metrics.statistics import auroc
from mechinterp.types import ImageTextBatch

if TYPE_CHECKING:
    from graphs.graph import AttributionGraph

__all__ = ["Recovery", "Truth", "recovery", "truth"]

_TINY = 1e-7  # what is left of e^-24 in an attention pattern is no edge
Source = tuple[str, int, np.ndarray]


@dataclass(frozen=True)
class Truth:
    """Nodes by id, edges as (target id, source id); `out.0` is the logit of `target`.

    Fields:
        weights: every edge between inputs, active neurons and the output that is not zero, with its exact weight.
        nodes: the nodes on a path to the output.
        edges: the edges on a path to the output.
        activations: of every active neuron.
        value: the logit.
    """

    target: str
    weights: dict[tuple[str, str], float]
    nodes: frozenset[str]
    edges: frozenset[tuple[str, str]]
    activations: dict[str, float]
    value: float


def truth(planted: PlantedModel, image: ImageTextBatch, target: str, *, ideal: bool = False) -> Truth:
    """The exact graph of one image and one class.

    `ideal`: as if no two concepts shared a dimension, which tells what was meant to be planted in a model that is in
    superposition.
    """
    circuit = planted.circuit
    directions = planted.directions.numpy()
    gram = np.eye(len(circuit.concepts)) if ideal else directions @ directions.T
    forward = _Forward(circuit, gram, planted.columns)
    return forward.run(planted.amounts(image)[0], target)


class _Forward:
    """A forward pass in coordinates of concepts: `x[pos, concept]` is how much of each concept was written."""

    def __init__(self, circuit: Circuit, gram: Float[np.ndarray, "concept concept"], columns: dict):
        self.circuit, self.gram, self.columns = circuit, gram, columns
        self.place = {name: i for i, name in enumerate(circuit.concepts)}

    def vector(self, parts: dict[str, float]) -> Float[np.ndarray, " concept"]:
        found = np.zeros(len(self.place))
        for name, amount in parts.items():
            found[self.place[name]] += amount
        return found

    def pattern(self, head: Head, x: Float[np.ndarray, "pos concept"]) -> Float[np.ndarray, "pos pos"]:
        seen = x @ self.gram
        is_class, is_patch = seen[:, 0], seen[:, 1]
        scores = SCORE * (np.outer(is_class, is_patch) + np.outer(is_patch, is_class))
        if head.follows is not None:
            scores = scores + head.sharpness * np.outer(is_class, seen[:, self.place[head.follows]])
        weights = np.exp(scores - scores.max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True)

    def moved(self, head: Head, x: Float[np.ndarray, "pos concept"]) -> Float[np.ndarray, "pos concept"]:
        seen, out = x @ self.gram, np.zeros_like(x)
        for read, (written, gain) in head.moves.items():
            out[:, self.place[written]] += gain * seen[:, self.place[read]]
        return out

    def inputs(self, amounts: Float[np.ndarray, "texture row column"]) -> list[Source]:
        """Input nodes as (id, position, vector)."""
        found: list[Source] = [(node_id(NodeType.CLS, "vision"), 0, self.vector({"is class token": 1.0}))]
        flat = amounts.reshape(len(amounts), -1)
        for patch in range(GRID * GRID):
            content = dict(zip(self.circuit.textures, flat[:, patch], strict=True))
            found.append((node_id(NodeType.PATCH, "vision", pos=patch + 1), patch + 1, self.vector(content)))
            found.append(
                (node_id(NodeType.POSITION, "vision", pos=patch + 1), patch + 1, self.vector({"is patch": 1.0}))
            )
        return found

    def run(self, amounts: Float[np.ndarray, "texture row column"], target: str) -> Truth:
        sources = self.inputs(amounts)
        names = [name for name, _, _ in sources]
        n_pos = GRID * GRID + 1
        streams = np.zeros((len(sources), n_pos, len(self.place)))
        for row, (_, pos, vector) in enumerate(sources):
            streams[row, pos] = vector
        weights: dict[tuple[str, str], float] = {}
        activations: dict[str, float] = {}
        for layer in range(self.circuit.layers):
            streams = self.attend(layer, streams)
            written = []
            for neuron in self.circuit.neurons_of(layer):
                read = streams @ self.gram @ self.vector(dict(neuron.reads))  # [source, pos]
                for pos in np.flatnonzero(read.sum(0) + neuron.bias > 0):
                    name = node_id(NodeType.FEATURE, "vision", layer, int(pos), self.columns[neuron.name][1])
                    activations[name] = float(read[:, pos].sum() + neuron.bias)
                    weights |= _edges(name, names, read[:, pos])
                    stream = np.zeros(streams.shape[1:])
                    stream[pos] = activations[name] * self.vector(dict(neuron.writes))
                    written.append((name, stream))
            names = names + [name for name, _ in written]
            streams = np.concatenate([streams, *(stream[None] for _, stream in written)])
        read = streams[:, 0] @ self.gram @ self.vector({f"logit {target}": 1.0})
        weights |= _edges("out.0", names, read)
        nodes, edges = _reaching("out.0", weights)
        return Truth(target, weights, nodes, edges, activations, float(read.sum()))

    def attend(self, layer: int, streams: Float[np.ndarray, "source pos concept"]) -> np.ndarray:
        x = streams.sum(0)
        added = np.zeros_like(streams)
        for head in self.circuit.heads:
            if head.layer == layer:
                pattern = self.pattern(head, x)
                added += np.stack([pattern @ self.moved(head, stream) for stream in streams])
        return streams + added


def _edges(target: str, names: list[str], read: Float[np.ndarray, " source"]) -> dict[tuple[str, str], float]:
    return {(target, name): float(r) for name, r in zip(names, read, strict=True) if abs(r) > _TINY}


def _reaching(output: str, weights: dict[tuple[str, str], float]) -> tuple[frozenset[str], frozenset[tuple[str, str]]]:
    """What has a path to the output."""
    sources: dict[str, list[str]] = {}
    for above, below in weights:
        sources.setdefault(above, []).append(below)
    nodes, queue = {output}, [output]
    while queue:
        for name in sources.get(queue.pop(), []):
            if name not in nodes:
                nodes.add(name)
                queue.append(name)
    edges = frozenset(edge for edge in weights if edge[0] in nodes)
    return frozenset(nodes - {output}), edges


@dataclass(frozen=True)
class Recovery:
    """How well a graph separates the circuit from the rest; nan where there is nothing to separate.

    Fields:
        node_auroc: influence of the circuit's nodes above that of the other features and patches.
        edge_auroc: the same for edges, each weighed by its share of its target and its target's influence.
        largest_error: largest difference of an edge from its true weight (edges that should be 0 included).
        missing: circuit nodes that the graph does not hold.
    """

    node_auroc: float
    edge_auroc: float
    largest_error: float
    missing: int


def recovery(graph: AttributionGraph, planted: Truth, names: dict[str, str] | None = None) -> Recovery:
    """Compare a graph of one output with the planted truth.

    `names` maps node ids of the graph to ids of the truth, where features are not the neurons themselves (trained
    transcoders); a feature without a name counts as a node outside of the circuit. `largest_error` is then of the
    mapped edges only.
    """
    from graphs.influence import edges_of, influence, output_weights, shares

    nodes = graph.nodes
    called = list(nodes.ids) if names is None else [names.get(i, f"? {i}") for i in nodes.ids]
    edges = edges_of(graph)
    strength = influence(graph, edges)
    counted = nodes.is_type(NodeType.FEATURE, NodeType.PATCH).numpy()
    node_scores = {called[i]: float(strength[i]) for i in np.flatnonzero(counted)}
    wanted = {n for n in planted.nodes if ".L" in n or ".patch." in n}
    missing = wanted - node_scores.keys()
    node_scores |= dict.fromkeys(missing, 0.0)

    target_share = shares(edges) * (strength + output_weights(graph))[edges.target]
    edge_scores: dict[tuple[str, str], float] = dict.fromkeys(planted.edges, 0.0)
    found: dict[tuple[str, str], float] = {}
    for t, s, score, weight in zip(
        edges.target.tolist(), edges.source.tolist(), target_share.tolist(), edges.weight.tolist(), strict=True
    ):
        edge_scores[called[t], called[s]] = score
        found[called[t], called[s]] = weight
    pairs = found.keys() | planted.weights.keys() if names is None else found.keys() & planted.weights.keys()
    errors = [abs(found.get(pair, 0.0) - planted.weights.get(pair, 0.0)) for pair in pairs]
    return Recovery(
        _auroc(node_scores, wanted),
        _auroc(edge_scores, planted.edges),
        max(errors, default=float("nan")),
        len(missing),
    )


def _auroc(scores: dict, positives: set | frozenset) -> float:
    keys = list(scores)
    return auroc(np.array([scores[k] for k in keys]), np.array([k in positives for k in keys], dtype=float))
