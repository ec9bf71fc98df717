"""DICOM radiographs to grey images in [0, 1], with a record of every step and no identifier.

The order is the standard's (PS3.3 C.11, PS3.4 N.2): modality LUT or rescale, then VOI LUT or window, then the
presentation (MONOCHROME1 is inverted).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from mechinterp.data.dicom_header import Header, guarded, label_of, read_header
from mechinterp.data.files import ImageFile
from mechinterp.errors import DataError, UsageError
from mechinterp.progress import progress

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = ["load_dicom", "survey"]

_PERCENTILES = (0.5, 99.5)


def load_dicom(
    path: str | Path,
    window: tuple[float | int, float | int] | None = None,
    voi: Literal["first", "percentile", "none"] = "first",
    *,
    where: str | None = None,
) -> tuple[Float[np.ndarray, "height width"], dict[str, Any]]:
    """Decode one single-frame grey DICOM image.

    Args:
        path: the file.
        window: (centre, width) in modality units (after rescale), used instead of what the file says.
        voi: "first" takes the first VOI LUT or window of the file and, where there is none, the range between the
            percentiles 0.5 and 99.5; "percentile" always takes that range; "none" the whole range of stored values.
        where: how errors call the file; by default `dicom-` and the start of the sha256 of its bytes.

    Returns:
        float32 pixels in [0, 1], dark to bright as displayed, and the record of what was done. The record and every
        error hold numbers and known codes only: no text field of the file, and not its name.

    Raises:
        DataError: not DICOM, damaged, truncated, multi-frame, colour, over the pixel cap, or compressed in a way that
            needs a package that is not installed (the message names it).
    """
    path = Path(path)
    where = where or _label(path)
    header = read_header(path, where)
    if window is not None and not (np.isfinite(window).all() and window[1] > 0):
        raise UsageError(f"a window is (centre, width > 0), not {window}", where="window")
    record: dict[str, Any] = {
        "photometric": header.photometric,
        "rows": header.rows,
        "columns": header.columns,
        "bits_stored": header.bits_stored,
        "transfer_syntax": header.transfer_syntax,
        "burned_in": header.burned_in,
        "deidentified": header.deidentified,
    }
    pixels = guarded(lambda: _decode(path, header, window, voi, record, where), "has pixels that cannot be read", where)
    return pixels, record


def survey(files: Sequence[ImageFile], notes: list[str]) -> Bool[np.ndarray, " image"]:
    """Check the header of every DICOM file, add counts to `notes`, and say which images may be shown.

    An image whose file declares neither BurnedInAnnotation NO nor PatientIdentityRemoved YES may carry the patient's
    name in its pixels.
    """
    may_show = np.ones(len(files), dtype=bool)
    count = inverted = 0
    for i, file in enumerate(progress(files, "reading DICOM headers", unit="image")):
        if file.dicom:
            header = read_header(file.path, file.where)
            may_show[i] = header.may_show
            inverted += header.photometric == "MONOCHROME1"
            count += 1
    notes.append(
        f"{count} DICOM images: modality LUT or rescale, then the file's first VOI LUT or window, else 0.5-99.5 %"
    )
    notes.append(f"{inverted} of them are MONOCHROME1 and inverted")
    notes.append("DICOM images and all patients are shown under hashed names")
    hidden = int((~may_show).sum())
    if hidden:
        notes.append(f"{hidden} DICOM images do not declare themselves free of burned-in text, so are not to be shown")
    return may_show


def _decode(
    path: Path,
    header: Header,
    window: tuple[float | int, float | int] | None,
    voi: str,
    record: dict[str, Any],
    where: str,
) -> Float[np.ndarray, "height width"]:
    import pydicom
    from pydicom.pixels.processing import apply_modality_lut

    dataset = pydicom.dcmread(path, force=True)
    stored = dataset.pixel_array
    if stored.shape != (header.rows, header.columns):
        raise DataError("decodes to another size than its header declares", where=where)
    padding = _padding(dataset, stored)
    values = np.asarray(apply_modality_lut(stored, dataset), dtype=np.float64)
    record["modality"] = _modality(dataset)
    if not np.isfinite(values).all():
        raise DataError("has values that are not finite after rescale", where=where)
    shown = _voi(values, dataset, header, window, voi, padding, record, where)
    record["inverted"] = header.photometric == "MONOCHROME1"
    if record["inverted"]:
        shown = 1.0 - shown
    if padding is not None:
        shown[padding] = 0.0  # padding is background, dark also where the image was inverted
    record["padding_pixels"] = 0 if padding is None else int(padding.sum())
    if not np.isfinite(shown).all():
        raise DataError("has values that are not finite after its window", where=where)
    return np.clip(shown, 0.0, 1.0).astype(np.float32)


def _voi(
    values: Float[np.ndarray, "height width"],
    dataset: Dataset,
    header: Header,
    window: tuple[float | int, float | int] | None,
    voi: str,
    padding: Bool[np.ndarray, "height width"] | None,
    record: dict[str, Any],
    where: str,
) -> Float[np.ndarray, "height width"]:
    """Map modality values to [0, 1] and record how."""
    function = "LINEAR"
    if window is None and voi == "first":
        if "VOILUTSequence" in dataset:
            record["voi"] = {"kind": "lut"}
            return _voi_lut(values, dataset)
        window = _first_window(dataset)
        if window is not None:
            declared = str(dataset.get("VOILUTFunction", "LINEAR"))
            function = declared if declared in ("LINEAR", "LINEAR_EXACT", "SIGMOID") else "LINEAR"
    if window is not None:
        centre, width = (float(v) for v in window)
        if not (np.isfinite((centre, width)).all() and width >= (1 if function == "LINEAR" else 1e-12)):
            raise DataError(f"has an impossible window: centre {centre:g}, width {width:g}", where=where)
        record["voi"] = {"kind": "window", "centre": centre, "width": width, "function": function}
        return _window(values, centre, width, function)
    if voi == "none":
        ends = _stored_range(dataset, header)
    else:
        kept = values if padding is None or padding.all() else values[~padding]
        ends = tuple(float(v) for v in np.percentile(kept, _PERCENTILES))
    low, high = min(ends), max(ends)
    record["voi"] = {"kind": "range" if voi == "none" else "percentile", "low": low, "high": high}
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _window(values: Float[np.ndarray, "*any"], centre: float, width: float, function: str) -> Float[np.ndarray, "*any"]:
    """PS3.3 C.11.2.1.2 (LINEAR), C.11.2.1.3.2 (LINEAR_EXACT) and C.11.2.1.3.1 (SIGMOID), onto [0, 1]."""
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - centre) / width, -700.0, 700.0)))
    if function == "LINEAR_EXACT":
        return np.clip((values - centre) / width + 0.5, 0.0, 1.0)
    if width == 1:  # the standard's step: at and below centre - 0.5 dark, above it bright
        return (values > centre - 0.5).astype(np.float64)
    return np.clip((values - (centre - 0.5)) / (width - 1.0) + 0.5, 0.0, 1.0)


def _first_window(dataset: Dataset) -> tuple[float, float] | None:
    centre, width = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    if centre is None or width is None or centre == "" or width == "":
        return None
    first = [v[0] if isinstance(v, Sequence) and not isinstance(v, str) else v for v in (centre, width)]
    return float(first[0]), float(first[1])


def _voi_lut(values: Float[np.ndarray, "height width"], dataset: Dataset) -> Float[np.ndarray, "height width"]:
    """Apply the first VOI LUT, scaled by the number of bits of its entries (PS3.3 C.11.2.1.1)."""
    from pydicom.pixels.processing import apply_voi

    bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
    looked_up = apply_voi(np.rint(values).astype(np.int64), dataset, index=0)
    return np.asarray(looked_up, dtype=np.float64) / (2**bits - 1)


def _modality(dataset: Dataset) -> dict[str, Any]:
    if "ModalityLUTSequence" in dataset:
        return {"kind": "lut"}
    if "RescaleSlope" in dataset and "RescaleIntercept" in dataset:
        return {
            "kind": "rescale",
            "slope": float(dataset.RescaleSlope),
            "intercept": float(dataset.RescaleIntercept),
        }
    return {"kind": "none"}


def _stored_range(dataset: Dataset, header: Header) -> tuple[float, float]:
    from pydicom.pixels.processing import apply_modality_lut

    top = 2 ** (header.bits_stored - 1) if header.signed else 2**header.bits_stored
    ends = np.array([-top if header.signed else 0, top - 1])
    low, high = np.asarray(apply_modality_lut(ends, dataset), dtype=np.float64)
    return float(low), float(high)


def _padding(dataset: Dataset, stored: np.ndarray) -> Bool[np.ndarray, "height width"] | None:
    """Pixels that are padding (PS3.3 C.7.5.1.1.2): one value, or a range with its limit."""
    value = dataset.get("PixelPaddingValue")
    if not isinstance(value, int):
        return None
    limit = dataset.get("PixelPaddingRangeLimit", value)
    low, high = sorted((value, limit if isinstance(limit, int) else value))
    padding = (stored >= low) & (stored <= high)
    return padding if padding.any() else None


def _label(path: Path) -> str:
    try:
        with path.open("rb") as opened:
            return label_of(hashlib.file_digest(opened, "sha256").hexdigest())
    except OSError:
        pass
    raise DataError("there is no such DICOM file, or it may not be read", where="load_dicom")
