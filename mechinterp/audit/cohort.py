"""Who is in the data: each attribute, how often it is known, and how often it goes with the target."""

from __future__ import annotations

from typing import Any

import numpy as np

from mechinterp.audit.evidence import Evidence
from mechinterp.data import ImageData

__all__ = ["cohort"]


def cohort(evidence: Evidence, data: ImageData) -> list[dict[str, Any]]:
    """One row per attribute over the labelled images; a share is nan where nothing is known."""
    rows = []
    for attribute in data.attributes:
        values = attribute.values[evidence.rows]
        known = np.isfinite(values)
        rows.append(
            {
                "attribute": attribute.name,
                "kind": attribute.kind,
                "known": int(known.sum()),
                "missing": int((~known).sum()),
                "present": _share(values, known),
                "with_target": _share(values, known & (evidence.labels == 1)),
                "without_target": _share(values, known & (evidence.labels == 0)),
                "in_test": _share(values, known & evidence.test),
            }
        )
    return rows


def _share(values: np.ndarray, rows: np.ndarray) -> float:
    return float(values[rows].mean()) if rows.any() else float("nan")
