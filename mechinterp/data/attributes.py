"""From metadata columns to binary attributes: every usable contrast of a column, and a reason for every other one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

__all__ = ["Attribute", "Kind", "attributes_of", "guess_kind", "is_normal", "matches", "strays"]

Kind = Literal["finding", "acquisition", "demographic", "other"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MAX_CATEGORIES = 20
NUMERIC = 0.9  # share of cells from which on a column is one of numbers, and the other cells are slips
MAX_CELL = 80  # characters; a longer cell is prose, not a category
_MISSING = frozenset({"", "na", "n/a", "nan", "null", "<na>", "#n/a", "?"})
_YES = frozenset({"1", "1.0", "true", "yes"})
_NO = frozenset({"0", "0.0", "false", "no"})
_UNCERTAIN = frozenset({"-1", "-1.0"})  # the CheXpert labels' mark for "uncertain"
_NORMAL = frozenset({"no finding", "no findings", "no_finding", "normal", "none"})
_PREFERRED = frozenset({"m", "male", "ap", "yes", "portable", "present", "positive"})
_NAMES: dict[Kind, tuple[str, ...]] = {
    "demographic": ("age", "sex", "gender", "race", "ethnicity", "bmi", "height", "weight", "insurance"),
    "acquisition": (
        *("view", "portable", "scanner", "hospital", "site", "manufacturer", "model", "station", "exposure", "kvp"),
        *("projection", "position", "marker", "laterality", "device", "detector", "modality", "protocol", "year"),
        *("follow_up", "source", "institution", "noise"),
    ),
    "finding": (
        *("finding", "label", "diagnosis", "pathology", "disease", "pneumonia", "effusion", "pneumothorax", "edema"),
        *("consolidation", "cardiomegaly", "nodule", "mass", "atelectasis", "infiltration", "emphysema", "fibrosis"),
        *("fracture", "hernia", "opacity", "lesion", "covid", "tuberculosis"),
    ),
}


@dataclass(frozen=True, eq=False)
class Attribute:
    """One binary contrast of a metadata column: `values` holds 1, 0, or NaN where the metadata says nothing.

    `name` reads `sex=M`, `view=AP`, `findings:Edema`, `age>55` (split at the median), or is the bare name of a 0/1
    column.
    """

    name: str
    column: str
    kind: Kind
    values: Float[np.ndarray, " image"]


def attributes_of(column: str, cells: Sequence[str], kind: Kind) -> tuple[list[Attribute], str | None, list[str]]:
    """The attributes of one column, the reason when there is none, and remarks on what was done besides."""
    remarks: list[str] = []
    present = [cell for cell in cells if not _is_missing(cell)]
    distinct = sorted(set(present))
    lowered = {cell.lower() for cell in distinct}
    if len(distinct) < 2:
        return [], "has one value only" if distinct else "has no values", remarks
    if lowered <= _YES | _NO | _UNCERTAIN:
        if lowered & _UNCERTAIN:
            remarks.append(f"{sum(cell in _UNCERTAIN for cell in cells)} cells of -1 (uncertain) taken as missing")
        values = np.array([_binary(cell) for cell in cells], dtype=np.float32)
        return _keep([Attribute(column, column, kind, values)], remarks)
    numbers = np.array([_number(cell) for cell in cells], dtype=np.float64)
    if np.isfinite(numbers).sum() == len(present):
        return _keep([_median_split(column, numbers, kind)], remarks)
    named = kind == "finding" and (len(distinct) > 2 or any(is_normal(cell) for cell in distinct))
    if named or any(";" in cell for cell in distinct):
        return _several(column, cells, kind, remarks)
    if any(len(cell) > MAX_CELL for cell in distinct):
        return [], "is free text", remarks
    if len(distinct) > 2 and len(distinct) == len(present):
        return [], "has another value in every row", remarks
    if len(distinct) > MAX_CATEGORIES:
        return [], f"has {len(distinct)} categories (at most {MAX_CATEGORIES})", remarks
    wanted = [_positive(present)] if len(distinct) == 2 else distinct
    return _keep([_contrast(f"{column}={value}", column, kind, cells, value) for value in wanted], remarks)


def guess_kind(column: str) -> Kind:
    """The kind of a column that no dataset.json describes, from well-known names; "other" when there is none."""
    words = column.lower().replace("-", "_")
    parts = set(words.split("_"))
    for kind in KINDS:
        names = _NAMES.get(kind, ())
        if words in names or any(name in parts or f"{name}s" in parts for name in names):
            return kind
    return "other"


def is_normal(value: str) -> bool:
    """Whether a finding's value says that there is none, like "No Finding"."""
    return value.strip().lower() in _NORMAL


