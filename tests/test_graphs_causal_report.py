"""The causal report and what it is made of: which graphs it takes, and that a seed means one sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_graphs_causal import TARGET, scene, some_features, taking
from tiny_models import tiny

from graphs.build import build_graph
from graphs.causal.changes import features_of, scaled
from graphs.causal.lab import Lab
from graphs.causal.ranking import node_effects, rankings
from graphs.causal.relations import total_effects
from graphs.causal.reporting import report
from graphs.frozen import freeze, in_dtype
from graphs.nodes import NodeType
from graphs.replace import Direction
from graphs.targets import Contrast, Logit, ReportToken
from mechinterp.errors import UsageError
from mechinterp.models import HookedVLM
from mechinterp.types import Placed, Target
from saes.dictionary import ReLU, SparseDictionary


def of_saes(family: str, layers: tuple[int, ...] = (0, 1), direction: Direction = "encoder"):
    """Model, lab and graph over random SAEs of the stream after some blocks of every tower, in float64.

    Blocks between them have none, and so has the last one, where the first readouts begin.
    """
    hf, processor = tiny(family)
    model = in_dtype(HookedVLM(hf.requires_grad_(False), processor), torch.float64)
    pixels, target = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(1)), TARGET
    match family:
        case "vit":
            batch, outputs = model.preprocess(pixels), [Logit(Target("effusion", ""))]
        case "gemma3":
            batch, outputs = model.preprocess(pixels), [ReportToken(2, "describe the image", (9, 10, 11, 12))]
        case _:
            batch = model.prepare(pixels, [target]) if family == "llava" else model.preprocess(pixels)
            outputs = [Contrast(target)]
    draws, placed = torch.Generator().manual_seed(0), []
    for tower in model.towers:
        d = model.d_model(tower)
        for layer in [at for at in layers if at < model.n_layers(tower)]:
            shapes = ((d, 40), (40, d), (40,), (d,))
            weights = [torch.randn(*shape, generator=draws, dtype=torch.float64) / 6 for shape in shapes]
            sae = SparseDictionary(*weights, ReLU(), centred=False)
            placed.append(Placed.sae(sae, f"{tower}.blocks.{layer}.hook_resid_post"))
    frozen = freeze(model, batch, outputs, dtype=torch.float64)
    graph = build_graph(frozen, placed, mode="sae", direction=direction)
    return model, Lab(model, batch, placed, outputs, frozen=frozen), graph


@pytest.mark.parametrize("family", ["vit", "clip", "llava", "gemma3"])
def test_with_all_held_ablating_an_sae_feature_is_minus_the_edge(family):
    """The true model with patterns, scales and gates held: every edge into features and outputs, across towers too."""
    _, lab, graph = of_saes(family)
    sources = some_features(graph, 24)
    targets = graph.nodes.is_type(NodeType.FEATURE).nonzero()[:, 0].tolist()
    changes = [scaled(graph, [i], factor) for i in sources for factor in (0.0, -1.0)]
    watch = features_of(graph, targets)
    result = lab.run(changes, "direct", watch)
    edges = graph.dense()[:, sources]
    wanted = -edges.repeat_interleave(2, dim=1) * torch.tensor([1.0, 2.0]).repeat(len(sources)).to(edges.dtype)
    limit = 1e-9 * float(edges.abs().max())
    moved = result.pre - lab.clean_state(watch)[0]
    assert float((moved - wanted[graph.row_of[targets]].T).abs().max()) < limit
    ends = graph.row_of[[output.node for output in graph.outputs]]
    assert float((result.outputs - lab.readout_values - wanted[ends].T).abs().max()) < limit
    alone = lab.run(changes[:1], "direct", watch)  # streams that no change of the batch touches are held too
    assert torch.allclose(alone.pre[0], result.pre[0], atol=limit)
    assert torch.allclose(alone.outputs[0], result.outputs[0], atol=limit)
    assert min(float(edges[rows].abs().max()) for rows in (ends, graph.row_of[targets])) > 1e4 * limit


def test_an_ablated_sae_feature_leaves_the_stream():
    """Nothing held: the output of the model in which a plain hook takes the feature's part off the stream."""
    model, lab, graph = of_saes("vit")
    node = some_features(graph, 1)[0]
    at = graph.nodes[node]
    with model.hooks(fwd_hooks=[(f"vision.blocks.{at.layer}.hook_resid_post", taking(lab, graph, node))]):
        wanted = model(lab.batch).logits[0, model.hf.config.label2id["effusion"]]
    found = lab.values[0] + lab.effects([scaled(graph, [node])])[0, 0]
    assert float(found) == pytest.approx(float(wanted), abs=1e-9) and float(found) != float(lab.values[0])


