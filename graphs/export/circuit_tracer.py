"""`circuit_tracer.json`: the graph in circuit-tracer's JSON, schema 1, which its viewer and Neuronpedia read.

Fields and habits are those of circuit-tracer 0.5.0 (`frontend/graph_models.py`, `assets/attribution_graph/util-cg.js`).
What its format has no word for is fitted in so that the viewer shows it and nothing is lost:

- ids: error nodes are `err_{layer}_{context}`; circuit-tracer's own, `0_{layer}_{pos}`, also name features of layer 0.
- layers: the towers' blocks in one count, `metadata.towers` says where each begins; contexts: their positions in a row.
- positions, class tokens and biases are of type "embedding", in contexts of their own behind the words, as the viewer
  writes the context's token over the name of every embedding and knows no other input.
- an output's name carries `(p=...)`, its share in the graph, without which the viewer stops.
- the viewer puts names into the page as markup, so angle brackets and ampersands are written in other characters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graphs.draw.scene import Names, feature_names
from graphs.export.schema import problems_of
from graphs.influence import influence
from graphs.nodes import Node, NodeType
from graphs.supernodes import Supernodes
from mechinterp.errors import UsageError
from mechinterp.pages.html import clean
from mechinterp.storage import write_json

if TYPE_CHECKING:
    from graphs.graph import AttributionGraph

__all__ = ["to_circuit_tracer", "write_circuit_tracer"]

_MARKUP = str.maketrans({"<": "‹", ">": "›", "&": "+", '"': "'"})
_NAMES = {NodeType.POSITION: "positions", NodeType.BIAS: "biases", NodeType.CLS: "class token"}


def write_circuit_tracer(graph: AttributionGraph, out: Path | str, **options: Any) -> Path:
    """Write `to_circuit_tracer(graph, **options)`; returns the path."""
    write_json(Path(out), to_circuit_tracer(graph, **options))
    return Path(out)


def to_circuit_tracer(
    graph: AttributionGraph,
    slug: str = "graph",
    scan: str = "mechinterp",
    names: Names | None = None,
    supernodes: Supernodes | None = None,
    whole: AttributionGraph | None = None,
) -> dict[str, Any]:
    """The graph, best a pruned one, as circuit-tracer's JSON.

    Args:
        graph: the graph.
        slug: its name in a list of graphs.
        scan: name of the set of dictionaries.
        names: of features, by `vision.blocks.2.hook_mlp_out:301`.
        supernodes: groups, which the viewer opens with.
        whole: the graph before it was pruned, for the names of positions that have no node left.
    """
    axes = _Axes(graph, whole)
    named = feature_names(names, graph)
    reach = _cumulative(graph)
    nodes = [_node(graph, graph.nodes[i], axes, named, reach[i]) for i in range(len(graph.nodes))]
    target, source, weight = (column.tolist() for column in graph.edges)
    groups = [
        [_text(g.name), *(nodes[graph.nodes.index(m)]["node_id"] for m in g.members if m in graph.nodes)]
        for g in supernodes or ()
    ]
    made = {
        "metadata": {
            "slug": slug,
            "scan": scan,
            "transcoder_list": axes.dictionaries,
            "prompt_tokens": axes.tokens,
            "prompt": _prompt(graph),
            "node_threshold": (graph.meta.get("pruning") or {}).get("node_threshold"),
            "schema_version": 1,
            "towers": axes.layers,
            "max_relative_residual": graph.meta.get("max_relative_residual"),
        },
        "qParams": {
            "pinnedIds": [nodes[o.node]["node_id"] for o in graph.outputs],
            "supernodes": [group for group in groups if len(group) > 1],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": [
            {"source": nodes[s]["node_id"], "target": nodes[t]["node_id"], "weight": w}
            for t, s, w in zip(target, source, weight, strict=True)
        ],
    }
    problems = problems_of(made)
    if problems:
        raise UsageError(problems[0], where="circuit_tracer.json", hint=f"{len(problems)} problem(s)")
    return made


class _Axes:
    """Layers and contexts of all towers, in one row each.

    Attributes:
        tokens: what stands at each context.
        layers: first layer of each tower; prompts of one text tower share theirs.
        n_layers: of all towers.
        dictionaries: name of the dictionary of each layer.
    """

    def __init__(self, graph: AttributionGraph, whole: AttributionGraph | None = None):
        nodes = graph.nodes
        places = _places(whole or graph) | _places(graph)
        self.tokens: list[str] = []
        self.layers: dict[str, int] = {}
        self._first: dict[str, int] = {}
        self._own: dict[tuple[str, NodeType], int] = {}
        self._length: dict[str, int] = {}
        bases: dict[str, int] = {}
        for t, tower in enumerate(nodes.towers):
            mine = (nodes.tower == t).nonzero()[:, 0].tolist()
            words = {pos: word for (name, pos), word in places.items() if name == tower}
            known = [*words, *(int(nodes.pos[i]) for i in mine)]  # an output may stand where nothing else does
            self._first[tower] = len(self.tokens)
            self._length[tower] = max(known, default=-1) + 1
            self.tokens += [_text(words.get(p, f"position {p}")) for p in range(self._length[tower])]
            base = tower.partition(".")[0]
            blocks = [int(nodes.layer[i]) for i in mine if int(nodes.type[i]) != NodeType.OUTPUT]
            bases[base] = max(bases.get(base, 0), max(blocks, default=-1) + 1)
        at = 0
        starts = {}
        for base, blocks in bases.items():
            starts[base] = at
            at += blocks
        self.n_layers = at
        self.layers = {tower: starts[tower.partition(".")[0]] for tower in nodes.towers}
        present = {(int(t), int(k)) for t, k in zip(nodes.tower.tolist(), nodes.type.tolist(), strict=True)}
        for t, tower in enumerate(nodes.towers):
            for kind, name in _NAMES.items():
                if (t, int(kind)) in present:
                    self._own[tower, kind] = len(self.tokens)
                    self.tokens.append(_text(f"[{name} of {tower}]"))
        self.dictionaries = _dictionaries(graph, starts, at)

    def context(self, node: Node) -> int:
        """The column of a node."""
        if node.type in _NAMES:
            return self._own[node.tower, node.type]
        last = self._first[node.tower] + max(0, self._length[node.tower] - 1)
        return self._first[node.tower] + node.pos if node.pos >= 0 else last


def _node(
    graph: AttributionGraph,
    node: Node,
    axes: _Axes,
    named: Mapping[tuple[str, int, int], str],
    cumulative: float,
) -> dict[str, Any]:
    """One node; key order and defaults as in circuit-tracer's `Node`."""
    context = axes.context(node)
    layer = axes.layers[node.tower] + node.layer
    made: dict[str, Any] = {
        "ctx_idx": context,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "clerp": "",
        "influence": cumulative,
        "activation": None,
    }
    if node.type == NodeType.FEATURE:
        name = named.get((node.tower.partition(".")[0], node.layer, node.feature))
        made |= {
            "node_id": f"{layer}_{node.feature}_{context}",
            "feature": (layer + node.feature) * (layer + node.feature + 1) // 2 + node.feature,
            "layer": str(layer),
            "feature_type": "cross layer transcoder",
            "jsNodeId": f"{layer}_{node.feature}-0",
            "clerp": _text(name) if name else "",
            "activation": node.activation,
        }
    elif node.type == NodeType.ERROR:
        made |= {
            "node_id": f"err_{layer}_{context}",
            "feature": -1,
            "layer": str(layer),
            "feature_type": "mlp reconstruction error",
            "jsNodeId": f"err_{layer}_{context}-0",
        }
    elif node.type == NodeType.OUTPUT:
        number = next(k for k, o in enumerate(graph.outputs) if o.node == node.index)
        share = float(graph.outputs.shares[number])
        made |= {
            "node_id": f"{axes.n_layers + 1}_{number}_{context}",
            "feature": number,
            "layer": str(axes.n_layers + 1),
            "feature_type": "logit",
            "token_prob": share,
            "is_target_logit": number == 0,
            "jsNodeId": f"L_{number}-{context}",
            "clerp": f'Output "{_text(node.label)}" (p={share:.3f})',
        }
    else:
        within = node.layer + 1 if node.type == NodeType.BIAS else node.pos
        made |= {
            "node_id": f"E_{node.id}_{context}",
            "feature": within,
            "layer": "E",
            "feature_type": "embedding",
            "jsNodeId": f"E_{node.id}-{context}",
            "clerp": _text(node.label),
        }
    return made


