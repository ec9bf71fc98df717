"""What an audit takes when nothing is named: a phantom with truth, written once and kept."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from mechinterp.audit.dictionary import cache_folder
from mechinterp.data import ImageData, open_data
from mechinterp.errors import StorageError
from mechinterp.storage import MANIFEST

__all__ = ["default_data"]


def default_data(images: int = 600, seed: int = 0) -> ImageData:
    """A phantom in which every shortcut is independent of every finding, so that each cell of label x attribute fills.

    A model that was trained where they go together shows here what it does when they do not. Kept in the cache folder
    under a name that says what it is.
    """
    from mechinterp import __version__
    from mechinterp.data.phantom import Phantom

    folder = cache_folder() / "data" / f"phantom-{__version__}-{images}-seed{seed}"
    if not (folder / MANIFEST).exists() and not (folder / "truth.json").exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                Phantom.sample(images, seed=10_000 + seed).write(Path(scratch) / "data")
                shutil.rmtree(folder, ignore_errors=True)
                (Path(scratch) / "data").rename(folder)
        except OSError as error:
            raise StorageError(f"cannot be written: {error.strerror or error}", where=str(folder)) from error
    return open_data(folder)
