"""A grade for each explainer on one model and target, from what was measured of it here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from mechinterp.audit.explainers.checks import FIELDS
from mechinterp.audit.explainers.compare import FEW, Comparison, Judged
from mechinterp.errors import UsageError
from mechinterp.metrics.grades import Evidence, Grade, Measured, Thresholds, grade
from mechinterp.metrics.sanity import reads_prompt
from mechinterp.metrics.statistics import PatientBootstrap, percentile_interval

__all__ = ["NEEDED", "curve_share", "grade_fields", "graded", "read_thresholds"]

NEEDED = ("faithfulness", "curves", "randomisation", "prompt", "excess")
"""Localisation counts only where it is asked for: a method is not to blame for a model that looks elsewhere."""


def curve_share(made: Comparison, judged: Judged, seed: int = 0) -> Measured:
    """Insertion minus deletion beyond a random order's, as a share of what the order of the true effects gains.

    A ratio of means over images, with a patient-bootstrap interval, which is nan for fewer than `FEW` patients; both
    are nan where the oracle gains nothing over random.
    """
    kept = np.isfinite(judged.curve)
    if kept.sum() < 2:
        return Measured(float("nan"), (float("nan"), float("nan")))
    own, best = (judged.curve - made.curve_random)[kept], (made.curve_oracle - made.curve_random)[kept]
    if best.mean() <= 0:
        return Measured(float("nan"), (float("nan"), float("nan")))
    owners = [p for p, k in zip(made.patients, kept, strict=True) if k]
    share = float(own.mean() / best.mean())
    if len(set(owners)) < FEW:
        return Measured(share, (float("nan"), float("nan")))
    boot = PatientBootstrap.of(owners, seed=seed)
    above, below = boot.mean(own), boot.mean(best)
    ratio = np.where(below > 0, above / np.where(below > 0, below, 1.0), np.nan)
    return Measured(share, percentile_interval(ratio))


def graded(made: Comparison, row: Mapping[str, Any], curves: Measured, thresholds: Thresholds | None = None) -> Grade:
    """The grade of one record of `explainer_rows`. F and the curves are by blur, which no explainer was built with;
    what is circular all the same is not graded.

    A classifier reads no prompt, so its grades need no check of that. R_excess is graded as it is, without taking off
    what chance adds to it: that counts against the method.
    """
    limits = thresholds or Thresholds(needed=NEEDED)
    if not reads_prompt(made.model):
        limits = replace(limits, needed=tuple(n for n in limits.needed if n != "prompt") or limits.needed)
    evidence = Evidence(
        faithfulness=_measured(row, "F"),
        curves=curves,
        randomisation=row[f"{FIELDS['weights']}_verdict"],
        prompt=row[f"{FIELDS['nonsense']}_verdict"],
        localisation=_localisation(row) if "localisation" in limits.needed else None,
        excess=_measured(row, "R_excess"),
        circular="F" in row["circular"],
    )
    task = f"{made.target.name} by {made.model.label}"
    if evidence.circular:
        reason = "circular: scored by the removals that it was built from"
        return Grade(row["method"], task, "NOT GRADED", None, (), reason)
    return grade(row["method"], task, evidence, limits)


def grade_fields(found: Grade) -> dict[str, Any]:
    """A grade as fields of a record."""
    return {
        "grade": found.grade,
        "acceptable_up_to": found.acceptable_up_to,
        "grade_reason": found.reason,
        "grade_pieces": {p.name: {"grade": p.letter, "evidence": p.evidence} for p in found.pieces},
    }


def read_thresholds(path: Path) -> Thresholds:
    """Thresholds from a JSON file with some fields of `Thresholds`; the others keep their defaults.

    Raises UsageError that names the file and the field.
    """
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot be read: {error}", where=str(path), hint="a JSON object of thresholds") from None
    known = {f.name for f in fields(Thresholds)}
    if not isinstance(given, dict) or set(given) - known:
        strange = sorted(set(given) - known) if isinstance(given, dict) else type(given).__name__
        raise UsageError(f"holds {strange}", where=str(path), hint=f"fields: {', '.join(sorted(known))}")
    made: dict[str, Any] = {}
    for name, value in given.items():
        if name == "acceptable":
            good = isinstance(value, dict) and all(letter in ("A", "B", "C", "D") for letter in value.values())
        elif name == "needed":
            good = isinstance(value, list) and all(isinstance(item, str) for item in value)
        else:
            good = isinstance(value, list) and len(value) == 3 and all(isinstance(item, int | float) for item in value)
        if not good:
            raise UsageError(f"{name} is {value!r}", where=str(path), hint="see mechinterp.metrics.grades.Thresholds")
        made[name] = value if name == "acceptable" else tuple(value)
    try:
        return replace(Thresholds(needed=NEEDED), **made)
    except UsageError as error:
        raise UsageError(str(error), where=str(path)) from None


def _measured(row: Mapping[str, Any], key: str) -> Measured | None:
    value, interval = row.get(key), row["ci95"].get(key)
    if value is None or interval is None:
        return None
    return Measured(value, (interval[0], interval[1]))


def _localisation(row: Mapping[str, Any]) -> Measured | None:
    """AUPRC minus chance over 1 minus chance; the interval is that of AUPRC, carried over."""
    found, chance = _measured(row, "auprc"), row.get("auprc_chance")
    if found is None or chance is None or not math.isfinite(chance) or chance >= 1:
        return None
    low, high = ((end - chance) / (1 - chance) for end in found.ci95)
    return Measured((found.value - chance) / (1 - chance), (low, high))
