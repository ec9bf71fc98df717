"""Write the catalogue: features.html (one page that loads nothing), features.parquet, manifest.json.

The page's only script is our own file, named by hash in the content security policy; without it the page shows
everything, unsorted. Every text from the data or the model goes through jinja2's autoescape.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mechinterp.pages.html import page, span
from mechinterp.storage import write_bytes, write_manifest
from saes.gallery.cards import cards_of, overlaps_of, places_of
from saes.gallery.facts import SAME
from saes.gallery.table import feature_table, parquet_bytes
from saes.naming import LEAST_AUROC, UNNAMED
from saes.naming.names import ERROR, FALSE_DISCOVERIES

if TYPE_CHECKING:
    from saes.gallery.build import Catalogue
    from saes.naming import Naming

__all__ = ["render", "write"]

TEMPLATES = Path(__file__).parent / "templates"


def write(made: Catalogue) -> Path:
    """Write everything below `made.folder`; returns it."""
    places, overlaps = places_of(made), overlaps_of(made)
    table = feature_table(made, places, overlaps)
    cards = cards_of(made, table, overlaps)
    html = render(_about(made, table), cards, _lines(table, set(made.shown)), _concepts(made))
    write_bytes(made.folder / "features.parquet", parquet_bytes(table))
    write_bytes(made.folder / "features.html", html.encode("utf-8", "replace"))
    write_manifest(made.folder, {"kind": "features", "model": made.model.label, "seed": made.seed})
    return made.folder


def render(
    about: dict[str, Any], cards: list[dict[str, Any]], lines: list[dict[str, Any]], concepts: list[dict[str, Any]]
) -> str:
    """The HTML page. Pictures are bytes; everything else is text that is escaped."""
    return page(
        TEMPLATES / "features.html.j2",
        "features.css",
        "features.js",
        filters={"range": _range, "short": _short},
        a=about,
        cards=cards,
        lines=lines,
        concepts=concepts,
    )


def _about(made: Catalogue, table: Any) -> dict[str, Any]:
    observed, naming = made.observed, made.naming
    test, data = observed.test, made.data
    parts = ["mechinterp", "features", made.model.label, "--data", data.name, "--seed", str(made.seed)]
    return {
        "model": made.model.label,
        "family": made.model.family,
        "model_sha256": made.model.sha256,
        "data": data.name,
        "data_sha256": data.sha256,
        "site": str(made.placed.writes),
        "source": made.source,
        "target": made.target.name if made.target else None,
        "prompts": [made.target.positive, made.target.negative] if made.target else [],
        "width": observed.strongest.shape[1],
        "live": len(naming.names),
        "named": len(naming.named),
        "by_text": sum(name.source == "text" for name in naming.named),
        "decoys": naming.decoys,
        "decoys_named": naming.decoys_named,
        "agreement": _agreement(naming),
        "better": _better(naming),
        "concepts_named": len({name.concept for name in naming.named}),
        "concepts": len(naming.concepts),
        "test_images": int(test.sum()),
        "test_patients": len(set(observed.patients[test])),
        "fit_images": int((~test).sum()),
        "fit_patients": len(set(observed.patients[~test])),
        "effect_images": made.push.images if made.push else 0,
        "towers": sorted(set(table["tower"])) if len(table) else [],
        "settings": {
            "least_auroc": LEAST_AUROC,
            "error": ERROR,
            "false_discoveries": FALSE_DISCOVERIES,
            "same": SAME,
        },
        "stability": made.stability is not None,
        "shown": len(made.shown),
        "notes": list(data.notes),
        "seed": made.seed,
        "command": shlex.join(parts),
    }


def _better(naming: Naming) -> bool:
    """Whether clearly more features are named than an untrained dictionary gets named (two-proportion z > 1.96)."""
    n, m, a, b = len(naming.names), naming.decoys, len(naming.named), naming.decoys_named
    if not n or not m:
        return False
    pooled = (a + b) / (n + m)
    error = (pooled * (1 - pooled) * (1 / n + 1 / m)) ** 0.5
    return a / n - b / m > 1.96 * error > 0


def _agreement(naming: Naming) -> dict[str, Any] | None:
    """How often the text tower says the attribute that a feature is named after, beside chance for these words."""
    spoken = {n.said for n in naming.names}
    pairs = [(n.name, n.said) for n in naming.named if n.source == "attribute" and n.said and n.name in spoken]
    if len(pairs) < 10:
        return None
    agree = float(np.mean([name == said for name, said in pairs]))
    chance = float(np.mean([[name == said for _, said in pairs] for name, _ in pairs]))
    return {"features": len(pairs), "share": agree, "chance": chance}


def _concepts(made: Catalogue) -> list[dict[str, Any]]:
    """For each concept on offer, how many features are named after it, and the best of them."""
    rows = []
    for i, concept in enumerate(made.naming.concepts):
        mine = [n for n in made.naming.named if n.concept == i]
        best = max(mine, key=lambda n: n.auroc, default=None)
        rows.append(
            {
                "name": concept.name,
                "kind": concept.kind,
                "labelled": concept.labelled,
                "with": sum(n.present for n in mine),
                "without": sum(not n.present for n in mine),
                "best": best.auroc if best else None,
                "ci95": list(best.ci95) if best else None,
                "best_index": best.feature if best else None,
                "shown": best is not None and best.feature in made.shown,
            }
        )
    order = {"finding": 0, "acquisition": 1, "demographic": 2, "other": 3, "report": 4, "text": 5}
    return sorted(rows, key=lambda r: (order.get(r["kind"], 6), -(r["best"] or 0), r["name"]))


def _lines(table: Any, shown: set[int]) -> list[dict[str, Any]]:
    """The rows of the table of all live features, numbers as None where there is none."""
    columns = ("id", "index", "tower", "name", "source", "test_auroc", "test_auroc_low", "test_auroc_high")
    columns += ("proposal", "best_attribute", "text", "frequency", "push", "push_size", "place", "seed_stability")
    made = []
    for row in table[list(columns)].to_dict("records") if len(table) else []:
        row = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}
        row["shown"] = row["index"] in shown
        row["named"] = row["name"] != UNNAMED
        made.append(row)
    return made


def _short(name: str | None) -> str | None:
    """`findings:Edema` reads Edema; `view=AP` stays."""
    if not name:
        return name
    negated = "not " if name.startswith("not ") else ""
    column, found, value = name.removeprefix("not ").partition(":")
    return f"{negated}{value}" if found and value and " " not in column else name


def _range(value: Any, digits: int = 2) -> str:
    ends = span(value, f".{digits}f")
    return f"{ends[0]} to {ends[1]}" if ends else ""
