"""The planted model: its graph is known exactly, so the whole pipeline is held to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import planted as curves
from benchmarks.graph_lesions import concentration, cover_of, graphs_of, measures, randomised
from graphs.build import build_graph
from graphs.causal.changes import FeatureAt, features_of, scaled
from graphs.causal.lab import Lab
from graphs.causal.reporting import report
from graphs.frozen import freeze
from graphs.heads import edge_heads
from graphs.nodes import NodeType
from graphs.planted import CLASSES, FINDINGS, THRESHOLD, Circuit, plant, recovery, truth
from graphs.qk import qk_panel
from graphs.replace import Replacement
from graphs.scores import scores
from graphs.targets import Logit
from mechinterp.types import Target

TARGETS = [Target(name, name) for name in CLASSES]


@pytest.fixture(scope="module")
def planted():
    return plant()


def image_with(planted, *findings, distractors=True, seed=0):
    """One image that holds exactly these findings, two patches each."""
    draws = np.random.default_rng(seed)
    amounts = planted.random_amounts(1, seed=seed, rate=0.12 if distractors else 0.0)
    for row, name in enumerate(FINDINGS):
        amounts[0, row] = 0.0
        if name in findings:
            amounts[0, row].flat[draws.choice(16, 2, replace=False)] = 0.7
    return planted.images(amounts)


def graph_of(planted, image, target, dtype=torch.float32):
    frozen = freeze(planted.model, image, [Logit(Target(target, target))], dtype=dtype)
    return frozen, build_graph(frozen, planted.dictionaries)


def node(planted, name, pos=0):
    layer, index = planted.columns[name]
    return FeatureAt("vision", layer, pos, index)


def test_the_model_is_what_was_written_down(planted):
    """Logits of the transformers model equal those worked out in concepts; findings switch the classes as designed."""
    batch = planted.images(planted.random_amounts(24, seed=1))
    found = planted.model.score(batch, TARGETS)
    known = [[truth(planted, batch[i : i + 1], name).value for name in CLASSES] for i in range(len(batch))]
    assert torch.allclose(found, torch.tensor(known), atol=1e-4)
    for findings, wanted in (
        (("lesion", "border"), (1, 0, 0)),
        (("lesion",), (0, 1, 0)),
        (("border",), (0, 0, 0)),
        (("marker",), (1, 0, 0)),
        (("marker", "lesion", "effusion"), (1, 1, 1)),
    ):
        logits = planted.model.score(image_with(planted, *findings), TARGETS)[0]
        assert tuple((logits > THRESHOLD).int().tolist()) == wanted, findings


@pytest.mark.parametrize(("target", "findings"), [("pneumonia", FINDINGS), ("atelectasis", ("lesion", "effusion"))])
def test_planted_circuit_is_found_exactly(planted, target, findings):
    image = image_with(planted, *findings, seed=3)
    _, graph = graph_of(planted, image, target)
    known = truth(planted, image, target)
    found = recovery(graph, known)
    assert (found.node_auroc, found.edge_auroc, found.missing) == (1.0, 1.0, 0)
    assert found.largest_error < 1e-5
    # there is something to tell apart: distractors are active, and other classes have circuits too
    outside = {i for i, t in zip(graph.nodes.ids, graph.nodes.type, strict=True) if t == NodeType.FEATURE}
    assert len(outside - known.nodes) > 15 and len(known.nodes) >= 6
    errors = graph.nodes.is_type(NodeType.ERROR)
    assert float(graph.dense()[:, errors].abs().max()) == 0.0
    told = scores(graph)
    assert told.completeness == pytest.approx(1.0) and told.replacement == pytest.approx(1.0)


def test_rotation_and_seed_do_not_matter():
    """Another rotation, shuffle and width: the same circuit. In float64 its weights are exact to 1e-10."""
    for seed, width in ((5, 96), (6, 64)):
        planted = plant(seed=seed, width=width, dtype=torch.float64)
        image = image_with(planted, *FINDINGS, seed=1)
        _, graph = graph_of(planted, image, "pneumonia", torch.float64)
        found = recovery(graph, truth(planted, image, "pneumonia"))
        assert (found.node_auroc, found.edge_auroc) == (1.0, 1.0) and found.largest_error < 1e-10


def test_recovery_can_fail(planted):
    """A graph of another image, or with its edges shuffled, is not taken for the circuit."""
    image = image_with(planted, *FINDINGS, seed=3)
    _, graph = graph_of(planted, image, "pneumonia")
    elsewhere = truth(planted, image_with(planted, *FINDINGS, seed=4), "pneumonia")
    wrong = recovery(graph, elsewhere)
    assert wrong.node_auroc < 0.95 and wrong.missing > 0 and wrong.largest_error > 0.01
    silent = truth(planted, image_with(planted, "effusion"), "pneumonia")
    assert np.isnan(recovery(graph, silent).node_auroc)


def test_superposition_hides_it():
    """Fewer dimensions than concepts: weights stay what the directions say, but the circuit drowns in interference."""
    planted = plant(width=16, dtype=torch.float64)
    image = image_with(planted, *FINDINGS, seed=3)
    _, graph = graph_of(planted, image, "pneumonia", torch.float64)
    assert recovery(graph, truth(planted, image, "pneumonia")).largest_error < 1e-9
    meant = recovery(graph, truth(planted, image, "pneumonia", ideal=True))
    assert meant.node_auroc < 0.98 or meant.missing > 0


@pytest.mark.parametrize("mode", ["direct", "frozen_attn", "free"])
def test_suppressing_the_marker_flips_what_it_should_and_nothing_else(planted, mode):
    """Pneumonia falls by the planted amount, below its threshold where only the shortcut held it up; the rest stays."""
    for findings, flips in ((("marker", "effusion", "lesion"), True), (("marker", "lesion", "border"), False)):
        image = image_with(planted, *findings)
        _, graph = graph_of(planted, image, "pneumonia")
        outputs = [Logit(t) for t in TARGETS]
        lab = Lab(
            planted.model,
            image,
            planted.dictionaries,
            outputs,
            frozen=freeze(planted.model, image, outputs) if mode == "direct" else None,
        )
        detectors = [i for i, f in _detected(planted, graph, "marker")]
        assert len(detectors) == 2
        change = lab.effects([scaled(graph, detectors)], mode)[0]
        name = graph.nodes.ids
        marker = graph.nodes.index(f"vision.L1.P0.F{planted.columns['marker'][1]}")
        known = truth(planted, image, "pneumonia")
        if mode == "direct":
            assert float(change.abs().max()) < 1e-6  # detectors have no direct edge to a logit
            continue
        assert float(change[0]) == pytest.approx(-known.weights["out.0", name[marker]], abs=1e-5)
        assert float(change[1:].abs().max()) < 1e-5
        after = float(lab.values[0] + change[0])
        assert float(lab.values[0]) > THRESHOLD and (after < THRESHOLD) == flips


def _detected(planted, graph, texture):
    index = planted.columns[f"detect {texture}"][1]
    for i, n in enumerate(graph.nodes.ids):
        if n.startswith("vision.L0.") and n.endswith(f".F{index}"):
            yield i, n


def test_suppressing_the_conjunction_raises_the_competitor(planted):
    """As with preeclampsia: the diagnosis falls, the competing one, silent before, rises; effusion is not moved."""
    image = image_with(planted, "lesion", "border", "effusion")
    frozen, graph = graph_of(planted, image, "pneumonia")
    lab = Lab(planted.model, image, planted.dictionaries, [Logit(t) for t in TARGETS], frozen=frozen)
    watch = [node(planted, name) for name in ("diagnosis", "competitor", "fluid")]
    conjunction = graph.nodes.index("vision.L1.P0.F{}".format(planted.columns["conjunction"][1]))
    before = lab.clean_state(watch)[1]
    result = lab.run([scaled(graph, [conjunction])], "free", watch)
    assert before[0] > 0.1 and before[1] == 0 and before[2] > 0.1
    assert result.acts[0, 0] == 0 and result.acts[0, 1] > 0.1
    assert float(result.acts[0, 2]) == pytest.approx(float(before[2]), abs=1e-6)
    change = result.outputs[0] - lab.values
    assert change[0] < -0.3 and change[1] > 0.3 and abs(float(change[2])) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constrained_ablation_is_minus_the_edge(planted, dtype):
    planted = planted if dtype == torch.float32 else plant(dtype=dtype)
    image = image_with(planted, *FINDINGS)
    frozen, graph = graph_of(planted, image, "pneumonia", dtype)
    lab = Lab(planted.model, image, planted.dictionaries, [Logit(TARGETS[0])], frozen=frozen)
    nodes = graph.nodes.is_type(NodeType.FEATURE).nonzero()[:, 0]
    watch = features_of(graph, nodes.tolist())
    result = lab.run([scaled(graph, [i]) for i in nodes.tolist()], "direct", watch)
    edges = graph.dense()[:, nodes]
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    moved = result.pre - lab.clean_state(watch)[0]
    assert float((moved + edges[graph.row_of[nodes]].T).abs().max()) < limit
    assert (
        float((result.outputs[:, 0] - lab.readout_values + edges[graph.row_of[graph.outputs[0].node]]).abs().max())
        < limit
    )


def test_report_of_the_planted_model(planted):
    """Influence orders effects, removal beats matched random features, and the flag stays down."""
    image = image_with(planted, *FINDINGS, seed=2)
    frozen, graph = graph_of(planted, image, "pneumonia")
    lab = Lab(planted.model, image, planted.dictionaries, [Logit(TARGETS[0])], frozen=frozen)
    other = Lab(planted.model, image_with(planted, "effusion"), planted.dictionaries, [Logit(TARGETS[0])])
    found = report(lab, graph, other=other, n_top=6, n_random=150)
    assert found.pairs.constrained_error < 1e-5
    ranked = found.node_spearman["active"]
    assert ranked["total effect"] > 0.999 and ranked["influence"] > 0.7 > ranked["activation"]
    assert found.pairs.total.sign == 1.0 and found.pairs.total.pearson > 0.9999 > found.pairs.direct.pearson
    assert found.perturbation.cosine_stream > 0.99 and found.perturbation.nmse_stream < 0.05
    assert found.control.sets == 150 and found.control.p < 0.01
    assert not found.mediation.flag and found.mediation.ratio_together == pytest.approx(1.0, abs=1e-4)
    best = {(c.ablation, c.ranking): c for c in found.curves}
    assert best["zero", "influence"].cpr > best["zero", "random"].cpr
    assert best["zero", "influence"].cmd < best["zero", "activation"].cmd
    assert {c.ablation for c in found.curves} == {"zero", "resample"}


def test_attention_that_follows_the_lesion_is_flagged():
    """Where the pattern itself looks for lesions, one lesion patch can stand in for the other, which no graph with the
    pattern held can know; the report says so, and the QK panel says why."""
    planted = plant(Circuit(follows=True))
    image = image_with(planted, "lesion", distractors=False)
    frozen, graph = graph_of(planted, image, "atelectasis")
    found = recovery(graph, truth(planted, image, "atelectasis"))
    assert found.largest_error < 1e-4 and graph.outputs[0].value > THRESHOLD
    lab = Lab(planted.model, image, planted.dictionaries, [Logit(TARGETS[1])], frozen=frozen)
    told = report(lab, graph, n_random=1).mediation
    assert told.flag and told.note == "attention-mediated, graph incomplete" and told.share_outside > 0.4
    detectors = [i for i, _ in _detected(planted, graph, "lesion")]
    place = graph.nodes[detectors[0]].pos
    panel = qk_panel(Replacement(frozen, planted.dictionaries), "vision", 1, 0, 0, place)
    parts = dict(zip(panel.ids, panel.key_side(contrast=True).tolist(), strict=True))
    features = {name: part for name, part in parts.items() if ".L0." in name}
    assert max(features, key=lambda name: features[name]) == graph.nodes.ids[detectors[0]]
    assert features[graph.nodes.ids[detectors[0]]] > 3.0


def test_each_edge_runs_through_the_head_that_was_planted(planted):
    image = image_with(planted, *FINDINGS)
    frozen, graph = graph_of(planted, image, "pneumonia")
    replacement = Replacement(frozen, planted.dictionaries)
    marker = graph.nodes.index(f"vision.L1.P0.F{planted.columns['marker'][1]}")
    for source, _ in _detected(planted, graph, "marker"):
        found = edge_heads(replacement, graph, marker, source)
        assert found.one_hop and next(iter(found.last)) == ("vision", 1, 2)
        assert found.last["vision", 1, 2] == pytest.approx(found.edge, rel=1e-5)


def test_rounds_find_the_path_that_one_round_cannot_see(planted):
    """Causes of causes have no edge to the output: one round is blind to them, and several rounds find them all."""
    image = image_with(planted, *FINDINGS)
    frozen, full = graph_of(planted, image, "pneumonia", torch.float64)
    features = full.nodes.is_type(NodeType.FEATURE)
    path = features & (full.nodes.influence > 1e-6)
    n = int(path.sum())
    direct = torch.zeros(len(full.nodes), dtype=torch.float64)
    sources, weights = full.in_edges(full.outputs[0].node)
    direct[sources] = weights.abs()
    seen = path & (direct > 1e-6)  # the rest is rounding, by which one round fills its budget
    assert int(features.sum()) > 3 * n and 0 < int(seen.sum()) < n / 2
    found = {}
    for rounds in (1, 2, 6):
        graph = build_graph(frozen, planted.dictionaries, max_features=n, rounds=rounds)
        assert graph.nodes.ids == full.nodes.ids and int((graph.expanded & features).sum()) == n
        found[rounds] = graph.expanded & path
        assert (found[rounds] & seen).sum() == seen.sum()
    assert int(found[1].sum()) < int(found[2].sum()) < int(found[6].sum()) == n
    caught = [float(full.nodes.influence[mask].sum() / full.nodes.influence[path].sum()) for mask in found.values()]
    assert caught[0] < 0.8 and caught[0] < caught[1] < caught[2] == pytest.approx(1)


def test_influence_lies_where_the_lesion_is(planted):
    """All that speaks for pneumonia lies in two patches: all of the influence, an eighth of the area."""
    amounts = np.zeros((1, len(planted.circuit.textures), 4, 4))
    amounts[0, :2, 1, 2] = amounts[0, :2, 3, 0] = 0.7
    image = planted.images(amounts)
    _, graph = graph_of(planted, image, "pneumonia")
    mask = np.zeros((32, 32), dtype=bool)
    mask[8:16, 16:24] = mask[24:, :8] = True
    half = np.zeros((32, 32), dtype=bool)
    half[8:16, 16:20] = True  # half of one of the patches
    for name, sizes in measures(graph).items():
        inside, outside, part = (
            concentration(sizes, cover_of(m, planted.model.grid_shape)) for m in (mask, ~mask, half)
        )
        assert inside == pytest.approx(8.0, abs=1e-3) and outside < 1e-3, name
        assert part == pytest.approx(8.0, abs=0.1), name


def test_curves_fall(tmp_path):
    """Superposition and a trained dictionary with too few latents cost the circuit; the intact model is exact."""
    found = curves.main(["--quick", "--out", str(tmp_path)])
    rows = {(r["curve"], r["at"]): r for r in found["rows"]}
    intact, crowded = (rows["superposition", at] for at in (96, 16))
    assert intact["node_auroc"] == intact["edge_auroc"] == 1.0 and intact["replacement"] == pytest.approx(1.0)
    assert crowded["node_auroc"] < 0.97 and crowded["edge_auroc"] < 0.97
    enough, few = (rows["trained transcoders", at] for at in (32, 8))
    assert enough["node_auroc"] > few["node_auroc"] and enough["r2"] > 0.85 and few["missed"] > enough["missed"]
    assert enough["replacement"] < 1.0
    assert {p.name for p in tmp_path.iterdir()} == {"planted.json", "planted.md", "planted.png"}


def test_a_null_graph_is_of_the_kind_that_it_stands_beside(planted):
    """Without dictionaries, a graph of random weights has the nodes and freezes of the trained model's, other edges."""
    image, null = image_with(planted, *FINDINGS), randomised(planted.model)
    output = Logit(Target(CLASSES[0], CLASSES[0]))
    found = dict(graphs_of(planted.model, null, image, output, planted.dictionaries))
    for own, other in (("attention alone", "random weights"), ("MLPs held", "random weights, MLPs held")):
        trained, random = found.pop(own), found.pop(other)
        assert trained.nodes.ids == random.nodes.ids and not trained.nodes.is_type(NodeType.FEATURE).any()
        for key in ("mode", "freezes", "dictionaries"):
            assert trained.meta[key] == random.meta[key], key
        assert trained.meta["model"]["sha256"] != random.meta["model"]["sha256"]
        assert not torch.allclose(trained.dense(), random.dense())
    assert list(found) == ["transcoders"] and found["transcoders"].nodes.is_type(NodeType.FEATURE).any()
