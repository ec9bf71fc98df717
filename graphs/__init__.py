"""Attribution graphs: from image patches and words through features to a score, exact on one input.

    from graphs import build_graph, freeze, write_folder
    from graphs.prune import prune
    from graphs.targets import Contrast

    frozen = freeze(model, model.prepare(image, [target]), [Contrast(target)])
    graph = build_graph(frozen, transcoders)
    write_folder(graph, prune(graph), image, "out/graph")

Nothing is imported before it is used. See docs/graphs.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mechinterp.lazy import lazily

if TYPE_CHECKING:
    from graphs.build import build_graph
    from graphs.certificate import CertificateError
    from graphs.export.folder import write_folder
    from graphs.frozen import freeze, from_transformer_lens
    from graphs.graph import AttributionGraph
    from graphs.heads import edge_heads
    from graphs.influence import total_effect
    from graphs.nodes import NodeType
    from graphs.pairs import pair_matrix
    from graphs.paths import strongest_paths
    from graphs.supernodes import Supernodes, suggest

__all__ = [
    "AttributionGraph",
    "CertificateError",
    "NodeType",
    "Supernodes",
    "build_graph",
    "edge_heads",
    "freeze",
    "from_transformer_lens",
    "pair_matrix",
    "strongest_paths",
    "suggest",
    "total_effect",
    "write_folder",
]

_HOMES = {
    "AttributionGraph": "graph",
    "CertificateError": "certificate",
    "NodeType": "nodes",
    "Supernodes": "supernodes",
    "build_graph": "build",
    "edge_heads": "heads",
    "freeze": "frozen",
    "from_transformer_lens": "frozen",
    "pair_matrix": "pairs",
    "strongest_paths": "paths",
    "suggest": "supernodes",
    "total_effect": "influence",
    "write_folder": "export.folder",
}

__getattr__ = lazily(__name__, _HOMES)
