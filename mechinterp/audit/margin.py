"""Marks that nobody annotated: blur the margin of every test image, where letters, arrows and stamps stand, and look.

A letter of a few pixels does not survive a blur of a sixteenth of the image's width; the grey level of shoulder, arm
and collimation does. What the score loses with it is what fine detail in the margin was worth to the model. The same
blur of the middle, where the target is, says what a change of that size looks like when detail is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.ndimage import gaussian_filter

from mechinterp.audit.evidence import Evidence
from mechinterp.data import ImageData
from mechinterp.metrics.statistics import PatientBootstrap, auroc, percentile_interval
from mechinterp.models import HookedVLM
from mechinterp.types import Target

__all__ = ["blur_margin", "margin_evidence"]

WIDTH = 1 / 8  # of the image, on each side
SIGMA = 1 / 16  # of the image's width


def ring(size: int) -> Bool[np.ndarray, "size size"]:
    """True in the outer eighth on each side."""
    inside = np.zeros((size, size), dtype=bool)
    edge = round(size * WIDTH)
    inside[edge : size - edge, edge : size - edge] = True
    return ~inside


def blur_margin(
    pixels: Float[np.ndarray, "image height width"], where: Bool[np.ndarray, "height width"]
) -> Float[np.ndarray, "image height width"]:
    """Images blurred where `where` is True, with a soft seam of a sixty-fourth of the width."""
    size = pixels.shape[-1]
    weight = gaussian_filter(where.astype(np.float32), size / 64, mode="nearest")
    smooth = gaussian_filter(pixels, (0, size * SIGMA, size * SIGMA), mode="nearest")
    return np.clip(pixels * (1 - weight) + smooth * weight, 0, 1).astype(np.float32)


@torch.no_grad()
def margin_evidence(
    model: HookedVLM, data: ImageData, target: Target, evidence: Evidence, bootstrap: PatientBootstrap
) -> list[dict[str, Any]]:
    """Two rows, margin and middle: mean |change| of the score in sd, AUROC before and after, and their difference.

    `bootstrap` resamples the patients of the test images, in the order of `evidence`.
    """
    rows = evidence.rows[evidence.test]
    pixels = data.pixels(rows)
    ids = [data.images[int(row)] for row in rows]
    labels, before = evidence.labels[evidence.test], evidence.score[evidence.test]
    outer = ring(pixels.shape[-1])
    out = []
    for name, where in (("margin", outer), ("middle", ~outer)):
        after = _scores(model, blur_margin(pixels, where), target, ids)
        change = np.abs(after - before) / evidence.sd
        lost = bootstrap.auroc(before, labels) - bootstrap.auroc(after, labels)
        out.append(
            {
                "region": name,
                "mean_change_sd": float(change.mean()),
                "mean_change_ci95": list(percentile_interval(bootstrap.mean(change))),
                "auroc_before": auroc(before, labels),
                "auroc_after": auroc(after, labels),
                "auroc_lost": auroc(before, labels) - auroc(after, labels),
                "auroc_lost_ci95": list(percentile_interval(lost)),
            }
        )
    return out


def _scores(model: HookedVLM, pixels: np.ndarray, target: Target, ids: Sequence[str]) -> Float[np.ndarray, " image"]:
    parts = []
    for start in range(0, len(pixels), 100):
        batch = model.prepare(pixels[start : start + 100], [target], ids=ids[start : start + 100])
        parts.append(model.score(batch, [target])[:, 0])
    return torch.cat(parts).double().cpu().numpy()
