"""Where a finding or mark is in an image: drawn masks, or boxes listed in the metadata."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Bool
from PIL import Image

from mechinterp.data.attributes import Attribute
from mechinterp.data.files import ImageFile, inside
from mechinterp.data.images import load_image
from mechinterp.errors import DataError

__all__ = ["Box", "Regions", "boxes_side", "read_boxes"]

_BOXES = re.compile(r"^boxes_(\d{2,5})$")
_SYNONYMS = {"infiltrate": "infiltration"}  # the NIH's box list and its label list differ in this word


@dataclass(frozen=True)
class Box:
    """A finding's rectangle in pixels of an original whose longer side has `side` pixels."""

    finding: str
    x: float
    y: float
    width: float
    height: float
    side: int


@dataclass(frozen=True)
class Regions:
    """Masks of a folder, from `masks/ATTRIBUTE/IMAGE.png` first, else from the boxes of an image."""

    root: Path
    boxes: dict[str, list[Box]] = field(default_factory=dict, repr=False)

    def mask(self, attribute: Attribute, file: ImageFile, size: int | None) -> Bool[np.ndarray, "height width"] | None:
        """Where the attribute is in the image; None when there is neither mask nor box."""
        drawn = self._drawn(attribute, file)
        boxes = [box for box in self.boxes.get(file.relative, ()) if _same(box.finding, attribute)]
        if drawn is None and not boxes:
            return None
        shape = (size, size) if size is not None else file.load()[0].shape
        if drawn is None:
            native = file.load()[0].shape if size is not None else shape
            drawn = _fill(boxes, native)
        if drawn.shape == shape:
            return drawn
        resized = Image.fromarray(drawn).resize((shape[1], shape[0]), Image.Resampling.NEAREST)
        return np.asarray(resized, dtype=bool)

    def _drawn(self, attribute: Attribute, file: ImageFile) -> Bool[np.ndarray, "height width"] | None:
        image = PurePosixPath(file.relative)
        below = image.relative_to("images") if image.parts[0] == "images" and len(image.parts) > 1 else image
        for folder in _folders(attribute):
            for name in (below.with_suffix(".png"), f"{below}.png", image.with_suffix(".png"), f"{image}.png"):
                path = inside(self.root, f"masks/{folder}/{name}")
                if path is not None and path.is_file():
                    return load_image(path, f"mask of {attribute.name} for {file.where}") > 0.5
        return None


def boxes_side(column: str) -> int | None:
    """N when a column is called `boxes_N`, else None."""
    found = _BOXES.match(column)
    return int(found[1]) if found and int(found[1]) > 0 else None


def read_boxes(
    column: str, side: int, cells: Sequence[str], names: Sequence[str], lines: Sequence[int]
) -> dict[str, list[Box]]:
    """Boxes of each image from cells of JSON `[[finding, x, y, width, height], ...]`.

    Returns `{name: [Box]}`. Raises DataError with the line of the cell that is something else.
    """
    boxes: dict[str, list[Box]] = {}
    for cell, name, line in zip(cells, names, lines, strict=True):
        if not cell:
            continue
        where = f"metadata.csv line {line} column {column}"
        try:
            listed = json.loads(cell)
        except (ValueError, RecursionError) as error:
            raise DataError("is not JSON", where=where, hint="write [[finding, x, y, width, height], ...]") from error
        if not isinstance(listed, list) or not all(_is_box(item) for item in listed):
            raise DataError("is not a list of [finding, x, y, width, height]", where=where)
        made = [Box(text, float(x), float(y), float(w), float(h), side) for text, x, y, w, h in listed]
        boxes.setdefault(name, []).extend(made)
    return boxes


def _is_box(item: object) -> bool:
    if not isinstance(item, list) or len(item) != 5 or not isinstance(item[0], str):
        return False
    numbers = [v for v in item[1:] if isinstance(v, int | float) and not isinstance(v, bool)]
    return len(numbers) == 4 and all(abs(v) < 1e6 and math.isfinite(v) for v in numbers)


def _fill(boxes: list[Box], shape: tuple[int, ...]) -> Bool[np.ndarray, "height width"]:
    mask = np.zeros(shape, dtype=bool)
    for box in boxes:
        scale = max(shape) / box.side
        left, top = max(0, math.floor(box.x * scale)), max(0, math.floor(box.y * scale))
        right, bottom = math.ceil((box.x + box.width) * scale), math.ceil((box.y + box.height) * scale)
        mask[top : max(0, bottom), left : max(0, right)] = True
    return mask


def _folders(attribute: Attribute) -> list[str]:
    """Names a mask folder may have: `findings:Edema`, `findings_Edema`, or `Edema`."""
    name = attribute.name
    named = [name, re.sub(r"[:=>]", "_", name)]
    if name.startswith(f"{attribute.column}:"):
        named.append(name[len(attribute.column) + 1 :])
    return [folder for folder in dict.fromkeys(named) if "/" not in folder]


def _same(finding: str, attribute: Attribute) -> bool:
    word = finding.strip().lower()
    names = {folder.lower() for folder in _folders(attribute)}
    return word in names or _SYNONYMS.get(word) in names
