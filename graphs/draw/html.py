"""`graph.html`: one offline page to walk through a graph: pan, zoom, open a node, pin, group, thresholds, search.

The page loads nothing. Its content security policy names its only script and style by hash; the graph is JSON in a data
block whose `<`, `>` and `&` are escaped, and everything reaches the page as text, never as markup.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from graphs.draw.notes import notes_of
from graphs.draw.png import caption, title_of
from graphs.draw.scene import Names, feature_names, feeds_of, grid_of, make_scene, output_name, patch_of, quoted
from graphs.influence import edges_of, influence, known_effect, output_weights, shares
from graphs.nodes import Node, NodeType
from graphs.supernodes import Supernodes
from mechinterp.pages.heat import thumbnail
from mechinterp.pages.html import clean, data_uri, page
from mechinterp.storage import write_bytes
from mechinterp.types import FeatureId

if TYPE_CHECKING:
    from graphs.graph import AttributionGraph

__all__ = ["Gallery", "page_of", "write_page"]

Gallery = Mapping[str, Sequence[tuple[bytes, str]]]
"""Pictures of features: FeatureId as text (`vision.blocks.2.hook_mlp_out:301`) to (PNG or JPEG, caption)."""
TEMPLATE = Path(__file__).parent / "templates" / "graph.html.j2"
START = 90
"""Share of the features' influence that the page shows first, in per cent; less where that is too much to read."""
READABLE = 45
SHOTS = 9


def write_page(
    graph: AttributionGraph,
    image: Float[np.ndarray, "height width"] | None,
    out: Path | str,
    names: Names | None = None,
    supernodes: Supernodes | None = None,
    gallery: Gallery | None = None,
    title: str | None = None,
) -> Path:
    """Write the page for a graph, best a pruned one; returns its path. See `graphs.draw.png.draw` for the arguments.

    Args:
        gallery: pictures of features, shown when a node is opened.
    """
    write_bytes(Path(out), page_of(graph, image, names, supernodes, gallery, title).encode("utf-8", "replace"))
    return Path(out)


def page_of(
    graph: AttributionGraph,
    image: Float[np.ndarray, "height width"] | None,
    names: Names | None = None,
    supernodes: Supernodes | None = None,
    gallery: Gallery | None = None,
    title: str | None = None,
) -> str:
    """The page as text."""
    from markupsafe import Markup

    grid = grid_of(graph)
    scene = make_scene(graph, names, supernodes, most=len(graph.nodes), most_lines=graph.n_edges)
    nodes = _nodes(graph, names)
    model = graph.meta.get("model") or {}
    data = {
        "nodes": nodes,
        "edges": _edges(graph),
        "towers": list(graph.nodes.towers),
        "feeds": [list(pair) for pair in feeds_of(graph)],
        "grid": list(grid) if grid else None,
        "supernodes": [{"name": clean(g.name), "members": _present(graph, g.members)} for g in supernodes or ()],
        "gallery": _pictures(gallery, {node["key"] for node in nodes}),
    }
    below = [f"model {model['label']}" if model.get("label") else "", graph.meta.get("image") or ""]
    return page(
        TEMPLATE,
        "graph.css",
        "graph.js",
        title=title or title_of(graph),
        subtitle=" · ".join(part for part in below if isinstance(part, str) and part),
        notes=notes_of(graph),
        start=_start([box.influence for box in scene.boxes if box.kind == NodeType.FEATURE]),
        grid=grid,
        image=data_uri(thumbnail(np.clip(image, 0, 1), side=480)) if image is not None and grid else None,
        caption=[line for line in caption(graph, scene) if not line.startswith("Drawn")],
        data=Markup(escaped_json(data)),
    )


def escaped_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in, nor be read as markup."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _nodes(graph: AttributionGraph, names: Names | None) -> list[dict[str, Any]]:
    table, named = graph.nodes, feature_names(names, graph)
    reach = table.influence.double()
    reach = reach if bool(reach.any()) else influence(graph)
    effect = known_effect(graph).tolist()
    rest = graph.rest.double().sum(1).tolist()
    rows = graph.row_of.tolist()
    made = []
    for i, share in enumerate(reach.tolist()):
        node = table[i]
        place = quoted(node.label.rpartition(" at ")[2]) if " at " in node.label else ""
        spot = patch_of(node.label)
        tower = node.tower.partition(".")[0]
        given = named.get((tower, node.layer, node.feature)) if node.type == NodeType.FEATURE else None
        made.append(
            {
                "id": node.id,
                "kind": node.type.name.lower(),
                "tower": node.tower,
                "layer": node.layer,
                "feature": node.feature,
                "key": f"{tower}.{node.layer}.{node.feature}" if node.type == NodeType.FEATURE else "",
                "name": clean(given or _plain_name(graph, node)),
                "label": clean(node.label),
                "place": "" if spot else clean(place),
                "patch": list(spot) if spot else None,
                "act": _short(node.activation),
                "pre": _short(node.pre),
                "con": _short(node.constant),
                "inf": _short(share),
                "eff": _short(effect[i]),
                "row": rows[i] >= 0,
                "rest": _short(rest[rows[i]]) if rows[i] >= 0 else 0,
            }
        )
    return made


def _plain_name(graph: AttributionGraph, node: Node) -> str:
    if node.type == NodeType.FEATURE:
        return f"F{node.feature}"
    return output_name(graph, node.label) if node.type == NodeType.OUTPUT else node.label


def _edges(graph: AttributionGraph) -> list[tuple[int, int, float, float]]:
    """Source, target, weight, and influence along it, of every edge."""
    edges = edges_of(graph)
    value = influence(graph, edges) + output_weights(graph)
    score = shares(edges) * value[edges.target]
    columns = (c.tolist() for c in (edges.source, edges.target, edges.weight, score))
    return [(s, t, _short(w), _short(v)) for s, t, w, v in zip(*columns, strict=True)]


def _short(value: float) -> float:
    """Seven digits: what float32 holds."""
    return float(f"{value:.7g}") if np.isfinite(value) else 0.0


def _present(graph: AttributionGraph, members: Sequence[str]) -> list[str]:
    return [member for member in members if member in graph.nodes]


def _pictures(gallery: Gallery | None, wanted: set[str]) -> dict[str, list[dict[str, str]]]:
    found = {}
    for key, shots in (gallery or {}).items():
        feature = FeatureId.parse(key)
        name = f"{feature.site.tower}.{feature.site.layer}.{feature.index}"
        if name in wanted:
            found[name] = [{"src": data_uri(picture), "caption": clean(said)} for picture, said in shots[:SHOTS]]
    return found


def _start(shares_: list[float]) -> int:
    """The share of influence to begin with: no more features than a person can read."""
    ordered = np.sort(np.asarray(shares_, dtype=float))[::-1]
    if len(ordered) <= READABLE or not ordered.sum():
        return START if len(ordered) > READABLE // 2 else 100
    return int(min(START, max(1, 100 * ordered[:READABLE].sum() / ordered.sum())))
