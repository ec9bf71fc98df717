"""The causal report and what it is made of: which graphs it takes, and that a seed means one sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_graphs_causal import scene, some_features
from tiny_models import tiny

from graphs.build import build_graph
from graphs.causal.changes import features_of, scaled
from graphs.causal.lab import Lab
from graphs.causal.ranking import node_effects, rankings
from graphs.causal.reporting import report
from graphs.frozen import freeze, in_dtype
from graphs.targets import Logit
from mechinterp.errors import UsageError
from mechinterp.models import HookedVLM
from mechinterp.types import Placed, Target
from saes.dictionary import ReLU, SparseDictionary


def test_saes_have_effects_and_gradients_but_no_report():
    """A graph of SAEs: gradients are small changes, rankings and effects are told; the report refuses in one error."""
    hf, processor = tiny("vit")
    model = in_dtype(HookedVLM(hf.requires_grad_(False), processor), torch.float64)
    batch, outputs = model.preprocess(torch.rand(1, 32, 32)), [Logit(Target("effusion", ""))]
    draws, placed = torch.Generator().manual_seed(0), []
    for layer in (0, 2):
        shapes = ((32, 40), (40, 32), (40,), (32,))
        weights = [torch.randn(*shape, generator=draws, dtype=torch.float64) / 6 for shape in shapes]
        sae = SparseDictionary(*weights, ReLU(), centred=False)
        placed.append(Placed.sae(sae, f"vision.blocks.{layer}.hook_resid_post"))
    frozen = freeze(model, batch, outputs, dtype=torch.float64)
    graph = build_graph(frozen, placed, mode="sae")
    lab = Lab(model, batch, placed, outputs, frozen=frozen)
    nodes, step = some_features(graph, 8), 1e-5
    found = lab.gradients(features_of(graph, nodes))
    for row, node in enumerate(nodes):
        up, down = lab.effects([scaled(graph, [node], 1 + step), scaled(graph, [node], 1 - step)])
        assert torch.allclose(found[row], (up - down) / (2 * step), rtol=1e-4, atol=1e-7)
    assert float(found.abs().max()) > 1e-3
    told, samples = node_effects(lab, graph, 30)
    assert samples["active"] == 30 and told["active"]["gradient x activation"] > 0.5
    with pytest.raises(UsageError, match=r"an SAE stands in the stream.*transcoders"):
        report(lab, graph)


def test_one_seed_is_one_sample_in_a_report_and_without():
    """Rankings that are known already do not change which features are drawn."""
    _, lab, graph = scene("vit")
    alone = node_effects(lab, graph, 25, seed=3)
    known = rankings(lab, graph, np.random.default_rng(3))
    assert node_effects(lab, graph, 25, seed=3, known=known) == alone
    found = report(lab, graph, n_nodes=25, n_sources=4, n_watched=8, n_top=3, n_random=4, seed=3)
    assert (found.node_spearman, found.samples) == alone
    assert node_effects(lab, graph, 25, seed=4)[0]["active"] != alone[0]["active"]