def strays(cells: Sequence[str]) -> list[int]:
    """Places of the cells that are no numbers in a column of numbers: at most one of ten that say anything.

    One of them would turn an age or a 0/1 into a category, or count as a 0 of a target.
    """
    present = [i for i, cell in enumerate(cells) if not _is_missing(cell)]
    other = [i for i in present if math.isnan(_number(cells[i]))]
    return other if len(present) - len(other) >= NUMERIC * len(present) else []


def matches(cell: str, value: str) -> float:
    """1.0 when a cell is `value` or holds it among values separated by `;`, NaN when it is missing, else 0.0."""
    if _is_missing(cell):
        return math.nan
    if value.lower() in _YES | _NO and cell.lower() in _YES | _NO | _UNCERTAIN:
        truth = _binary(cell)
        return truth if value.lower() in _YES or math.isnan(truth) else 1.0 - truth
    return float(value in [part.strip() for part in cell.split(";")])


def _several(column: str, cells: Sequence[str], kind: Kind, remarks: list[str]):
    """One attribute per value of a column that lists several separated by `;`.

    "No Finding" is not an attribute: it is a 0 for every value, and as a contrast only the complement of the rest.
    """
    counts = Counter(part for cell in cells for part in {p.strip() for p in cell.split(";")} if not _is_missing(part))
    values = [value for value, _ in counts.most_common() if not is_normal(value) and len(value) <= MAX_CELL]
    if len(values) > MAX_CATEGORIES:
        remarks.append(f"only the {MAX_CATEGORIES} most frequent of {len(values)} values are attributes")
    kept = sorted(values[:MAX_CATEGORIES])
    if kind != "finding" and len(counts) > 2 and len(counts) == sum(counts.values()):
        return [], "has another value in every row", remarks
    return _keep([_contrast(f"{column}:{value}", column, kind, cells, value) for value in kept], remarks)


def _keep(made: list[Attribute], remarks: list[str]):
    """Drop attributes that do not vary."""
    kept = [a for a in made if (a.values == 1).any() and (a.values == 0).any()]
    return kept, None if kept else "has one value only", remarks


def _contrast(name: str, column: str, kind: Kind, cells: Sequence[str], value: str) -> Attribute:
    return Attribute(name, column, kind, np.array([matches(cell, value) for cell in cells], dtype=np.float32))


def _median_split(column: str, numbers: Float[np.ndarray, " image"], kind: Kind) -> Attribute:
    known = numbers[np.isfinite(numbers)]
    at = float(np.median(known))
    if not (known > at).any():  # more than half share the largest value: split below it
        at = float(known[known < at].max())
    values = np.where(np.isfinite(numbers), (numbers > at).astype(np.float32), np.float32(np.nan))
    return Attribute(f"{column}>{at:g}", column, kind, values.astype(np.float32))


def _positive(present: list[str]) -> str:
    """Which of two categories counts as 1: the one usually named (AP, M), else the rarer, else the later."""
    counts = Counter(present)
    preferred = [value for value in counts if value.lower() in _PREFERRED]
    return preferred[0] if len(preferred) == 1 else min(sorted(counts, reverse=True), key=lambda value: counts[value])


def _is_missing(cell: str) -> bool:
    return cell.strip().lower() in _MISSING


def _binary(cell: str) -> float:
    word = cell.lower()
    return 1.0 if word in _YES else 0.0 if word in _NO else math.nan


def _number(cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
