"""A phantom on disk: the data folder that every command reads, and truth.json, which restores the phantom."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from mechinterp.data.phantom.factors import DETAILS, FACTORS
from mechinterp.data.phantom.language import prompts
from mechinterp.errors import DataError, MechInterpError, StorageError
from mechinterp.storage import read_json, write_bytes, write_json

if TYPE_CHECKING:
    from mechinterp.data.phantom.phantom import Phantom

__all__ = ["TRUTH", "dataset_description", "load_phantom", "write_phantom"]

TRUTH = "truth.json"
SCHEMA_VERSION = 1
_HIDDEN = ("exposure", "noise", "breast")  # causes that a real metadata table would not hold
_COLUMNS = tuple(name for name in FACTORS if name not in _HIDDEN)


def dataset_description(name: str = "phantom") -> dict[str, Any]:
    """What dataset.json holds: a target per finding, and which columns are findings, acquisition, demographic."""
    kinds = {
        "findings": [n for n in _COLUMNS if FACTORS[n].kind == "finding"],
        "acquisition": [n for n in _COLUMNS if FACTORS[n].kind in ("device", "acquisition")],
        "demographic": [n for n in _COLUMNS if FACTORS[n].kind == "demographic"],
    }
    targets = {}
    for finding in kinds["findings"]:
        positive, negative, question = prompts(finding)
        targets[finding] = {
            "column": finding,
            "value": 1,
            "positive": positive,
            "negative": negative,
            "question": question,
            "yes": "yes",
            "no": "no",
        }
    return {"name": name, "targets": targets, **kinds}


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _csv(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


def _save(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise StorageError(f"cannot write: {error.strerror or error}", where=str(path)) from error


def write_phantom(phantom: Phantom, folder: Path, masks: bool) -> Path:
    """Write the folder; truth.json comes last, so that a folder with it is whole. Returns the folder."""
    names = phantom.images
    if len(set(names)) < len(names):
        raise DataError("an image occurs twice", where="factors", hint="write rows that differ in their image number")
    for name, pixels in zip(names, phantom.render(), strict=True):
        _save(folder / name, _png(pixels))
    if masks:
        for factor in FACTORS:
            if FACTORS[factor].scope == "global" or factor in _HIDDEN:
                continue
            for name, mask in zip(names, phantom.masks(factor), strict=True):
                if mask.any():
                    _save(folder / "masks" / factor / Path(name).name, _png(mask))
    table: dict[str, list] = {"image": names, "patient_id": phantom.patients}
    for factor in _COLUMNS:
        values, words = phantom.factors[factor], FACTORS[factor].values
        table[factor] = [words[int(v)] if words else int(v) for v in values]
    write_bytes(folder / "metadata.csv", _csv(table, zip(*table.values(), strict=True)))
    write_bytes(folder / "reports.csv", _csv(("image", "report"), zip(names, phantom.reports(), strict=True)))
    write_json(folder / "dataset.json", dataset_description())
    write_json(folder / TRUTH, _truth(phantom))
    return folder


def _truth(phantom: Phantom) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "generator": "mechinterp.data.phantom",
        "seed": phantom.seed,
        "size": phantom.size,
        "associations": [
            {"shortcut": shortcut, "finding": finding, "rho": rho}
            for (shortcut, finding), rho in phantom.associations.items()
        ],
        "graph": {
            name: {"kind": factor.kind, "parents": list(factor.parents), "scope": factor.scope}
            for name, factor in FACTORS.items()
        },
        "factors": {name: phantom.factors[name].tolist() for name in phantom.factors},
    }


def load_phantom(folder: Path) -> Phantom:
    """Read truth.json. Raises StorageError when it cannot be read, DataError when it is not a phantom's."""
    from mechinterp.data.phantom.phantom import Phantom, check_values

    path = folder / TRUTH
    truth = read_json(path)
    where = str(path)
    hint = "write the phantom again"
    try:
        if truth["schema_version"] != SCHEMA_VERSION:
            raise DataError(f"is of version {truth['schema_version']}, not {SCHEMA_VERSION}", where=where, hint=hint)
        columns, n = truth["factors"], len(truth["factors"]["image"])
        table = {name: np.asarray(columns[name], np.int64) for name in ("patient", "image")}
        for name in (*FACTORS, *DETAILS):
            if len(columns[name]) != n:
                raise DataError(f"column {name!r} has {len(columns[name])} rows, not {n}", where=where, hint=hint)
            table[name] = check_values(name, columns[name], n)
        if not n or any(len(v) != n or v.min() < 0 for v in table.values() if v.dtype == np.int64):
            raise DataError("holds no rows, or rows of unequal number", where=where, hint=hint)
        dials = {(entry["shortcut"], entry["finding"]): float(entry["rho"]) for entry in truth["associations"]}
        return Phantom(pd.DataFrame(table), int(truth["seed"]), int(truth["size"]), dials)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError) as error:
        raise DataError(f"is not the truth of a phantom: {error!r}", where=where, hint=hint) from error
    except DataError:
        raise
    except MechInterpError as error:
        raise DataError(f"is not the truth of a phantom: {error}", where=where, hint=hint) from error
