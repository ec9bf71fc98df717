"""The folder that `mechinterp iq` writes: iq.json, table.md, scores.csv and .parquet, the pictures, the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mechinterp.audit.explainers.figures import maps_picture, plane_picture
from mechinterp.audit.explainers.further import further_table, parquet, scores_table
from mechinterp.audit.explainers.records import missing
from mechinterp.audit.explainers.section import Compared
from mechinterp.data import ImageData
from mechinterp.storage import write_bytes, write_json, write_manifest

__all__ = ["console_of", "table_of", "write_folder"]

CONSOLE = 120  # columns of a terminal

SHOWN = (
    ("R", "R"),
    ("F", "F"),
    ("IS", "IS"),
    ("IS_zero", "IS (zero)"),
    ("R_null", "R_null"),
    ("R_excess", "R_excess"),
    ("coverage", "coverage"),
    ("curves", "curves"),
    ("F_own", "F, own fill"),
    ("auprc", "AUPRC"),
    ("randomisation", "weights"),
    ("prompt_randomisation", "prompt"),
    ("other_prompt", "other finding"),
)
BESIDE = (("label_randomisation", "labels"), ("repeatability", "again"), ("reproducibility", "other"))
"""Columns of checks against other models, shown where there is one."""
EXPLAINED = """R: correlation of a patch's attribution with the output over small perturbations (by chance: R_floor in
iq.json); high is bad, but exact explanations can have it too. F: agreement with the effects of removing patches, by a
filling that no method used. IS = ((R^2 + (1 - F)^2) / 2)^(1/2); never read it without R and F: (1, 1) and (0, 0) tie.
IS (zero) counts patches whose attribution never moves as R = 0. R_null: reliance on the output at patches without
effect. R_excess: reliance beyond that of the true effects. "-": not defined, as no patch's attribution moves.
coverage: share of patches whose attribution moves, the only ones that R and IS count. curves: insertion minus deletion
by blurring, 0 a random order, 1 the order of the true effects. F, own fill: by the filling that methods used. "°"
marks a score made by the very removals that the method is made of: it is circular, no evidence. AUPRC: against the
target's mask. weights, prompt, other finding: similarity of the map after the vision tower's weights were replaced,
the prompt by nonsense, or by that of another finding; labels: to the map of a model trained on permuted labels. "="
marks a map that stayed as alike as maps of other patients are, which is a failure. again, other: similarity to the map
of the same trained again, or of another architecture; "≠" marks a map that did not come back, which may be the models'
doing as well. "?": not decided, the interval holds the likeness of maps of other patients. R, F and IS are those of
iq-reading-1, not the paper's."""
GRADED = """The grade is that of the worst piece of evidence (F, curves, R_excess, weights, prompt), each at the end of
its 95 % interval that speaks against the method; a piece that was not decided makes it NOT GRADED. The thresholds are
conventions (`mechinterp.metrics.grades.Thresholds`; `--thresholds FILE` sets others): no study ties them to any
outcome."""


