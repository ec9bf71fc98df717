"""What a graph says one feature does to another, and how that compares with what it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Num
from scipy import stats
from torch import Tensor

from graphs.graph import AttributionGraph
from graphs.influence import edges_of, relative
from graphs.nodes import NodeType

__all__ = ["Agreement", "agreement", "spearman", "total_effects"]


@dataclass(frozen=True)
class Agreement:
    """How two columns of numbers agree; nan where one of them does not vary.

    `sign` is the share of pairs with the same sign; `sign_weighted` weights each pair by the size of the measured one.
    """

    pairs: int
    pearson: float
    spearman: float
    sign: float
    sign_weighted: float


def agreement(predicted: Num[np.ndarray, " pair"], measured: Num[np.ndarray, " pair"]) -> Agreement:
    """Agreement of signed predictions with signed measurements."""
    nan = float("nan")
    if len(predicted) < 3 or np.ptp(predicted) == 0 or np.ptp(measured) == 0:
        return Agreement(len(predicted), nan, nan, nan, nan)
    same = np.sign(predicted) == np.sign(measured)
    size = np.abs(measured)
    return Agreement(
        len(predicted),
        float(np.corrcoef(predicted, measured)[0, 1]),
        spearman(predicted, measured),
        float(same.mean()),
        float((same * size).sum() / size.sum()),
    )


def spearman(a: Num[np.ndarray, " pair"], b: Num[np.ndarray, " pair"]) -> float:
    """Rank correlation with mid-ranks for ties; nan with fewer than three pairs or a constant column."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


def total_effects(graph: AttributionGraph, sources: Sequence[int]) -> Float[Tensor, "node source"]:
    """What each node's pre-activation (value, for outputs) owes to each source by all paths, signed, in float64.

    `E[t, s] = W[t, s] + sum_m W[t, m] / activation[m] * E[m, s]`: features above the source follow one to one, as long
    as none of them starts or stops to fire. Removing the source should change the node by `-E`. Paths through features
    that were not expanded are not known and count 0.
    """
    edges = edges_of(graph)
    fraction = relative(graph, edges)  # W / activation of the target; W itself for outputs
    moved = torch.zeros(len(graph.nodes), len(sources), dtype=torch.float64)
    for column, source in enumerate(sources):
        moved[source, column] = 1.0
    for level in reversed(list(edges.levels())):
        passed = fraction[level, None] * moved[edges.source[level]]
        moved.index_add_(0, edges.target[level], passed)
    outputs = graph.nodes.type == NodeType.OUTPUT
    unit = torch.where(outputs, 1.0, graph.nodes.activation.double())
    for column, source in enumerate(sources):
        moved[source, column] = 0.0
    return moved * unit[:, None]
