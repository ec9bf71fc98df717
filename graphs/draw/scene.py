"""What a picture of a graph shows: boxes and lines, chosen and named, before anything has a place.

Features are taken together over positions (a box says where, on the image), errors by layer, and positions and biases
by tower, each as the sum of its members. The most influential boxes are shown; what is not shown is counted. Errors,
positions and biases are shown by their share, without lines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from graphs.influence import edges_of, influence, known_effect, output_weights, shares
from graphs.nodes import NodeType
from graphs.supernodes import Supernodes
from mechinterp.errors import UsageError
from mechinterp.pages.html import clean
from mechinterp.types import FeatureId, Site

if TYPE_CHECKING:
    from graphs.graph import AttributionGraph

__all__ = [
    "QUIET",
    "Box",
    "Line",
    "Names",
    "Scene",
    "certificate",
    "feature_names",
    "feeds_of",
    "grid_of",
    "make_scene",
    "output_name",
    "patch_of",
    "quoted",
    "written_sites",
]

QUIET = (NodeType.ERROR, NodeType.BIAS, NodeType.POSITION, NodeType.CLS)

Names = Mapping[str, str] | Mapping[FeatureId, str]
_PATCH = re.compile(r"patch (\d+)\s*,\s*(\d+)$")


@dataclass(frozen=True)
class Box:
    """One thing in the picture.

    Attributes:
        kind, tower, layer: of its members.
        name: what it is called; `detail`: a second, smaller line.
        influence: share of the outputs that passes through its members.
        effect: total effect of its members on the outputs, signed.
        members: node indices in the graph.
        patches: (row, column) to activation, for what stands at image patches.
    """

    kind: NodeType
    tower: str
    layer: int
    name: str
    detail: str
    influence: float
    effect: float
    members: tuple[int, ...]
    patches: dict[tuple[int, int], float] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """Edges between two boxes, added up; `score` is the influence that runs along them."""

    source: int
    target: int
    weight: float
    score: float


@dataclass(frozen=True)
class Scene:
    """A picture's content.

    Attributes:
        feeds: pairs of towers of which the first feeds the second.
        grid: rows and columns of patches, None without an image.
        hidden_boxes: features that are not shown, and the largest influence among them.
        line_share: of the influence along all edges, what runs along the lines.
        top_patches: boxes of the patches that have lines.
    """

    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
    towers: tuple[str, ...]
    feeds: tuple[tuple[str, str], ...]
    grid: tuple[int, int] | None
    hidden_boxes: int
    hidden_influence: float
    line_share: float
    top_patches: tuple[int, ...]


def make_scene(
    graph: AttributionGraph,
    names: Names | None = None,
    supernodes: Supernodes | None = None,
    most: int = 60,
    most_lines: int = 180,
    most_patches: int = 8,
) -> Scene:
    """Choose what to show of a graph, best a pruned one.

    Args:
        graph: the graph.
        names: of features, by FeatureId or its text `vision.blocks.2.hook_mlp_out:301`.
        supernodes: groups to show as one box each.
        most: boxes of features, at most.
        most_lines: lines, at most; every box keeps its strongest line in and out.
        most_patches: patches with lines, at most.
    """
    nodes = graph.nodes
    named = feature_names(names, graph)
    owner, keys = _owners(graph, supernodes or Supernodes())
    reach = nodes.influence.double()
    if not bool(reach.any()):
        reach = influence(graph)
    effect = known_effect(graph)
    members: list[list[int]] = [[] for _ in keys]
    for node, box in enumerate(owner):
        members[box].append(node)
    boxes = [_box(graph, key, mine, reach, effect, named) for key, mine in zip(keys, members, strict=True)]
    every = _lines(graph, owner)
    patches = _ranked(boxes, NodeType.PATCH)
    silent = {*patches[most_patches:], *(i for i, b in enumerate(boxes) if b.kind in QUIET)}
    lines = [line for line in every if line.source not in silent]

    ranked = _ranked(boxes, NodeType.FEATURE)
    shown = set(ranked[:most]) | {i for i, b in enumerate(boxes) if b.kind != NodeType.FEATURE}
    kept = _strongest([line for line in lines if line.source in shown and line.target in shown], most_lines)
    linked = {end for line in kept for end in (line.source, line.target)}
    always = (NodeType.OUTPUT, NodeType.TOKEN, NodeType.PATCH, *QUIET)
    shown = {i for i in shown if boxes[i].kind in always or i in linked}
    new = {old: i for i, old in enumerate(sorted(shown))}
    hidden = [i for i in ranked if i not in shown]
    total = sum(line.score for line in every)
    return Scene(
        boxes=tuple(boxes[i] for i in sorted(shown)),
        lines=tuple(Line(new[e.source], new[e.target], e.weight, e.score) for e in kept),
        towers=nodes.towers,
        feeds=feeds_of(graph),
        grid=grid_of(graph),
        hidden_boxes=len(hidden),
        hidden_influence=max((boxes[i].influence for i in hidden), default=0.0),
        line_share=sum(line.score for line in kept) / total if total else 1.0,
        top_patches=tuple(new[i] for i in patches[:most_patches]),
    )


def written_sites(graph: AttributionGraph) -> dict[tuple[str, int], str]:
    """Where the features of each (tower, layer) write, as far as the graph says: "vision.blocks.2.hook_mlp_out"."""
    found = {}
    for about in graph.meta.get("dictionaries") or ():
        site = Site.parse(about["writes"])
        if site.layer is not None:
            found[site.tower, site.layer] = str(site)
    return found


def feature_names(names: Names | None, graph: AttributionGraph | None = None) -> dict[tuple[str, int, int], str]:
    """Names by (tower, layer, latent). Raises UsageError for a key that is no feature of a block.

    With a graph, without the names that belong to another dictionary than the graph's: latent 84 of a transcoder is not
    latent 84 of an SAE in the same block.
    """
    found, sites = {}, {} if graph is None else written_sites(graph)
    for key, name in (names or {}).items():
        feature = key if isinstance(key, FeatureId) else FeatureId.parse(key)
        if feature.site.layer is None:
            raise UsageError("is not in a block", where=str(key))
        if sites.get((feature.site.tower, feature.site.layer), str(feature.site)) != str(feature.site):
            continue
        found[feature.site.tower, feature.site.layer, feature.index] = str(name)
    return found


def grid_of(graph: AttributionGraph) -> tuple[int, int] | None:
    """Rows and columns of the image's patches, from the labels of the patch nodes; None without any."""
    nodes = graph.nodes
    found = [patch_of(nodes.labels[i]) for i in nodes.is_type(NodeType.PATCH).nonzero()[:, 0].tolist()]
    places = [place for place in found if place]
    return (max(r for r, _ in places) + 1, max(c for _, c in places) + 1) if places else None


