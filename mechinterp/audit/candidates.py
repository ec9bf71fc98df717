"""Candidate shortcuts: is the attribute there, does the model hold it, does it go with the target?"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from mechinterp.audit.evidence import Evidence
from mechinterp.audit.probe import logistic_scores
from mechinterp.audit.settings import Settings
from mechinterp.data import Attribute, ImageData
from mechinterp.metrics.contingency import OddsRatio, odds_ratio
from mechinterp.metrics.statistics import (
    Interval,
    PatientBootstrap,
    percentile_interval,
    stratified_auroc_columns,
    stratified_mean_difference,
)

__all__ = ["Candidate", "Observed", "candidates", "gap_beside", "observe"]


@dataclass(frozen=True, eq=False)
class Candidate:
    """An attribute on trial. `values` (1, 0, nan) and `known` are over the images of the evidence."""

    attribute: Attribute
    values: Float[np.ndarray, " n"]

    @property
    def name(self) -> str:
        """Name of the attribute."""
        return self.attribute.name

    @property
    def known(self) -> Bool[np.ndarray, " n"]:
        """Where the metadata has a value."""
        return np.isfinite(self.values)


@dataclass(frozen=True)
class Observed:
    """What can be seen without opening the model.

    Fields:
        present: share of the images with a known value that have the attribute.
        association: odds ratio of attribute and target in the audited data.
        detectable: AUROC of a linear probe on the embedding, within target strata, on test patients.
        score_gap: score with minus without the attribute, within target strata, on test patients, in sd of the score.
        smallest_cell: images in the smallest of the four cells target x attribute among test patients.
        beside: another attribute that was held equal as well when the score gap was taken, by name.
    """

    present: float
    association: OddsRatio
    detectable: float
    score_gap: float
    score_gap_ci95: Interval
    smallest_cell: int
    beside: str | None = None

    @property
    def gap_error(self) -> float:
        """Standard error of the score gap, from its bootstrap interval taken as normal."""
        low, high = self.score_gap_ci95
        return float((high - low) / (2 * stats.norm.ppf(0.975)))


def candidates(evidence: Evidence, data: ImageData, target: str) -> list[Candidate]:
    """Every attribute that is not the target itself, in the order of the columns."""
    own = data.target_attribute(target)
    return [
        Candidate(attribute, attribute.values[evidence.rows].astype(np.float64))
        for attribute in data.attributes
        if attribute.name != own
    ]


def observe(candidate: Candidate, evidence: Evidence, bootstrap: PatientBootstrap, settings: Settings) -> Observed:
    """Prevalence, association, detectability and score gap of one candidate."""
    known, values, labels = candidate.known, candidate.values, evidence.labels
    test = known[evidence.test]
    value, label = values[evidence.test][test], labels[evidence.test][test]
    cells = [int(((value == v) & (label == y)).sum()) for v in (0, 1) for y in (0, 1)]
    gap, interval = float("nan"), (float("nan"), float("nan"))
    if min(cells) > 0:
        score = evidence.score[evidence.test][test] / evidence.sd
        gap = float(stratified_mean_difference(score, value, label)[0])
        draws = stratified_mean_difference(score, value, label, bootstrap.weights[:, test])
        interval = percentile_interval(draws)
    return Observed(
        present=float(values[known].mean()) if known.any() else float("nan"),
        association=odds_ratio(values[known], labels[known]),
        detectable=_detectable(candidate, evidence),
        score_gap=gap,
        score_gap_ci95=interval,
        smallest_cell=min(cells),
    )


def gap_beside(
    candidate: Candidate,
    other: Candidate,
    observed: Observed,
    evidence: Evidence,
    bootstrap: PatientBootstrap,
    settings: Settings,
) -> Observed:
    """The score gap of a candidate with another one held equal too: what is left when the other one's share is out.

    `observed` as it is where one of the eight cells target x candidate x other holds fewer than `min_cell` images.
    """
    test = (candidate.known & other.known)[evidence.test]
    value, beside = (c.values[evidence.test][test] for c in (candidate, other))
    label = evidence.labels[evidence.test][test]
    cells = np.bincount((4 * label + 2 * value + beside).astype(int), minlength=8)
    if cells.min() < settings.min_cell:
        return observed
    score, strata = evidence.score[evidence.test][test] / evidence.sd, 2 * label + beside
    gap = float(stratified_mean_difference(score, value, strata)[0])
    draws = stratified_mean_difference(score, value, strata, bootstrap.weights[:, test])
    return replace(observed, score_gap=gap, score_gap_ci95=percentile_interval(draws), beside=other.name)


def _detectable(candidate: Candidate, evidence: Evidence) -> float:
    """AUROC of the probe on test patients, counted within target strata so that the target cannot lend it skill."""
    fit, held = candidate.known & ~evidence.test, candidate.known & evidence.test
    if len(np.unique(candidate.values[fit])) < 2 or len(np.unique(candidate.values[held])) < 2:
        return float("nan")
    log_odds = logistic_scores(evidence.embedding[fit], candidate.values[fit], evidence.embedding[held])
    area, _ = stratified_auroc_columns(log_odds[:, None], candidate.values[held], evidence.labels[held])
    return float(area[0])
