"""Edges by heads are exact partitions; attention scores are exact sums over pairs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from graph_toys import bridged_pass, random_pass, relu_transcoders
from test_graphs_frozen_models import frozen_of
from test_graphs_sweep import dictionaries

from graphs.build import build_graph
from graphs.frozen.parts import Readout
from graphs.heads import edge_heads, top_edges, top_reads
from graphs.nodes import NodeType
from graphs.qk import qk_panel
from graphs.replace import Replacement
from mechinterp.errors import UsageError


def scene(frozen):
    dictionaries = relu_transcoders(frozen)
    return Replacement(frozen, dictionaries), build_graph(frozen, dictionaries)


def edges_between(graph, layer_of_target, layer_of_source, n=6):
    targets, sources, weights = graph.edges
    nodes = graph.nodes
    picked = (nodes.layer[targets] == layer_of_target) & (nodes.layer[sources] == layer_of_source)
    picked &= nodes.type[sources] != NodeType.BIAS
    order = (weights.abs() * picked).argsort(descending=True)[:n]
    return [(int(targets[i]), int(sources[i]), float(weights[i])) for i in order]


@pytest.mark.parametrize("causal", [True, False])
def test_heads_share_out_an_edge_exactly(causal):
    replacement, graph = scene(random_pass(seed=3, causal=causal))
    for gap in (1, 2, 3):
        for target, source, weight in edges_between(graph, 2 if gap < 3 else 3, 2 - gap):
            found = edge_heads(replacement, graph, target, source)
            scale = abs(weight) + 1e-6
            assert abs(found.edge - weight) < 1e-10 * scale + 1e-12
            assert abs(found.no_head + sum(found.last.values()) - weight) < 1e-9 * scale
            assert abs(found.no_head + sum(found.first.values()) - weight) < 1e-9 * scale
            assert found.one_hop == (len({layer for _, layer, _ in found.last}) == 1)
            if found.one_hop:
                assert all(abs(found.first[head] - part) < 1e-9 * scale for head, part in found.last.items())


def read_everywhere(frozen):
    """The pass with one random output at each end of the last stack's first and last block, mid and post."""
    stack, draw = len(frozen.stacks) - 1, torch.Generator().manual_seed(0)
    blocks, readouts = frozen.stacks[stack].blocks, []
    for layer in (0, len(blocks) - 1):
        for point in ("mid", "post"):
            stream = blocks[layer].resid_mid if point == "mid" else blocks[layer].resid_post
            seed = torch.randn(stream.shape, generator=draw, dtype=torch.float64)
            value = float((seed * stream).sum())
            readouts.append(Readout(f"{layer}.{point}", "logit", stack, seed, 0.0, value, 0.25, layer, point))
    return dataclasses.replace(frozen, readouts=tuple(readouts))


SMALL = {
    "causal": lambda: random_pass(0, d=8, pos=3),
    "bidirectional": lambda: random_pass(1, d=8, pos=2, causal=False),
    "projector": lambda: bridged_pass(2, d=(6, 8)),
}
SETS = {"plain": ("plain", None), "skip": ("skip", None), "sae": ("sae", None), "sae, one block": ("sae", (1,))}


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("name", SMALL)
def test_every_edge_of_every_mode_is_its_heads_and_a_direct_part(name, kind):
    """All stored edges but those of biases, and zero for every pair that has none."""
    frozen = read_everywhere(SMALL[name]())
    given = dictionaries(frozen, SETS[kind][0], width=6, layers=SETS[kind][1])
    mode = "sae" if kind.startswith("sae") else "transcoder"
    replacement, graph = Replacement(frozen, given, mode), build_graph(frozen, given, mode=mode)
    sources = (graph.nodes.type != NodeType.BIAS) & (graph.nodes.type != NodeType.OUTPUT)
    checked = {True: 0, False: 0}
    step = 7 if name == "projector" else 1  # the sources of that larger graph take turns
    for target, row in zip(graph.targets.tolist(), graph.dense(), strict=True):
        for source in sources.nonzero()[target % step :: step, 0].tolist():
            weight = float(row[source])
            found = edge_heads(replacement, graph, target, source)
            sums = (found.edge, *(found.no_head + sum(heads.values()) for heads in (found.last, found.first)))
            assert max(abs(value - weight) for value in sums) < 1e-10, (
                graph.nodes.ids[source],
                graph.nodes.ids[target],
            )
            checked[weight != 0] += 1
    assert min(checked.values()) > 25


def test_no_head_is_what_stays_at_its_position():
    """A part without heads exists only between nodes of one position, and is then the plain product."""
    replacement, graph = scene(random_pass(seed=4))
    nodes = graph.nodes
    seen = {True: 0, False: 0}
    for target, source, _ in edges_between(graph, 2, 0, n=5000):
        s, t = nodes[source], nodes[target]
        same = s.pos == t.pos
        if s.type != NodeType.FEATURE or seen[same] == 10:
            continue
        seen[same] += 1
        found = edge_heads(replacement, graph, target, source)
        levels = replacement.levels
        write = levels[0, 0].writes[(levels[0, 0].pos == s.pos) & (levels[0, 0].index == s.feature)][0]
        read = levels[0, 2].reads[(levels[0, 2].pos == t.pos) & (levels[0, 2].index == t.feature)][0]
        assert found.no_head == pytest.approx(float(write @ read) if same else 0.0, abs=1e-12)
    assert seen == {True: 10, False: 10}


