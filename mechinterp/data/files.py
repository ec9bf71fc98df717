"""One image of a data folder on disk: where it is, the name it may be shown under, and how it is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Float

from mechinterp.data.images import load_image
from mechinterp.errors import DataError, StorageError
from mechinterp.storage import sha256_file

__all__ = ["ImageFile", "find_image", "inside"]

_PLAIN = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp"})
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff")


@dataclass(frozen=True)
class ImageFile:
    """An image file. `name` and `where` may be printed; `path` and `relative` may not when the file is DICOM."""

    name: str
    where: str
    dicom: bool
    path: Path = field(repr=False)
    relative: str = field(repr=False)

    def load(self) -> tuple[Float[np.ndarray, "height width"], dict[str, Any]]:
        """Grey pixels in [0, 1] and, for DICOM, the record of the steps taken."""
        if not self.dicom:
            return load_image(self.path, self.where), {}
        from mechinterp.data.dicom import load_dicom

        return load_dicom(self.path, where=self.where)

    @cached_property
    def sha256(self) -> str:
        """Hex sha256 of the bytes of the file."""
        return _sha256(self.path, self.where)


def open_image(path: Path) -> tuple[str, Float[np.ndarray, "height width"]]:
    """The name that may be printed, and the grey pixels in [0, 1], of one file: PNG, JPEG or DICOM.

    A DICOM file is called by its bytes, as in `find_image`. Raises DataError for a file that is none of these.
    """
    try:
        with path.open("rb") as opened:
            dicom = opened.read(132)[128:] == b"DICM"
    except FileNotFoundError as error:
        raise DataError("no such image", where=str(path)) from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    name = f"dicom-{_sha256(path, 'image')[:12]}" if dicom else path.name
    pixels, _ = ImageFile(name, name if dicom else str(path), dicom, path, path.name).load()
    if float(np.ptp(pixels)) == 0:
        raise DataError("is one shade of grey all over: there is nothing to explain", where=name)
    return name, pixels


def find_image(root: Path, cell: str, line: int) -> ImageFile:
    """The file that a cell of the image column means.

    A DICOM file is called `dicom-` and the start of the sha256 of its bytes: the same file has the same name
    everywhere, and neither its path nor anything inside can be read off it. Errors about it give the line of
    metadata.csv instead of the path. Raises DataError when the cell leaves the folder or the file does not exist.
    """
    at = f"metadata.csv line {line}"
    shown = f": {cell[:120]!r}" if PurePosixPath(cell).suffix.lower() in _PLAIN else ""
    path = inside(root, cell)
    if path is None:
        raise DataError(
            f"the image is not below the data folder{shown}", where=at, hint="use a path relative to the folder"
        )
    try:
        if not path.is_file():
            raise DataError(f"there is no such image{shown}", where=at, hint="the path is relative to the folder")
        with path.open("rb") as opened:
            head = opened.read(132)
    except OSError:
        head = None
    if head is None:
        raise DataError(f"the image cannot be read{shown}", where=at)
    plain = head.startswith(_MAGIC) or path.suffix.lower() in _PLAIN
    if plain and head[128:] != b"DICM":
        relative = PurePosixPath(cell).as_posix()
        return ImageFile(relative, relative, False, path, relative)
    name = f"dicom-{_sha256(path, at)[:12]}"
    return ImageFile(name, f"{at} ({name})", True, path, PurePosixPath(cell).as_posix())


def inside(root: Path, relative: str) -> Path | None:
    """The path of `relative` below `root`; None when it leads elsewhere, also through a symbolic link."""
    pure = PurePosixPath(relative)
    if not relative or "\0" in relative or pure.is_absolute() or ".." in pure.parts:
        return None
    try:
        path = (root / relative).resolve()
        return path if path.is_relative_to(root.resolve()) else None
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name too long, half a surrogate
        return None


def _sha256(path: Path, where: str) -> str:
    reason = ""
    try:
        return sha256_file(path)
    except StorageError as error:
        reason = error.what
    raise DataError(reason, where=where)
