"""Interventions do what they say on every family, and the numbers made of them are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import tiny

from graphs.build import build_graph
from graphs.causal.changes import Change, FeatureAt, features_of, scaled, taken_from
from graphs.causal.controls import matched_sets, position_class
from graphs.causal.faithful import SHARES, curve
from graphs.causal.figure import draw_suppression
from graphs.causal.lab import Lab
from graphs.causal.relations import agreement, spearman, total_effects
from graphs.causal.suppression import suppress
from graphs.frozen import freeze, in_dtype
from graphs.influence import total_effect
from graphs.nodes import NodeType
from graphs.planted import plant
from graphs.targets import Contrast, Feature, Logit, ReportToken, TokenLogit
from mechinterp.errors import NonFiniteError, UsageError
from mechinterp.models import HookedVLM
from mechinterp.types import Placed, Site, Target
from saes.dictionary import ReLU, SparseDictionary

TARGET = Target("pneumonia", "a chest x-ray with pneumonia", "a chest x-ray without pneumonia")


def random_transcoders(model, dtype, width=40):
    """A sparse random transcoder at every MLP of the model."""
    draws, found = torch.Generator().manual_seed(0), []
    for tower in model.towers:
        d = model.d_model(tower)
        for layer in range(model.n_layers(tower)):
            weights = (
                torch.randn(d, width, generator=draws) / d**0.5,
                torch.randn(width, d, generator=draws) / width**0.5,
                torch.randn(width, generator=draws) * 0.3 - 1.5,
                torch.randn(d, generator=draws) * 0.1,
            )
            dictionary = SparseDictionary(*(w.to(dtype) for w in weights), ReLU(), centred=False)
            block = f"{tower}.blocks.{layer}"
            reads, writes = Site.parse(f"{block}.ln2.hook_normalized"), Site.parse(f"{block}.hook_mlp_out")
            found.append(Placed(dictionary, reads, writes))
    return found


def scene(family, dtype=torch.float32):
    """Model, batch, transcoders, outputs, frozen pass, graph."""
    hf, processor = tiny(family)
    model = HookedVLM(hf.requires_grad_(False), processor)
    placed = random_transcoders(model, dtype)
    pixels = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(1))
    batch = model.preprocess(pixels)
    match family:
        case "llava":
            batch = model.prepare(pixels, [TARGET])
            outputs = [Contrast(TARGET), TokenLogit("yes", -2)]
        case "gemma3":
            outputs = [
                ReportToken(2, "describe the image", (9, 10, 11, 12)),
                ReportToken(1, "describe the image", (9, 10)),
            ]
        case "vit":
            outputs = [Contrast(Target("pneumonia", "")), Logit(Target("effusion", ""))]
        case "dinov2":
            outputs = [Feature("vision", 2, 0, 3, placed[2])]
        case _:
            outputs = [Contrast(TARGET), Feature("vision", 2, 0, 3, placed[2])]
    frozen = freeze(model, batch, outputs, dtype=dtype)
    graph = build_graph(frozen, placed)
    lab = Lab(in_dtype(model, dtype), batch, placed, outputs, frozen=frozen)
    return model, lab, graph


def taking(lab, graph, node):
    """A plain hook that takes a feature's part off what is written at its position."""
    at = graph.nodes[node]
    row = lab.dictionary(features_of(graph, [node])[0]).dictionary.W_dec[at.feature]

    def take(value, hook):
        value = value.clone()
        value[:, at.pos] -= at.activation * row
        return value

    return take


def some_features(graph, n):
    nodes = graph.nodes.is_type(NodeType.FEATURE).nonzero()[:, 0].tolist()
    return nodes[:: max(1, len(nodes) // n)]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("clip", torch.float64),
        ("siglip", torch.float32),
        ("llava", torch.float64),
        ("gemma3", torch.float64),
        ("vit", torch.float32),
        ("dinov2", torch.float32),
    ],
)
def test_with_all_held_ablation_is_minus_the_edge(family, dtype):
    """The true model, its patterns, scales and MLP outputs held by hooks: every edge into every feature and output."""
    _, lab, graph = scene(family, dtype)
    sources = some_features(graph, 12)
    targets = graph.nodes.is_type(NodeType.FEATURE).nonzero()[:, 0].tolist()
    watch = features_of(graph, targets)
    changes = [scaled(graph, [i], factor) for i in sources for factor in (0.0, -1.0)]
    result = lab.run(changes, "direct", watch)
    edges = graph.dense()[:, sources]
    wanted = -edges.repeat_interleave(2, dim=1) * torch.tensor([1.0, 2.0]).repeat(len(sources)).to(edges.dtype)
    limit = (1e-9 if dtype == torch.float64 else 1e-4) * float(edges.abs().max())
    moved = result.pre - lab.clean_state(watch)[0]
    assert float((moved - wanted[graph.row_of[targets]].T).abs().max()) < limit
    ends = [output.node for output in graph.outputs]
    assert float((result.outputs - lab.readout_values - wanted[graph.row_of[ends]].T).abs().max()) < limit
    assert len(ends) == len(lab.readout_values) and float(edges[graph.row_of[ends]].abs().max()) > 0