def patch_of(label: str) -> tuple[int, int] | None:
    """Row and column of the patch that a label ends in, as in "feature 301 at patch 3,4"."""
    found = _PATCH.search(label)
    return (int(found[1]), int(found[2])) if found else None


def quoted(place: str) -> str:
    """A word as a word, the class token as it is."""
    return place if place == "CLS" else f"“{place}”"


def output_name(graph: AttributionGraph, label: str) -> str:
    """What an output is called beside the others: "image half" where all are halves of one score, else its label."""
    wholes = {output.name.partition(" (")[0] for output in graph.outputs}
    if len(graph.outputs) == 1 or len(wholes) > 1:
        return label
    return label.removeprefix(f"{wholes.pop()} (").removesuffix(")")


def certificate(graph: AttributionGraph) -> dict[str, Any]:
    """What is printed on every picture: how exactly rows add up, the scores, and what was pruned.

    The largest residual is that of the whole graph and `rows` are those of the whole graph, where they are known.
    """
    pre = graph.nodes.pre[graph.targets].double()
    largest = float((graph.residuals().abs() / pre.abs().clamp_min(1e-6 * float(pre.abs().max()) + 1e-30)).max())
    return {
        "max_relative_residual": graph.meta.get("max_relative_residual"),
        "residual_here": largest,
        "rows": graph.meta.get("rows", len(graph.targets)),
        "active_features": graph.meta.get("active_features"),
        "expanded_features": graph.meta.get("expanded_features"),
        "whole": graph.meta.get("scores"),
        "pruning": graph.meta.get("pruning"),
    }


def _owners(graph: AttributionGraph, supernodes: Supernodes) -> tuple[list[int], list[tuple]]:
    """The box of each node, and what defines each box."""
    nodes = graph.nodes
    group = {member: g.name for g in supernodes for member in g.members}
    found: dict[tuple, int] = {}
    owner = []
    columns = (c.tolist() for c in (nodes.type, nodes.tower, nodes.layer, nodes.feature))
    for i, (kind, tower, layer, feature) in enumerate(zip(*columns, strict=True)):
        name = nodes.ids[i]
        if name in group:
            key: tuple = ("group", group[name])
        elif kind == NodeType.FEATURE:
            key = (kind, tower, layer, feature)
        elif kind == NodeType.ERROR:
            key = (kind, tower, layer)
        elif kind in (NodeType.BIAS, NodeType.POSITION, NodeType.CLS):
            key = (kind, tower)
        else:
            key = (kind, name)
        owner.append(found.setdefault(key, len(found)))
    return owner, list(found)


