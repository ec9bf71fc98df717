"""What an experiment hands back, and how it is written: result.json, table.md, figure.png, closed by a manifest."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from mechinterp.errors import StorageError
from mechinterp.storage import MANIFEST, write_bytes, write_json, write_manifest

__all__ = ["Claim", "Result", "Row", "Table", "claim_folder", "write_result"]

SCHEMA_VERSION = 1
FILES = ("result.json", "table.md", "figure.png", MANIFEST)
LIBRARIES = ("mechinterp", "torch", "numpy", "scipy", "transformers", "transformer-lens", "sae-lens")

Interval = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One number: its name, value, 95 % interval where it has one, what `n` counts, and the setting it belongs to."""

    name: str
    value: float
    n: int
    ci95: Interval | None = None
    of: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Flat, as in result.json."""
        return {"name": self.name, "value": self.value, "ci95": self.ci95, "n": self.n, **self.of}


@dataclass(frozen=True)
class Claim:
    """A sentence that could have come out false, whether it holds, and the numbers that decide."""

    claim: str
    holds: bool
    evidence: str


@dataclass(frozen=True)
class Table:
    """A table for people. Cells are text, or numbers that are printed to two decimals."""

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[Any, ...], ...]

    def markdown(self) -> str:
        """The table in Markdown."""
        head = [f"## {self.title}", "", _line(self.header), _line("---" for _ in self.header)]
        return "\n".join([*head, *(_line(map(_cell, line)) for line in self.lines)])


@dataclass(frozen=True)
class Result:
    """Rows and claims for result.json, tables for table.md, and the figure as PNG bytes."""

    rows: Sequence[Row]
    claims: Sequence[Claim]
    tables: Sequence[Table]
    figure: bytes
    notes: Sequence[str] = ()


def claim_folder(folder: Path) -> Path:
    """`folder`, if it is new, empty, or holds an earlier experiment. Raises StorageError otherwise."""
    if folder.exists() and not folder.is_dir():
        raise StorageError("is not a folder", where=str(folder), hint="choose another --out")
    strange = [p.name for p in folder.iterdir() if p.name not in FILES] if folder.is_dir() else []
    strange = [name for name in strange if not name.endswith(".partial")]
    if strange:
        raise StorageError(f"holds {strange[0]!r}, which no experiment wrote", where=str(folder), hint="another --out")
    return folder


def write_result(
    folder: Path, result: Result, name: str, question: str, quick: bool, seed: int, seconds: float
) -> None:
    """Write the three files, then the manifest; an older manifest goes first, so that a killed run is no whole one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    write_json(
        folder / "result.json",
        {
            "schema_version": SCHEMA_VERSION,
            "experiment": name,
            "question": question,
            "quick": quick,
            "seed": seed,
            "seconds": round(seconds, 2),
            "versions": versions(),
            "rows": [row.to_dict() for row in result.rows],
            "claims": [vars(claim) for claim in result.claims],
            "notes": list(result.notes),
        },
    )
    write_bytes(folder / "table.md", _markdown(result, name, question, quick, seed).encode())
    write_bytes(folder / "figure.png", result.figure)
    write_manifest(folder, {"kind": "experiment", "experiment": name, "seed": seed, "quick": quick})


def versions() -> dict[str, str]:
    """Versions of what the numbers rest on."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found


def _markdown(result: Result, name: str, question: str, quick: bool, seed: int) -> str:
    command = f"mechinterp experiment {name} --seed {seed}" + (" --quick" if quick else "")
    lines = [f"# {name}", "", f"{question[0].upper()}{question[1:]}", "", f"`{command}`", ""]
    if quick:
        lines += ["This is the quick version: it shows that the experiment runs, and its numbers are no result.", ""]
    lines += ["## Claims", "", _line(("claim", "holds", "evidence")), _line(("---",) * 3)]
    lines += [_line((c.claim, "yes" if c.holds else "**no**", c.evidence)) for c in result.claims]
    for table in result.tables:
        lines += ["", table.markdown()]
    if result.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in result.notes)]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.2f}" if math.isfinite(value) else "not tested"
