"""A Comparison as the rows of audit.json, of `mechinterp iq` and of the main table: means with patient intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from mechinterp.audit.explainers.checks import check_fields, counts, intervals
from mechinterp.audit.explainers.compare import FEW, Comparison, Judged
from mechinterp.metrics.sanity import Check
from mechinterp.metrics.statistics import PatientBootstrap, percentile_interval

__all__ = ["columns_of", "explainer_rows", "mean_and_interval", "missing"]

MOVING = ("R", "IS", "R_null", "R_excess")  # defined only where some element's attribution moves


def columns_of(judged: Judged) -> dict[str, Float[np.ndarray, " image"]]:
    """The per-image scores of one explainer by the names that tables use.

    R_null and R_excess are nan where no element's attribution moves (coverage 0): there is nothing to correlate, and
    the 0 that undefined correlations count as would pass for a perfect score.
    """
    s = judged.scores
    moves = np.nan_to_num(s.coverage) > 0
    return {
        "R": s.R,
        "F": s.F_dist,
        "IS": s.IS[2],
        "R_null": np.where(moves, s.R_null, np.nan),
        "R_excess": np.where(moves, s.R_excess, np.nan),
        "coverage": s.coverage,
        "R_zero": s.R_zero,
        "F_corr": s.F_corr,
        "F_own": judged.F_own,
        "IS_zero": s.IS_zero[2],
        "IS_p1": s.IS[1],
        "IS_p4": s.IS[4],
        "R_floor": judged.floor,
        **judged.further,
    }


def explainer_rows(
    made: Comparison,
    extra: Mapping[str, Mapping[str, Float[np.ndarray, " image"]]] | None = None,
    checks: Mapping[str, Mapping[str, Check]] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One record a method: every score as mean over images, `ci95` over patients, `n` images that have one, seconds.

    `circular` names the scores made by the removals that the method is made of, which are no evidence.

    Args:
        extra: further per-image columns, `{column: {method: [image]}}`: localisation.
        checks: sanity checks of each method.
        seed: of the bootstrap.
    """
    rows = []
    for name, judged in made.judged.items():
        columns = columns_of(judged) | {c: by[name] for c, by in (extra or {}).items() if name in by}
        numbers = {c: mean_and_interval(v, made.patients, seed) for c, v in columns.items()}
        of = (checks or {}).get(name, {})
        rows.append(
            {
                "method": name,
                "built_from": judged.method.built_from,
                "anchor": judged.method.anchor,
                "circular": list(judged.circular),
                "images": len(made.rows),
                "auprc": None,
                **{c: value for c, (value, _) in numbers.items()},
                **check_fields(of),
                "seconds": judged.seconds,
                "statuses": dict(sorted(Counter(judged.scores.status).items())),
                "ci95": {c: interval for c, (_, interval) in numbers.items()} | intervals(of),
                "n": {c: int(np.isfinite(v).sum()) for c, v in columns.items()} | counts(of),
            }
        )
    return rows


def mean_and_interval(
    values: Float[np.ndarray, " image"], patients: tuple[str, ...], seed: int = 0
) -> tuple[float | None, list[float] | None]:
    """Mean over the images that have a value and its 95 % patient-bootstrap interval; None where there is none."""
    kept = np.isfinite(values)
    if not kept.any():
        return None, None
    mean = float(values[kept].mean())
    owners = [p for p, k in zip(patients, kept, strict=True) if k]
    if len(set(owners)) < FEW:
        return mean, None
    low, high = percentile_interval(PatientBootstrap.of(owners, seed=seed).mean(values[kept]))
    return mean, [low, high] if np.isfinite(low) else None


def missing(row: Mapping[str, Any], key: str) -> str:
    """What a table says of a score that a record of `explainer_rows` has not: "-" where it is not defined at all."""
    return "-" if key in MOVING and row.get("coverage") == 0 else "not tested"
