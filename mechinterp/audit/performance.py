"""How well the score separates the target: overall, in every subgroup, and against metadata alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool

from mechinterp.audit.evidence import Evidence
from mechinterp.audit.probe import logistic_scores
from mechinterp.audit.settings import Settings
from mechinterp.data import Attribute
from mechinterp.metrics.statistics import PatientBootstrap, auroc, percentile_interval

__all__ = ["metadata_only", "performance_rows"]

METADATA = "metadata_only"


def performance_rows(
    evidence: Evidence, attributes: list[Attribute], bootstrap: PatientBootstrap, settings: Settings
) -> list[dict[str, Any]]:
    """Rows of the performance table on test patients: overall first, metadata_only second, then subgroups.

    A subgroup needs `min_cell` images with and without the target. `difference` is its AUROC minus that of the other
    images with a known value, with a patient-bootstrap interval. `model_minus_metadata` is paired: the same patients.
    """
    score, labels = evidence.score[evidence.test], evidence.labels[evidence.test]
    everyone = np.ones(len(score), dtype=bool)
    rows = [_row("overall", score, labels, everyone, bootstrap)]
    guess = metadata_only(evidence, attributes)
    rows.append({"group": METADATA, "n": 0, "auroc": None, "ci95": [None, None]})
    if guess is not None:
        rows[1] = _row(METADATA, guess, labels, everyone, bootstrap)
        draws = bootstrap.auroc(score, labels) - bootstrap.auroc(guess, labels)
        rows[1]["model_minus_metadata"] = rows[0]["auroc"] - rows[1]["auroc"]
        rows[1]["model_minus_metadata_ci95"] = list(percentile_interval(draws))
    for attribute in attributes:
        if attribute.kind == "finding":
            continue
        values = attribute.values[evidence.rows][evidence.test]
        with_it, without = values == 1, values == 0
        if all(_enough(labels[group], settings.min_cell) for group in (with_it, without)):
            rows.append(_row(attribute.name, score, labels, with_it, bootstrap, against=without))
            rows.append(_row(f"not {attribute.name}", score, labels, without, bootstrap, against=with_it))
    return rows


def metadata_only(evidence: Evidence, attributes: list[Attribute]) -> np.ndarray | None:
    """Log odds of the target for test images from acquisition and demographic columns alone; None without any.

    Fitted on train and val patients (Zech et al. 2018: sorting by hospital alone reached an AUC of 0.861).
    """
    used = [a.values[evidence.rows] for a in attributes if a.kind in ("acquisition", "demographic")]
    fit = ~evidence.test
    if not used or len(np.unique(evidence.labels[fit])) < 2:
        return None
    table = np.stack(used, axis=1)
    return logistic_scores(table[fit], evidence.labels[fit], table[evidence.test])


def _enough(labels: np.ndarray, least: int) -> bool:
    return min(int((labels == 1).sum()), int((labels == 0).sum())) >= least


def _row(
    group: str,
    score: np.ndarray,
    labels: np.ndarray,
    rows: Bool[np.ndarray, " n"],
    bootstrap: PatientBootstrap,
    against: Bool[np.ndarray, " n"] | None = None,
) -> dict[str, Any]:
    draws = bootstrap.auroc(score, labels, rows)
    row: dict[str, Any] = {
        "group": group,
        "n": int(rows.sum()),
        "positives": int((labels[rows] == 1).sum()),
        "auroc": auroc(score[rows], labels[rows]),
        "ci95": list(percentile_interval(draws)),
    }
    if against is not None:
        other = bootstrap.auroc(score, labels, against)
        row["difference"] = row["auroc"] - auroc(score[against], labels[against])
        row["difference_ci95"] = list(percentile_interval(draws - other))
    return row