def _ranked(boxes: list[Box], kind: NodeType) -> list[int]:
    """Boxes of one kind, most influential first."""
    return sorted((i for i, b in enumerate(boxes) if b.kind == kind), key=lambda i: -boxes[i].influence)


def _box(graph: AttributionGraph, key: tuple, members: list[int], reach, effect, named) -> Box:
    nodes = graph.nodes
    first = max(members, key=lambda i: float(reach[i]))
    kind, tower = NodeType(int(nodes.type[first])), nodes.towers[int(nodes.tower[first])]
    layer, feature = int(nodes.layer[first]), int(nodes.feature[first])
    patches: dict[tuple[int, int], float] = {}
    places = []
    for i in members:
        at = nodes.labels[i].rpartition(" at ")[2]
        where = patch_of(at)
        if where:
            patches[where] = patches.get(where, 0.0) + abs(float(nodes.activation[i]))
        elif kind == NodeType.FEATURE:
            places.append(quoted(at))
    name, detail = nodes.labels[first], ""
    if kind == NodeType.FEATURE:
        given = named.get((tower.partition(".")[0], layer, feature))
        name = key[1] if key[0] == "group" else given or f"F{feature}"
        where = [_count(len(patches), "patch", "patches")] if patches else []
        where += list(dict.fromkeys(places))[:2] + (["…"] if len(set(places)) > 2 else [])
        many = len({(int(nodes.layer[i]), int(nodes.feature[i])) for i in members})
        own = _count(many, "feature", "features") if key[0] == "group" else f"F{feature}" if given else ""
        detail = ", ".join(part for part in (own, *where) if part)
    elif kind == NodeType.ERROR:
        name = "error"
    elif kind == NodeType.BIAS:
        name = "projector" if tower == "projector" else "biases"
    elif kind == NodeType.POSITION:
        name = "positions"
    elif kind == NodeType.CLS:
        name = "class token"
    elif kind == NodeType.OUTPUT:
        name = output_name(graph, name)
        detail = f"{float(nodes.activation[first]):+.3f}".replace("-", "−")
    if kind in (NodeType.BIAS, NodeType.POSITION, NodeType.CLS):
        layer = -1
    rows = torch.tensor(members)
    share, moved = float(reach[rows].sum()), float(effect[rows].sum())
    return Box(kind, tower, layer, clean(name), clean(detail), share, moved, tuple(members), patches)


def _lines(graph: AttributionGraph, owner: list[int]) -> list[Line]:
    """Every pair of boxes with edges between them, strongest first."""
    edges = edges_of(graph)
    value = influence(graph, edges) + output_weights(graph)
    score = shares(edges) * value[edges.target]
    of = torch.tensor(owner)
    n = max(owner, default=-1) + 1
    pair = of[edges.target] * n + of[edges.source]
    pairs, at = pair.unique(return_inverse=True)
    summed = torch.zeros(len(pairs), 2, dtype=torch.float64).index_add_(0, at, torch.stack([edges.weight, score], 1))
    made = [
        Line(p % n, p // n, weight, strength)
        for p, (weight, strength) in zip(pairs.tolist(), summed.tolist(), strict=True)
        if p % n != p // n
    ]
    return sorted(made, key=lambda line: -line.score)


def _strongest(lines: list[Line], most: int) -> list[Line]:
    """The first `most` lines (they come sorted), and before them the first into and out of every box."""
    best: list[Line] = []
    into, out = set(), set()
    for line in lines:
        if line.target not in into or line.source not in out:
            into.add(line.target)
            out.add(line.source)
            best.append(line)
    chosen = {id(line) for line in best[:most]}
    rest = [line for line in lines if id(line) not in chosen][: max(0, most - len(chosen))]
    return sorted(best[:most] + rest, key=lambda line: -line.score)


def feeds_of(graph: AttributionGraph) -> tuple[tuple[str, str], ...]:
    """Pairs of towers of which the first feeds the second, outputs left aside."""
    nodes = graph.nodes
    target, source, _ = graph.edges
    inner = nodes.type[target] == NodeType.FEATURE
    n = len(nodes.towers)
    pairs = (nodes.tower[source].long() * n + nodes.tower[target])[inner].unique().tolist()
    return tuple((nodes.towers[p // n], nodes.towers[p % n]) for p in pairs if p // n != p % n)


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"