def test_small_changes_of_sae_features_go_as_the_local_model_says():
    """Errors held and features recomputed: a small change moves what is above by its total effect, by all paths."""
    _, lab, graph = of_saes("vit", layers=(0, 1, 2))
    sources, step = some_features(graph, 12), 1e-6
    above = [i for i in graph.nodes.is_type(NodeType.FEATURE).nonzero()[:, 0].tolist() if graph.nodes[i].layer == 2]
    watch = features_of(graph, above)
    moved = (
        lab.run([scaled(graph, [i], 1 + step) for i in sources], "replacement", watch).pre - lab.clean_state(watch)[0]
    )
    said = total_effects(graph, sources)[above].T
    assert torch.allclose(moved / step, said, atol=1e-6 * float(said.abs().max()))
    two_up = [k for k, i in enumerate(sources) if graph.nodes[i].layer == 0]
    assert float(said[two_up].abs().max()) > 1e-3


def test_a_graph_of_saes_has_a_report():
    """Constrained ablation is minus the edge, and all of the report is told; decoders as targets are refused."""
    _, lab, graph = of_saes("vit", layers=(0, 1, 2))
    found = report(lab, graph, n_nodes=20, n_sources=8, n_watched=60, n_top=3, n_random=5)
    assert found.pairs.constrained_error < 1e-9
    assert set(found.pairs.direct_by_distance) == {1, 2} and np.isnan(found.pairs.direct_by_distance[2].pearson)
    told = (found.pairs.by_distance[2], found.pairs.direct_by_distance[1], found.pairs.total)
    assert all(np.isfinite(one.pearson) and one.pairs > 20 for one in told) and found.samples["active"] == 20
    assert found.perturbation.ablations > 0 and np.isfinite(found.perturbation.nmse_mlp)
    assert found.control.sets == 5 and np.isfinite(found.curves[0].cpr) and found.mediation.ratio_together > 0
    _, lab, graph = of_saes("vit", direction="decoder")
    with pytest.raises(UsageError, match=r"targets are decoders.*encoder"):
        report(lab, graph)


def test_saes_have_effects_and_gradients():
    """A graph of SAEs: gradients are small changes, and rankings and effects are told."""
    _, lab, graph = of_saes("vit", layers=(0, 2))
    nodes, step = some_features(graph, 8), 1e-5
    found = lab.gradients(features_of(graph, nodes))
    for row, node in enumerate(nodes):
        up, down = lab.effects([scaled(graph, [node], 1 + step), scaled(graph, [node], 1 - step)])
        assert torch.allclose(found[row], (up - down) / (2 * step), rtol=1e-4, atol=1e-7)
    assert float(found.abs().max()) > 1e-3
    told, samples = node_effects(lab, graph, 30)
    assert samples["active"] == 30 and told["active"]["gradient x activation"] > 0.5


def test_one_seed_is_one_sample_in_a_report_and_without():
    """Rankings that are known already do not change which features are drawn."""
    _, lab, graph = scene("vit")
    alone = node_effects(lab, graph, 25, seed=3)
    known = rankings(lab, graph, np.random.default_rng(3))
    assert node_effects(lab, graph, 25, seed=3, known=known) == alone
    found = report(lab, graph, n_nodes=25, n_sources=4, n_watched=8, n_top=3, n_random=4, seed=3)
    assert (found.node_spearman, found.samples) == alone
    assert node_effects(lab, graph, 25, seed=4)[0]["active"] != alone[0]["active"]
