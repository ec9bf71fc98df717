"""What is done to features: a set of them, each at one layer and position, takes new activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from graphs.graph import AttributionGraph
from graphs.nodes import NodeType
from mechinterp.errors import UsageError

__all__ = ["Change", "FeatureAt", "features_of", "scaled", "taken_from"]


class FeatureAt(NamedTuple):
    """A feature at one position of one stack (`tower` is "vision", "text", or "text.1" for the second prompt)."""

    tower: str
    layer: int
    pos: int
    index: int


@dataclass(frozen=True)
class Change:
    """One intervention: the features take these activations together.

    What the MLP writes (for SAEs the stream) moves by `(v - a) d` for each; what the dictionary did not explain stays.
    """

    features: tuple[FeatureAt, ...]
    values: tuple[float, ...]
    name: str = ""

    def __post_init__(self) -> None:
        if not self.features or len(self.features) != len(self.values):
            raise UsageError(
                f"{len(self.features)} features with {len(self.values)} values", where="Change", hint="one value each"
            )
        if len(set(self.features)) != len(self.features):
            raise UsageError("a feature is changed twice", where="Change")


def features_of(graph: AttributionGraph, nodes: Iterable[int]) -> tuple[FeatureAt, ...]:
    """The features behind rows of a node table. Raises UsageError for a node of another type."""
    found = []
    for index in nodes:
        node = graph.nodes[int(index)]
        if node.type != NodeType.FEATURE:
            raise UsageError(f"{node.id} is no feature", where="nodes", hint="only features can be changed")
        found.append(FeatureAt(node.tower, node.layer, node.pos, node.feature))
    return tuple(found)


def scaled(graph: AttributionGraph, nodes: Sequence[int], factor: float = 0.0, name: str = "") -> Change:
    """The nodes' activations times `factor`: 0 ablates, -1 is the steering of Ameisen et al. 2025 (section 5)."""
    values = tuple(factor * graph.nodes[int(i)].activation for i in nodes)
    return Change(features_of(graph, nodes), values, name)


def taken_from(
    graph: AttributionGraph,
    nodes: Sequence[int],
    activations: Mapping[tuple[str, int], Float[Tensor, "_pos _d_sae"]],
    name: str = "",
) -> Change:
    """The nodes take the activations that they have elsewhere, by (tower, layer).

    `Lab.activations()` of another image makes this resample ablation; the mean of several of those, mean ablation.
    """
    features = features_of(graph, nodes)
    return Change(features, tuple(float(activations[f.tower, f.layer][f.pos, f.index]) for f in features), name)
