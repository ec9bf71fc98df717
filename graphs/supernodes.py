"""Groups of nodes: proposed, changed by hand, kept as JSON, and summed so that a grouped graph still adds up.

No automatic grouping is known to be sufficient (Ameisen et al. 2025 grouped by hand), so `suggest` only proposes, from
three kinds of evidence, and asks that members (each a feature at a position) push the outputs the same way. Groups made
by hand may mix signs; `Supernodes.checked` says which do. The weight of a group is the sum over its members: of
activations, of pre-activations, of edges in and out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphs.graph import AttributionGraph, Outputs, csr
from graphs.influence import known_effect
from graphs.nodes import N_TYPES, NodeTable, NodeType
from mechinterp.errors import StorageError, UsageError
from mechinterp.storage import read_json, write_json

if TYPE_CHECKING:
    from mechinterp.types import Placed

__all__ = ["Supernode", "Supernodes", "by_feature", "grouped", "merge", "suggest"]


@dataclass(frozen=True)
class Supernode:
    """A named group of nodes, by their ids.

    `mixed_signs`: some members raise the outputs and others lower them; None while it was not checked.
    """

    name: str
    members: tuple[str, ...]
    mixed_signs: bool | None = None


@dataclass(frozen=True)
class Supernodes:
    """Groups that share no node. Every change gives a new object; ids outlive pruning."""

    groups: tuple[Supernode, ...] = ()

    def __post_init__(self) -> None:
        names = [group.name for group in self.groups]
        if len(set(names)) != len(names):
            raise UsageError(f"two supernodes share a name in {names}", where="Supernodes")
        seen: dict[str, str] = {}
        for group in self.groups:
            for member in group.members:
                if member in seen:
                    raise UsageError(f"{member} is in {seen[member]!r} and in {group.name!r}", where="Supernodes")
                seen[member] = group.name

    def __iter__(self) -> Iterator[Supernode]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> Supernode:
        for group in self.groups:
            if group.name == name:
                return group
        raise UsageError(f"there is no supernode {name!r}", hint=f"there are {[g.name for g in self.groups]}")

    def add(self, name: str, members: Iterable[str]) -> Supernodes:
        """With these nodes in the group `name`, which is made where there is none; they leave other groups."""
        new = tuple(dict.fromkeys(members))
        left = self.remove_nodes(new)
        if any(group.name == name for group in left.groups):
            more = replace(left[name], members=(*left[name].members, *new), mixed_signs=None)
            return Supernodes(tuple(more if g.name == name else g for g in left.groups))
        return Supernodes((*left.groups, Supernode(name, new)))

    def remove(self, name: str) -> Supernodes:
        """Without the group `name`."""
        gone = self[name]
        return Supernodes(tuple(group for group in self.groups if group is not gone))

    def remove_nodes(self, members: Iterable[str]) -> Supernodes:
        """Without these nodes; groups that lose all their nodes go."""
        gone = set(members)
        left = ((g, tuple(m for m in g.members if m not in gone)) for g in self.groups)
        groups = (g if len(m) == len(g.members) else replace(g, members=m, mixed_signs=None) for g, m in left)
        return Supernodes(tuple(group for group in groups if group.members))

    def rename(self, name: str, new: str) -> Supernodes:
        """With another name for one group."""
        old = self[name]
        return Supernodes(tuple(replace(g, name=new) if g is old else g for g in self.groups))

    def checked(self, graph: AttributionGraph) -> Supernodes:
        """With `mixed_signs` of each group said, by the total effect on the outputs of every member in the graph.

        A group without a member in the graph stays unchecked.
        """
        effect = known_effect(graph).sign().tolist()

        def mixed(group: Supernode) -> bool | None:
            signs = {effect[graph.nodes.index(m)] for m in group.members if m in graph.nodes}
            return {1.0, -1.0} <= signs if signs else None

        return Supernodes(tuple(replace(g, mixed_signs=mixed(g)) for g in self.groups))

    def save(self, path: Path | str) -> None:
        """Write as JSON, atomically; `mixed_signs` where it was checked."""
        groups: list[dict[str, object]] = [{"name": g.name, "members": list(g.members)} for g in self.groups]
        for group, written in zip(self.groups, groups, strict=True):
            if group.mixed_signs is not None:
                written["mixed_signs"] = group.mixed_signs
        write_json(Path(path), {"schema_version": 1, "supernodes": groups})

    @classmethod
    def load(cls, path: Path | str) -> Supernodes:
        """Read what `save` or the page wrote; signs are to be checked anew. Raises StorageError for something else."""
        found = read_json(Path(path))
        try:
            read = [(g["name"], g["members"]) for g in found["supernodes"]]
            if not all(isinstance(ids, list) and {type(text) for text in (name, *ids)} == {str} for name, ids in read):
                raise TypeError
            return cls(tuple(Supernode(name, tuple(ids)) for name, ids in read))
        except (KeyError, TypeError, UsageError) as error:
            what = error.what if isinstance(error, UsageError) else "holds no supernodes"
            raise StorageError(what, where=str(path), hint="each name once, each member in one list of ids") from error


def grouped(graph: AttributionGraph, supernodes: Supernodes) -> AttributionGraph:
    """The graph with each supernode as one node, id `group.N`; see `merge`. Nodes that the graph lacks do not count."""
    parts = []
    for i, group in enumerate(supernodes):
        members = [graph.nodes.index(m) for m in group.members if m in graph.nodes]
        if members:
            parts.append((f"group.{i}", group.name, members))
    return merge(graph, parts)


def by_feature(graph: AttributionGraph, effect: Float[Tensor, " node"] | None = None) -> Supernodes:
    """One group for each feature of a dictionary that fires at several positions.

    Where the `effect` of each node is given, positions at which it has another sign are another group.
    """
    found: dict[tuple[int, int, int, int], list[str]] = {}
    nodes = graph.nodes
    sign = (torch.zeros(len(nodes)) if effect is None else effect.sign()).int().tolist()
    for i in nodes.is_type(NodeType.FEATURE).nonzero()[:, 0].tolist():
        key = (int(nodes.tower[i]), int(nodes.layer[i]), int(nodes.feature[i]), sign[i])
        found.setdefault(key, []).append(nodes.ids[i])
    groups = [
        Supernode(f"{nodes.towers[tower]}.L{layer}.F{feature}{('', '+', '-')[way]}", tuple(ids))
        for (tower, layer, feature, way), ids in found.items()
        if len(ids) > 1
    ]
    return Supernodes(tuple(groups))


def merge(graph: AttributionGraph, parts: Sequence[tuple[str, str, Sequence[int]]]) -> AttributionGraph:
    """The graph in which some nodes are drawn together.

    Args:
        parts: (id, label, node indices); the nodes of a part are of one type and tower.

    Everything is summed: activation, influence, total effect, edges; `pre` and `constant` over the members whose
    in-edges are known, so that every row adds up. Influence and effect count a path as often as it meets the part.
    Edges within a part go to its `rest`. A part that spans layers may stand in a cycle with another one: such a graph
    is a summary to look at, and `influence` refuses it. Raises UsageError where a part mixes
    types or towers, or holds an output.
    """
    nodes, n = graph.nodes, len(graph.nodes)
    owner = torch.arange(n)
    place = torch.arange(n)
    for name, _, members in parts:
        rows = torch.tensor(members, dtype=torch.long)
        mixed = len(set(zip(nodes.type[rows].tolist(), nodes.tower[rows].tolist(), strict=True))) != 1
        if mixed or int(nodes.type[rows[0]]) == NodeType.OUTPUT:
            raise UsageError(
                "mixes types or towers, or holds an output", where=name, hint="group features of one tower"
            )
        owner[rows] = rows[nodes.influence[rows].argmax()]
        place[rows] = rows.max()
    heads = (owner == torch.arange(n)).nonzero()[:, 0]
    heads = heads[place[heads].argsort(stable=True)]
    new = torch.empty(n, dtype=torch.long)
    new[heads] = torch.arange(len(heads))
    new = new[owner]
    return _summed(graph, new, heads, {int(new[members[0]]): (name, label) for name, label, members in parts})


def _summed(
    graph: AttributionGraph, new: Int[Tensor, " node"], heads: Int[Tensor, " part"], names: dict[int, tuple[str, str]]
) -> AttributionGraph:
    nodes, n = graph.nodes, len(heads)

    def total(values: Tensor) -> Tensor:
        return torch.zeros(n, dtype=values.dtype).index_add_(0, new, values)

    def common(values: Tensor) -> Tensor:
        """The value that all members share, else -1."""
        first = values[heads]
        differs = torch.zeros(n, dtype=torch.bool)
        differs[new[values != first[new]]] = True
        return torch.where(differs, torch.full_like(first, -1), first)

    known = graph.expanded | ~nodes.is_type(NodeType.FEATURE)
    table = NodeTable(
        type=nodes.type[heads],
        tower=nodes.tower[heads],
        layer=nodes.layer[heads],
        pos=common(nodes.pos),
        feature=common(nodes.feature),
        activation=total(nodes.activation),
        pre=total(torch.where(known, nodes.pre, torch.zeros_like(nodes.pre))),
        constant=total(torch.where(known, nodes.constant, torch.zeros_like(nodes.constant))),
        influence=total(nodes.influence),
        effect=total(nodes.effect),
        towers=nodes.towers,
        ids=tuple(names[i][0] if i in names else nodes.ids[head] for i, head in enumerate(heads.tolist())),
        labels=tuple(names[i][1] if i in names else nodes.labels[head] for i, head in enumerate(heads.tolist())),
    )
    has_row = torch.zeros(n, dtype=torch.bool)
    has_row[new[graph.targets]] = True
    targets = has_row.nonzero()[:, 0]
    row = torch.cumsum(has_row, 0) - 1
    rest = torch.zeros(len(targets), N_TYPES, dtype=graph.rest.dtype)
    rest.index_add_(0, row[new[graph.targets]], graph.rest)
    target, source, weight = graph.edges
    inside = new[target] == new[source]
    at = row[new[target[inside]]] * N_TYPES + nodes.type[source[inside]].long()
    rest.view(-1).index_add_(0, at, weight[inside])
    pairs = torch.stack([row[new[target[~inside]]], new[source[~inside]]])
    matrix = torch.sparse_coo_tensor(pairs, weight[~inside], (len(targets), n), check_invariants=False).coalesce()
    at_row, column = matrix.indices()
    crow = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(at_row, minlength=len(targets)).cumsum(0)])
    weights = csr(crow, column, matrix.values(), (len(targets), n))
    outputs = Outputs(replace(o, node=int(new[o.node])) for o in graph.outputs)
    return AttributionGraph(table, weights, targets, rest, outputs, dict(graph.meta))


def suggest(
    graph: AttributionGraph, dictionaries: Sequence[Placed] = (), least: float = 0.5, most: int = 2000
) -> Supernodes:
    """Propose groups of features of one tower that come from the same places, go to the same places, and write alike.

    Features are first taken together over the positions at which they push the outputs the same way. Two of them are
    alike as the mean of the cosines of their in-edges, of their out-edges and, where `dictionaries` are given, of their
    decoder directions. They may share a group when that is at least `least`, when all their members' effects on the
    outputs have one sign, and when their out-edges point the same way. Every pair in a group has to (complete linkage).

    Args:
        graph: best pruned: at most the `most` most influential features are compared.
        dictionaries: of the graph, for decoder directions.
        least: of the mean cosine.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    effect = known_effect(graph)
    alone = by_feature(graph, effect)
    whole = grouped(graph, alone)
    nodes = whole.nodes
    features = nodes.is_type(NodeType.FEATURE).nonzero()[:, 0]
    features = features[nodes.influence[features].argsort(descending=True, stable=True)[:most]]
    if len(features) < 2:
        return Supernodes()
    members = {group.name: group.members for group in alone}
    ids = [members.get(nodes.labels[f], (nodes.ids[f],)) for f in features.tolist()]
    signs = torch.stack([effect[graph.nodes.index(mine[0])].sign() for mine in ids])  # the same for all of them
    alike = _alike(whole, features, dictionaries, signs)
    distance = torch.where(alike >= least, 1 - alike, 2.0).fill_diagonal_(0)
    upper = torch.triu_indices(len(features), len(features), offset=1)
    tree = linkage(distance[upper[0], upper[1]].numpy(), method="complete")
    cluster = torch.from_numpy(fcluster(tree, t=1 - least + 1e-9, criterion="distance").astype("int64"))
    made = Supernodes()
    for number in dict.fromkeys(cluster.tolist()):  # in order of the most influential member
        chosen = (cluster == number).nonzero()[:, 0].tolist()
        if len(chosen) < 2:
            continue
        together = [i for at in chosen for i in ids[at]]
        label = graph.nodes.labels[graph.nodes.index(together[0])].partition(" at ")[0]
        taken = {group.name for group in made}
        made = made.add(label if label not in taken else f"{label} ({len(made) + 1})", together)
    return made


