"""What circuit-tracer's JSON, schema 1, must hold: checked before it is written."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["problems_of"]

Types = tuple[type, ...]
_NUMBER: Types = (int, float)
_OPTIONAL: Types = (int, float, type(None))
METADATA: dict[str, Types] = {
    "slug": (str,),
    "scan": (str,),
    "transcoder_list": (list,),
    "prompt_tokens": (list,),
    "prompt": (str,),
    "node_threshold": _OPTIONAL,
    "schema_version": (int,),
}
PARAMETERS: dict[str, Types] = {
    "pinnedIds": (list,),
    "supernodes": (list,),
    "linkType": (str,),
    "clickedId": (str,),
    "sg_pos": (str,),
}
NODE: dict[str, Types] = {
    "node_id": (str,),
    "feature": (int,),
    "layer": (str,),
    "ctx_idx": (int,),
    "feature_type": (str,),
    "token_prob": _NUMBER,
    "is_target_logit": (bool,),
    "run_idx": (int,),
    "reverse_ctx_idx": (int,),
    "jsNodeId": (str,),
    "clerp": (str,),
    "influence": _OPTIONAL,
    "activation": _OPTIONAL,
}
LINK: dict[str, Types] = {"source": (str,), "target": (str,), "weight": _NUMBER}
FEATURE_TYPES = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}


def problems_of(value: dict[str, Any]) -> list[str]:
    """One line for each thing that circuit-tracer's reader or viewer would stumble over; empty when it is well."""
    missing = [key for key in ("metadata", "qParams", "nodes", "links") if key not in value]
    if missing:
        return [f"{key}: missing" for key in missing]
    found = _fields(value["metadata"], METADATA, "metadata") + _fields(value["qParams"], PARAMETERS, "qParams")
    for i, node in enumerate(value["nodes"]):
        found += _fields(node, NODE, f"nodes[{i}]")
    for i, link in enumerate(value["links"]):
        found += _fields(link, LINK, f"links[{i}]")
    return found or _relations(value)


def _fields(value: dict[str, Any], fields: dict[str, Types], where: str) -> list[str]:
    found = []
    for name, types in fields.items():
        if name not in value:
            found.append(f"{where}.{name}: missing")
        elif not isinstance(value[name], types) or (isinstance(value[name], bool) and bool not in types):
            found.append(f"{where}.{name}: is {type(value[name]).__name__}")
        elif isinstance(value[name], float) and not math.isfinite(value[name]):
            found.append(f"{where}.{name}: is {value[name]}")
    return found


def _relations(value: dict[str, Any]) -> list[str]:
    nodes, tokens = value["nodes"], len(value["metadata"]["prompt_tokens"])
    found = []
    known: set[str] = set()
    for node in nodes:
        name, kind = node["node_id"], node["feature_type"]
        if name in known:
            found.append(f"{name}: two nodes have this id")
        known.add(name)
        if kind not in FEATURE_TYPES:
            found.append(f"{name}: feature_type is {kind!r}")
        if not 0 <= node["ctx_idx"] < tokens:
            found.append(f"{name}: ctx_idx {node['ctx_idx']} has no token")
        if (node["layer"] == "E") != (kind == "embedding") or not (node["layer"] == "E" or node["layer"].isdigit()):
            found.append(f"{name}: layer is {node['layer']!r}")
        if kind == "logit" and "(p=" not in node["clerp"]:
            found.append(f"{name}: the viewer reads (p=...) in clerp")
        if "<" in node["clerp"]:
            found.append(f"{name}: clerp holds markup")
    for link in value["links"]:
        for end in ("source", "target"):
            if link[end] not in known:
                found.append(f"link {link['source']} -> {link['target']}: there is no node {link[end]}")
    for group in value["qParams"]["supernodes"]:
        found += [f"supernode {group[0]}: there is no node {name}" for name in group[1:] if name not in known]
    return found
