"""Is the graph's ranking of features enough to rebuild the output? Faithfulness curves in the free model.

`f(k) = (m(C_k) - m(0)) / (m(M) - m(0))` after Mueller et al. 2025 ("MIB", arXiv:2504.13151): `C_k` keeps the share
`k` of active features that rank first, everything else is ablated, `m(0)` has all features ablated. CPR is the area
under `f` (larger is better), CMD the area between `f` and 1 (0 is best), trapezoids on a linear `k`.

What is ablated matters (Miller et al. 2024, arXiv:2407.08734), so a curve says: features of all layers and positions,
to zero or to their values on another image; transcoder errors, biases and attention stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from graphs.causal.changes import features_of
from graphs.causal.lab import Lab
from graphs.graph import AttributionGraph

__all__ = ["SHARES", "Ablation", "Curve", "curve"]

SHARES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
Ablation = Literal["zero", "resample"]


@dataclass(frozen=True)
class Curve:
    """Faithfulness by share of features kept.

    Fields:
        ablation: what happens to the features that are not kept.
        ranking: what they were ranked by.
        k, f: share kept, and faithfulness; f is 0 at 0 and 1 at 1 by definition.
        whole, none: the output with all features and with none.
        cpr, cmd: areas; nan where the output is the same with and without features.
    """

    ablation: Ablation
    ranking: str
    k: tuple[float, ...]
    f: tuple[float, ...]
    whole: float
    none: float
    cpr: float
    cmd: float


def curve(
    lab: Lab,
    graph: AttributionGraph,
    nodes: Sequence[int],
    score: Float[np.ndarray, " node"],
    ranking: str,
    other: Lab | None = None,
    output: int = 0,
) -> Curve:
    """The curve of one ranking of the feature nodes, for one output of the lab.

    Args:
        lab: the image.
        graph: its graph; `nodes` are all its active features, `score` what they are ranked by (largest kept first).
        ranking: name of the ranking.
        other: another image, for resample ablation; else zero ablation.
        output: which output.
    """
    order = [nodes[i] for i in np.argsort(-score, kind="stable")]
    kept = [features_of(graph, order[: max(1, round(k * len(order)))]) for k in SHARES[1:-1]]
    values = lab.only([(), *kept, None], None if other is None else other.activations())[:, output].numpy()
    none, whole = float(values[0]), float(values[-1])
    scale = whole - none
    f = np.full(len(SHARES), np.nan) if abs(scale) < 1e-6 * max(1.0, abs(whole)) else (values - none) / scale
    k = np.array(SHARES)
    return Curve(
        "zero" if other is None else "resample",
        ranking,
        SHARES,
        tuple(f.tolist()),
        whole,
        none,
        float(np.trapezoid(f, k)),
        float(np.trapezoid(np.abs(1 - f), k)),
    )
