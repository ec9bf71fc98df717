"""What an audit takes when nothing is named: a phantom with truth, written once and kept."""

from __future__ import annotations

import csv
import io
import shutil
import tempfile
from pathlib import Path

from mechinterp.audit.dictionary import cache_folder, training_record
from mechinterp.data import ImageData, open_data
from mechinterp.errors import StorageError
from mechinterp.models import HookedVLM
from mechinterp.storage import MANIFEST, write_bytes, write_manifest

__all__ = ["DEFAULT_IMAGES", "default_data", "is_default", "stand_in"]

DEFAULT_IMAGES = 600

# a dial at 0 gives both factors the marginal 1/2 and keeps them independent: every cell of the table fills
INDEPENDENT = {("drain", "pneumothorax"): 0.0}


def default_data(images: int = DEFAULT_IMAGES, seed: int = 0) -> ImageData:
    """A phantom in which every shortcut is independent of every finding, so that each cell of label x attribute fills.

    A model that was trained where they go together shows here what it does when they do not. Kept in the cache folder
    under a name that says what it is.
    """
    from mechinterp.data.phantom import Phantom

    folder = _folder(images, seed)
    if not (folder / MANIFEST).exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                made = Path(scratch) / "data"
                Phantom.sample(images, seed=10_000 + seed, associations=INDEPENDENT).write(made)
                _split(made / "metadata.csv")
                write_manifest(made, {"kind": "data", "seed": seed})
                shutil.rmtree(folder, ignore_errors=True)
                made.rename(folder)
        except OSError as error:
            raise StorageError(f"cannot be written: {error.strerror or error}", where=str(folder)) from error
    return open_data(folder)


def is_default(data: ImageData, seed: int = 0) -> bool:
    """Whether this is what a command with `--seed SEED` takes when no data are named."""
    return data.root == _folder(DEFAULT_IMAGES, seed)


def stand_in(model: HookedVLM, data: ImageData) -> str | None:
    """What to say where a model of other images is about to be judged on the phantom that is taken by default.

    A model of phantoms names a target of theirs in its training.json. None for such a model, and for named data.
    """
    ours = data.root.parent == cache_folder() / "data"
    if not ours or training_record(model).get("target") in data.targets:
        return None
    return (
        f"No data were named, so {model.label} was asked about synthetic phantoms. Nothing says that it was trained on "
        "such images: what follows is no result about radiographs. Give --data FOLDER."
    )


def _folder(images: int, seed: int) -> Path:
    from mechinterp import __version__

    return cache_folder() / "data" / f"phantom-audit-{__version__}-{images}-seed{seed}"


def _split(metadata: Path) -> None:
    """Add a split column: two of five patients train or val, three test. The models that ship need no training here."""
    with open(metadata, newline="") as opened:
        rows = list(csv.DictReader(opened))
    place = {patient: i for i, patient in enumerate(dict.fromkeys(row["patient_id"] for row in rows))}
    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0], "split"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(row | {"split": ("train", "test", "test", "val", "test")[place[row["patient_id"]] % 5]})
    write_bytes(metadata, text.getvalue().encode())
