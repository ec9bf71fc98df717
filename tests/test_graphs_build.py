"""Building graphs: the budget, sparse rows, folders, and the models that ship."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from graph_toys import bridged_pass, random_pass
from test_graphs_frozen_models import OUTPUTS, batch_of, model_of
from test_graphs_sweep import dictionaries

from graphs.build import build_graph
from graphs.draw.png import caption
from graphs.draw.scene import make_scene
from graphs.frozen import freeze
from graphs.frozen.parts import Readout
from graphs.graph import AttributionGraph
from graphs.halves import output_shares
from graphs.influence import influence
from graphs.nodes import NodeType
from graphs.pairs import pair_matrix
from graphs.targets import Contrast, Feature, Similarity
from mechinterp.audit.dictionary import transcoders_of
from mechinterp.errors import StorageError, UsageError
from mechinterp.models import HookedVLM
from mechinterp.types import Placed, Site, Target
from saes.dictionary import SparseDictionary, TopK

TARGET = Target(
    "consolidation",
    "a chest x-ray with consolidation",
    "a chest x-ray without consolidation",
    "is there consolidation ?",
)


def same(a: AttributionGraph, b: AttributionGraph) -> None:
    assert a.nodes.ids == b.nodes.ids and torch.equal(a.targets, b.targets)
    torch.testing.assert_close(a.dense(), b.dense(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(a.nodes.influence, b.nodes.influence, rtol=1e-9, atol=1e-12)


def test_a_budget_of_all_features_is_the_full_graph():
    frozen = bridged_pass(0)
    given = dictionaries(frozen, "plain")
    full = build_graph(frozen, given)
    n = int(full.nodes.is_type(NodeType.FEATURE).sum())
    same(full, build_graph(frozen, given, max_features=n))
    same(full, build_graph(frozen, given, max_features=10 * n, rounds=3))
    almost = build_graph(frozen, given, max_features=n - 1)
    assert int(almost.leaves.sum()) == 1


@pytest.mark.parametrize("causal", [False, True])
def test_batches_of_any_size_make_the_same_graph(causal):
    """Batches share memory: what the builder keeps must be its own."""
    frozen = random_pass(3, causal=causal)
    given = dictionaries(frozen, "plain")
    full = build_graph(frozen, given)
    for batch in (1, 2, 7):
        same(full, build_graph(frozen, given, batch=batch))


def test_influence_is_the_dense_inverse():
    graph = build_graph(random_pass(1, outputs=2), dictionaries(random_pass(1, outputs=2), "plain"))
    n = len(graph.nodes)
    share = torch.zeros(n, n, dtype=torch.float64)
    share[graph.targets] = graph.dense().abs()
    share = share / share.sum(1, keepdim=True).clamp_min(1e-300)
    eye = torch.eye(n, dtype=torch.float64)
    expected = graph.output_weights() @ (torch.linalg.inv(eye - share) - eye)
    torch.testing.assert_close(graph.nodes.influence, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.as_tensor(influence(graph)), expected, rtol=1e-9, atol=1e-12)


def test_a_budget_takes_the_influential_features_first():
    frozen = random_pass(0, d=32, layers=5, pos=12, causal=False)
    given = dictionaries(frozen, "plain", width=64)
    full = build_graph(frozen, given)
    k = 60
    best = build_graph(frozen, given, max_features=k)
    assert int((best.expanded & best.nodes.is_type(NodeType.FEATURE)).sum()) == k
    assert best.meta["max_relative_residual"] <= 1e-10
    value = torch.where(full.nodes.is_type(NodeType.FEATURE), torch.as_tensor(influence(full)), 0)
    oracle = value.topk(k).values.sum()
    found = value[best.targets].sum()
    assert found >= 0.99 * oracle > 0
    # the rows that are there are those of the full graph
    rows = full.dense()[full.row_of[best.targets]]
    torch.testing.assert_close(best.dense(), rows, rtol=1e-9, atol=1e-12)


def test_sparse_rows_still_add_up():
    frozen = random_pass(2, causal=False)
    given = dictionaries(frozen, "plain")
    full, sparse = build_graph(frozen, given), build_graph(frozen, given, row_mass=0.9)
    assert sparse.n_edges < 0.8 * full.n_edges
    assert sparse.residuals().abs().max() < 1e-12
    dense, kept = full.dense(), sparse.dense()
    assert ((kept == 0) | (kept == dense)).all()
    assert (kept.abs().sum(1) >= 0.9 * dense.abs().sum(1) - 1e-12).all()
    for kind in NodeType:
        lost = (dense - kept)[:, full.nodes.type == int(kind)].sum(1)
        torch.testing.assert_close(sparse.rest[:, int(kind)], lost, rtol=1e-9, atol=1e-12)


def test_node_names_are_unique_and_ordered():
    graph = build_graph(bridged_pass(0), dictionaries(bridged_pass(0), "plain"))
    assert len(set(graph.nodes.ids)) == len(graph.nodes)
    targets, sources, _ = graph.edges
    assert (sources < targets).all()
    inputs = ["vision.cls", "vision.patch.1", "vision.pos.0", "projector.bias", "text.tok.0"]
    for name in (*inputs, "vision.bias.L1", "text.err.L0.P3", "out.0"):
        assert name in graph.nodes


@pytest.mark.parametrize("wrong", [{"max_features": -1}, {"rounds": 0}, {"row_mass": 0.0}])
def test_budgets_that_make_no_sense(wrong):
    with pytest.raises(UsageError):
        build_graph(random_pass(0), [], **wrong)


def test_a_graph_folder_is_exact_and_repeatable(tmp_path):
    frozen = bridged_pass(1, dtype=torch.float32)
    given = dictionaries(frozen, "plain")
    graph = build_graph(frozen, given, max_features=30, row_mass=0.99)
    graph.save(tmp_path / "a")
    loaded = AttributionGraph.load(tmp_path / "a")
    assert graph.equal(loaded)
    loaded.save(tmp_path / "b")
    build_graph(frozen, given, max_features=30, row_mass=0.99).save(tmp_path / "c")
    for name in ("graph.safetensors", "graph.json", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    about = json.loads((tmp_path / "a" / "graph.json").read_text())
    assert about["max_relative_residual"] < 1e-5 and about["freezes"]
    assert 0 < about["replacement"] < 1 and 0 < about["completeness"] < 1
    assert set(about["nodes"][0]) == {
        "id", "type", "tower", "layer", "position", "feature", "activation", "influence", "label"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["graph.safetensors", "graph.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_damaged_folders_are_refused(tmp_path, name, harm):
    build_graph(random_pass(0, dtype=torch.float32), []).save(tmp_path)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    elif harm == "cut":
        path.write_bytes(bytes(content[: len(content) // 2]))
    else:
        path.unlink()
    with pytest.raises(StorageError):
        AttributionGraph.load(tmp_path)


def test_foreign_folders_are_refused(tmp_path):
    from mechinterp.storage import save_tensors, write_json, write_manifest

    save_tensors(tmp_path / "graph.safetensors", {"x": torch.zeros(3)})
    write_json(tmp_path / "graph.json", {"nodes": []})
    write_manifest(tmp_path, {})
    with pytest.raises(StorageError, match="no attribution graph"):
        AttributionGraph.load(tmp_path)
    write_json(tmp_path / "graph.json", {"format": "mechinterp attribution graph", "schema_version": 1, "nodes": []})
    write_manifest(tmp_path, {})
    with pytest.raises(StorageError, match="does not hold a graph"):
        AttributionGraph.load(tmp_path)


@cache
def bundled_model(name: str) -> HookedVLM:
    return HookedVLM.from_pretrained(name)


def image() -> np.ndarray:
    return np.random.default_rng(0).random((1, 64, 64), dtype=np.float32)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("name", ["phantom-clip", "phantom-llava"])
def test_models_that_ship_conserve(name, dtype, limit):
    model = bundled_model(name)
    given = transcoders_of(model)
    assert len(given) >= 6
    frozen = freeze(model, model.prepare(image(), [TARGET]), [Contrast(TARGET)], dtype=dtype)
    graph = build_graph(frozen, given, max_features=300)
    assert 0 < graph.meta["max_relative_residual"] <= limit
    assert graph.meta["model"]["sha256"] and graph.meta["dictionaries"]
    weighted = sum(o.weight * o.value for o in graph.outputs)
    assert math.isclose(weighted, float(model.score(model.prepare(image(), [TARGET]), [TARGET])[0, 0]), abs_tol=1e-4)
    if name == "phantom-llava":  # a text feature's row reaches patches and vision features through the projector
        text = (graph.nodes.is_type(NodeType.FEATURE) & graph.expanded).nonzero()[:, 0]
        top = int(text[[graph.nodes[i].tower == "text" for i in text.tolist()]][-1])
        reached = {(graph.nodes[s].tower, graph.nodes[s].type) for s in graph.in_edges(top)[0].tolist()}
        assert {("vision", NodeType.PATCH), ("vision", NodeType.FEATURE), ("projector", NodeType.BIAS)} <= reached


@pytest.mark.parametrize("family", ["siglip", "gemma3", "llava", "vit", "dinov2"])
def test_every_family_conserves(family):
    """Random models of the true classes: rotary embedding, grouped queries, RMSNorm, gated MLPs, post norms."""
    model = model_of(family)
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        outputs = OUTPUTS[family]
        frozen = freeze(model, batch_of(model), outputs or [feature_of(model)], dtype=dtype)
        for kind in ("plain", "skip", "sae"):
            given = dictionaries(frozen, kind, width=12)
            graph = build_graph(frozen, given, mode="sae" if kind == "sae" else "transcoder")
            assert graph.meta["max_relative_residual"] <= limit and int(graph.expanded.sum()) > 20


def feature_of(model: HookedVLM) -> Feature:
    """Some feature of the last block, as an output."""
    width = model.hf.config.hidden_size
    draw = torch.Generator().manual_seed(1)
    W_enc, W_dec = torch.randn(width, 5, generator=draw), torch.randn(5, width, generator=draw)
    dictionary = SparseDictionary(W_enc, W_dec, torch.zeros(5), torch.zeros(width), TopK(2), centred=False)
    reads, writes = Site("vision", 1, "ln2.hook_normalized"), Site("vision", 1, "hook_mlp_out")
    return Feature("vision", 1, 2, 3, Placed(dictionary, reads, writes))


def test_both_halves_and_the_pair_matrix_sum_to_the_similarity():
    model = bundled_model("phantom-clip")
    batch = model.prepare(image(), [TARGET])
    frozen = freeze(model, batch, [Similarity(TARGET)], dtype=torch.float64)
    graph = build_graph(frozen, transcoders_of(model), max_features=0)
    image_half, text_half = graph.outputs
    assert image_half.value == pytest.approx(text_half.value, abs=1e-10) and image_half.value != 0
    for half in graph.outputs:
        total = float(graph.in_edges(half.node)[1].sum()) + graph.nodes[half.node].constant
        assert total == pytest.approx(half.value, abs=1e-10)
    pairs = pair_matrix(model, batch, TARGET, transcoders_of(model), dtype=torch.float64)
    assert float(pairs.values.sum()) == pytest.approx(image_half.value, abs=1e-10)
    assert pairs.values.shape == (len(pairs.image), len(pairs.text))
    # its margins are the edges of the two halves
    margins = ((pairs.image, pairs.values.sum(1), image_half), (pairs.text, pairs.values.sum(0), text_half))
    for ids, margin, half in margins:
        sources, weights = graph.in_edges(half.node)
        edges = {graph.nodes.ids[s]: w for s, w in zip(sources.tolist(), weights.tolist(), strict=True)}
        found = {name: w for name, w in zip(ids, margin.tolist(), strict=True) if name in edges}
        assert found.keys() == edges.keys()
        assert max(abs(found[name] - edges[name]) for name in edges) < 1e-10


def test_the_halves_of_a_score_are_one_output():
    """Influence of a CLIP graph is that of one row that holds the edges of all halves, whatever their sizes."""
    model = bundled_model("phantom-clip")
    frozen = freeze(model, model.prepare(image(), [TARGET]), [Contrast(TARGET)], dtype=torch.float64)
    graph = build_graph(frozen, transcoders_of(model), max_features=40)
    n, first = len(graph.nodes), min(o.node for o in graph.outputs)
    rows = torch.zeros(n, n, dtype=torch.float64)
    rows[graph.targets] = graph.dense().abs()
    score = graph.outputs.weights @ rows[graph.outputs.nodes]
    # conservation: the weighted halves are the score, edges and constants together
    whole = sum(o.weight * float(graph.in_edges(o.node)[1].sum() + graph.nodes.constant[o.node]) for o in graph.outputs)
    assert whole == pytest.approx(float(graph.outputs[0].value), abs=1e-9)
    share = rows / rows.sum(1, keepdim=True).clamp_min(1e-300)
    below = torch.linalg.inv(torch.eye(first, dtype=torch.float64) - share[:first, :first])
    expected = (score / score.sum())[:first] @ below
    torch.testing.assert_close(graph.nodes.influence[:first], expected, rtol=1e-9, atol=1e-12)
    assert graph.outputs.shares.sum() == pytest.approx(1) and graph.outputs.shares[0] > 0.5


def test_outputs_by_themselves_keep_their_weights():
    def readout(weight, part_of=""):
        seed = torch.zeros(1, 1)
        return Readout("r", "logit", 0, seed, 0.0, 0.0, weight, part_of=part_of)

    mass = torch.tensor([1.0, 9.0, 3.0, 1.0])
    assert output_shares([readout(1.0), readout(-3.0)], mass[:2]).tolist() == pytest.approx([0.25, 0.75])
    mixed = [readout(1.0), readout(0.5, "a"), readout(0.5, "a"), readout(0.5, "b")]
    assert output_shares(mixed, mass).tolist() == pytest.approx([1 / 3, 1 / 4, 1 / 12, 1 / 3])
    assert output_shares([readout(0.0)] * 2, mass[:2]).tolist() == [0.5, 0.5]
    assert output_shares([readout(0.5, "a")] * 2, torch.zeros(2)).tolist() == [0.5, 0.5]


def with_gate(frozen, number, layer, factor):
    """The pass with the gate of one MLP times a factor."""
    stack = frozen.stacks[number]
    blocks = list(stack.blocks)
    mlp = blocks[layer].mlp
    blocks[layer] = replace(blocks[layer], mlp=replace(mlp, gate=mlp.gate * factor))
    stacks = list(frozen.stacks)
    stacks[number] = replace(stack, blocks=tuple(blocks))
    return replace(frozen, stacks=tuple(stacks))


@pytest.mark.parametrize("mode", ["transcoder", "sae"])
def test_the_gates_that_a_graph_holds_are_named(mode):
    """The freezes name the gate of an MLP exactly where the edges would be others if the gate were."""
    frozen = bridged_pass()
    given = dictionaries(frozen, "sae" if mode == "sae" else "plain")
    plain = build_graph(frozen, given, mode=mode, limit=float("inf"))
    for number, stack in enumerate(frozen.stacks):
        for block in stack.blocks:
            moved = build_graph(with_gate(frozen, number, block.layer, 1.5), given, mode=mode, limit=float("inf"))
            other = moved.weights.values().shape != plain.weights.values().shape
            other = other or not torch.equal(moved.weights.values(), plain.weights.values())
            named = f"gate of the MLP of {stack.tower}.blocks.{block.layer}" in plain.meta["freezes"]
            assert named == other == (mode == "sae"), (stack.tower, block.layer)
    assert set(frozen.freezes) <= set(plain.meta["freezes"])
    words = caption(plain, make_scene(plain))[-1]
    assert ("MLP gates are held" in words) == (mode == "sae")