def write_folder(compared: Compared, data: ImageData, out: Path, seed: int, seconds: float, command: str) -> str:
    """Write everything below `out`; returns the table."""
    from mechinterp.experiments.result import versions

    table = table_of(compared.rows)
    head = f"# {compared.made.model.label}, {compared.made.target.name}: explainers side by side\n\n`{command}`\n\n"
    about = f"{len(compared.made.rows)} images of {len(set(compared.made.patients))} test patients.\n\n"
    if compared.controls:
        about += f"Held beside: {', '.join(f'{label} ({key})' for key, label in compared.controls.items())}.\n\n"
    write_json(
        out / "iq.json",
        {"schema_version": 1, "seed": seed, "seconds": seconds, "versions": versions(), **compared.record},
    )
    blocks = [table, EXPLAINED, further_table(compared.rows), _grades(compared.rows)]
    body = "\n\n".join(filter(None, blocks))
    write_bytes(out / "table.md", f"{head}{about}{body}\n".encode())
    scores = scores_table(compared.rows)
    write_bytes(out / "scores.csv", scores.to_csv(index=False).encode())
    write_bytes(out / "scores.parquet", parquet(scores))
    write_bytes(out / "plane.png", plane_picture(compared.rows))
    maps = maps_picture(compared.made, data)
    if maps is not None:
        write_bytes(out / "maps.png", maps)
    write_manifest(out, {"kind": "iq", "model": compared.made.model.label, "seed": seed})
    return table


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table: the explainers by F, then the anchors."""
    ranked = sorted(rows, key=lambda r: (r["anchor"], -(r["F"] if r["F"] is not None else -1)))
    masses = sorted({key for row in rows for key in row if key.startswith("mass ")})
    shown = [*SHOWN, *(c for c in BESIDE if any(row.get(c[0]) is not None for row in rows))]
    of_masks = [f"{m} (1: chance{_images(rows, m)})" for m in masses]
    header = ["method", *(title for _, title in shown), *of_masks, "seconds"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in ranked:
        name = f"*{row['method']}* (anchor)" if row["anchor"] else row["method"]
        cells = [name, *(_cell(row, key) for key, _ in shown), *(_cell(row, m) for m in masses)]
        lines.append("| " + " | ".join([*cells, f"{row['seconds']:.3f}"]) + " |")
    return "\n".join(lines)


def console_of(rows: Sequence[Mapping[str, Any]], width: int = CONSOLE) -> str:
    """The table for a terminal: the scores that matter most, as many as fit beside each other; intervals of F and R.

    No line is longer than `width`. Everything is in table.md.
    """
    masses = sorted({key for row in rows for key in row if key.startswith("mass ")})
    titles = dict(SHOWN) | dict(BESIDE) | {m: m for m in masses}
    ranked = sorted(rows, key=lambda r: (r["anchor"], -(r["F"] if r["F"] is not None else -1)))
    made = [["method", *(f"{row['method']}{' (anchor)' if row['anchor'] else ''}" for row in ranked)]]
    left_out = []
    for key in ("F", "R", *masses, "curves", "randomisation", "prompt_randomisation", "R_excess", "auprc", "IS"):
        cells = [_cell(row, key) if key in ("F", "R") else _cell(row, key).partition(" [")[0] for row in ranked]
        column = [titles[key], *cells]
        if sum(max(map(len, one)) + 2 for one in [*made, column]) - 2 <= width:
            made.append(column)
        else:
            left_out.append(titles[key])
    widths = [max(map(len, column)) for column in made]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in zip(*made, strict=True)
    ]
    beside = f"also {', '.join(left_out)}, " if left_out else ""
    return "\n".join([*lines, f"in table.md: {beside}every interval, and what each column means"])


def _images(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """Of how many images a column is."""
    n = max(row["n"].get(key, 0) for row in rows)
    return f"; {n} image{'s' if n > 1 else ''}"


def _grades(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of the grades of explainers, the best first; what decided each."""
    lines = ["## How approximate, and for what is that enough?", "", "| method | grade | enough for | decided by |"]
    lines.append("|---|---|---|---|")
    for row in sorted((r for r in rows if not r["anchor"]), key=lambda r: (r["grade"], r["method"])):
        enough = f"up to {row['acceptable_up_to']} risk" if row["acceptable_up_to"] else "no use"
        enough = "unknown" if row["grade"] == "NOT GRADED" else enough
        lines.append(f"| {row['method']} | {row['grade']} | {enough} | {row['grade_reason']} |")
    return "\n".join([*lines, "", GRADED])


def _cell(row: Mapping[str, Any], key: str) -> str:
    value, interval = row.get(key), row["ci95"].get(key)
    if value is None:
        return "" if key in dict(BESIDE) else missing(row, key)
    mark = " ≠" if key in ("repeatability", "reproducibility") else " ="
    failed = {"fail": mark, "not tested": " ?"}.get(row.get(f"{key}_verdict", ""), "")
    failed += " °" if key in row["circular"] else ""
    return f"{value:.2f}{failed}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")