def _cumulative(graph: AttributionGraph) -> list[float]:
    """Of each node, the share of all influence that it and the more influential ones have; the viewer's slider."""
    reach = graph.nodes.influence.double()
    reach = reach if bool(reach.any()) else influence(graph)
    order = reach.argsort(descending=True, stable=True)
    total = torch.empty_like(reach)
    total[order] = reach[order].cumsum(0) / reach.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return total.tolist()


def _dictionaries(graph: AttributionGraph, starts: dict[str, int], n: int) -> list[str]:
    found = [""] * n
    for about in graph.meta.get("dictionaries") or ():
        parts = str(about.get("writes", "")).split(".")
        if len(parts) > 2 and parts[2].isdigit() and parts[0] in starts and starts[parts[0]] + int(parts[2]) < n:
            found[starts[parts[0]] + int(parts[2])] = ".".join(parts)
    return found


def _prompt(graph: AttributionGraph) -> str:
    return _text("; ".join(output.name for output in graph.outputs))


def _places(graph: AttributionGraph) -> dict[tuple[str, int], str]:
    """What stands at each position of each tower; an output's label says what it is, not where."""
    nodes = graph.nodes
    rows = zip(nodes.tower.tolist(), nodes.pos.tolist(), nodes.type.tolist(), nodes.labels, strict=True)
    return {
        (nodes.towers[tower], pos): _place(label)
        for tower, pos, kind, label in rows
        if pos >= 0 and kind != NodeType.OUTPUT
    }


def _place(label: str) -> str:
    """Where a node is, from its label: "error at patch 3,4" is at "patch 3,4"."""
    return label.removeprefix("position of ").rpartition(" at ")[2]


def _text(text: str) -> str:
    return str(clean(" ".join(text.split()))).translate(_MARKUP)