def test_heads_share_out_edges_through_a_projector():
    replacement, graph = scene(bridged_pass(seed=0))
    nodes = graph.nodes
    targets, sources, weights = graph.edges
    crossing = (nodes.tower[targets] != nodes.tower[sources]) & (nodes.type[sources] != NodeType.BIAS)
    picked = (weights.abs() * crossing).argsort(descending=True)[:5].tolist()
    for i in picked:
        found = edge_heads(replacement, graph, int(targets[i]), int(sources[i]))
        assert found.edge == pytest.approx(float(weights[i]), rel=1e-9)
        assert found.no_head + sum(found.last.values()) == pytest.approx(found.edge, rel=1e-9)
        assert found.no_head + sum(found.first.values()) == pytest.approx(found.edge, rel=1e-9)
        assert {tower for tower, _, _ in found.last} == {"vision", "text"}


def test_bias_nodes_have_no_heads():
    replacement, graph = scene(random_pass(seed=0))
    bias = int((graph.nodes.type == NodeType.BIAS).nonzero()[0])
    with pytest.raises(UsageError, match="one place"):
        edge_heads(replacement, graph, graph.outputs[0].node, bias)


def test_top_reads_are_what_heads_bring():
    """With the output as the only target, a head's reads sum to what the head writes along the output's seed."""
    frozen = random_pass(seed=5)
    replacement = Replacement(frozen, relu_transcoders(frozen))
    graph = build_graph(frozen, relu_transcoders(frozen), max_features=0)
    reads = top_reads(replacement, graph, n=10_000)
    seed = frozen.readouts[0].seed
    for block in frozen.stacks[0].blocks:
        by_head = (block.attention.adjoint_by_head(seed[:, None])[:, :, 0] * block.resid_pre).sum((1, 2))
        for head in range(2):
            mine = [r for r in reads if (r.layer, r.head) == (block.layer, head)]
            assert len(mine) == 6 and {r.query for r in mine} == {5}
            assert sum(r.loading for r in mine) == pytest.approx(float(by_head[head]), rel=1e-10)
    assert [r.score for r in reads] == sorted((r.score for r in reads), reverse=True)
    assert top_reads(replacement, graph, n=3) == reads[:3]


def test_top_edges_are_the_strongest_one_hop_edges():
    """Against every edge by itself: one hop, no bias, size as a part of its row times the target's influence."""
    for kind, mode in (("plain", "transcoder"), ("sae", "sae")):
        frozen = random_pass(seed=2, layers=2, d=8, pos=3)
        given = dictionaries(frozen, kind, width=6, layers=(0,) if kind == "sae" else None)
        replacement, graph = Replacement(frozen, given, mode), build_graph(frozen, given, mode=mode)
        strength = graph.nodes.influence + graph.outputs.shares[0] * (graph.nodes.type == NodeType.OUTPUT)
        wanted = []
        for target, row in zip(graph.targets.tolist(), graph.dense(), strict=True):
            for source in ((row != 0) & (graph.nodes.type != NodeType.BIAS)).nonzero()[:, 0].tolist():
                if edge_heads(replacement, graph, target, source).one_hop:
                    wanted.append((float(row[source].abs() / row.abs().sum() * strength[target]), target, source))
        wanted = sorted(wanted, reverse=True)[:7]
        found = top_edges(replacement, graph, 7)
        assert [(target, source) for target, source, _, _ in found] == [(t, s) for _, t, s in wanted]
        assert [share for _, _, share, _ in found] == pytest.approx([share for share, _, _ in wanted])


def test_top_reads_stop_at_the_nearest_sae():
    """An output reads no head below an SAE, and none at all where one stands after the last block."""
    frozen = random_pass(seed=3, layers=4, causal=False)
    for layers, read in (((0, 2), {3}), ((1,), {2, 3}), ((0, 3), set())):
        given = dictionaries(frozen, "sae", layers=layers)
        graph = build_graph(frozen, given, mode="sae", max_features=0)
        reads = top_reads(Replacement(frozen, given, "sae"), graph, n=10_000)
        assert {r.layer for r in reads} == read
        block = frozen.stacks[0].blocks[3]
        seed = frozen.readouts[0].seed
        seed = seed + block.mlp.adjoint(seed[:, None])[:, 0]  # through the last MLP, its gate held
        by_head = (block.attention.adjoint_by_head(seed[:, None])[:, :, 0] * block.resid_pre).sum((1, 2))
        for head in range(2 if read else 0):
            mine = [r.loading for r in reads if (r.layer, r.head) == (3, head)]
            assert sum(mine) == pytest.approx(float(by_head[head]), rel=1e-10)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_pairs_sum_to_the_score(layer, causal):
    replacement, _ = scene(random_pass(seed=1, causal=causal))
    attention = replacement.frozen.stacks[0].blocks[layer].attention
    for head, query, key in ((0, 4, 2), (1, 5, 5), (0, 3, 0)):
        panel = qk_panel(replacement, "text" if causal else "vision", layer, head, query, key)
        row = attention.scores.values[head, query]
        allowed = row[: query + 1] if causal else row
        assert panel.score == float(row[key])
        assert float(panel.matrix().sum()) == pytest.approx(panel.score, abs=1e-12)
        assert float(panel.matrix(contrast=True).sum()) == pytest.approx(float(row[key] - allowed.mean()), abs=1e-12)
        assert float(panel.key_side().sum()) == pytest.approx(panel.score, abs=1e-12)
        assert float(panel.query_side(contrast=True).sum()) == pytest.approx(panel.contrast, abs=1e-12)
        top = panel.top(5)
        values = panel.matrix().abs().flatten().sort(descending=True).values[:5]
        assert [abs(p.value) for p in top] == pytest.approx(values.tolist())
        assert panel.ids[-1] == "constant" and len(set(panel.ids)) == len(panel.ids)


