"""Pruning: what circuit-tracer keeps, rows that still add up, and honest scores of what is left."""

from __future__ import annotations

import pytest
import torch

from graphs.draw.scene import make_scene
from graphs.influence import influence, known_effect, output_weights, total_effect
from graphs.nodes import NodeType
from graphs.prune import prune, prune_masks, threshold_of
from mechinterp.errors import UsageError
from tests.graph_scenes import lot
from tests.test_graphs_influence import CASES, closed, square


def dense_prune(graph, node, edge):
    """The published procedure on the dense matrix, by the letter."""
    n = len(graph.nodes)
    matrix = square(graph)
    fixed = graph.nodes.is_type(NodeType.OUTPUT, NodeType.PATCH, NodeType.TOKEN)
    reach = influence(graph)

    def threshold(scores, share):
        ordered = scores.sort(descending=True).values
        at = int(torch.searchsorted(ordered.cumsum(0) / ordered.sum(), share))
        return ordered[min(at, len(ordered) - 1)]

    keep = (reach >= threshold(reach, node)) | fixed
    matrix[~keep] = 0
    matrix[:, ~keep] = 0
    share = matrix.abs() / matrix.abs().sum(1, keepdim=True).clamp_min(1e-300)
    weight = output_weights(graph) @ closed(share) + output_weights(graph)
    score = share * weight[:, None]
    edges = (score >= threshold(score.flatten(), edge)) & (score > 0)
    before = None
    while before is None or not torch.equal(before, keep):
        before = keep.clone()
        edges[~keep] = False
        edges[:, ~keep] = False
        keep = keep & (fixed | edges.any(0))
        keep = keep & (fixed | ~graph.expanded | edges.any(1))
    edges[~keep] = False
    edges[:, ~keep] = False
    assert edges.shape == (n, n)
    return keep, edges


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("thresholds", [(0.8, 0.98), (0.5, 0.7)])
def test_it_keeps_what_the_published_procedure_keeps(case, thresholds):
    graph = lot(**case)
    keep, kept_edges = prune_masks(graph, *thresholds)
    expected, edges = dense_prune(graph, *thresholds)
    assert torch.equal(keep, expected)
    target, source, _ = graph.edges
    assert torch.equal(edges[target, source], kept_edges)


@pytest.mark.parametrize("case", CASES)
def test_rows_still_add_up(case):
    graph = lot(**case)
    pruned = prune(graph)
    assert 0 < pruned.n_edges < graph.n_edges and len(pruned.nodes) < len(graph.nodes)
    assert float(pruned.residuals().abs().max()) < 1e-10
    assert float(pruned.rest.abs().sum()) > 0
    twice = prune(pruned, 0.6, 0.8)
    assert twice.n_edges < pruned.n_edges and float(twice.residuals().abs().max()) < 1e-10
    # by type: the row of the whole graph, type by type
    for row, node in enumerate(pruned.targets.tolist()):
        sources, weights = graph.in_edges(graph.nodes.index(pruned.nodes.ids[node]))
        mine, kept = pruned.in_edges(node)
        for kind in NodeType:
            whole = weights[graph.nodes.type[sources] == kind].sum()
            left = kept[pruned.nodes.type[mine] == kind].sum() + pruned.rest[row, kind]
            assert float(left) == pytest.approx(float(whole), abs=1e-10)


def test_what_is_drawn_of_a_pruned_graph_is_the_effect_in_the_whole_one():
    graph = lot(3, chained=True)
    whole = total_effect(graph)
    pruned = prune(graph, 0.5, 0.6)
    assert len(pruned.nodes) < len(graph.nodes)
    kept = [graph.nodes.index(name) for name in pruned.nodes.ids]
    assert torch.allclose(known_effect(pruned), whole[kept], atol=1e-6)
    assert not torch.allclose(total_effect(pruned), whole[kept], atol=1e-3)  # paths went with the pruning
    assert torch.equal(known_effect(graph), whole)  # nothing was kept yet: computed
    scene = make_scene(pruned, most=10**6, most_lines=10**6, most_patches=10**6)
    for box in scene.boxes:
        assert box.effect == pytest.approx(float(whole[[kept[i] for i in box.members]].sum()), abs=1e-5)


def test_what_always_stays_and_what_must_be_connected():
    graph = lot(3, unexpanded=0.3)
    pruned = prune(graph, 0.5, 0.7)
    for kind in (NodeType.OUTPUT, NodeType.PATCH, NodeType.TOKEN):
        assert int(pruned.nodes.is_type(kind).sum()) == int(graph.nodes.is_type(kind).sum())
    target, source, _ = pruned.edges
    must = ~pruned.nodes.is_type(NodeType.OUTPUT, NodeType.PATCH, NodeType.TOKEN)
    used, reached = torch.zeros_like(must), torch.zeros_like(must)
    used[source], reached[target] = True, True
    assert bool(used[must].all()) and bool(reached[must & pruned.expanded].all())
    assert bool(pruned.leaves.any())  # a feature that was not expanded may stay: what feeds it is unknown


def test_the_file_says_what_was_pruned():
    graph = lot(0)
    pruned = prune(graph, 0.7, 0.9)
    about = pruned.meta["pruning"]
    assert (about["node_threshold"], about["edge_threshold"]) == (0.7, 0.9)
    assert (about["nodes"], about["edges"]) == (len(pruned.nodes), pruned.n_edges)
    assert (about["nodes_before"], about["edges_before"]) == (len(graph.nodes), graph.n_edges)
    assert about["scores"]["completeness"] < pruned.meta["scores"]["completeness"]
    assert "pruning" not in graph.meta
    kept = pruned.nodes.ids
    whole = influence(graph)
    for name, value in zip(kept, pruned.nodes.influence.tolist(), strict=True):
        assert value == pytest.approx(float(whole[graph.nodes.index(name)]))


def test_thresholds():
    values = torch.tensor([0.1, 0.4, 0.3, 0.2])
    assert [threshold_of(values, s) for s in (0.3, 0.7, 0.71, 1.0)] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert threshold_of(values, 0) == float("inf") == threshold_of(values[:0], 0.5)
    graph = lot(0)
    everything = prune(graph, 1.0, 1.0)
    left = influence(everything)  # only what nothing passes through went
    whole = influence(graph)[[graph.nodes.index(name) for name in everything.nodes.ids]]
    torch.testing.assert_close(left, whole, rtol=1e-6, atol=1e-9)
    assert prune(graph, 0.0, 0.0).n_edges == 0
    with pytest.raises(UsageError, match="between 0 and 1"):
        prune(graph, 1.2)
