"""From numbers to FAIL, CONCERN, PASS or NOT TESTED, each with one sentence that holds its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mechinterp.audit.candidates import Observed
from mechinterp.audit.causal import Causal, Harm
from mechinterp.audit.settings import Settings
from mechinterp.audit.standing import ENOUGH, Standing
from mechinterp.metrics.statistics import Interval

__all__ = ["Ruling", "Verdict", "rule", "suspicious", "within", "worst"]

Verdict = Literal["FAIL", "CONCERN", "PASS", "NOT TESTED"]
ACCOUNTED = 0.25
_ORDER: tuple[Verdict, ...] = ("FAIL", "CONCERN", "NOT TESTED", "PASS")


@dataclass(frozen=True)
class Ruling:
    """A verdict and its reason."""

    verdict: Verdict
    reason: str


def worst(verdicts: list[Verdict]) -> Verdict:
    """FAIL before CONCERN before NOT TESTED before PASS; NOT TESTED when there are none."""
    return min(verdicts, key=_ORDER.index) if verdicts else "NOT TESTED"


def suspicious(observed: Observed, adjusted_p: float, settings: Settings) -> bool:
    """The score differs with the attribute at the same truth, by an amount that matters and beyond chance."""
    return bool(adjusted_p < settings.alpha and abs(observed.score_gap) >= settings.effect_line)


def within(interval: Interval, line: float) -> bool:
    """The whole interval lies inside +-line (False for nan)."""
    return bool(-line < interval[0] and interval[1] < line)


def rule(
    kind: str,
    observed: Observed,
    gap_p: float,
    causal: Causal | None,
    adjusted_p: float,
    harmed: Harm | None,
    standing: Standing | None,
    settings: Settings,
) -> Ruling:
    """The verdict of one attribute.

    FAIL: its features move the score (beyond matched random sets, Holm-adjusted p below alpha; interval without 0;
    effect at least `effect_line`), they account for at least `ACCOUNTED` of the score gap that is seen at the same
    label, and AUROC is at least `harm_line` lower where the attribute contradicts the label (interval without 0).
    CONCERN: they move it without proof of harm; or the score follows the attribute at the same truth by no feature
    that we found. A finding that goes with the target can be a medical reason, so it is never FAIL.
    PASS: nothing of the above, the interval of the effect lies within the line, and one of two things shows that this
    is no blindness: the interval of the score gap lies within the line too, or the features stand for the attribute
    (`Standing.enough`) and the interval stays within the line when the effect is taken in proportion to the whole.
    NOT TESTED: everything else, with what was missing.
    """
    line = settings.effect_line
    equal = f" and the same {observed.beside}" if observed.beside else ""
    seen = f"the score differs by {_sd(observed.score_gap, observed.score_gap_ci95)} at the same label{equal}"
    if observed.smallest_cell < settings.min_cell:
        return Ruling(
            "NOT TESTED",
            f"only {observed.smallest_cell} test images in the smallest group of label x attribute "
            f"(needs {settings.min_cell})",
        )
    if causal is None:
        return _without_features(observed, gap_p, seen, settings)
    proof = f"removing its features changes the score by {_sd(causal.effect, causal.ci95)}"
    against = f"matched random sets: p = {_p(adjusted_p)} after Holm"
    moves = adjusted_p < settings.alpha and not _holds_zero(causal.ci95)
    if moves and abs(causal.effect) >= line:
        assert harmed is not None, "harm is computed wherever an effect is"
        costs = (
            f"AUROC is {harmed.gap:.3f} {_range(harmed.gap_ci95)} higher where it agrees with the label than where it "
            f"contradicts it; removal closes {harmed.recovered:+.3f} {_range(harmed.recovered_ci95)}"
        )
        accounts = causal.effect * observed.score_gap > 0 and abs(causal.effect) >= ACCOUNTED * abs(observed.score_gap)
        hurts = accounts and harmed.gap >= settings.harm_line and harmed.gap_ci95[0] > 0
        if kind == "finding":
            return Ruling("CONCERN", f"{proof} ({against}); as a finding it may be a medical reason; {costs}")
        if hurts:
            return Ruling("FAIL", f"{proof} ({against}), and {costs}")
        return Ruling("CONCERN", f"{proof} ({against}), but harm is not shown: {costs}")
    if np.isnan(adjusted_p):
        said = f"the dictionary is too small to draw matched random sets; {proof}; {seen}"
        return Ruling("CONCERN" if suspicious(observed, gap_p, settings) else "NOT TESTED", said)
    if suspicious(observed, gap_p, settings):
        return Ruling("CONCERN", f"{seen}, which the features found do not account for ({proof}; {against})")
    if not within(causal.ci95, line):
        return Ruling("NOT TESTED", f"too little power: {proof}; smallest detectable {causal.detectable_effect:.2f} sd")
    proof += f", within the line of {line:g} sd"
    if within(observed.score_gap_ci95, line):
        return Ruling("PASS", f"{seen}, within the line; {proof}")
    assert standing is not None, "measured wherever features are removed"
    taken = f"the removal takes {_share(standing)} out of the image embedding"
    if not standing.enough:
        return Ruling(
            "NOT TESTED",
            f"its features do not stand for it: {taken} (needs {ENOUGH:g} by the lower end); "
            f"and {seen}, which reaches beyond the line",
        )
    if within((causal.ci95[0] / standing.ci95[0], causal.ci95[1] / standing.ci95[0]), line):
        return Ruling("PASS", f"{proof}; {taken}, and in proportion to the whole the effect is within the line as well")
    return Ruling("NOT TESTED", f"too little power: {proof}, but {taken}, and in proportion to the whole it is not")


def _without_features(observed: Observed, gap_p: float, seen: str, settings: Settings) -> Ruling:
    probe = f"a linear probe finds it with AUROC {observed.detectable:.2f}"
    if suspicious(observed, gap_p, settings):
        return Ruling("CONCERN", f"{seen}, and no feature of the dictionary is selective for it ({probe})")
    if within(observed.score_gap_ci95, settings.effect_line):
        return Ruling("PASS", f"no feature is selective for it ({probe}); {seen}, within the line")
    return Ruling("NOT TESTED", f"no feature of the dictionary is selective for it ({probe}); {seen}")


def _holds_zero(interval: Interval) -> bool:
    return not (interval[0] > 0 or interval[1] < 0)


def _range(interval: Interval) -> str:
    return f"[{interval[0]:+.3f}, {interval[1]:+.3f}]"


def _sd(value: float, interval: Interval) -> str:
    return f"{value:+.2f} sd [{interval[0]:+.2f}, {interval[1]:+.2f}]"


def _share(standing: Standing) -> str:
    if np.isnan(standing.share):
        return "an unknown share of it"
    return f"{standing.share:.2f} [{standing.ci95[0]:.2f}, {standing.ci95[1]:.2f}] of it"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else "not computed" if np.isnan(value) else f"{value:.3f}"
