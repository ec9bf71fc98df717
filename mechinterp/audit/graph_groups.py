"""The groups of `mechinterp graph`: proposed ones get names, a user's are read back and checked, and one is picked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mechinterp.errors import UsageError
from mechinterp.pages.html import clean

if TYPE_CHECKING:
    from graphs.graph import AttributionGraph
    from graphs.supernodes import Supernodes
    from mechinterp.audit.graphing import ImageGraph

__all__ = ["fitted", "keys_of", "members_of", "named"]

SHOWN = 3  # names in one line


def keys_of(graph: AttributionGraph) -> Callable[[int], str]:
    """The key of a feature node in `stored_names`."""
    from graphs.draw.scene import written_sites

    nodes, sites = graph.nodes, written_sites(graph)

    def key(node: int) -> str:
        tower = nodes.towers[int(nodes.tower[node])].partition(".")[0]
        return f"{sites[tower, int(nodes.layer[node])]}:{int(nodes.feature[node])}"

    return key


def named(graph: AttributionGraph, groups: Supernodes, names: Mapping[str, str]) -> Supernodes:
    """The groups by their strongest member: its name where it has one, and how many features are with it."""
    from graphs.supernodes import Supernodes

    made, key = Supernodes(), keys_of(graph)
    for group in groups:
        rows = [graph.nodes.index(member) for member in group.members]
        features = dict.fromkeys(map(key, rows))
        first = max(rows, key=lambda row: float(graph.nodes.influence[row]))
        name = f"{names.get(key(first), f'F{int(graph.nodes.feature[first])}')} +{len(features) - 1}"
        taken = {g.name for g in made}
        made = made.add(name if name not in taken else f"{name} ({len(made) + 1})", group.members)
    return made


def fitted(groups: Supernodes, made: ImageGraph, path: Path) -> tuple[Supernodes, list[str]]:
    """A user's groups, checked against the whole graph of an image: what is there of them, and the lines to print.

    Members that the graph lacks are left out, and the lines say so and which groups mix signs. Raises UsageError where
    no member is in the graph, and for one that is no feature.
    """
    from graphs.nodes import NodeType

    nodes = made.whole.nodes
    members = [member for group in groups for member in group.members]
    known = [member for member in members if member in nodes]
    if not known:
        features = nodes.is_type(NodeType.FEATURE).nonzero()[:, 0].tolist()
        such = f"such as {nodes.ids[features[0]]} here" if features else "there are none here"
        raise UsageError(
            f"none of its {len(members)} members is in this graph", where=str(path), hint=f"ids of features, {such}"
        )
    for member in known:
        if nodes.type[nodes.index(member)] != NodeType.FEATURE:
            raise UsageError(f"{member} is no feature", where=str(path), hint="only features can be grouped")
    unknown = [member for member in members if member not in nodes]
    kept = groups.remove_nodes(unknown).checked(made.whole)
    mixed = [group.name for group in kept if group.mixed_signs]
    signs = f"some members raise the score and others lower it in {_some(mixed)}" if mixed else "none mixes signs"
    lines = [f"  groups from {clean(path.name)}: {len(kept)} with {len(known)} members; {signs}"]
    if unknown:
        lines.append(f"    {len(unknown)} members are not in this graph and left out: {_some(unknown)}")
    weak = [member for member in known if member not in made.pruned.nodes]
    if weak:
        lines.append(f"    {len(weak)} members are too weak to be drawn: {_some(weak)}")
    return kept, lines


def _some(names: list[str]) -> str:
    """The first names of a list, in one line of text that prints."""
    shown = ", ".join(" ".join(clean(name).split()) for name in names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def members_of(graph: AttributionGraph, text: str, groups: Supernodes, names: Mapping[str, str]) -> list[int]:
    """The feature nodes that a text means: a group, a feature's name, or ids separated by commas.

    An id is one node (`vision.L2.P17.F301`) or a feature at all its places (`vision.L2.F301`). Raises UsageError that
    lists the groups when nothing is meant.
    """
    from graphs.nodes import NodeType

    nodes, key = graph.nodes, keys_of(graph)
    features = nodes.is_type(NodeType.FEATURE).nonzero()[:, 0].tolist()
    for group in groups:
        if group.name == text:
            return [nodes.index(member) for member in group.members]
    found = [i for i in features if names.get(key(i)) == text]
    if found:
        return found
    by_id: dict[str, list[int]] = {}
    for i in features:
        whole = f"{nodes.towers[int(nodes.tower[i])]}.L{int(nodes.layer[i])}.F{int(nodes.feature[i])}"
        by_id.setdefault(whole, []).append(i)
        by_id.setdefault(nodes.ids[i], []).append(i)
    parts = [part.strip() for part in text.split(",")]
    missing = [part for part in parts if part not in by_id]
    if missing:
        known = ", ".join(group.name for group in groups) or "none"
        raise UsageError(
            f"{missing[0]!r} is no group, name or feature here", where="--suppress", hint=f"groups: {known}"
        )
    return list(dict.fromkeys(i for part in parts for i in by_id[part]))