@pytest.mark.parametrize("family", ["clip", "llava"])
def test_doing_nothing_changes_nothing(family):
    """Features set to what they are, in every mode; and clean outputs are the model's own scores."""
    model, lab, graph = scene(family)
    changes = [scaled(graph, some_features(graph, 5), 1.0)]
    for mode in ("direct", "replacement", "frozen_attn", "free"):
        assert float(lab.effects(changes, mode).abs().max()) < 2e-5, mode
    score = model.score(lab.batch, [TARGET])[0, 0]
    assert float(lab.values[0]) == pytest.approx(float(score), abs=1e-5)
    assert float(lab.effects([scaled(graph, some_features(graph, 5))])[0, 0]) != 0


def test_free_ablation_is_the_model_with_a_hook():
    """Against a plain hook that takes the feature's part off the MLP output, written down here."""
    model, lab, graph = scene("clip")
    (node,) = [i for i in some_features(graph, 400) if graph.nodes[i].tower == "vision" and graph.nodes[i].layer == 1][
        :1
    ]
    with model.hooks(fwd_hooks=[("vision.blocks.1.hook_mlp_out", taking(lab, graph, node))]):
        wanted = model.score(lab.batch, [TARGET])[0, 0]
    found = lab.values[0] + lab.effects([scaled(graph, [node])])[0, 0]
    assert float(found) == pytest.approx(float(wanted), abs=1e-5)


def test_interventions_in_one_batch_do_not_meet():
    _, lab, graph = scene("clip")
    changes = [scaled(graph, [i]) for i in some_features(graph, 9)]
    together = lab.effects(changes)
    alone = torch.cat([lab.effects([change]) for change in changes])
    assert torch.allclose(together, alone, atol=1e-5) and {f.tower for c in changes for f in c.features} > {"vision"}


def test_a_change_of_a_later_feature_sets_it():
    """Two layers at once, nothing held: the later feature has the value that was asked for, wherever it would be."""
    _, lab, graph = scene("vit")
    nodes = some_features(graph, 400)
    early = next(i for i in nodes if graph.nodes[i].layer == 0 and graph.nodes[i].pos == 0)
    later = FeatureAt("vision", 2, 0, 5)
    change = Change((*features_of(graph, [early]), later), (3.0, 0.7))
    site = "vision.blocks.2.hook_mlp_out"
    only = Change(features_of(graph, [early]), (3.0,))
    both, first = (lab.run([c], "free", [later], names=[site]) for c in (change, only))
    row = lab.dictionary(later).dictionary.W_dec[5]
    moved = (both.kept[site] - first.kept[site])[0, 0]
    assert torch.allclose(moved, (0.7 - first.acts[0, 0]) * row, atol=1e-5)


def test_resample_and_mean_take_values_from_elsewhere():
    """All features of the last block taken from another image: its MLP output moves by what the two sets differ."""
    model, lab, graph = scene("vit")
    other = Lab(model, model.preprocess(torch.rand(1, 32, 32)), list(lab.placed.values()), lab.outputs)
    nodes = [i for i in some_features(graph, 4000) if graph.nodes[i].layer == 2 and graph.nodes[i].pos == 0]
    elsewhere = other.activations()
    mean = {key: (acts + elsewhere[key]) / 2 for key, acts in lab.activations().items()}
    site = "vision.blocks.2.hook_mlp_out"
    found = lab.run([taken_from(graph, nodes, acts) for acts in (elsewhere, mean)], names=[site]).kept[site][:, 0]
    index = [graph.nodes[i].feature for i in nodes]
    rows = lab.placed["vision", 2].dictionary.W_dec[index]
    moved = (elsewhere["vision", 2][0, index] - graph.nodes.activation[nodes]) @ rows
    wanted = lab.clean["vision"][site][0, 0] + torch.stack([moved, moved / 2])
    assert nodes and torch.allclose(found, wanted, atol=1e-5)


