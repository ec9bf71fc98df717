"""The graph folder: the graph itself, its pictures, and the files that other programs read, closed by a manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from graphs.draw.html import Gallery, write_page
from graphs.draw.png import draw
from graphs.draw.scene import Names
from graphs.export.circuit_tracer import write_circuit_tracer
from graphs.scores import scores
from graphs.storage import save_graph
from graphs.supernodes import Supernodes
from graphs.views import write_graphml
from mechinterp.storage import write_manifest

if TYPE_CHECKING:
    from graphs.graph import AttributionGraph

__all__ = ["write_folder"]


def write_folder(
    graph: AttributionGraph,
    pruned: AttributionGraph,
    image: Float[np.ndarray, "height width"] | None,
    out: Path | str,
    names: Names | None = None,
    gallery: Gallery | None = None,
    supernodes: Supernodes | None = None,
    title: str | None = None,
    about: dict[str, Any] | None = None,
) -> Path:
    """Write everything below `out` and close it with a manifest; returns `out`.

    graph.safetensors, graph.json     the whole graph, with its scores
    graph.png, graph.html             the pruned one
    circuit_tracer.json               the pruned one, for circuit-tracer's viewer and Neuronpedia
    graph.graphml                     the pruned one, for Gephi, yEd, Cytoscape
    supernodes.json                   the groups, where there are any, and which of them mix signs

    Args:
        graph: as built.
        pruned: `prune(graph)`.
        image: what the model saw, grey, in [0, 1], cropped as the model crops.
        names, gallery, supernodes: see `graphs.draw`.
        title: of the pictures; default the outputs and their values.
        about: more for the manifest.
    """
    folder = Path(out)
    whole = pruned.meta.get("scores") or scores(graph).to_dict()
    kept = {name: whole[name] for name in ("completeness", "replacement")}
    drawn = pruned if "scores" in pruned.meta else replace(pruned, meta={**pruned.meta, "scores": whole})
    draw(drawn, image, folder / "graph.png", names, supernodes, title=title)
    write_page(drawn, image, folder / "graph.html", names, supernodes, gallery, title)
    slug = "-".join(str(part) for part in (graph.meta.get("model", {}).get("label"), graph.outputs[0].name) if part)
    write_circuit_tracer(
        drawn, folder / "circuit_tracer.json", slug=slug, names=names, supernodes=supernodes, whole=graph
    )
    write_graphml(drawn, folder / "graph.graphml")
    if supernodes:
        supernodes.checked(graph).save(folder / "supernodes.json")
    save_graph(replace(graph, meta={**graph.meta, **kept, "scores": whole}), folder)
    model = graph.meta.get("model") or {}
    write_manifest(folder, {"kind": "graph", "model": model.get("label"), **(about or {})})
    return folder
