"""The arithmetic of the causal report, on graphs drawn by lot and a lab whose answers are written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from graphs.causal.changes import Change, FeatureAt, scaled
from graphs.causal.faithful import SHARES, curve
from graphs.causal.lab import Lab, Outcome
from graphs.causal.pairs import pair_effects, perturbation
from graphs.causal.ranking import rankings
from graphs.causal.relations import total_effects
from graphs.causal.reporting import _mediation
from graphs.causal.sites import Mode
from graphs.causal.suppression import predicted, suppress
from graphs.graph import AttributionGraph
from graphs.nodes import NodeType
from mechinterp.types import Placed, Site
from saes.dictionary import ReLU, SparseDictionary
from tests.graph_scenes import lot


class Answers(Lab):
    """A lab without a model. What a change does to the features and to the one output is said by functions."""

    def __init__(
        self,
        graph: AttributionGraph,
        pre: Callable[[Change, Mode], Tensor] | None = None,
        output: Callable[[Change, Mode], float] | None = None,
        kept: Callable[[str, Mode], Tensor] | None = None,
    ):
        self.graph, self.outputs, self.values = graph, (None,), torch.zeros(1, dtype=torch.float64)  # type: ignore[assignment]
        self._pre, self._output, self._kept = pre, output, kept
        self.clean = {"vision": dict.fromkeys(self.names(), torch.zeros(1, 2, 2))}

    @staticmethod
    def names() -> list[str]:
        return [f"vision.blocks.{i}.{at}" for i in range(3) for at in ("hook_resid_post", "hook_mlp_out")]

    @property
    def readout_values(self) -> Tensor:
        return self.values

    def leg_of(self, tower: str):
        class Leg:
            name = "vision"

        return Leg() if tower == "vision" else None

    def dictionary(self, feature: FeatureAt) -> Placed:
        eye, none = torch.eye(8), torch.zeros(8)
        block = f"{feature.tower}.blocks.{feature.layer}"
        reads, writes = Site.parse(f"{block}.ln2.hook_normalized"), Site.parse(f"{block}.hook_mlp_out")
        return Placed(SparseDictionary(eye, eye, none, none, ReLU()), reads, writes)

    def clean_state(self, watch: Sequence[FeatureAt]) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(watch)), torch.zeros(len(watch))

    def run(
        self, changes: Sequence[Change], mode: Mode = "free", watch: Sequence[FeatureAt] = (), names: Sequence[str] = ()
    ) -> Outcome:
        rows = [node_of(self.graph, f) for f in watch]
        pre = torch.stack([self._pre(c, mode)[rows] if self._pre else torch.zeros(len(rows)) for c in changes]).float()
        outputs = torch.tensor([[self._output(c, mode) if self._output else 0.0] for c in changes], dtype=torch.float64)
        kept = {name: self._kept(name, mode).expand(len(changes), 2, 2) for name in names if self._kept}
        return Outcome(outputs, pre, pre, kept)


def node_of(graph: AttributionGraph, feature: FeatureAt) -> int:
    return graph.nodes.index(f"{feature.tower}.L{feature.layer}.P{feature.pos}.F{feature.index}")


def some(graph: AttributionGraph, layer: int, tower: int = 0) -> list[int]:
    nodes = graph.nodes
    picked = nodes.is_type(NodeType.FEATURE) & (nodes.tower == tower) & (nodes.layer == layer)
    return picked.nonzero()[:, 0].tolist()


def edges_into(graph: AttributionGraph, source: int) -> Tensor:
    """The edge from one node to every node."""
    found = torch.zeros(len(graph.nodes), dtype=torch.float64)
    found[graph.targets] = graph.dense()[:, source].double()
    return found


def test_a_model_that_obeys_the_edges_agrees_with_them_in_sign():
    """Where ablation moves every feature by exactly minus the edge, edges correlate 1 with it, and not -1."""
    graph = lot(0, density=0.6)
    lab = Answers(graph, lambda change, mode: -edges_into(graph, node_of(graph, change.features[0])))
    found = pair_effects(lab, graph, some(graph, 0)[:6], some(graph, 1) + some(graph, 2))
    assert found.direct.pairs > 20 and found.constrained_error < 1e-6
    assert found.direct.pearson == pytest.approx(1, abs=1e-5) and found.direct.sign == 1.0


def test_agreement_is_told_by_layers_between():
    """A model that follows total effects one layer on, and does their opposite two layers on: each distance says so."""
    graph = lot(1, density=0.6)
    towards = {1: -1.0, 2: 1.0}

    def pre(change: Change, mode: Mode) -> Tensor:
        source = node_of(graph, change.features[0])
        gap = (graph.nodes.layer - graph.nodes.layer[source]).tolist()
        effect = total_effects(graph, [source])[:, 0]
        return effect * torch.tensor([towards.get(g, 0.0) for g in gap], dtype=torch.float64)

    sources, watched = some(graph, 0)[:6] + some(graph, 1)[:6], some(graph, 1) + some(graph, 2)
    found = pair_effects(Answers(graph, pre), graph, sources, watched)
    assert set(found.by_distance) == {1, 2}
    assert found.by_distance[1].pearson == pytest.approx(1, abs=1e-5) and found.by_distance[1].sign == 1.0
    assert found.by_distance[2].pearson == pytest.approx(-1, abs=1e-5) and found.by_distance[2].sign == 0.0


def test_edges_are_told_by_layers_between_as_well():
    """A model that follows edges one layer on, and does their opposite two layers on: edges say so at each distance."""
    graph = lot(1, density=0.6)

    def pre(change: Change, mode: Mode) -> Tensor:
        source = node_of(graph, change.features[0])
        gap = graph.nodes.layer - graph.nodes.layer[source]
        return edges_into(graph, source) * torch.where(gap == 2, 1.0, -1.0)

    sources, watched = some(graph, 0)[:6] + some(graph, 1)[:6], some(graph, 1) + some(graph, 2)
    found = pair_effects(Answers(graph, pre), graph, sources, watched)
    assert set(found.direct_by_distance) == {1, 2} and found.by_distance[2].pearson > -0.999
    assert sum(told.pairs for told in found.direct_by_distance.values()) == found.direct.pairs
    one, two = found.direct_by_distance[1], found.direct_by_distance[2]
    assert one.pearson == pytest.approx(1, abs=1e-5) and two.pearson == pytest.approx(-1, abs=1e-5)
    assert one.spearman == pytest.approx(1, abs=1e-5) and two.sign_weighted == 0.0


def test_one_block_on_cosine_and_error_are_those_of_what_was_said():
    """A stream said half too large (NMSE 1/4) and an MLP said with the wrong sign (cosine -1, NMSE 4)."""
    graph = lot(0)
    true = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])

    def kept(name: str, mode: Mode) -> Tensor:
        return true * (1.0 if mode == "free" else 1.5 if name.endswith("resid_post") else -1.0)

    found = perturbation(Answers(graph, kept=kept), graph, some(graph, 0)[:3])
    assert found.ablations == 3
    assert (found.cosine_stream, found.nmse_stream) == (pytest.approx(1), pytest.approx(0.25))
    assert (found.cosine_mlp, found.nmse_mlp) == (pytest.approx(-1), pytest.approx(4))


def test_overshooting_counts_against_a_curve():
    """Faithfulness 2 between the ends: |1 - f| is 1 up to k = 0.5 and falls to 0 at 1, so CMD is 0.75."""
    graph = lot(0)

    class Over(Answers):
        def only(self, kept, other=None):
            return torch.tensor([[0.0]] + [[2.0]] * (len(SHARES) - 2) + [[1.0]], dtype=torch.float64)

    nodes = some(graph, 0)
    found = curve(Over(graph), graph, nodes, np.arange(len(nodes), dtype=float), "order")
    assert found.f[1] == 2.0 and found.cmd == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("together", "alone", "flag"),
    [
        (1.0, (1.0,) * 6, False),
        (3.0, (1.0,) * 6, True),
        (1.0, (3.0, 3.0, *(1.0,) * 4), True),
        (1.0, (3.0, *(1.0,) * 5), False),
    ],
)
def test_attention_is_flagged_by_all_together_or_by_a_third_of_them(together, alone, flag):
    """Ratios of free to held effects: all features together outside of [0.5, 2] suffice, as does a third one by one."""
    graph = lot(0)
    top = some(graph, 0)[:6]
    ratio = dict(zip(top, alone, strict=True))

    def output(change: Change, mode: Mode) -> float:
        if mode == "frozen_attn":
            return 1.0
        return together if len(change.features) > 1 else float(ratio[node_of(graph, change.features[0])])

    told = _mediation(Answers(graph, output=output), graph, top)
    assert told.flag is flag and told.ratio_together == together
    assert told.share_outside == pytest.approx(np.mean([r != 1 for r in alone]))


def test_random_sets_are_steered_by_the_same_factor():
    """The output is the sum of what is set: under factor -1 each random set gives minus the sum of its activations."""
    graph = lot(0)
    members = some(graph, 1)[:2]
    lab = Answers(graph, output=lambda change, mode: float(sum(change.values)))
    for factor in (-1.0, 0.5):
        (row,) = suppress(lab, graph, members, {}, factor=factor, n_random=20).measured
        assert row.after == pytest.approx(sum(scaled(graph, members, factor).values))
        assert len(row.random) == 20 and all(np.sign(value) == np.sign(factor) for value in row.random)


def test_what_members_promote_falls_and_what_they_inhibit_rises():
    """The graph's forecast: total effects of "promoted" are positive, of "inhibited" negative, the largest first."""
    graph = lot(2, density=0.6)
    members = some(graph, 0)[:3]
    effect = total_effects(graph, members).sum(1)
    found = {
        name: [float(effect[node_of(graph, f)]) for f in features]
        for name, features in predicted(graph, members, 4).items()
    }
    assert len(found["promoted"]) == len(found["inhibited"]) == 4
    assert found["promoted"] == sorted(found["promoted"], reverse=True) and found["promoted"][-1] > 0
    assert found["inhibited"] == sorted(found["inhibited"]) and found["inhibited"][-1] < 0
    assert found["promoted"][0] == pytest.approx(max(float(effect[i]) for i in some(graph, 1) + some(graph, 2)))


def test_baselines_are_what_their_names_say():
    """Activation is the node's own, gradient x activation the lab's size, direct edge that to outputs."""
    graph = lot(3, outputs=2)
    features = graph.nodes.is_type(NodeType.FEATURE).nonzero()[:, 0]
    given = torch.linspace(-3, 2, len(features), dtype=torch.float64)[:, None]

    class Slopes(Answers):
        def gradients(self, features):
            return given

    found = rankings(Slopes(graph), graph, np.random.default_rng(0))
    np.testing.assert_array_equal(found["activation"], graph.nodes.activation.abs().numpy())
    np.testing.assert_array_equal(found["gradient x activation"][features], given[:, 0].abs().numpy())
    np.testing.assert_allclose(found["direct edge"], graph.dense()[graph.row_of[graph.outputs.nodes]].abs().sum(0))
    assert not np.array_equal(found["random"], found["activation"])
