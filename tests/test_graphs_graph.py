"""The graph object: rows add up, names are unique, parts can be taken out without losing mass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from graph_toys_graphs import random_graph

from graphs.nodes import NodeType
from mechinterp.errors import UsageError


def in_edges(graph, node):
    sources, weights = graph.in_edges(node)
    return dict(zip([graph.nodes.ids[s] for s in sources], weights.tolist(), strict=True))


@pytest.mark.parametrize("rest", [False, True])
def test_random_graph_adds_up_and_is_ordered(rest):
    graph = random_graph(3, rest=rest, unexpanded=0.3, dtype=torch.float64)
    assert graph.residuals().abs().max() < 1e-12
    targets, sources, _ = graph.edges
    assert (sources < targets).all()
    assert graph.leaves.any() and not graph.leaves[graph.targets].any()


def test_edges_of_a_node_are_those_of_the_dense_matrix():
    graph = random_graph(1)
    dense = graph.dense()
    node = int(graph.targets[7])
    sources, weights = graph.in_edges(node)
    assert torch.equal(dense[7].nonzero()[:, 0], sources) and torch.equal(dense[7][sources], weights)
    source = int(sources[0])
    targets, weights = graph.out_edges(source)
    assert torch.equal(graph.targets[dense[:, source] != 0], targets)
    assert torch.equal(dense[:, source][dense[:, source] != 0], weights)
    assert not len(graph.in_edges(0)[0])


def test_subgraph_keeps_row_identity_and_outputs():
    graph = random_graph(2, rest=True, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    keep_nodes = torch.rand(len(graph.nodes), generator=generator) < 0.5
    keep_edges = torch.rand(graph.n_edges, generator=generator) < 0.5
    part = graph.subgraph(keep_nodes, keep_edges)
    assert part.n_edges < graph.n_edges / 4 and len(part.nodes) < len(graph.nodes)
    assert part.residuals().abs().max() < 1e-12
    assert [o.name for o in part.outputs] == [o.name for o in graph.outputs]
    for index, name in enumerate(part.nodes.ids[:20]):
        assert graph.nodes[graph.nodes.index(name)] == replace(part.nodes[index], index=graph.nodes.index(name))
    at = part.nodes.index("out.0")
    old = in_edges(graph, graph.outputs[0].node)
    new = in_edges(part, at)
    assert new and new.items() <= old.items()


def test_node_names_are_unique_and_found():
    graph = random_graph(0)
    assert graph.nodes.index("vision.err.L1.P2") == [*graph.nodes.ids].index("vision.err.L1.P2")
    assert graph.nodes[graph.nodes.index("projector.bias")].type == NodeType.BIAS
    with pytest.raises(UsageError, match="no node is called"):
        graph.nodes.index("vision.L9.P9.F9")
    with pytest.raises(UsageError, match="two nodes"):
        replace(graph.nodes, ids=(graph.nodes.ids[1], *graph.nodes.ids[1:]))
