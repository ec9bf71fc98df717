"""Random valid attribution graphs: every row adds up, sources stand before targets. No model needed."""

from __future__ import annotations

import torch

from graphs.graph import AttributionGraph, GraphOutput, Outputs, csr
from graphs.nodes import N_TYPES, NodeTable, NodeType, node_id


def random_graph(
    seed: int = 0,
    layers: int = 3,
    positions: int = 5,
    features: int = 2,
    outputs: int = 2,
    density: float = 0.6,
    unexpanded: float = 0.0,
    rest: bool = False,
    two_towers: bool = True,
    dtype: torch.dtype = torch.float32,
) -> AttributionGraph:
    """A vision tower (patches, CLS, positions, errors, biases, features) and a text tower behind a projector bias.

    Args:
        features: active features at each (layer, position).
        density: share of the possible edges (source before target in layer order) that is there.
        unexpanded: share of the features that are leaves.
        rest: whether a part of each row's mass is in `rest`.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[tuple[NodeType, str, int, int, int]] = []
    for tower in ("vision", "text") if two_towers else ("vision",):
        if tower == "text":
            rows.append((NodeType.BIAS, "projector", -1, -1, -1))
        for pos in range(positions):
            kind = NodeType.TOKEN if tower == "text" else (NodeType.PATCH if pos else NodeType.CLS)
            rows.append((kind, tower, -1, pos, -1))
        if tower == "vision":
            rows += [(NodeType.POSITION, tower, -1, pos, -1) for pos in range(positions)]
        for layer in range(layers):
            rows.append((NodeType.BIAS, tower, layer, -1, -1))
            rows += [(NodeType.ERROR, tower, layer, pos, -1) for pos in range(positions)]
            for pos in range(positions):
                drawn = torch.randperm(50, generator=generator)[:features].sort().values.tolist()
                rows += [(NodeType.FEATURE, tower, layer, pos, f) for f in drawn]
    last = rows[-1][1]
    rows += [(NodeType.OUTPUT, last, layers, positions - 1, -1) for _ in range(outputs)]

    towers = tuple(dict.fromkeys(row[1] for row in rows))
    kinds = torch.tensor([int(row[0]) for row in rows], dtype=torch.uint8)
    n = len(rows)
    ids = [node_id(*row) if row[0] != NodeType.OUTPUT else f"out.{i - (n - outputs)}" for i, row in enumerate(rows)]
    # a target reads only what was written before its layer of its tower
    depth = torch.tensor([(towers.index(r[1]) * 100 + r[2] + 1) if r[0] != NodeType.OUTPUT else 10**6 for r in rows])

    drawn = torch.rand(n, generator=generator) < unexpanded
    is_target = (kinds == NodeType.OUTPUT) | ((kinds == NodeType.FEATURE) & ~drawn)
    targets = is_target.nonzero()[:, 0]
    dense = torch.randn(len(targets), n, generator=generator, dtype=dtype)
    allowed = depth[None, :] < depth[targets][:, None]
    present = allowed & (torch.rand(len(targets), n, generator=generator) < density)
    dense = dense * present
    remainder = torch.randn(len(targets), N_TYPES, generator=generator, dtype=dtype) * (0.1 if rest else 0.0)
    constant = torch.zeros(n, dtype=dtype)
    constant[targets] = 0.1 * torch.randn(len(targets), generator=generator, dtype=dtype)
    pre = torch.rand(n, generator=generator, dtype=dtype) * (kinds == NodeType.FEATURE)
    pre[targets] = (dense.double().sum(1) + remainder.double().sum(1)).to(dtype) + constant[targets]
    activation = torch.where(kinds == NodeType.FEATURE, pre.abs(), torch.where(kinds == NodeType.OUTPUT, pre, 0 * pre))

    crow = torch.cat([torch.zeros(1, dtype=torch.long), present.sum(1).cumsum(0)])
    where = present.nonzero()
    nodes = NodeTable(
        type=kinds,
        tower=torch.tensor([towers.index(row[1]) for row in rows], dtype=torch.int16),
        layer=torch.tensor([row[2] for row in rows], dtype=torch.int16),
        pos=torch.tensor([row[3] for row in rows], dtype=torch.int32),
        feature=torch.tensor([row[4] for row in rows], dtype=torch.int32),
        activation=activation,
        pre=pre,
        constant=constant,
        influence=torch.zeros(n, dtype=dtype),
        effect=torch.zeros(n, dtype=dtype),
        towers=towers,
        ids=tuple(ids),
        labels=tuple(ids),
    )
    named = Outputs(
        GraphOutput(f"output {k}", "logit", 1.0 / outputs, float(pre[n - outputs + k]), n - outputs + k)
        for k in range(outputs)
    )
    meta = {"mode": "transcoder", "dtype": str(dtype).removeprefix("torch."), "freezes": [], "seed": seed}
    return AttributionGraph(
        nodes, csr(crow, where[:, 1], dense[present], (len(targets), n)), targets, remainder, named, meta
    )
