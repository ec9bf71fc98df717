"""Two graphs of one toy, in the shared form that both workers write: are the edges equal, are the best features found?

The form: `rows` and `columns` name targets and features by (layer, position, feature), outputs by (number of layers,
position, token); `features`, `errors` (by layer, then position) and `tokens` are the edges of each row; `total` is the
sum of all absolute in-edges of a row, and `shares` are the weights of the outputs, in their order among the rows.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Edges = dict[str, Tensor]


def read(file: Path) -> Edges:
    """What a worker wrote."""
    return load_file(file)


def difference(one: Edges, other: Edges) -> float:
    """Largest absolute difference of an edge that both have. Raises AssertionError where they hardly share any."""
    rows, columns = (_common(one[name], other[name]) for name in ("rows", "columns"))
    for pair, name in ((rows, "rows"), (columns, "columns")):
        smaller = min(len(one[name]), len(other[name]))
        assert len(pair[0]) > 0.5 * smaller, f"only {len(pair[0])} of {smaller} {name} are in both graphs"
    positions = one["tokens"].shape[1]
    later = (torch.arange(one["errors"].shape[1]) % positions > 0).nonzero()[:, 0]  # the peer has none at the first
    found = 0.0
    for name, mine, theirs in (
        ("features", columns[0], columns[1]),
        ("errors", later, later),
        ("tokens", torch.arange(positions), torch.arange(positions)),
    ):
        difference = one[name][rows[0]][:, mine] - other[name][rows[1]][:, theirs]
        found = max(found, float(difference.abs().max()))
    return found


def influence(full: Edges) -> dict[tuple[int, ...], float]:
    """Influence of every feature on the outputs, in the full graph: one substitution from the top layer down."""
    rows, top = full["rows"], int(full["rows"][:, 0].max())
    column = {tuple(name): i for i, name in enumerate(full["columns"].tolist())}
    value = torch.zeros(len(column), dtype=full["features"].dtype)
    for layer in range(top, -1, -1):
        mine = (rows[:, 0] == layer).nonzero()[:, 0]
        if not len(mine):
            continue
        at = None if layer == top else torch.tensor([column[tuple(name)] for name in rows[mine].tolist()])
        weight = full["shares"] if at is None else value[at]
        value += (weight / full["total"][mine].clamp_min(torch.finfo(value.dtype).tiny)) @ full["features"][mine].abs()
    return {name: float(value[i]) for name, i in column.items()}


def captured(found: Edges, full: Edges) -> float:
    """Influence of the features that were expanded, as a share of what the same number of the best would have."""
    of = influence(full)
    names = [tuple(name) for name in found["rows"].tolist() if tuple(name) in of]
    best = sorted(of.values(), reverse=True)[: len(names)]
    return sum(of[name] for name in names) / sum(best)


def _common(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Where the names that both have stand, in each."""
    place = {tuple(name): i for i, name in enumerate(other.tolist())}
    pairs = [(i, place[tuple(name)]) for i, name in enumerate(one.tolist()) if tuple(name) in place]
    both = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return both[:, 0], both[:, 1]
