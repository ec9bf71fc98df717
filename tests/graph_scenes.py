"""Attribution graphs drawn by lot, in the shapes that real ones have; every row adds up.

graph = lot(seed=0)                                # a vision tower and a text tower that meet in the output
graph = lot(seed=0, chained=True)                  # a vision tower that feeds a text tower
image = radiograph()                               # something grey to draw patches on
"""

from __future__ import annotations

import numpy as np
import torch

from graphs.graph import AttributionGraph, GraphOutput, Outputs, csr
from graphs.nodes import N_TYPES, NodeTable, NodeType, node_id

WORDS = ("a", "chest", "x-ray", "with", "consolidation")


def lot(
    seed: int = 0,
    side: int = 4,
    layers: tuple[int, int] = (3, 2),
    kinds: int = 5,
    chained: bool = False,
    density: float = 0.3,
    unexpanded: float = 0.0,
    outputs: int = 1,
    dtype: torch.dtype = torch.float64,
) -> AttributionGraph:
    """A random graph: `kinds` features a layer fire at a third of the positions of their tower."""
    draw = np.random.default_rng(seed)
    towers = ("vision", "text")
    rows: list[tuple[NodeType, int, int, int, int, str]] = []

    def at(tower: int, p: int) -> str:
        return WORDS[p] if tower else f"patch {(p - 1) // side},{(p - 1) % side}" if p else "CLS"

    for tower, (length, depth) in enumerate(((side * side + 1, layers[0]), (len(WORDS), layers[1]))):
        if tower == 0:
            rows.append((NodeType.CLS, 0, -1, 0, -1, "CLS"))
            rows += [
                (NodeType.PATCH, 0, -1, p, -1, f"patch {(p - 1) // side},{(p - 1) % side}") for p in range(1, length)
            ]
        else:
            rows += [(NodeType.TOKEN, 1, -1, p, -1, word) for p, word in enumerate(WORDS)]
        rows += [(NodeType.POSITION, tower, -1, p, -1, f"position of {at(tower, p)}") for p in range(length)]
        rows.append((NodeType.BIAS, tower, -1, -1, -1, "bias"))
        for layer in range(depth):
            firing = [(p, f) for p in range(length) for f in range(kinds) if draw.random() < 0.35]
            rows += [(NodeType.FEATURE, tower, layer, p, f, f"feature {f} at {at(tower, p)}") for p, f in firing]
            rows += [(NodeType.ERROR, tower, layer, p, -1, f"error at {at(tower, p)}") for p in range(length)]
            rows.append((NodeType.BIAS, tower, layer, -1, -1, "bias"))
    rows += [(NodeType.OUTPUT, 1, layers[1], -1, i, f"consolidation {i}") for i in range(outputs)]
    kind, tower, layer = (np.array([row[i] for row in rows]) for i in range(3))
    n = len(rows)
    expandable = (kind == NodeType.FEATURE) & (draw.random(n) >= unexpanded) | (kind == NodeType.OUTPUT)
    targets = np.flatnonzero(expandable)

    dense = np.zeros((len(targets), n))
    for i, t in enumerate(targets):
        below = (tower == tower[t]) & (layer < layer[t])
        if chained and tower[t] == 1:
            below |= tower == 0
        if kind[t] == NodeType.OUTPUT:
            below = kind != NodeType.OUTPUT
            if chained:
                below &= tower == 1
        scale = np.where(kind == NodeType.ERROR, 0.2, np.where(kind == NodeType.POSITION, 0.15, 1.0))
        dense[i] = np.where(below & (draw.random(n) < density), draw.standard_normal(n) ** 3 * scale, 0.0)
    constant, pre = np.zeros(n), np.zeros(n)
    constant[targets] = draw.standard_normal(len(targets)) * 0.1
    pre[targets] = dense.sum(1) + constant[targets]
    unknown = np.setdiff1d(np.flatnonzero(kind == NodeType.FEATURE), targets)
    pre[unknown] = np.abs(draw.standard_normal(len(unknown)))
    for i, t in enumerate(targets):  # features fire: turn the row of one that would not
        if kind[t] == NodeType.FEATURE and pre[t] < 0:
            dense[i], constant[t], pre[t] = -dense[i], -constant[t], -pre[t]

    sparse = torch.from_numpy(dense).to(dtype).to_sparse_coo().coalesce()
    at, col = sparse.indices()
    crow = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(at, minlength=len(targets)).cumsum(0)])
    nodes = NodeTable(
        type=torch.tensor(kind, dtype=torch.uint8),
        tower=torch.tensor(tower, dtype=torch.int16),
        layer=torch.tensor(layer, dtype=torch.int16),
        pos=torch.tensor([row[3] for row in rows], dtype=torch.int32),
        feature=torch.tensor([row[4] if row[0] == NodeType.FEATURE else -1 for row in rows], dtype=torch.int32),
        activation=torch.from_numpy(pre).to(dtype),
        pre=torch.from_numpy(pre).to(dtype),
        constant=torch.from_numpy(constant).to(dtype),
        influence=torch.zeros(n, dtype=dtype),
        effect=torch.zeros(n, dtype=dtype),
        towers=towers,
        ids=tuple(node_id(row[0], towers[row[1]], *row[2:5]) for row in rows),
        labels=tuple(row[5] for row in rows),
    )
    first = n - outputs
    made = Outputs(
        GraphOutput(f"consolidation {i}", "logit", float((i + 1) * (-1) ** i), float(pre[first + i]), first + i)
        for i in range(outputs)
    )
    meta = {"model": {"label": "toy", "family": "clip", "sha256": "0" * 64}, "max_relative_residual": 1e-16}
    rest = torch.zeros(len(targets), N_TYPES, dtype=dtype)
    weights = csr(crow, col, sparse.values(), (len(targets), n))
    return AttributionGraph(nodes, weights, torch.from_numpy(targets), rest, made, meta)


def radiograph(side: int = 64) -> np.ndarray:
    """A grey oval with two dark ones: lungs, near enough."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    body = np.exp(-6 * (x**2 + (y * 0.8) ** 2))
    lungs = sum(np.exp(-(((x - c) / 0.11) ** 2 + (y / 0.25) ** 2)) for c in (-0.2, 0.2))
    return np.clip(0.9 * body - 0.45 * lungs + 0.1, 0, 1).astype(np.float32)