def test_gradients_are_small_changes():
    _, lab, graph = scene("llava", torch.float64)
    nodes = some_features(graph, 8)
    found = lab.gradients(features_of(graph, nodes))
    step = 1e-5
    for row, node in enumerate(nodes):
        up, down = lab.effects([scaled(graph, [node], 1 + step), scaled(graph, [node], 1 - step)])
        assert torch.allclose(found[row], (up - down) / (2 * step), rtol=1e-4, atol=1e-7)


def test_replacement_mode_is_the_local_replacement_model():
    """Features recomputed, the rest held: where transcoders are exact (the planted model), that is frozen attention."""
    planted = plant()
    image = planted.images(planted.random_amounts(1, seed=3))
    outputs = [Logit(Target("effusion", "effusion"))]
    frozen = freeze(planted.model, image, outputs)
    graph = build_graph(frozen, planted.dictionaries)
    lab = Lab(planted.model, image, planted.dictionaries, outputs, frozen=frozen)
    changes = [scaled(graph, [i]) for i in some_features(graph, 20)]
    names = ["vision.blocks.2.hook_resid_post"]
    said, true = (lab.run(changes, mode, names=names).kept[names[0]] for mode in ("replacement", "frozen_attn"))
    assert torch.allclose(said, true, atol=1e-5) and float((said - lab.clean["vision"][names[0]]).abs().max()) > 0.1


def test_total_effects_are_the_dense_inverse():
    _, _, graph = scene("vit")
    sources = some_features(graph, 4)
    n = len(graph.nodes)
    dense = torch.zeros(n, n, dtype=torch.float64)
    dense[graph.targets] = graph.dense().double()
    unit = torch.ones(n, dtype=torch.float64)
    features = graph.nodes.is_type(NodeType.FEATURE)
    unit[features] = graph.nodes.activation[features].double()
    fraction = dense / unit[:, None]
    every = torch.linalg.inv(torch.eye(n, dtype=torch.float64) - fraction) - torch.eye(n, dtype=torch.float64)
    found = total_effects(graph, sources)
    assert torch.allclose(found, (every * unit[:, None])[:, sources], atol=1e-9)
    assert torch.allclose(found[graph.outputs[0].node], total_effect(graph, 0)[sources], atol=1e-9)


def test_agreement_on_known_columns():
    exact = agreement(np.array([1.0, -2.0, 3.0]), np.array([2.0, -4.0, 6.0]))
    assert (exact.pairs, exact.sign, exact.sign_weighted) == (3, 1.0, 1.0)
    assert exact.pearson == pytest.approx(1) and exact.spearman == pytest.approx(1)
    mixed = agreement(np.array([1.0, 1.0, 2.0, -1.0]), np.array([-1.0, 1.0, 8.0, 0.0]))
    assert mixed.sign == 0.5 and mixed.sign_weighted == pytest.approx(0.9)
    assert np.isnan(spearman(np.array([1.0, 1.0, 1.0]), np.arange(3.0))) and np.isnan(
        agreement(*np.ones((2, 2))).pearson
    )


def test_faithfulness_ends_at_nothing_and_everything():
    _, lab, graph = scene("vit")
    nodes = graph.nodes.is_type(NodeType.FEATURE).nonzero()[:, 0].tolist()
    order = np.arange(len(nodes), dtype=float)
    found = curve(lab, graph, nodes, order, "order")
    assert (found.f[0], found.f[-1]) == (0.0, 1.0) and found.k == SHARES
    assert found.whole == pytest.approx(float(lab.values[0]), abs=1e-5)
    everything = Change(features_of(graph, nodes), (0.0,) * len(nodes))
    assert found.none == pytest.approx(float(lab.run([everything]).outputs[0, 0]), abs=0.05)
    area = sum(
        (k1 - k0) * (f1 + f0) / 2 for k0, k1, f0, f1 in zip(found.k, found.k[1:], found.f, found.f[1:], strict=False)
    )
    assert found.cpr == pytest.approx(area)
    same = curve(lab, graph, nodes, order, "order", other=lab)
    assert np.isnan(same.f[0]) and same.none == pytest.approx(same.whole)  # resampled from itself: nothing changes


