"""ImageData: what an open data folder offers, whatever its files were."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Bool, Float

from mechinterp.data.attributes import Attribute
from mechinterp.data.files import ImageFile
from mechinterp.data.images import resize_square
from mechinterp.data.regions import Regions
from mechinterp.errors import DataError, UsageError
from mechinterp.progress import progress
from mechinterp.types import Target

__all__ = ["ImageData"]

Rows = slice | Iterable[SupportsIndex] | np.ndarray  # an array holds row numbers, or one bool for each image


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """Images of patients with binary attributes, and targets to ask a model about. Made by `open_data`.

    Attributes:
        name: from dataset.json, else the folder's name.
        root: the folder.
        images: a name for each image, safe to show: the path below the folder, or `dicom-` and a hash for DICOM.
        patients: the patient of each image; pseudonyms when the folder holds DICOM.
        split: "train", "val" or "test" for each image; no patient is in two.
        attributes: every usable binary contrast of a metadata column.
        skipped: the columns that gave no attribute, and why.
        targets: what a model can be asked, with the prompts.
        reports: the report of each image, where there is one.
        truth: path of truth.json when the folder is a phantom.
        notes: what was done or assumed while reading, without identifiers.
        may_show: False for a DICOM image that does not declare itself free of burned-in text or de-identified.
    """

    name: str
    root: Path
    images: tuple[str, ...]
    patients: tuple[str, ...]
    split: np.ndarray
    attributes: tuple[Attribute, ...]
    skipped: dict[str, str]
    targets: dict[str, Target]
    reports: tuple[str | None, ...]
    truth: Path | None
    notes: list[str]
    may_show: Bool[np.ndarray, " image"]
    _files: tuple[ImageFile, ...]
    _labels: dict[str, Float[np.ndarray, " image"]]
    _same: dict[str, str]  # the attribute that each target is, decided on the whole folder
    _regions: Regions
    _tables: str  # sha256 over metadata.csv and dataset.json

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return (
            f"ImageData({self.name!r}: {len(self)} images of {len(set(self.patients))} patients, "
            f"{len(self.attributes)} attributes, targets {list(self.targets)})"
        )

    def pixels(self, rows: Rows | None = None, size: int | None = None) -> Float[np.ndarray, "image height width"]:
        """Grey images in [0, 1] for some rows (all by default), optionally resized to `size` x `size`, antialiased.

        Raises DataError naming the file when an image cannot be read or, without `size`, differs in size.
        """
        picked = self._rows(rows)
        if size is not None and size < 1:
            raise UsageError(f"size must be at least 1, not {size}", where="pixels")
        out: np.ndarray | None = None
        for i, row in enumerate(progress(picked, "reading images", unit="image")):
            image = self._files[row].load()[0]
            image = image if size is None else resize_square(image, size)
            if out is None:
                out = np.empty((len(picked), *image.shape), dtype=np.float32)
            if image.shape != out.shape[1:]:
                raise DataError(
                    f"is {image.shape[1]} x {image.shape[0]} pixels where {self.images[picked[0]]} is "
                    f"{out.shape[2]} x {out.shape[1]}",
                    where=self.images[row],
                    hint="give a size to resize all images to",
                )
            out[i] = image
        return np.zeros((0, size or 0, size or 0), dtype=np.float32) if out is None else out

    def record(self, row: SupportsIndex) -> dict[str, Any]:
        """What was done to the pixels of one image: the DICOM steps in order; empty for PNG and JPEG."""
        return self._files[index(row)].load()[1]

    def attribute(self, name: str) -> Attribute:
        """The attribute called `name`. Raises UsageError listing what exists."""
        for attribute in self.attributes:
            if attribute.name == name:
                return attribute
        known = ", ".join(a.name for a in self.attributes)
        raise UsageError(f"no attribute {name!r}", hint=f"there are: {known}" if known else "there are none")

    def labels(self, target: str) -> Float[np.ndarray, " image"]:
        """Truth of a target for each image: 1, 0, or NaN where the metadata says nothing."""
        if target not in self._labels:
            raise UsageError(f"no target {target!r}", hint=f"there are: {', '.join(self._labels) or 'none'}")
        return self._labels[target]

    def target_attribute(self, target: str) -> str | None:
        """The attribute that says the same as a target (or its opposite); None when no attribute does."""
        self.labels(target)  # refuses an unknown name
        return self._same.get(target)

    def mask(
        self, attribute: str, row: SupportsIndex, size: int | None = None
    ) -> Bool[np.ndarray, "height width"] | None:
        """Where an attribute is in one image, at the image's own size or `size` x `size`; None when nobody drew it."""
        return self._regions.mask(self.attribute(attribute), self._files[index(row)], size)

    @property
    def sha256(self) -> str:
        """Hash over the sorted (name, sha256 of bytes) of the images, metadata.csv and dataset.json."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256(self._tables.encode())
        files = progress(self._files, "hashing images", unit="image")
        for name, content in sorted((file.name, file.sha256) for file in files):
            digest.update(json.dumps([name, content]).encode())
        return digest.hexdigest()

    def subset(self, rows: Rows) -> ImageData:
        """The same data with some rows only, in the order given. Attributes stay, even if they no longer vary."""
        picked = self._rows(rows)
        return replace(
            self,
            images=tuple(self.images[i] for i in picked),
            patients=tuple(self.patients[i] for i in picked),
            split=self.split[picked],
            attributes=tuple(replace(a, values=a.values[picked]) for a in self.attributes),
            reports=tuple(self.reports[i] for i in picked),
            may_show=self.may_show[picked],
            notes=list(self.notes),
            _files=tuple(self._files[i] for i in picked),
            _labels={name: values[picked] for name, values in self._labels.items()},
        )

    def _rows(self, rows: Rows | None) -> list[int]:
        if rows is None or isinstance(rows, slice):
            return list(range(len(self))[rows or slice(None)])
        picked = np.asarray(rows if isinstance(rows, np.ndarray | Sequence) else list(rows))
        if picked.dtype == bool and picked.size:
            if picked.shape != (len(self),):
                raise UsageError(f"a row mask must have {len(self)} values, not shape {picked.shape}", where="rows")
            picked = np.flatnonzero(picked)
        if picked.size and (not np.issubdtype(picked.dtype, np.integer) or picked.ndim != 1):
            raise UsageError("rows must be whole numbers", where="rows")
        if picked.size and (picked.min() < -len(self) or picked.max() >= len(self)):
            raise UsageError(f"there are {len(self)} rows; asked for {picked.max()}", where="rows")
        return [int(i) % len(self) for i in picked]
