"""Build an attribution graph: all features as targets, or the most influential ones first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from graphs.certificate import certify
from graphs.frozen.parts import FrozenPass
from graphs.graph import AttributionGraph, GraphOutput, Outputs
from graphs.halves import output_shares
from graphs.layout import Layout
from graphs.nodes import NodeType
from graphs.replace import Direction, Mode, Replacement
from graphs.rows import Rows
from graphs.sweep import Sweep
from mechinterp.errors import UsageError
from mechinterp.storage import canonical_json
from mechinterp.types import Placed

__all__ = ["build_graph"]


def build_graph(
    frozen: FrozenPass,
    dictionaries: Sequence[Placed],
    max_features: int | None = None,
    rounds: int = 6,
    batch: int | None = None,
    mode: Mode = "transcoder",
    direction: Direction = "encoder",
    row_mass: float | None = None,
    limit: float | None = None,
) -> AttributionGraph:
    """The graph of one input and its outputs, certified.

    Args:
        frozen: the pass (`graphs.frozen.freeze`), with its outputs.
        dictionaries: transcoders, or SAEs for `mode="sae"`; blocks without one have only errors.
        max_features: number of features whose in-edges are computed, best first (default: all). The others stay as
            sources whose own causes are unknown (`AttributionGraph.leaves`).
        rounds: in how many steps the best are found; influence is computed anew after each.
        batch: targets that the sweep takes at a time (default: what fits the cache).
        mode, direction: see `Replacement`.
        row_mass: keep only the largest edges that have this share of a row's absolute weight; the sum of the others
            stays in `rest`.
        limit: of the relative residual (default by dtype: 1e-5 in float32, 1e-10 in float64).

    Raises CertificateError when a row does not add up, UsageError for a budget or dictionary that makes no sense.
    """
    if not frozen.readouts:
        raise UsageError("there is no output to explain", where="frozen.readouts")
    if (max_features is not None and max_features < 0) or rounds < 1:
        raise UsageError(f"max_features={max_features}, rounds={rounds}", where="build_graph")
    if row_mass is not None and not 0 < row_mass <= 1:
        raise UsageError(f"row_mass={row_mass} is no share", where="build_graph")
    replacement = Replacement(frozen, dictionaries, mode, direction)
    layout = Layout(replacement)
    sweep, rows = Sweep(replacement, layout, batch), Rows(layout)
    features = layout.nodes.is_type(NodeType.FEATURE)
    weights = _outputs(sweep, rows, frozen, layout)
    wanted = int(features.sum()) if max_features is None else min(max_features, int(features.sum()))
    steps = 1 if wanted == int(features.sum()) else min(rounds, wanted)
    for step in range(steps):
        share = wanted * (step + 1) // steps - wanted * step // steps
        open_ = features & ~rows.expanded()
        if share < int(open_.sum()):
            value = torch.where(open_, rows.influence(weights), -1.0)
            picked = value.argsort(descending=True, stable=True)[:share]
        else:
            picked = open_.nonzero()[:, 0]
        _expand(sweep, rows, picked)
    del sweep  # and its memory: what follows needs as much for the edges
    influence = rows.influence(weights)
    matrix, targets, rest = rows.assemble(row_mass)
    outputs = Outputs(
        GraphOutput(r.name, r.kind, float(r.weight), float(r.value), layout.outputs + k, share)
        for k, (r, share) in enumerate(zip(frozen.readouts, weights[layout.outputs :].tolist(), strict=True))
    )
    meta = _meta(replacement) | {"max_features": max_features, "rounds": steps, "row_mass": row_mass}
    meta |= {"rows": len(targets), "active_features": int(features.sum())}
    meta["expanded_features"] = len(targets) - len(outputs)
    graph = AttributionGraph(layout.nodes.with_influence(influence), matrix, targets, rest, outputs, meta)
    certificate = certify(graph, limit)
    meta |= {"certificate": certificate.to_dict(), "max_relative_residual": certificate.max_relative_residual}
    return replace(graph, meta=json.loads(canonical_json(meta)))


def _expand(sweep: Sweep, rows: Rows, targets: Tensor) -> None:
    if len(targets):
        rows.reserve(targets)
        for batch in sweep.rows(targets):
            rows.add(batch)


def _outputs(sweep: Sweep, rows: Rows, frozen: FrozenPass, layout: Layout) -> Float[Tensor, " node"]:
    """Expand the outputs; the share of the influence that begins at each node."""
    weights = torch.zeros(len(layout.nodes), dtype=layout.nodes.activation.dtype)
    mass = torch.zeros_like(weights)
    for nodes, edges in sweep.rows(torch.arange(layout.outputs, len(layout.nodes))):
        mass[nodes] = edges.abs().sum(0)
        rows.add((nodes, edges))
    weights[layout.outputs :] = output_shares(frozen.readouts, mass[layout.outputs :])
    return weights


def _meta(replacement: Replacement) -> dict[str, Any]:
    """How the graph was made, as JSON can hold it."""
    frozen = replacement.frozen
    scales = []
    for readout in frozen.readouts:
        stream = frozen.stream_of(readout)
        scales.append(float((readout.seed.norm(dim=-1) * stream.norm(dim=-1)).norm() / stream.shape[1] ** 0.5))
    return {
        "model": dict(frozen.model),
        "image": frozen.image,
        "mode": replacement.mode,
        "direction": replacement.direction,
        "dtype": str(replacement.dtype).removeprefix("torch."),
        "freezes": list(replacement.freezes),
        "dictionaries": [
            {
                "reads": str(placed.reads),
                "writes": str(placed.writes),
                "info": getattr(placed.dictionary, "info", None) or {},
            }
            for _, placed in sorted(replacement.placed.items())
        ],
        "output_scales": scales,
    }
