"""Open a data folder: images, metadata.csv, and what may stand beside them."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mechinterp.data.attributes import Attribute, attributes_of, guess_kind, is_normal, matches, strays
from mechinterp.data.description import Description, TargetColumn, default_targets, read_description
from mechinterp.data.files import ImageFile, find_image
from mechinterp.data.imagedata import ImageData
from mechinterp.data.regions import Box, Regions, boxes_side, read_boxes
from mechinterp.data.table import Table, read_table
from mechinterp.errors import DataError
from mechinterp.progress import progress

__all__ = ["assign_split", "open_data"]

_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_RESERVED = ("image", "patient_id", "split")


def open_data(folder: str | Path, *, seed: int = 0) -> ImageData:
    """Open a folder of images with a metadata.csv.

    Columns `image` and `patient_id` are needed; `split` (train, val, test) is optional; every other column becomes
    binary attributes where it can (0/1, categories, numbers split at the median, values separated by `;`), and a
    column `boxes_N` holds rectangles as JSON. A few cells that are no numbers in a column of numbers count as missing.
    dataset.json names the kinds of columns and the targets; without it both are guessed and `notes` say so. Without a
    split column patients are split 60/15/25 by a hash of `seed` and patient.

    Raises DataError naming the file, line and field that is wrong. Nothing is ever written to the folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError("no such folder", where=str(root), hint="a data folder holds metadata.csv and images")
    table = read_table(root / "metadata.csv", ("image", "patient_id"))
    described, notes = read_description(root, set(table.columns))
    files = _image_files(root, table)
    split = _splits(table, seed, notes)
    boxes = _boxes(table, files, notes)
    table = _numbers_only(table, notes)
    attributes, skipped = _attributes(table, described, notes)
    specs = described.targets or default_targets(attributes)
    if not described.targets and specs:
        notes.append(f"targets made from the findings: {', '.join(specs)}")
    may_show = np.ones(len(files), dtype=bool)
    name, patients = described.name or root.resolve().name, tuple(table.columns["patient_id"])
    if any(file.dicom for file in files):
        from mechinterp.data.dicom import survey

        may_show = survey(files, notes)
        patients = _pseudonyms(patients, files)
        name = described.name or f"dicom-folder-{_digest(*(file.name for file in files))[:8]}"
    truth = root / "truth.json"
    labels = {
        key: np.array([matches(cell, spec.value) for cell in table.columns[spec.column]], dtype=np.float32)
        for key, spec in specs.items()
    }
    return ImageData(
        name=name,
        root=root,
        images=tuple(file.name for file in files),
        patients=patients,
        split=split,
        attributes=tuple(attributes),
        skipped=skipped,
        targets={key: spec.target for key, spec in specs.items()},
        reports=_reports(root, files, notes),
        truth=truth if truth.is_file() else None,
        notes=notes,
        may_show=may_show,
        _files=tuple(files),
        _labels=labels,
        _same=_same(labels, specs, attributes),
        _regions=Regions(root, boxes),
        _tables=_tables_digest(root),
    )


def assign_split(patients: Sequence[str], seed: int) -> np.ndarray:
    """Split by patient, 60/15/25, from sha256 of `seed:patient`: adding patients moves nobody."""
    share = {p: int.from_bytes(hashlib.sha256(f"{seed}:{p}".encode()).digest()[:8], "big") / 2**64 for p in patients}
    return np.array(["train" if share[p] < 0.6 else "val" if share[p] < 0.75 else "test" for p in patients], dtype=str)


def _image_files(root: Path, table: Table) -> list[ImageFile]:
    files: list[ImageFile] = []
    lines: dict[Path, int] = {}
    names: dict[str, int] = {}
    rows = zip(table.columns["image"], table.lines, strict=True)
    for cell, line in progress(rows, "finding images", total=len(table), unit="image"):
        file = find_image(root, cell, line)
        if file.path in lines:
            raise DataError(
                f"is the same image as line {lines[file.path]}", where=f"metadata.csv line {line}", hint="remove one"
            )
        lines[file.path] = line
        copies = names[file.name] = names.get(file.name, 0) + 1
        files.append(file if copies == 1 else replace(file, name=f"{file.name}-{copies}"))
    return files


def _splits(table: Table, seed: int, notes: list[str]) -> np.ndarray:
    """The split of each row; every patient is in one only."""
    patients = table.columns["patient_id"]
    for patient, line in zip(patients, table.lines, strict=True):
        if not patient:
            raise DataError("patient_id is empty", where=f"metadata.csv line {line}", hint="patients are the unit")
    if "split" not in table.columns:
        notes.append(f"no split column: patients split 60/15/25 into train, val, test by a hash with seed {seed}")
        return assign_split(patients, seed)
    split = []
    first: dict[str, tuple[str, int]] = {}
    for patient, cell, line in zip(patients, table.columns["split"], table.lines, strict=True):
        value = _SPLITS.get(cell.lower())
        if value is None:
            raise DataError(
                f"{cell[:40]!r} is no split", where=f"metadata.csv line {line} column split", hint="train, val or test"
            )
        before, at = first.setdefault(patient, (value, line))
        if before != value:
            raise DataError(
                f"the patient of this line is in {value} here and in {before} on line {at}",
                where=f"metadata.csv line {line} column split",
                hint="split by patient, not by image",
            )
        split.append(value)
    return np.array(split, dtype=str)


