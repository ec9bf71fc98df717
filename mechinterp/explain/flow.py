"""The largest flow from the readout through attention to each element: many small maximum-flow problems."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor

__all__ = ["flows"]

UNIT = 2**30  # capacities become whole numbers of this fraction: int32 is what scipy takes


def flows(
    start: Float[Tensor, "row token"],
    matrices: Sequence[Float[Tensor, "_ _ _"]],
    at: Int[Tensor, " element"],
) -> Float[Tensor, "row element"]:
    """Largest flow from the readout to each element, for every row; NaN for a row whose capacities are not finite.

    Args:
        start: capacity from the readout to each topmost token; a row sums to 1 at most.
        matrices: `[row or 1, above, below]` capacities from tokens to the tokens below, from the top.
        at: bottom tokens that are the elements.
    """
    chains = [np.ascontiguousarray(m.double().cpu().numpy()) for m in matrices]
    first = start.double().cpu().numpy()
    found = [
        _row(first[row], [chain[min(row, len(chain) - 1)] for chain in chains], at.cpu().numpy())
        for row in range(len(first))
    ]
    return torch.from_numpy(np.stack(found)).to(start)


def _row(start: np.ndarray, matrices: Sequence[np.ndarray], at: np.ndarray) -> np.ndarray:
    """One image: one graph, in which only the edges of the last matrix into the sink change from element to element."""
    if not all(np.isfinite(one).all() for one in (start, *matrices)):
        return np.full(len(at), np.nan)
    return np.array([_largest(start, matrices[:-1], matrices[-1][:, element]) for element in at])


def _largest(start: np.ndarray, matrices: Sequence[np.ndarray], last: np.ndarray) -> float:
    layers = [start[None], *matrices, last[:, None]]
    counts = np.cumsum([0] + [len(layer) for layer in layers])
    source, sink, capacity = [], [], []
    for layer, first, below in zip(layers, counts, counts[1:], strict=False):
        i, j = np.nonzero(layer)
        source.append(i + first)
        sink.append(j + below)
        capacity.append(np.round(layer[i, j] * UNIT).astype(np.int32))
    n = counts[-1] + 1
    edges = (np.concatenate(source).astype(np.int32), np.concatenate(sink).astype(np.int32))
    graph = csr_array((np.concatenate(capacity), edges), shape=(n, n))
    return maximum_flow(graph, 0, n - 1, method="dinic").flow_value / UNIT
