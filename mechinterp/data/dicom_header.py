"""Read a DICOM header without trusting it: what is checked before a pixel is decoded.

Nothing from a text field is ever repeated: an error or record holds numbers, known codes and our own words only.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mechinterp.data.images import MAX_PIXELS
from mechinterp.errors import DataError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = ["Header", "guarded", "label_of", "read_header"]

T = TypeVar("T")
MAX_BYTES = 2**30
_DEFLATED = "1.2.840.10008.1.2.1.99"
_IMPLICIT_LITTLE = "1.2.840.10008.1.2"
_GREY = ("MONOCHROME1", "MONOCHROME2")
_PIXEL_TAGS = (0x7FE00010, 0x7FE00008, 0x7FE00009)
_PLUGINS = {
    "1.2.840.10008.1.2.4.50": "pylibjpeg and pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.51": "pylibjpeg and pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.57": "pylibjpeg and pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.70": "pylibjpeg and pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.80": "pylibjpeg and pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.81": "pylibjpeg and pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.90": "pylibjpeg and pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.91": "pylibjpeg and pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.201": "pylibjpeg and pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.202": "pylibjpeg and pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg and pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.5": "pylibjpeg and pylibjpeg-rle",
}


@dataclass(frozen=True)
class Header:
    """What is needed to decode: grey, one frame, of a size that fits the file."""

    photometric: str
    rows: int
    columns: int
    bits_stored: int
    signed: bool
    transfer_syntax: str
    burned_in: str  # "yes", "no", "unstated"
    deidentified: bool

    @property
    def may_show(self) -> bool:
        """Whether the file declares that no identifying text is burned in, or that it was de-identified."""
        return self.burned_in == "no" or (self.deidentified and self.burned_in != "yes")


def label_of(digest: str) -> str:
    """The name that a DICOM file may be shown under: the start of the sha256 of its bytes."""
    return f"dicom-{digest[:12]}"


def read_header(path: Path, where: str) -> Header:
    """Check a DICOM file before decoding. Raises DataError, which repeats no text of the file."""
    try:
        size = path.stat().st_size
    except OSError:
        size = -1
    if size < 0:
        raise DataError("there is no such file, or it may not be read", where=where)
    if size > MAX_BYTES:
        raise DataError(f"has {size} bytes, over the cap of {MAX_BYTES}", where=where)
    syntax = guarded(lambda: _transfer_syntax(path), "is not DICOM", where)
    if syntax == _DEFLATED:
        raise DataError(
            "is deflated (its size in memory cannot be bounded)", where=where, hint="convert it to Explicit VR"
        )
    dataset = guarded(lambda: _read(path, pixels=False), "is not readable DICOM", where)
    header = guarded(lambda: _header(dataset, syntax, size, where), "has a header that cannot be read", where)
    _check_plugin(syntax, where)
    return header


def guarded(action: Callable[[], T], what: str, where: str) -> T:
    """Run pydicom with its warnings and log silenced; its errors become ours, without their text or cause.

    pydicom raises many kinds on damaged files, and their messages quote values of the file.
    """
    try:
        with _quiet():
            return action()
    except DataError:
        raise
    except Exception:  # whatever it was, its text may quote the patient
        pass
    raise DataError(what, where=where, hint="check the file with a DICOM viewer, or export it again")


def _read(path: Path, *, pixels: bool) -> Dataset:
    import pydicom

    return pydicom.dcmread(path, force=True, stop_before_pixels=not pixels)


def _transfer_syntax(path: Path) -> str:
    """The transfer syntax from the file meta group alone, so that nothing is inflated yet."""
    from pydicom.filereader import read_file_meta_info

    with path.open("rb") as opened:
        if opened.read(132)[128:] != b"DICM":
            return _IMPLICIT_LITTLE  # no preamble: what pydicom assumes
    return str(read_file_meta_info(path).get("TransferSyntaxUID", _IMPLICIT_LITTLE))


def _header(dataset: Dataset, syntax: str, size: int, where: str) -> Header:
    rows, columns = _integer(dataset, "Rows", where), _integer(dataset, "Columns", where)
    allocated = _integer(dataset, "BitsAllocated", where)
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    photometric = str(dataset.get("PhotometricInterpretation", ""))
    if frames != 1:
        raise DataError(
            f"holds {frames} frames; only single images are read", where=where, hint="export the frame you need"
        )
    if int(dataset.get("SamplesPerPixel", 1)) != 1 or photometric not in _GREY:
        raise DataError("is not grey (MONOCHROME1 or MONOCHROME2)", where=where, hint="export it as grey")
    if min(rows, columns) < 1 or allocated not in (1, 8, 16, 32):
        raise DataError(f"declares {columns} x {rows} pixels of {allocated} bits", where=where)
    if rows * columns > MAX_PIXELS:
        raise DataError(f"declares {columns} x {rows} pixels, over the cap of {MAX_PIXELS}", where=where)
    from pydicom.uid import UID

    uid = UID(syntax)
    if not uid.is_transfer_syntax or uid.is_private:
        raise DataError("has a private or unknown transfer syntax", where=where, hint="convert it to Explicit VR")
    needed = math.ceil(rows * columns * allocated / 8)
    if not uid.is_compressed and needed > size:
        raise DataError(f"declares {needed} bytes of pixels and has {size}: truncated", where=where)
    burned = str(dataset.get("BurnedInAnnotation", "")).strip().upper()
    removed = str(dataset.get("PatientIdentityRemoved", "")).strip().upper()
    stored = int(dataset.get("BitsStored", allocated))
    return Header(
        photometric=photometric,
        rows=rows,
        columns=columns,
        bits_stored=stored if 1 <= stored <= allocated else allocated,
        signed=int(dataset.get("PixelRepresentation", 0)) == 1,
        transfer_syntax=uid.name,
        burned_in={"YES": "yes", "NO": "no"}.get(burned, "unstated"),
        deidentified=removed == "YES",
    )


def _check_plugin(syntax: str, where: str) -> None:
    """Refuse a compressed transfer syntax that no installed plugin decodes, naming the package that would."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    uid = UID(syntax)
    if not uid.is_compressed:
        return
    try:
        available = get_decoder(uid).is_available
    except NotImplementedError:
        available = False
    if not available:
        package = _PLUGINS.get(syntax)
        hint = f"pip install {package.replace(' and', '')}" if package else "convert it to Explicit VR Little Endian"
        raise DataError(f"is compressed as {uid.name}, which needs a decoder", where=where, hint=hint)


def _integer(dataset: Dataset, keyword: str, where: str) -> int:
    value: Any = dataset.get(keyword)
    if not isinstance(value, int):
        raise DataError(f"has no {keyword}, so it holds no image", where=where)
    return int(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence pydicom, whose warnings and log lines quote values; a decompression bomb becomes an error."""
    from PIL.Image import DecompressionBombWarning

    logger = logging.getLogger("pydicom")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", DecompressionBombWarning)
            yield
    finally:
        logger.disabled = before
