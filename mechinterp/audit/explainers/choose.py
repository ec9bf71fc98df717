"""Which images explainers are compared on, and where the truth is in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from mechinterp.data import ImageData
from mechinterp.errors import DataError
from mechinterp.models import HookedVLM

__all__ = ["chosen_rows", "masks_of"]


def chosen_rows(
    data: ImageData, target: str, images: int, seed: int, masks: Sequence[str] = ()
) -> Int[np.ndarray, " image"]:
    """Rows of test patients, one an image of each patient, half with the target as far as there are any.

    A seeded choice that looks at labels and masks only, never at scores or maps. Images with the target that have a
    mask come first among those with it, since localisation needs one; of those with the target and of those without,
    half have the mask of an attribute in `masks` (a suspected shortcut), as far as there are any.

    Raises DataError without test patients that have a label, and for a target that no image has.
    """
    labels = data.labels(target)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data))
    usable = [int(row) for row in order if np.isfinite(labels[row]) and data.split[row] == "test"]
    if not usable:
        raise DataError("no test patient has a label", where=data.name, hint=f"see dataset.json, target {target!r}")
    if not (labels == 1).any():
        hint = "is column or value in dataset.json misspelt?"
        raise DataError(f"no image has the target {target!r}", where=data.name, hint=hint)
    attribute = data.target_attribute(target)
    usable.sort(key=lambda row: not (labels[row] == 1 and attribute and data.mask(attribute, row) is not None))
    with_mask = {row for row in usable if any(data.mask(name, row) is not None for name in masks)}
    taken: dict[str, int] = {}
    for label, room in ((True, images - images // 2), (False, images // 2)):
        group = [row for row in usable if (labels[row] == 1) == label]
        marked, plain = ([row for row in group if (row in with_mask) == has] for has in (True, False))
        end, half = len(taken) + room, len(taken) + (room + 1) // 2
        for rows, until in ((marked, half), (plain, end), (group, end)):
            for row in rows:
                if len(taken) < until:
                    taken.setdefault(data.patients[row], row)
    return np.array(sorted(taken.values()))


def masks_of(
    model: HookedVLM, data: ImageData, attribute: str, rows: Sequence[int] | np.ndarray
) -> tuple[Float[np.ndarray, "image element"], Bool[np.ndarray, " image"]]:
    """Share of each patch that an attribute's mask covers, and for which images there is a mask that is not empty."""
    across, down = model.grid_shape[1], model.grid_shape[0]
    shares = np.zeros((len(rows), down * across))
    known = np.zeros(len(rows), dtype=bool)
    for i, row in enumerate(rows):
        mask = data.mask(attribute, int(row))
        if mask is None or not mask.any():
            continue
        owner = model.grid(*mask.shape).numpy() - model.patch_tokens().start  # -1 and less: cropped away
        inside = owner >= 0
        area = np.bincount(owner[inside], minlength=down * across)
        shares[i] = np.bincount(owner[inside], mask[inside], down * across) / np.maximum(area, 1)
        known[i] = shares[i].any()
    return shares, known
