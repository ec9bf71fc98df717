"""The shortcut table: every candidate attribute through the same questions, then the drivers that nobody named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from mechinterp.audit.candidates import Candidate, Observed, gap_beside, observe
from mechinterp.audit.causal import Causal, Harm, Trial, causal_effect, harm, joint_p
from mechinterp.audit.evidence import Evidence
from mechinterp.audit.features import Selectivity, select
from mechinterp.audit.settings import Settings
from mechinterp.audit.standing import Standing, stands_for
from mechinterp.audit.verdicts import Ruling, rule, suspicious
from mechinterp.metrics.statistics import PatientBootstrap, holm, smallest_detectable_effect
from mechinterp.progress import progress
from mechinterp.types import FeatureId

__all__ = ["Case", "choose_features", "shortcut_row", "try_candidates"]


@dataclass
class Case:
    """One candidate and all that was found out about it, filled in step by step."""

    candidate: Candidate
    features: tuple[int, ...]
    observed: Observed | None = None
    causal: Causal | None = None
    harmed: Harm | None = None
    standing: Standing | None = None
    adjusted_p: float = float("nan")
    gap_p: float = float("nan")
    together_p: float = float("nan")
    ruling: Ruling = field(default_factory=lambda: Ruling("NOT TESTED", "not looked at"))


def choose_features(candidates: Sequence[Candidate], selectivity: Selectivity) -> list[Case]:
    """A case with its feature set for every candidate."""
    return [Case(candidate, select(selectivity, a)) for a, candidate in enumerate(candidates)]


def try_candidates(
    cases: list[Case],
    trial: Trial,
    evidence: Evidence,
    bootstrap: PatientBootstrap,
    settings: Settings,
    seed: int,
) -> None:
    """Fill in every case: observe, ablate, compare with random sets, correct for their number, measure harm, rule."""
    for case in progress(cases, "candidates", unit="candidate"):
        case.observed = observe(case.candidate, evidence, bootstrap, settings)
    testable = [c for c in cases if c.features and c.observed and c.observed.smallest_cell >= settings.min_cell]
    pushes = trial.remove([case.features for case in testable]) if testable else []
    for case, push in progress(zip(testable, pushes, strict=True), "matched random sets", total=len(testable)):
        values = case.candidate.values[trial.position]
        case.causal = causal_effect(trial, case.features, push, values, evidence.activity, settings, seed)
        case.harmed = harm(trial, case.causal, values)
        case.standing = stands_for(trial, case.candidate, case.features, evidence)
        if abs(case.causal.effect) >= settings.effect_line:
            wanted = max(settings.joint_sets, math.ceil(1.25 * len(testable) / settings.alpha))
            case.together_p = joint_p(trial, case.causal, case.features, values, evidence.activity, wanted, seed)
    _hold_the_lead_equal(cases, evidence, bootstrap, settings)
    causal = holm(np.array([_causal_p(case) for case in cases]))
    gaps = holm(np.array([_gap_p(case.observed, settings) for case in cases]))
    for case, adjusted, gap in zip(cases, causal, gaps, strict=True):
        assert case.observed is not None, "observed above"
        case.adjusted_p, case.gap_p = float(adjusted), float(gap)
        kind = case.candidate.attribute.kind
        found = (case.causal, case.adjusted_p, case.harmed, case.standing)
        case.ruling = rule(kind, case.observed, case.gap_p, *found, settings)


def _causal_p(case: Case) -> float:
    """p of the effect: against sets removed together where that was computed, else against sums of single effects."""
    if case.causal is None:
        return float("nan")
    return case.causal.p if math.isnan(case.together_p) else case.together_p


def _hold_the_lead_equal(
    cases: list[Case], evidence: Evidence, bootstrap: PatientBootstrap, settings: Settings
) -> None:
    """Where a score gap matters, take all the others again with the attribute of the largest one held equal.

    What goes with the attribute that the model follows, and is not followed itself, then shows no gap; and what that
    attribute does to the score is noise no more, so the intervals of the others are as narrow as they can be.
    """
    gaps = holm(np.array([_gap_p(case.observed, settings) for case in cases]))
    seen = [
        (c, c.observed) for c, p in zip(cases, gaps, strict=True) if c.observed and suspicious(c.observed, p, settings)
    ]
    if not seen:
        return
    lead, _ = max(seen, key=lambda pair: abs(pair[1].score_gap))
    for case in cases:
        if case.observed and case.candidate.attribute.column != lead.candidate.attribute.column:
            case.observed = gap_beside(case.candidate, lead.candidate, case.observed, evidence, bootstrap, settings)


def _gap_p(observed: Observed | None, settings: Settings) -> float:
    """Two-sided p of the observed score gap, from its bootstrap interval taken as normal."""
    if observed is None or observed.smallest_cell < settings.min_cell:
        return float("nan")
    error = observed.gap_error
    return float(2 * stats.norm.sf(abs(observed.score_gap) / error)) if error > 0 else float("nan")


def _detectable_gap(observed: Observed, settings: Settings) -> float | None:
    """The score gap that the test images would have shown; None where there are too few of them."""
    if observed.smallest_cell < settings.min_cell or not observed.gap_error > 0:
        return None
    return smallest_detectable_effect(observed.gap_error)


def shortcut_row(case: Case, trial: Trial, settings: Settings) -> dict[str, Any]:
    """The row of audit.json of one attribute."""
    seen, causal, harmed = case.observed, case.causal, case.harmed
    assert seen is not None, "cases are tried before they are written"
    total = np.abs(trial.push).sum()
    mine = sum(np.abs(trial.of(feature)).sum() for feature in case.features if feature in trial.features)
    return {
        "candidate": case.candidate.name,
        "kind": "attribute",
        "column": case.candidate.attribute.column,
        "attribute_kind": case.candidate.attribute.kind,
        "features": [str(FeatureId(trial.placed.writes, feature)) for feature in case.features],
        "present": seen.present,
        "detectable_auroc": seen.detectable,
        "association_odds_ratio": seen.association.value,
        "association_ci95": list(seen.association.ci95),
        "observed_score_gap": seen.score_gap,
        "observed_ci95": list(seen.score_gap_ci95),
        "observed_beside": seen.beside,
        "smallest_cell": seen.smallest_cell,
        "used_share": float(mine / total) if total > 0 else None,
        "causal_effect": causal and causal.effect,
        "causal_ci95": list(causal.ci95) if causal else [None, None],
        "causal_p": causal and _causal_p(case),
        "causal_p_holm": case.adjusted_p,
        "causal_p_joint": case.together_p,
        "effect_with_attribute": causal and causal.effect_with,
        "null_band": list(causal.null_band) if causal else [None, None],
        "null_sets": causal.null_sets if causal else 0,
        "detectable_effect": causal and causal.detectable_effect,
        "detectable_gap": _detectable_gap(seen, settings),
        "removed_share": case.standing and case.standing.share,
        "removed_share_ci95": list(case.standing.ci95) if case.standing else [None, None],
        "harm_auroc_gap": harmed and harmed.gap,
        "harm_ci95": list(harmed.gap_ci95) if harmed else [None, None],
        "auroc_aligned": harmed and harmed.aligned,
        "auroc_conflicting": harmed and harmed.conflicting,
        "gap_after_removal": harmed and harmed.gap_after,
        "recovered": harmed and harmed.recovered,
        "recovered_ci95": list(harmed.recovered_ci95) if harmed else [None, None],
        "verdict": case.ruling.verdict,
        "reason": case.ruling.reason,
    }