@pytest.mark.parametrize("family", ["clip", "siglip", "llava", "gemma3"])
def test_pairs_sum_on_the_real_classes(family):
    """Random models of the true classes: rotary embedding, grouped queries, query norms, windows, a projector."""
    frozen = frozen_of(family, torch.float64)
    replacement = Replacement(frozen, dictionaries(frozen, "plain", width=12))
    for stack in frozen.stacks:
        for layer in (0, len(stack.blocks) - 1):
            attention = stack.blocks[layer].attention
            query, head = len(stack.final) - 1, len(attention.pattern) - 1
            for key in (query, query - 2):
                panel = qk_panel(replacement, stack.tower, layer, head, query, key)
                seen = attention.pattern[head, query] > 0
                share = attention.scores.values[head, query][seen].softmax(0)[int(seen[:key].sum())]
                assert float(share) == pytest.approx(float(attention.pattern[head, query, key]), abs=1e-12)
                row = attention.scores.values[head, query]
                assert panel.score == float(row[key]) and abs(panel.score) > 1e-6
                assert float(panel.matrix().sum()) == pytest.approx(panel.score, abs=1e-12)
                assert float(panel.matrix(contrast=True).sum()) == pytest.approx(panel.contrast, abs=1e-12)


def test_pairs_sum_through_a_projector():
    """The first block of a language model reads what the projector brings: components lie in the vision tower."""
    replacement, _ = scene(bridged_pass(seed=2))
    last = len(replacement.frozen.stacks[1].final) - 1
    for layer in (0, 1):
        panel = qk_panel(replacement, "text", layer, 0, last, 1)
        assert float(panel.matrix().sum()) == pytest.approx(panel.score, abs=1e-12)
        assert any(name.startswith("vision.") for name in panel.ids)


def test_pairs_sum_with_rotation_and_query_norms():
    """A rotation by position and a norm of queries and keys, as Gemma 3 has them, put onto the toy's scores."""
    frozen = random_pass(seed=6)
    block = frozen.stacks[0].blocks[1]
    attention = block.attention
    scores, n = attention.scores, len(block.resid_pre)

    from graphs.frozen.norms import FrozenNorm

    def rotate(x):
        angle = torch.arange(n, dtype=x.dtype)[:, None] * 0.7
        half = x.shape[-1] // 2
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    draws = torch.Generator().manual_seed(0)
    norms = tuple(
        FrozenNorm(
            torch.rand(8, generator=draws, dtype=torch.float64) + 0.5,
            torch.zeros(8, dtype=torch.float64),
            torch.rand(n, 1, generator=draws, dtype=torch.float64) + 0.5,
            centres=False,
        )
        for _ in range(2)
    )
    q, k = (torch.stack([norm.apply(row) for norm, row in zip(norms, x, strict=True)]) for x in (scores.q, scores.k))
    turned = dataclasses.replace(scores, q=rotate(q), k=rotate(k), rotate=rotate, q_norm=norms, k_norm=norms)
    changed = dataclasses.replace(block, attention=dataclasses.replace(attention, scores=turned))
    stack = dataclasses.replace(
        frozen.stacks[0], blocks=(frozen.stacks[0].blocks[0], changed, frozen.stacks[0].blocks[2])
    )
    frozen = dataclasses.replace(frozen, stacks=(stack,))
    panel = qk_panel(Replacement(frozen, relu_transcoders(frozen)), "text", 1, 1, 4, 1)
    assert panel.score == float(turned.values[1, 4, 1])
    assert float(panel.matrix().sum()) == pytest.approx(panel.score, abs=1e-12)


def test_masked_keys_have_no_panel():
    replacement, _ = scene(random_pass(seed=1))
    with pytest.raises(UsageError, match="masked"):
        qk_panel(replacement, "text", 1, 0, 2, 4)
    with pytest.raises(UsageError, match="no block 9"):
        qk_panel(replacement, "text", 9, 0, 2, 1)
