"""Influence, total effect and scores against their dense definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from graphs.graph import csr
from graphs.influence import edges_of, influence, output_weights, total_effect, with_influence
from graphs.nodes import NodeType
from graphs.scores import scores
from graphs.support import support
from mechinterp.errors import UsageError
from tests.graph_scenes import lot

EYE = {"dtype": torch.float64}
CASES = [{"seed": 0}, {"seed": 1, "chained": True}, {"seed": 2, "outputs": 3}, {"seed": 3, "unexpanded": 0.3}]


def square(graph):
    """Signed edges `[n, n]`, rows are targets."""
    n = len(graph.nodes)
    dense = torch.zeros(n, n, **EYE)
    dense[graph.targets] = graph.dense().double()
    return dense


def closed(matrix):
    eye = torch.eye(len(matrix), **EYE)
    return torch.linalg.inv(eye - matrix) - eye


def normalised(graph):
    dense = square(graph).abs()
    return dense / dense.sum(1, keepdim=True).clamp_min(1e-300)


@pytest.mark.parametrize("case", CASES)
def test_influence_is_the_inverse(case):
    graph = lot(**case)
    found = influence(graph)
    torch.testing.assert_close(found, output_weights(graph) @ closed(normalised(graph)), rtol=1e-12, atol=1e-14)
    assert output_weights(graph).sum() == pytest.approx(1)
    ends = ~graph.expanded
    assert found[ends].sum() == pytest.approx(1)  # everything ends in a leaf


@pytest.mark.parametrize("case", CASES)
def test_support_is_the_inverse_of_the_positive_part(case):
    graph = lot(**case)
    drive = square(graph).clamp_min(0)
    share = drive / drive.sum(1, keepdim=True).clamp_min(1e-300)
    found = support(graph)
    torch.testing.assert_close(found, output_weights(graph) @ closed(share), rtol=1e-12, atol=1e-14)
    assert found.min() >= 0 and found[~graph.expanded].sum() <= 1 + 1e-12


def test_support_leaves_out_what_lowers():
    """With every edge positive it is influence; a source whose only edges are negative has none."""
    graph = lot(seed=0)
    _, source, weight = graph.edges
    crow, shape = graph.weights.crow_indices(), (len(graph.targets), len(graph.nodes))
    up = replace(graph, weights=csr(crow, source, weight.abs(), shape))
    torch.testing.assert_close(support(up), influence(up), rtol=1e-12, atol=1e-14)
    loud = int(influence(graph).masked_fill(graph.expanded, 0).argmax())
    turned = torch.where(source == loud, -weight.abs(), weight)
    down = replace(graph, weights=csr(crow, source, turned, shape))
    assert support(down)[loud] == 0 < influence(down)[loud]


@pytest.mark.parametrize("case", CASES)
def test_total_effect_is_the_signed_inverse(case):
    graph = lot(**case)
    activation = graph.nodes.activation.double().clone()
    activation[graph.nodes.type == NodeType.OUTPUT] = 1
    ratio = square(graph) / torch.where(activation == 0, 1.0, activation)[:, None]
    inverse = closed(ratio)
    torch.testing.assert_close(total_effect(graph), graph.output_weights() @ inverse, rtol=1e-9, atol=1e-9)
    last = graph.outputs[-1]
    torch.testing.assert_close(total_effect(graph, len(graph.outputs) - 1), inverse[last.node], rtol=1e-9, atol=1e-9)
    with pytest.raises(UsageError, match="there is no output"):
        total_effect(graph, 7)


@pytest.mark.parametrize("case", CASES)
def test_total_effects_of_leaves_and_constants_are_the_output(case):
    graph = lot(**case)
    effect = total_effect(graph, 0)
    features = graph.expanded & (graph.nodes.type == NodeType.FEATURE)
    leaves = ~graph.expanded
    carried = (effect * graph.nodes.constant / graph.nodes.activation)[features].sum()
    output = graph.outputs[0]
    made = effect[leaves].sum() + carried + graph.nodes.constant[output.node]
    assert float(made) == pytest.approx(output.value, rel=1e-9)


def test_a_silent_feature_passes_nothing_on():
    graph = lot(4)
    above = int(graph.nodes.is_type(NodeType.FEATURE).nonzero()[-1])
    activation = graph.nodes.activation.clone()
    activation[above] = 0
    silent = graph.with_nodes(replace(graph.nodes, activation=activation))
    assert torch.isfinite(total_effect(silent)).all()


def test_edges_that_do_not_run_upwards_are_refused():
    graph = lot(0)
    layer = graph.nodes.layer.clone()
    layer[graph.nodes.type == NodeType.FEATURE] = 0  # all features on one level, with edges between them
    with pytest.raises(UsageError, match="does not run upwards"):
        edges_of(graph.with_nodes(replace(graph.nodes, layer=layer)))


def test_influence_goes_into_the_table():
    graph = lot(0, dtype=torch.float32)
    table = with_influence(graph).nodes.influence
    assert table.dtype == torch.float32 and table.max() <= 1 and table.min() >= 0
    torch.testing.assert_close(table.double(), influence(graph), rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("case", CASES)
def test_scores_by_their_definition(case):
    graph = lot(**case)
    share = normalised(graph)
    weights = output_weights(graph) @ closed(share) + output_weights(graph)
    wrong = (graph.nodes.type == NodeType.ERROR) | graph.leaves
    explained = 1 - share[:, wrong].sum(1)
    made = scores(graph)
    rows = graph.expanded
    assert made.completeness == pytest.approx(float((weights * explained)[rows].sum() / weights[rows].sum()))
    assert made.completeness_circuit_tracer == pytest.approx(float((weights * explained).sum() / weights.sum()))
    assert made.completeness_circuit_tracer > made.completeness
    errors = float(weights[wrong].sum())
    content = float(weights[graph.nodes.is_type(NodeType.PATCH, NodeType.TOKEN)].sum())
    assert made.replacement == pytest.approx(1 - errors)
    assert made.replacement_content == pytest.approx(content / (content + errors))
    assert sum(made.influence_by_type.values()) == pytest.approx(1)
    assert (made.influence_by_type["unexpanded"] > 0) == ("unexpanded" in case)
    nodes = graph.nodes
    for name, value in made.errors_by_layer.items():
        tower, layer = name.split(".L")
        here = (nodes.type == NodeType.ERROR) & (nodes.layer == int(layer)) & (nodes.tower == nodes.towers.index(tower))
        assert here.any() and value == pytest.approx(float(weights[here].sum()))
    assert sum(made.errors_by_layer.values()) == pytest.approx(made.influence_by_type["error"])


def test_scores_as_circuit_tracer_has_them():
    """Its own formulas, power iteration included, on a graph of features, errors, tokens and logits only."""
    graph = lot(5, outputs=2)
    bare = graph.subgraph(~graph.nodes.is_type(NodeType.POSITION, NodeType.BIAS, NodeType.CLS))
    bare = replace(bare, rest=torch.zeros_like(bare.rest))
    share = normalised(bare)
    seed = output_weights(bare)
    step = seed @ share
    reach = step.clone()
    while step.any():
        step = step @ share
        reach += step
    error = bare.nodes.type == NodeType.ERROR
    token = bare.nodes.is_type(NodeType.PATCH, NodeType.TOKEN)
    weight = reach + seed
    completeness = ((1 - share[:, error].sum(-1)) * weight).sum() / weight.sum()
    made = scores(bare)
    assert made.completeness_circuit_tracer == pytest.approx(float(completeness))
    assert made.replacement == pytest.approx(float(reach[token].sum() / (reach[token].sum() + reach[error].sum())))


def test_without_errors_everything_is_explained():
    graph = lot(6)
    whole = graph.subgraph(graph.nodes.type != NodeType.ERROR)
    whole = replace(whole, rest=torch.zeros_like(whole.rest))
    made = scores(whole)
    assert (made.completeness, made.completeness_circuit_tracer, made.replacement) == (1.0, 1.0, pytest.approx(1))


def test_what_is_not_kept_counts_as_error():
    graph = lot(0)
    keep = torch.rand(len(graph.nodes), generator=torch.Generator().manual_seed(0)) < 0.7
    keep[graph.outputs[0].node] = True
    made = scores(graph, keep)
    share = normalised(graph)
    share[~keep] = 0  # nothing is known of where a lost node comes from
    weights = output_weights(graph) @ closed(share) + output_weights(graph)
    wrong = ~keep | (graph.nodes.type == NodeType.ERROR)
    rows = graph.expanded & keep
    explained = 1 - share[:, wrong].sum(1)
    assert made.completeness == pytest.approx(float((weights * explained)[rows].sum() / weights[rows].sum()))
    assert made.replacement == pytest.approx(float(1 - weights[wrong].sum()))
    # the stored subgraph knows signed sums of what it lost, so it cannot look worse than it is
    assert scores(graph.subgraph(keep)).completeness >= made.completeness
