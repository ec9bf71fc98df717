"""Write the artefact: audit.json, figures, one self-contained report.html, and the manifest that closes the folder.

The page holds no script and loads nothing: its content security policy allows images from data: URIs and one style
sheet, by hash. Every text from the data or the model goes through jinja2's autoescape.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mechinterp.audit.catalogue import Heat
from mechinterp.audit.figures import forest, performance_plot
from mechinterp.audit.standing import ENOUGH
from mechinterp.data import ImageData
from mechinterp.pages.heat import heat_picture, thumbnail
from mechinterp.pages.html import page, span
from mechinterp.storage import write_bytes, write_json, write_manifest

__all__ = ["render", "write_report"]

TEMPLATES = Path(__file__).parent / "templates"
SIDE = 168
ALIKE = 3  # rows with one reason that become one


def write_report(
    out: Path,
    record: dict[str, Any],
    data: ImageData,
    heats: dict[str, Heat],
    pictures: Mapping[str, bytes | None] | None = None,
) -> Path:
    """Write everything below `out`; returns it. `pictures`: `graph` and `maps` of their sections, where there are."""
    figures = {
        **(pictures or {}),
        "shortcuts": forest(record["shortcuts"], record["truth"], record["settings"]["effect_line"]),
        "performance": performance_plot(record["performance"]),
    }
    figures = {name: png for name, png in figures.items() if png is not None}
    galleries = {name: _gallery(heat, data) for name, heat in heats.items()}
    failures = [_failure(row, data) for row in record["failures"]]
    html = render(record, figures, galleries, failures)
    for name, png in figures.items():
        write_bytes(out / "figures" / f"{name}.png", png)
    write_json(out / "audit.json", record)
    write_bytes(out / "report.html", html.encode("utf-8", "replace"))
    write_manifest(out, {"kind": "audit", "model": record["model"]["id"], "seed": record["seed"]})
    return out


def render(
    record: dict[str, Any],
    figures: dict[str, bytes],
    galleries: dict[str, list[dict[str, Any]]],
    failures: list[dict[str, Any]],
) -> str:
    """The HTML page. Pictures are bytes; everything else is text that is escaped."""
    untested = [row for row in record["shortcuts"] if row["verdict"] == "NOT TESTED" and row["causal_effect"] is None]
    idle = _alike(untested, "reason")
    return page(
        TEMPLATES / "report.html.j2",
        "report.css",
        filters={"p": _p, "range": _range, "slug": _slug},
        r=record,
        least_share=ENOUGH,
        figures=figures,
        galleries=galleries,
        failures=failures,
        command=_command(record),
        iq_command=_iq_command(record),
        cards={card["id"]: card for card in record["features"]},
        mass_keys=_mass_keys(record),
        beside=_beside(record),
        explained_n=_explained(record),
        accused=_accused(record),
        idle=idle,
        alike={row["candidate"] for group in idle for row in group["rows"]},
        not_tested=_gathered(record["not_tested"]),
    )


def _alike(rows: list[dict[str, Any]], why: str) -> list[dict[str, Any]]:
    """Groups of at least `ALIKE` rows with one reason, numbers aside: {why, rows}."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(re.split(r" \(|;", row[why])[0], []).append(row)
    return [{"why": said, "rows": same} for said, same in groups.items() if len(same) >= ALIKE]


def _gathered(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The entries of what was not tested, those with one reason as one entry, where the first of them stood."""
    groups = _alike(rows, "why")
    places = {id(row): group for group in groups for row in group["rows"]}
    made = []
    for row in rows:
        group = places.get(id(row))
        if group is None:
            made.append(row)
        elif row is group["rows"][0]:
            what = f"{len(group['rows'])}: {', '.join(one['what'] for one in group['rows'])}"
            made.append({"what": what, "why": group["why"]})
    return made


BESIDE = {
    "label_randomisation": "to permuted labels",
    "repeatability": "to the same trained again",
    "reproducibility": "to another architecture",
}


def _beside(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Fields and titles of the checks against other models, where the model's record names such."""
    rows = record["explainers"]
    return [(key, title) for key, title in BESIDE.items() if any(row.get(key) is not None for row in rows)]


def _mass_keys(record: dict[str, Any]) -> list[str]:
    return sorted({key for row in record["explainers"] for key in row if key.startswith("mass ")})


def _explained(record: dict[str, Any]) -> dict[str, int]:
    """How many images a column of the explainers' table is of."""
    rows = record["explainers"]
    return {key: max(row["n"].get(key, 0) for row in rows) for key in ("auprc", *_mass_keys(record))} if rows else {}


def _accused(record: dict[str, Any]) -> list[dict[str, Any]]:
    """For each suspect with a mask: every method's relevance in it over its area, largest first."""
    suspects = {row["candidate"] for row in record["shortcuts"] if row["verdict"] in ("FAIL", "CONCERN")}
    found = []
    for key in _mass_keys(record):
        if key.removeprefix("mass ") in suspects:
            rows = [row for row in record["explainers"] if row[key] is not None and not row["anchor"]]
            ranked = sorted(rows, key=lambda row: -row[key])
            found.append({"name": key.removeprefix("mass "), "methods": [(row["method"], row[key]) for row in ranked]})
    return found


def _gallery(heat: Heat, data: ImageData) -> list[dict[str, Any]]:
    largest = max([float(example.heat.max()) for example in heat.examples], default=0.0)
    return [
        {
            "image": data.images[example.row],
            "jpeg": heat_picture(_pixels(data, example.row), example.heat, largest, side=SIDE)
            if data.may_show[example.row]
            else None,
        }
        for example in heat.examples
    ]


def _failure(row: dict[str, Any], data: ImageData) -> dict[str, Any]:
    return {**row, "jpeg": thumbnail(_pixels(data, row["row"]), SIDE) if data.may_show[row["row"]] else None}


def _pixels(data: ImageData, row: int) -> np.ndarray:
    return data.pixels([row])[0]


def _command(record: dict[str, Any]) -> str:
    return shlex.join([*_asked("audit", record), "--out", "out/audit"])


def _iq_command(record: dict[str, Any]) -> str:
    """What to type for the numbers of the explainers' section, and those of all other methods."""
    masks = [suspect["name"] for suspect in _accused(record)]
    images = ["--images", str(record["explainers"][0]["images"])] if record["explainers"] else []
    return shlex.join([*_asked("iq", record), *images, *(["--masks", ",".join(masks)] if masks else [])])


def _asked(command: str, record: dict[str, Any]) -> list[str]:
    """A command for the same model, data, target and seed.

    The phantom that is taken by default has no folder; any other data have a name here and no path, which is FOLDER.
    Thresholds of the grades that were given are FILE.
    """
    data = [] if record["data"].get("default") else ["--data", "FOLDER"]
    data += ["--thresholds", "FILE"] if record["settings"].get("grades") else []
    parts = ["mechinterp", command, record["model"]["id"], *data, "--target", record["target"]]
    return [*parts, "--seed", str(record["seed"])]


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _range(value: list[float | None] | None, digits: int = 2, sign: bool = True) -> str:
    ends = span(value, f"+.{digits}f" if sign else f".{digits}f")
    return f"[{ends[0]}, {ends[1]}]".replace("-", "−") if ends else ""


def _slug(text: str) -> str:
    """A safe id for an anchor."""
    return "f-" + hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:10]
