"""Groups: sums that still add up, edits, files, and proposals that have a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from graphs.graph import AttributionGraph, csr
from graphs.influence import edges_of, total_effect
from graphs.nodes import NodeType
from graphs.prune import prune
from graphs.supernodes import Supernode, Supernodes, by_feature, grouped, merge, suggest
from mechinterp.errors import StorageError, UsageError
from mechinterp.storage import read_json, write_json
from mechinterp.types import Placed, Site
from saes.dictionary import ReLU, SparseDictionary
from tests.graph_scenes import lot


@pytest.mark.parametrize("case", [{"seed": 0}, {"seed": 1, "chained": True}, {"seed": 3, "unexpanded": 0.3}])
def test_a_grouped_graph_adds_up(case):
    graph = lot(**case)
    for one in (graph, prune(graph)):
        together = grouped(one, by_feature(one))
        assert len(together.nodes) <= len(one.nodes) - (one is graph)
        assert float(together.residuals().abs().max()) < 1e-10
        assert float(together.nodes.activation.sum()) == pytest.approx(float(one.nodes.activation.sum()))
        assert float(together.nodes.influence.sum()) == pytest.approx(float(one.nodes.influence.sum()))
        edges_of(together)  # features of one layer, taken together, still stand in order
        assert [o.value for o in together.outputs] == [float(together.nodes.pre[o.node]) for o in together.outputs]


def test_a_group_is_the_sum_of_its_members():
    graph = lot(0)
    nodes = graph.nodes
    vision = (nodes.is_type(NodeType.FEATURE) & (nodes.tower == 0)).nonzero()[:, 0]
    low, high = vision[nodes.layer[vision] == 0][:3].tolist(), vision[nodes.layer[vision] == 2][:2].tolist()
    members = [*low, *high]  # with edges between the members
    groups = Supernodes().add("some", [nodes.ids[i] for i in members])
    together = grouped(graph, groups)
    made = together.nodes.index("group.0")
    assert together.nodes[made].label == "some" and together.nodes[made].layer in (0, 2)
    rows = graph.dense()[graph.row_of[torch.tensor(members)]]
    expected = rows.sum(0)
    found = dict(zip(*(column.tolist() for column in together.in_edges(made)), strict=True))
    for i in range(len(nodes)):
        if i not in members and float(expected[i]) != 0:
            assert found[together.nodes.index(nodes.ids[i])] == pytest.approx(float(expected[i]))
    assert made not in found
    inside = float(expected[torch.tensor(members)].sum())
    assert float(together.rest[together.row_of[made], NodeType.FEATURE]) == pytest.approx(inside)
    assert float(together.residuals().abs().max()) < 1e-10


def test_groups_do_not_mix():
    graph = lot(0)
    features = graph.nodes.is_type(NodeType.FEATURE).nonzero()[:, 0].tolist()
    for bad in ([features[0], features[-1]], [features[0], 0], [graph.outputs[0].node]):
        with pytest.raises(UsageError, match="mixes types or towers"):
            merge(graph, [("x", "x", bad)])


def test_edits_give_new_objects():
    groups = Supernodes().add("a", ["n1", "n2"]).add("b", ["n3"])
    moved = groups.add("b", ["n2", "n2"])
    assert moved["a"].members == ("n1",) and moved["b"].members == ("n3", "n2")
    assert groups["a"].members == ("n1", "n2")
    assert [g.name for g in moved.add("c", ["n1"])] == ["b", "c"]  # an empty group goes
    assert groups.rename("a", "z")["z"].members == ("n1", "n2")
    assert [g.name for g in groups.remove("a")] == ["b"] and len(groups.remove_nodes(["n3"])) == 1
    with pytest.raises(UsageError, match="no supernode 'q'"):
        groups.rename("q", "z")
    with pytest.raises(UsageError, match="share a name"):
        groups.rename("a", "b")
    with pytest.raises(UsageError, match="n1 is in 'a' and in 'b'"):
        Supernodes((Supernode("a", ("n1",)), Supernode("b", ("n1",))))


def test_files(tmp_path):
    """Groups come back as they were saved, whatever their names hold; a file of anything else is one error."""
    groups = Supernodes().add('<b>"é\u202e', ["n1", "n2"]).add("b", ["n3"])
    groups.save(tmp_path / "groups.json")
    assert Supernodes.load(tmp_path / "groups.json") == groups
    texts = [{"name": 1, "members": ["n1"]}, {"name": "a", "members": "n1"}, {"name": "a", "members": [1]}]
    for wrong in ({"supernodes": [{"name": "a"}]}, [1], {"supernodes": 3}, *({"supernodes": [t]} for t in texts)):
        write_json(tmp_path / "wrong.json", wrong)
        with pytest.raises(StorageError, match="holds no supernodes"):
            Supernodes.load(tmp_path / "wrong.json")
    write_json(tmp_path / "twice.json", {"supernodes": [{"name": n, "members": ["n1"]} for n in "ab"]})
    with pytest.raises(StorageError, match=r"twice\.json: n1 is in 'a' and in 'b'"):
        Supernodes.load(tmp_path / "twice.json")


def twins(sign: float) -> tuple[AttributionGraph, int, int]:
    """A graph in which feature `b` is a copy of `a` in its edges (times `sign` in its out-edges)."""
    graph = lot(7, kinds=4, density=0.5)
    nodes = graph.nodes
    first = (nodes.is_type(NodeType.FEATURE) & (nodes.tower == 0) & (nodes.layer == 1)).nonzero()[:, 0]
    kinds = nodes.feature[first]
    a = int(first[kinds == 0][0])
    b = int(first[kinds == 1][0])
    keep = torch.ones(len(nodes), dtype=torch.bool)
    keep[[i for i in first.tolist() if int(nodes.feature[i]) in (0, 1) and i not in (a, b)]] = False
    dense = graph.dense().clone()
    dense[graph.row_of[b]] = dense[graph.row_of[a]]
    dense[:, b] = sign * dense[:, a]
    at = (dense != 0).nonzero()
    crow = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(at[:, 0], minlength=len(dense)).cumsum(0)])
    weights = csr(crow, at[:, 1].contiguous(), dense[at[:, 0], at[:, 1]], tuple(dense.shape))
    pre = nodes.pre.clone()
    pre[graph.targets] = dense.sum(1) + nodes.constant[graph.targets]
    activation = torch.where(nodes.activation == 0, nodes.activation, pre)
    changed = replace(graph, weights=weights, nodes=replace(nodes, pre=pre, activation=activation))
    changed = changed.subgraph(keep)
    return changed, changed.nodes.index(nodes.ids[a]), changed.nodes.index(nodes.ids[b])


def test_what_comes_from_and_goes_to_the_same_places_is_proposed():
    graph, a, b = twins(1.0)
    pairs = [group.members for group in suggest(graph, least=0.95)]
    assert any({graph.nodes.ids[a], graph.nodes.ids[b]} <= set(members) for members in pairs)
    together = grouped(graph, suggest(graph, least=0.3))
    assert float(together.residuals().abs().max()) < 1e-8


def test_members_push_the_same_way():
    graph, a, b = twins(-1.0)
    effect = total_effect(graph)
    assert float(effect[a]) == pytest.approx(-float(effect[b]))
    for least in (0.1, 0.3, 0.6):
        for group in suggest(graph, least=least):
            rows = [graph.nodes.index(m) for m in group.members]
            assert not {a, b} <= set(rows)
            assert len({float(effect[i]) > 0 for i in rows}) == 1
            assert len({int(graph.nodes.tower[i]) for i in rows}) == 1


def test_positions_that_push_the_other_way_stay_out_of_a_group():
    """Where a feature raises the score at one place and lowers it at another, no group holds both places."""
    graph = lot(5, side=5, kinds=4, density=0.6)
    effect = total_effect(graph)
    found = [[float(effect[graph.nodes.index(m)]) for m in g.members] for g in suggest(graph, least=0.05)]
    assert len(found) > 3 and all(min(e) > 0 or max(e) < 0 for e in found)


def test_groups_by_hand_say_when_they_mix_signs(tmp_path):
    """A member of the other sign makes a group mixed, in the object and its file; an edit has to be checked again."""
    graph = lot(0)
    effect = total_effect(graph)
    features = graph.nodes.is_type(NodeType.FEATURE).nonzero()[:, 0].tolist()
    up, down = ([graph.nodes.ids[i] for i in features if way * float(effect[i]) > 0] for way in (1, -1))
    groups = Supernodes().add("up", up[:3]).add("both", [up[3], down[0], "gone.L9.P0.F1"])
    groups = groups.add("gone", ["gone.L9.P0.F2"])
    assert [g.mixed_signs for g in groups] == [None, None, None]
    checked = groups.checked(graph)
    assert (checked["up"].mixed_signs, checked["both"].mixed_signs) == (False, True)
    assert checked["gone"].mixed_signs is None
    checked.save(tmp_path / "groups.json")
    kept = {g["name"]: g.get("mixed_signs") for g in read_json(tmp_path / "groups.json")["supernodes"]}
    assert kept == {"up": False, "both": True, "gone": None}
    assert Supernodes.load(tmp_path / "groups.json").checked(graph) == checked
    edited = checked.add("up", [down[1]])
    assert edited["up"].mixed_signs is None and edited.checked(graph)["up"].mixed_signs
    assert checked.remove_nodes([down[0]])["both"].mixed_signs is None


def same_decoders(layers: int = 3) -> list[Placed]:
    """Dictionaries in which latents 0 and 1 write alike."""
    rows = torch.eye(4)
    rows[1] = rows[0]
    return [
        Placed(
            SparseDictionary(torch.zeros(4, 4), rows, torch.zeros(4), torch.zeros(4), ReLU()),
            Site("vision", layer, "ln2.hook_normalized"),
            Site("vision", layer, "hook_mlp_out"),
        )
        for layer in range(layers)
    ]


@pytest.mark.parametrize(("sign", "together"), [(1.0, True), (-1.0, False)])
def test_out_edges_have_to_agree_in_sign(sign, together):
    """Features that read alike, write alike and raise the score share no group when their out-edges are opposite."""
    graph, a, b = twins(sign)
    keep = graph.nodes.type != NodeType.FEATURE
    keep[[a, b]] = True
    alone = graph.with_nodes(replace(graph.nodes, effect=torch.ones_like(graph.nodes.effect))).subgraph(keep)
    assert len(suggest(alone, same_decoders(), least=0.3)) == together  # opposite: (1 - 1 + 1) / 3


def test_decoders_are_evidence():
    graph, a, b = twins(1.0)
    opposite = torch.eye(4)
    opposite[1] = -opposite[0]
    placed = [
        Placed(
            SparseDictionary(torch.zeros(4, 4), opposite, torch.zeros(4), torch.zeros(4), ReLU()),
            Site("vision", layer, "ln2.hook_normalized"),
            Site("vision", layer, "hook_mlp_out"),
        )
        for layer in range(3)
    ]
    ids = {graph.nodes.ids[a], graph.nodes.ids[b]}
    assert any(ids <= set(g.members) for g in suggest(graph, least=0.5))
    assert not any(ids <= set(g.members) for g in suggest(graph, placed, least=0.5))  # (1 + 1 - 1) / 3
    assert len(suggest(graph.subgraph(graph.nodes.type != NodeType.FEATURE))) == 0
