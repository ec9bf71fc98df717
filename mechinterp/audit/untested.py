"""What this audit did not test, and why: filled from what is missing, never left empty by silence."""

from __future__ import annotations

from typing import Any

from mechinterp.data import ImageData

__all__ = ["untested"]

_KINDS = {"acquisition": "acquisition (view, scanner, hospital, portable)", "demographic": "demographic (age, sex)"}


def untested(record: dict[str, Any], data: ImageData, no_graph: str | None) -> list[dict[str, str]]:
    """The not_tested entries of audit.json. `no_graph`: why there is no attribution graph, None where there is one."""
    entries = [
        {"what": row["candidate"], "why": row["reason"]}
        for row in record["shortcuts"]
        if row["verdict"] == "NOT TESTED"
    ]
    kinds = {attribute.kind for attribute in data.attributes}
    for kind, words in _KINDS.items():
        if kind not in kinds:
            entries.append({"what": f"shortcuts and subgroups by {words}", "why": "the metadata has no such column"})
    entries += [{"what": f"column {column}", "why": reason} for column, reason in sorted(data.skipped.items())]
    if record["performance"][1]["auroc"] is None:
        entries.append({"what": "metadata-only baseline", "why": "no acquisition or demographic column to fit it on"})
    if record["truth"] is None:
        entries.append({"what": "truth by do()", "why": "only a phantom can be rendered again with one factor changed"})
    if not data.may_show.all():
        hidden = int((~data.may_show).sum())
        entries.append({"what": f"pictures of {hidden} images", "why": "burned-in text is not excluded; withheld"})
    if not any(feature["seed_stability"] is not None for feature in record["features"]):
        entries.append({"what": "seed stability of features", "why": "no other seed of the dictionary was trained"})
    if no_graph is not None:
        entries.append({"what": "attribution graph", "why": no_graph})
    if not record.get("explainers"):
        entries.append({"what": "quality of saliency maps (explainers)", "why": "left out by the settings"})
    entries += [
        {"what": "calibration and a fixed operating point", "why": "the score is not a probability"},
        {"what": "other targets of the data", "why": "one audit asks one target; run it again with --target"},
        {
            "what": "shortcuts that no column names and no dictionary feature carries",
            "why": "nothing here can see them",
        },
    ]
    return entries
