"""What one feature does to others in the model, against what the graph says; and how far one block on it is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from graphs.causal.changes import features_of, scaled
from graphs.causal.lab import Lab
from graphs.causal.ranking import REACH
from graphs.causal.relations import Agreement, agreement, total_effects
from graphs.graph import AttributionGraph

__all__ = ["PairEffects", "Perturbation", "pair_effects", "perturbation"]


@dataclass(frozen=True)
class PairEffects:
    """Effects of features on features.

    Fields:
        constrained_error: largest |ablation with all held + edge|, relative to the largest edge. Zero but for rounding.
        direct, total: free ablation against the edge and the total effect, over pairs with a path between them.
        direct_by_distance, by_distance: the same within a tower, by layer distance (1: the next layer).
    """

    constrained_error: float
    direct: Agreement
    total: Agreement
    direct_by_distance: dict[int, Agreement]
    by_distance: dict[int, Agreement]


@dataclass(frozen=True)
class Perturbation:
    """One block after an ablation: what the local replacement model says of the change, against the model itself.

    Medians over ablations, of the cosine and of `|said - true|^2 / |true|^2`. `stream` is the residual stream after the
    next block, which holds the ablation itself; `mlp` is the next MLP's output alone, which does not.
    """

    ablations: int
    cosine_stream: float
    nmse_stream: float
    cosine_mlp: float
    nmse_mlp: float


def pair_effects(lab: Lab, graph: AttributionGraph, sources: Sequence[int], watched: Sequence[int]) -> PairEffects:
    """Ablate each source by itself and watch the others, which must be expanded (rows of the graph)."""
    sources, watched = list(sources), list(watched)
    watch = features_of(graph, watched)
    changes = [scaled(graph, [i]) for i in sources]
    clean, _ = lab.clean_state(watch)
    rows = graph.row_of[torch.tensor(watched)]
    edges = _columns(graph, sources)[rows].T.double().numpy()  # [source, watched]
    free = (lab.run(changes, "free", watch).pre - clean).double().numpy()
    held = (lab.run(changes, "direct", watch).pre.double() - clean.double()).numpy()
    constrained = float(np.abs(held + edges).max() / max(np.abs(edges).max(), 1e-30))
    paths = total_effects(graph, sources)[watched].T.numpy()
    layer = graph.nodes.layer.numpy()
    tower = graph.nodes.tower.numpy()
    gap = layer[watched][None] - layer[sources][:, None]
    same = tower[watched][None] == tower[sources][:, None]
    connected = np.abs(paths) > REACH * np.abs(paths).max()
    apart = {int(d): connected & same & (gap == d) for d in np.unique(gap[connected & same])}

    def told(said: Float[np.ndarray, "source watched"], pairs: Bool[np.ndarray, "source watched"]) -> Agreement:
        return agreement(-said[pairs], free[pairs])

    return PairEffects(
        constrained,
        told(edges, connected),
        told(paths, connected),
        {d: told(edges, pairs) for d, pairs in apart.items()},
        {d: told(paths, pairs) for d, pairs in apart.items()},
    )


def _columns(graph: AttributionGraph, sources: Sequence[int]) -> Float[Tensor, "target source"]:
    """Columns of the edge matrix."""
    found = torch.zeros(len(graph.targets), len(sources), dtype=graph.weights.dtype)
    targets, edge_sources, weights = graph.edges
    for column, source in enumerate(sources):
        picked = edge_sources == source
        found[graph.row_of[targets[picked]], column] = weights[picked]
    return found


def perturbation(lab: Lab, graph: AttributionGraph, sources: Sequence[int]) -> Perturbation:
    """Ablate each source by itself in the replacement model and in the model; compare one block on."""
    rows: list[tuple[float, ...]] = []
    places: dict[tuple[str, int], list[int]] = {}
    for i in sources:
        node = graph.nodes[i]
        places.setdefault((node.tower, node.layer), []).append(i)
    for (tower, layer), members in places.items():
        name = f"{tower.split('.')[0]}.blocks.{layer + 1}"
        names = (f"{name}.hook_resid_post", f"{name}.hook_mlp_out")
        clean = lab.clean[lab.leg_of(tower).name]
        if names[0] not in clean:
            continue
        changes = [scaled(graph, [i]) for i in members]
        true, said = (lab.run(changes, mode, names=names).kept for mode in ("free", "replacement"))
        pairs = [((true[n] - clean[n]).flatten(1).double(), (said[n] - clean[n]).flatten(1).double()) for n in names]
        rows += list(zip(*(column for pair in pairs for column in _compared(*pair)), strict=True))
    if not rows:
        return Perturbation(0, *(float("nan"),) * 4)
    columns = np.array(rows).T
    return Perturbation(len(rows), *(float(np.nanmedian(c)) if np.isfinite(c).any() else float("nan") for c in columns))


def _compared(true: Float[Tensor, "row value"], said: Float[Tensor, "row value"]) -> tuple[list[float], list[float]]:
    """Cosine and NMSE of each row; nan where nothing changed in truth."""
    size = true.norm(dim=1)
    known = torch.where(size > 1e-9, 1.0, torch.nan)
    cosine = torch.nn.functional.cosine_similarity(true, said) * known
    nmse = (said - true).norm(dim=1).pow(2) / size.pow(2).clamp_min(1e-30) * known
    return cosine.tolist(), nmse.tolist()