def _boxes(table: Table, files: list[ImageFile], notes: list[str]) -> dict[str, list[Box]]:
    boxes: dict[str, list[Box]] = {}
    names = [file.relative for file in files]
    for column, cells in table.columns.items():
        side = boxes_side(column)
        if side is not None:
            found = read_boxes(column, side, cells, names, table.lines)
            notes.append(f"{column}: boxes of {len(found)} images")
            for name, more in found.items():
                boxes.setdefault(name, []).extend(more)
    return boxes


def _numbers_only(table: Table, notes: list[str]) -> Table:
    """The table with the slips in columns of numbers emptied; the notes name their lines, not what stands in them."""
    columns = dict(table.columns)
    for column, cells in table.columns.items():
        if column in _RESERVED or boxes_side(column) is not None:
            continue
        slips = set(strays(cells))
        if slips:
            lines = ", ".join(str(table.lines[i]) for i in sorted(slips)[:5]) + (" ..." if len(slips) > 5 else "")
            notes.append(
                f"{column}: {len(slips)} cells that are no numbers taken as missing (metadata.csv line {lines})"
            )
            columns[column] = ["" if i in slips else cell for i, cell in enumerate(cells)]
    return replace(table, columns=columns)


def _attributes(table: Table, described: Description, notes: list[str]) -> tuple[list[Attribute], dict[str, str]]:
    attributes: dict[str, Attribute] = {}
    skipped: dict[str, str] = {}
    guessed = []
    for column, cells in table.columns.items():
        if column in _RESERVED or boxes_side(column) is not None:
            continue
        kind = described.kinds.get(column, "other") if described.given else guess_kind(column)
        if not described.given:
            guessed.append(f"{column} {kind}")
        made, reason, remarks = attributes_of(column, cells, kind)
        if reason is not None:
            skipped[column] = reason
        if any(is_normal(part) for cell in cells for part in cell.split(";")) and made and kind == "finding":
            remarks.append('"No Finding" counts as 0 for every finding and is no attribute')
        notes += [f"{column}: {remark}" for remark in remarks]
        for attribute in made:
            if attribute.name in attributes:
                skipped[column] = f"{attribute.name} exists already"
            attributes.setdefault(attribute.name, attribute)
    if guessed:
        notes.append(f"no dataset.json: kinds guessed from the column names: {', '.join(guessed)}")
    return list(attributes.values()), skipped


def _same(
    labels: dict[str, np.ndarray], specs: dict[str, TargetColumn], attributes: Sequence[Attribute]
) -> dict[str, str]:
    """The attribute that says the same as each target, or its opposite; its own column's before another's."""
    same = {}
    for key, spec in specs.items():
        for attribute in sorted(attributes, key=lambda a: a.column != spec.column):
            values = attribute.values
            if any(np.array_equal(side, labels[key], equal_nan=True) for side in (values, 1 - values)):
                same[key] = attribute.name
                break
    return same


def _reports(root: Path, files: list[ImageFile], notes: list[str]) -> tuple[str | None, ...]:
    path = root / "reports.csv"
    if not path.exists():
        return (None,) * len(files)
    table = read_table(path, ("image", "report"))
    reports: dict[str, str] = {}
    for image, report, line in zip(table.columns["image"], table.columns["report"], table.lines, strict=True):
        key = Path(image).as_posix()
        if key in reports:
            raise DataError("an image has two reports", where=f"reports.csv line {line}", hint="join them into one")
        reports[key] = report
    found = tuple(reports.get(file.relative) or None for file in files)
    missing = sum(report is None for report in found)
    if missing:
        notes.append(f"reports.csv: {missing} of {len(files)} images have no report")
    return found


def _pseudonyms(patients: tuple[str, ...], files: list[ImageFile]) -> tuple[str, ...]:
    """Names for patients of a DICOM folder that only who holds the images could link to patient_id.

    HMAC-SHA256 with a key made from the bytes of all images: the same folder gives the same names, nothing is stored,
    and a list of hospital numbers is no help in undoing it.
    """
    key = _digest(*(file.sha256 for file in files)).encode()
    return tuple(f"patient-{hmac.digest(key, p.encode(), 'sha256').hex()[:12]}" for p in patients)


def _tables_digest(root: Path) -> str:
    parts = []
    for name in ("metadata.csv", "dataset.json"):
        path = root / name
        parts.append(hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
    return _digest(*parts)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