def test_matched_sets_match():
    _, _, graph = scene("clip")
    nodes = [i for i in some_features(graph, 400) if graph.nodes[i].tower == "vision"]
    members = [i for i in nodes if graph.nodes[i].pos > 0][:3]
    where = position_class(graph)
    assert where(members[0]) == "image" and where(next(i for i in nodes if graph.nodes[i].pos == 0)) == "cls"
    found = matched_sets(graph, members, lambda i: 1.0, n=50, seed=1)
    assert len(found.sets) == 50 and found == matched_sets(graph, members, lambda i: 1.0, n=50, seed=1)
    for drawn in found.sets:
        assert len(set(drawn)) == 3 and not set(drawn) & set(members)
        assert {(graph.nodes[i].layer, where(i)) for i in drawn} <= {(graph.nodes[i].layer, where(i)) for i in members}
    mean = np.mean([[graph.nodes[i].activation for i in drawn] for drawn in found.sets])
    everyone = np.mean([graph.nodes[i].activation for i in nodes])
    own = np.mean([graph.nodes[i].activation for i in members])
    assert abs(mean - own) <= abs(everyone - own) + 0.05


def test_suppression_beside_random_and_drawn(tmp_path):
    """The planted diagnosis falls, its competitor rises, random supernodes do neither; and the figure is written."""
    planted = plant()
    amounts = planted.random_amounts(1, seed=5, rate=0.3)
    amounts[0, :4] = 0.0
    for row in (0, 1, 3):
        amounts[0, row].flat[[row, 9 + row]] = 0.7
    image = planted.images(amounts)
    outputs = [Logit(Target(name, name)) for name in ("pneumonia", "atelectasis", "effusion")]
    frozen = freeze(planted.model, image, outputs[:1])
    graph = build_graph(frozen, planted.dictionaries)
    lab = Lab(planted.model, image, planted.dictionaries, outputs)
    member = graph.nodes.index("vision.L1.P0.F{}".format(planted.columns["conjunction"][1]))
    watched = {
        name: [FeatureAt("vision", planted.columns[name][0], 0, planted.columns[name][1])]
        for name in ("diagnosis", "competitor", "fluid")
    }
    found = suppress(lab, graph, [member], watched, name="conjunction", n_random=120)
    rows = {m.name: m for m in found.measured}
    assert rows["diagnosis"].after == 0 < rows["diagnosis"].before and rows["diagnosis"].p < 0.01
    assert rows["competitor"].before == 0 < rows["competitor"].after and rows["competitor"].p < 0.01
    assert rows["fluid"].after == pytest.approx(rows["fluid"].before, abs=1e-5)
    assert rows["pneumonia"].after < rows["pneumonia"].before and rows["atelectasis"].after > 0.3
    assert rows["pneumonia"].p < 0.01 < rows["effusion"].p and len(rows["fluid"].random) == 120
    path = draw_suppression(found, tmp_path / "suppress.png")
    assert path.stat().st_size > 10_000
    with pytest.raises(UsageError, match="suppressed itself"):
        suppress(lab, graph, [member], {"x": features_of(graph, [member])})


def test_mistakes_are_named():
    _, lab, graph = scene("vit")
    output = graph.outputs[0].node
    with pytest.raises(UsageError, match="no feature"):
        scaled(graph, [output])
    with pytest.raises(UsageError, match="no dictionary"):
        lab.run([Change((FeatureAt("vision", 9, 0, 1),), (0.0,))])
    with pytest.raises(UsageError, match="tower 'text'"):
        lab.leg_of("text")
    with pytest.raises(UsageError, match="changed twice"):
        Change((FeatureAt("vision", 1, 0, 1),) * 2, (0.0, 1.0))
    with pytest.raises(NonFiniteError):
        lab.run([Change((FeatureAt("vision", 1, 0, 1),), (float("inf"),))])
    bare = Lab(lab.model, lab.batch, list(lab.placed.values()), lab.outputs)
    with pytest.raises(UsageError, match="frozen pass"):
        bare.run([scaled(graph, some_features(graph, 1)[:1])], "direct")
