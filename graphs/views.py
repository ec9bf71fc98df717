"""A graph for other libraries: as a networkx graph, and as GraphML."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from graphs.influence import influence, output_weights
from graphs.nodes import NodeType
from mechinterp.pages.html import clean
from mechinterp.storage import atomic_path

if TYPE_CHECKING:
    import networkx

    from graphs.graph import AttributionGraph

__all__ = ["to_networkx", "write_graphml"]


def to_networkx(graph: AttributionGraph, min_influence: float | int = 0.0) -> networkx.DiGraph:
    """A `networkx.DiGraph` of the nodes with at least this influence, and of the outputs; edges point to their targets.

    Nodes are the ids, with type, tower, layer, position, feature, activation, influence and label; an edge has its
    signed `weight` and `size`, its absolute value. Edges that leave the kept nodes are not in it: the row sums of the
    graph hold in `graph`, not here.
    """
    import networkx

    nodes = graph.nodes
    reach = nodes.influence.double()
    reach = reach if bool(reach.any()) else influence(graph)
    keep = (reach >= min_influence) | (output_weights(graph) > 0)
    made = networkx.DiGraph()
    for i in keep.nonzero()[:, 0].tolist():
        node = nodes[i]
        made.add_node(
            node.id,
            type=NodeType(node.type).name.lower(),
            tower=node.tower,
            layer=node.layer,
            position=node.pos,
            feature=node.feature,
            activation=node.activation,
            influence=float(reach[i]),
            label=node.label,
        )
    target, source, weight = graph.edges
    inside = keep[target] & keep[source]
    columns = torch.stack([source[inside], target[inside]], 1).tolist()
    for (s, t), w in zip(columns, weight[inside].tolist(), strict=True):
        made.add_edge(nodes.ids[s], nodes.ids[t], weight=w, size=abs(w))
    return made


def write_graphml(graph: AttributionGraph, out: Path | str, min_influence: float | int = 0.0) -> Path:
    """Write the networkx view as GraphML, atomically; returns the path. XML has no control characters: they go."""
    import networkx

    made = to_networkx(graph, min_influence)
    for _, values in made.nodes(data=True):
        values["label"] = clean(values["label"]).translate({9: " ", 10: " "})
    with atomic_path(Path(out)) as partial:
        networkx.write_graphml(made, partial)
    return Path(out)