def _alike(
    graph: AttributionGraph, features: Int[Tensor, " f"], dictionaries: Sequence[Placed], sign: Float[Tensor, " f"]
) -> Float[Tensor, "f f"]:
    """Mean cosine of each pair of features; -1 where the pair may not share a group."""
    nodes = graph.nodes
    dense = torch.zeros(len(nodes), len(nodes), dtype=torch.float64)
    dense[graph.targets] = graph.dense().double()
    out = _cosines(dense[:, features].T)
    evidence = [_cosines(dense[features]), out]
    directions = _directions(graph, features, dictionaries)
    if directions is not None:
        evidence.append(directions)
    stacked = torch.stack(evidence)
    mean = stacked.nan_to_num(0).sum(0) / (~stacked.isnan()).sum(0).clamp_min(1)  # a leaf has no in-edges
    allowed = (sign[:, None] == sign) & (out > 0)
    allowed &= nodes.tower[features][:, None] == nodes.tower[features]
    return torch.where(allowed, mean, -1.0)


def _cosines(rows: Float[Tensor, "f d"]) -> Float[Tensor, "f f"]:
    """Cosine of each pair of rows; NaN where a row is zero."""
    unit = rows / rows.norm(dim=1, keepdim=True)
    return unit @ unit.T


def _directions(
    graph: AttributionGraph, features: Int[Tensor, " f"], dictionaries: Sequence[Placed]
) -> Float[Tensor, "f f"] | None:
    """Cosines of decoder directions; NaN where a pair has none in one space. None without dictionaries."""
    if not dictionaries:
        return None
    decoders = {(p.writes.tower, p.writes.layer): p.dictionary.W_dec.detach() for p in dictionaries}
    cosine = torch.full((len(features), len(features)), torch.nan, dtype=torch.float64)
    for tower in set(graph.nodes.tower[features].tolist()):
        mine = (graph.nodes.tower[features] == tower).nonzero()[:, 0]
        name = graph.nodes.towers[tower].split(".")[0]
        found, rows = [], []
        for i in mine.tolist():
            node = int(features[i])
            decoder = decoders.get((name, int(graph.nodes.layer[node])))
            if decoder is not None:
                found.append(i)
                rows.append(decoder[int(graph.nodes.feature[node])].double())
        if found:
            at = torch.tensor(found)
            cosine[at[:, None], at] = _cosines(torch.stack(rows))
    return cosine
