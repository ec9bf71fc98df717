"""Our graphs of toys in a process of their own: `python -m benchmarks.graph_worker` takes jobs, a line each.

The counterpart of `peers/run_circuit_tracer.py`: the same jobs, the same files, the same answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import toy as toys
from benchmarks.peers.measure import measured, serve
from graphs.build import build_graph
from graphs.graph import AttributionGraph
from graphs.nodes import NodeType


def edges(graph: AttributionGraph, toy: dict[str, Any]) -> dict[str, Tensor]:
    """The edges in the shared form: rows and columns named by (layer, position, feature), a logit by its token."""
    nodes, (layers, positions) = graph.nodes, (toy["config"]["n_layers"], len(toy["tokens"]))
    name = torch.stack([nodes.layer.long(), nodes.pos.long(), nodes.feature.long()], 1)
    outputs = [output.node for output in graph.outputs]
    name[outputs] = torch.tensor([[layers, positions - 1, token] for token in toy["targets"]])
    features = nodes.is_type(NodeType.FEATURE).nonzero()[:, 0]
    errors = nodes.is_type(NodeType.ERROR).nonzero()[:, 0]  # by layer, then position
    tokens = nodes.is_type(NodeType.TOKEN).nonzero()[:, 0]
    dense = graph.weights.to_dense()
    shares = torch.tensor([output.weight for output in graph.outputs])
    return {
        "rows": name[graph.targets].contiguous(),
        "columns": name[features].contiguous(),
        "features": dense[:, features].contiguous(),
        "errors": dense[:, errors].contiguous(),
        "tokens": dense[:, tokens].contiguous(),
        "total": dense.abs().sum(1),
        "shares": shares / shares.sum(),
    }


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Write the toy of a shape into `folder`; or build its graph, with a `budget` of features; edges go to `out`."""
    folder = Path(job["folder"])
    if "write" in job:
        toys.write(toys.Shape(**job["write"]), folder)
        return {}
    model, placed, toy = toys.read(folder)
    graph, cost = measured(
        lambda: build_graph(toys.freeze(model, toy), placed, max_features=job["budget"], batch=job["batch"])
    )
    if job["out"] is not None:
        save_file(edges(graph, toy), job["out"])
    features = int(graph.nodes.is_type(NodeType.FEATURE).sum())
    rows = len(graph.targets) - len(graph.outputs)
    return {**cost, "features": features, "rows": rows, "residual": graph.meta["max_relative_residual"]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(answer, "ours")
