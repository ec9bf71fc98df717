"""The strongest paths are those that listing every path finds."""

from __future__ import annotations

import pytest
import torch

from graphs.influence import edges_of, relative, shares
from graphs.nodes import NodeType
from graphs.paths import paths_of_score, strongest_paths
from graphs.prune import prune
from mechinterp.errors import UsageError
from tests.graph_scenes import lot


def every_path(graph, start, output=0):
    """All paths by walking down from the output: (share, contribution, nodes)."""
    edges = edges_of(graph)
    share, signed = shares(edges).tolist(), relative(graph, edges).tolist()
    into: dict[int, list[tuple[int, int]]] = {}
    for i, (t, s) in enumerate(zip(edges.target.tolist(), edges.source.tolist(), strict=True)):
        into.setdefault(t, []).append((i, s))
    found = []

    def walk(node, a, b, nodes):
        if start[node]:
            found.append((a, b, nodes[::-1]))
        for i, s in into.get(node, []):
            walk(s, a * share[i], b * signed[i], (*nodes, s))

    top = graph.outputs[output].node
    walk(top, 1.0, 1.0, (top,))
    return found


@pytest.mark.parametrize("by", ["share", "contribution"])
@pytest.mark.parametrize("source", [NodeType.PATCH, (NodeType.PATCH, NodeType.TOKEN), NodeType.ERROR])
def test_the_first_k_of_all(by, source):
    graph = lot(1, side=3, layers=(2, 2), kinds=3, density=0.2, chained=True)
    kinds = source if isinstance(source, tuple) else (source,)
    every = every_path(graph, graph.nodes.is_type(*kinds).tolist())
    rank = (lambda p: p[0]) if by == "share" else (lambda p: abs(p[1]))
    every.sort(key=rank, reverse=True)
    assert len(every) > 60
    found = strongest_paths(graph, 40, source, by=by)
    assert [(p.share if by == "share" else abs(p.contribution)) for p in found] == pytest.approx(
        [rank(p) for p in every[:40]]
    )
    truth = {nodes: (a, b) for a, b, nodes in every}
    for path in found:
        assert truth[path.nodes] == pytest.approx((path.share, path.contribution))
        assert path.ids == tuple(graph.nodes.ids[i] for i in path.nodes)
        assert path.ids[-1] == "out.0" and str(path).count("->") == len(path.nodes) - 1
    assert len({p.nodes for p in found}) == 40


def test_all_paths_together_are_the_output():
    graph = lot(2, side=2, layers=(2, 2), kinds=3)
    leaves = ~graph.expanded
    total = sum(p.contribution for p in strongest_paths(graph, 10**6, leaves))
    edges = edges_of(graph)
    assert edges.n == len(graph.nodes)
    from graphs.influence import total_effect

    effect = total_effect(graph, 0)
    assert total == pytest.approx(float(effect[leaves].sum()), rel=1e-9)
    assert len(strongest_paths(graph, 10**6, leaves)) == len(every_path(graph, leaves.tolist()))


def test_a_path_may_begin_at_a_feature_and_others_pass_through_it():
    graph = lot(1, side=2, layers=(3, 2), kinds=3)
    every = sorted(every_path(graph, graph.nodes.is_type(NodeType.FEATURE).tolist()), reverse=True)
    found = strongest_paths(graph, 25, NodeType.FEATURE)
    assert [p.share for p in found] == pytest.approx([a for a, _, _ in every[:25]])


def test_where_there_is_none():
    graph = lot(0)
    assert strongest_paths(graph, 3, torch.zeros(len(graph.nodes), dtype=torch.bool)) == []
    itself = strongest_paths(graph, 3, NodeType.OUTPUT)
    assert [p.ids for p in itself] == [("out.0",)] and itself[0].share == 1
    with pytest.raises(UsageError, match="at least one"):
        strongest_paths(graph, 0)
    with pytest.raises(UsageError, match="no output"):
        strongest_paths(graph, 1, output=4)


def test_paths_of_a_score_are_told_in_numbers_of_the_whole_graph():
    """Unpruned they are the strongest of all outputs, weighted; pruned, shares stay those of the whole graph."""
    graph = lot(seed=2, outputs=3)
    begins, weights = graph.outputs.shares.tolist(), graph.outputs.weights.tolist()
    every = [
        (begins[i] * path.share, weights[i] * path.contribution, path.ids)
        for i in range(3)
        for path in strongest_paths(graph, 400, output=i)
    ]
    every.sort(key=lambda path: -path[0])
    found = paths_of_score(graph, graph, 5)
    assert [path.ids for path in found] == [ids for _, _, ids in every[:5]]
    told = {ids: (share, contribution) for share, contribution, ids in every}
    small = prune(graph, 0.5, 0.8)
    some = paths_of_score(graph, small, 5)
    assert len(small.nodes) < len(graph.nodes) and some
    for path in [*found, *some]:
        assert (path.share, path.contribution) == pytest.approx(told[path.ids], rel=1e-5)
