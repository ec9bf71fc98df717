"""dataset.json: which columns are findings, acquisition or demographics, and which questions a model is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mechinterp.data.attributes import Attribute, Kind
from mechinterp.errors import DataError, StorageError
from mechinterp.storage import read_json
from mechinterp.types import Target

__all__ = ["Description", "TargetColumn", "default_targets", "read_description"]

FILE = "dataset.json"
_LISTS: dict[str, Kind] = {"findings": "finding", "acquisition": "acquisition", "demographic": "demographic"}


@dataclass(frozen=True)
class TargetColumn:
    """A target and where its truth is: the rows whose cell in `column` is or holds `value`."""

    target: Target
    column: str
    value: str


@dataclass(frozen=True)
class Description:
    """What dataset.json says; empty when there is none."""

    name: str | None = None
    kinds: dict[str, Kind] = field(default_factory=dict)
    targets: dict[str, TargetColumn] = field(default_factory=dict)
    given: bool = False


def read_description(root: Path, columns: set[str]) -> tuple[Description, list[str]]:
    """Read dataset.json beside metadata.csv, and notes about listed columns that do not exist.

    Raises DataError naming the field that has the wrong type, or the target whose column does not exist.
    """
    path = root / FILE
    if not path.exists():
        return Description(), []
    try:
        content = read_json(path)
    except StorageError as error:
        raise DataError(error.what, where=FILE, hint=error.hint) from error
    if not isinstance(content, dict):
        raise DataError("is not an object {...}", where=FILE)
    name = content.get("name")
    if name is not None and not isinstance(name, str):
        raise DataError("must be text", where=f"{FILE} name")
    kinds: dict[str, Kind] = {}
    notes = []
    for key, kind in _LISTS.items():
        listed = content.get(key, [])
        if not isinstance(listed, list) or not all(isinstance(column, str) for column in listed):
            raise DataError("must be a list of column names", where=f"{FILE} {key}")
        kinds |= dict.fromkeys((column for column in listed if column in columns), kind)
        notes += [f"{FILE} {key}: no column {column!r} in metadata.csv" for column in listed if column not in columns]
    targets = content.get("targets", {})
    if not isinstance(targets, dict):
        raise DataError("must be an object {name: {...}}", where=f"{FILE} targets")
    made = {key: _target(key, spec, columns) for key, spec in targets.items()}
    return Description(name, kinds, made, given=True), notes


def default_targets(attributes: list[Attribute]) -> dict[str, TargetColumn]:
    """One target for each finding, asked in plain words, for a folder that names none."""
    made = {}
    for attribute in attributes:
        if attribute.kind != "finding" or ">" in attribute.name:
            continue
        bare = attribute.name == attribute.column
        value = "1" if bare else attribute.name[len(attribute.column) + 1 :]
        words = (attribute.name if bare else value).replace("_", " ").lower()
        target = Target(words.replace(" ", "_"), f"a chest x-ray with {words}", f"a chest x-ray without {words}")
        made[target.name] = TargetColumn(target, attribute.column, value)
    return made


def _target(name: str, spec: Any, columns: set[str]) -> TargetColumn:
    where = f"{FILE} targets.{name}"
    if not isinstance(spec, dict):
        raise DataError("must be an object {column, value, positive, negative}", where=where)
    texts: dict[str, str] = {}
    for key in ("column", "positive", "negative", "question", "yes", "no"):
        value = spec.get(key)
        if isinstance(value, str):
            texts[key] = value
        elif value is not None:
            raise DataError("must be text", where=f"{where}.{key}")
    column = texts.pop("column", name)
    if column not in columns:
        raise DataError(
            f"there is no column {column!r} in metadata.csv", where=f"{where}.column", hint="name a column of the table"
        )
    value = spec.get("value", 1)
    if not isinstance(value, str | int | float):
        raise DataError("must be text or a number", where=f"{where}.value")
    value = str(int(value)) if isinstance(value, bool) or value in (0, 1) else str(value)
    words = name.replace("_", " ")
    texts.setdefault("positive", f"a chest x-ray with {words}")
    return TargetColumn(Target(name, **texts), column, value.strip())
