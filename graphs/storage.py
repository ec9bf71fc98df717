"""A graph folder: `graph.safetensors` (the numbers), `graph.json` (what people and other tools read), a manifest.

`graph.json` repeats the nodes in words; `load_graph` takes numbers from the tensors and names from the JSON, so a round
trip is exact to the bit. Nothing is pickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphs.graph import AttributionGraph, GraphOutput, Outputs, csr
from graphs.nodes import COLUMNS, N_TYPES, NodeTable, NodeType
from mechinterp.errors import MechInterpError, StorageError
from mechinterp.storage import (
    MANIFEST,
    canonical_json,
    load_tensors,
    read_json,
    save_tensors,
    verify_folder,
    write_json,
    write_manifest,
)

__all__ = ["GRAPH_JSON", "GRAPH_TENSORS", "load_graph", "save_graph"]

GRAPH_TENSORS, GRAPH_JSON = "graph.safetensors", "graph.json"
FORMAT, SCHEMA_VERSION = "mechinterp attribution graph", 1
EDGES = ("crow", "col", "values", "targets", "rest")


def save_graph(graph: AttributionGraph, folder: Path) -> Path:
    """Write a graph folder and close it with a manifest; returns the folder. Same graph, same bytes.

    Raises StorageError when it cannot be written.
    """
    tensors = {
        "crow": graph.weights.crow_indices(),
        "col": graph.weights.col_indices(),
        "values": graph.weights.values(),
        "targets": graph.targets,
        "rest": graph.rest,
    } | {f"nodes.{name}": getattr(graph.nodes, name) for name in COLUMNS}
    save_tensors(folder / GRAPH_TENSORS, tensors, {"format": FORMAT, "schema_version": str(SCHEMA_VERSION)})
    write_json(folder / GRAPH_JSON, _described(graph))
    write_manifest(folder, {"kind": FORMAT})
    return folder


def load_graph(folder: Path) -> AttributionGraph:
    """Read a graph folder. Raises StorageError, naming the file, when it is damaged, incomplete or something else."""
    hint = "make the graph again"
    problems = verify_folder(folder)
    own = [p for p in problems if p.startswith((GRAPH_TENSORS, GRAPH_JSON, MANIFEST))]
    if own:
        raise StorageError(own[0], where=str(folder), hint=hint)
    about = read_json(folder / GRAPH_JSON)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise StorageError("is no attribution graph", where=str(folder / GRAPH_JSON), hint=hint)
    if about.get("schema_version") != SCHEMA_VERSION:
        raise StorageError(
            f"has schema version {about.get('schema_version')!r}, this release reads {SCHEMA_VERSION}",
            where=str(folder / GRAPH_JSON),
            hint=hint,
        )
    tensors = load_tensors(folder / GRAPH_TENSORS)
    try:
        return _assembled(about, tensors)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, MechInterpError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise StorageError(f"does not hold a graph: {lines[0][:200]}", where=str(folder), hint=hint) from error


def _described(graph: AttributionGraph) -> dict[str, Any]:
    """`graph.json`: the fields of the interface first, then what a round trip needs."""
    from graphs.scores import scores  # not needed to read a folder

    nodes = graph.nodes
    found = scores(graph)
    rows = zip(
        nodes.ids,
        nodes.labels,
        nodes.type.tolist(),
        nodes.tower.tolist(),
        nodes.layer.tolist(),
        nodes.pos.tolist(),
        nodes.feature.tolist(),
        nodes.activation.tolist(),
        nodes.influence.tolist(),
        strict=True,
    )
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "max_relative_residual": graph.meta.get("max_relative_residual"),
        "completeness": graph.meta.get("completeness", found.completeness),
        "replacement": graph.meta.get("replacement", found.replacement),
        "freezes": graph.meta.get("freezes", []),
        "towers": list(nodes.towers),
        "outputs": [
            {
                "name": o.name,
                "kind": o.kind,
                "weight": o.weight,
                "share": o.share,
                "value": o.value,
                "id": nodes.ids[o.node],
            }
            for o in graph.outputs
        ],
        "nodes": [
            {
                "id": name,
                "type": NodeType(kind).name.lower(),
                "tower": nodes.towers[tower],
                "layer": layer,
                "position": pos,
                "feature": feature,
                "activation": activation,
                "influence": influence,
                "label": label,
            }
            for name, label, kind, tower, layer, pos, feature, activation, influence in rows
        ],
        "meta": graph.meta,
    }


def _assembled(about: dict[str, Any], tensors: dict[str, Tensor]) -> AttributionGraph:
    missing = {*EDGES, *(f"nodes.{name}" for name in COLUMNS)} - set(tensors)
    if missing:
        raise ValueError(f"tensors are missing: {sorted(missing)}")
    nodes = NodeTable(
        **{name: tensors[f"nodes.{name}"] for name in COLUMNS},
        towers=tuple(str(tower) for tower in about["towers"]),
        ids=tuple(str(node["id"]) for node in about["nodes"]),
        labels=tuple(str(node["label"]) for node in about["nodes"]),
    )
    n, n_targets = len(nodes), len(tensors["targets"])
    if (nodes.type >= N_TYPES).any() or not 0 <= int(nodes.tower.min()) <= int(nodes.tower.max()) < len(nodes.towers):
        raise ValueError("a node has a type or tower that does not exist")
    targets = tensors["targets"]
    if (targets.diff() <= 0).any() or (n_targets and not 0 <= int(targets[0]) <= int(targets[-1]) < n):
        raise ValueError("targets are no ascending nodes")
    weights = csr(tensors["crow"], tensors["col"], tensors["values"], (n_targets, n), check=True)
    if not all(torch.isfinite(tensors[name]).all() for name in ("values", "rest", "nodes.pre", "nodes.constant")):
        raise ValueError("it has numbers that are not finite")
    outputs = Outputs(
        GraphOutput(
            str(o["name"]),
            str(o["kind"]),
            float(o["weight"]),
            float(o["value"]),
            nodes.index(o["id"]),
            None if o.get("share") is None else float(o["share"]),
        )
        for o in about["outputs"]
    )
    meta = json.loads(canonical_json(about["meta"]))
    return AttributionGraph(nodes, weights, targets, tensors["rest"], outputs, meta)
