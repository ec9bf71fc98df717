"""Grades: the worst piece decides, the bad end of an interval counts, and what is missing is never a pass."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from mechinterp.errors import UsageError
from mechinterp.metrics.grades import Evidence, Measured, Thresholds, grade


def at(value: float, half: float = 0.02) -> Measured:
    return Measured(value, (value - half, value + half))


BEST = Evidence(at(0.95), at(0.9), "pass", "pass", at(0.8), at(0.0))


def letter(evidence: Evidence, **limits) -> str:
    return grade("m", "t", evidence, Thresholds(**limits)).grade


def test_the_worst_piece_decides():
    assert letter(BEST) == "A"
    assert letter(replace(BEST, curves=at(0.5))) == "B"
    assert letter(replace(BEST, curves=at(0.5), excess=at(0.2))) == "C"
    assert letter(replace(BEST, localisation=at(-0.1))) == "D", "worse than chance"
    found = grade("m", "t", replace(BEST, prompt="fail"))
    assert found.grade == "D" and found.acceptable_up_to is None and found.reason == "prompt: fail"


def test_the_bad_end_of_the_interval_counts():
    assert letter(replace(BEST, faithfulness=at(0.9, 0.05))) == "A"
    assert letter(replace(BEST, faithfulness=at(0.9, 0.35))) == "C", "few patients earn no good grade"
    assert letter(replace(BEST, excess=at(0.0, 0.2))) == "C"


@pytest.mark.parametrize("name", [f.name for f in fields(Evidence) if f.name != "circular"])
def test_missing_evidence_is_never_a_pass(name):
    missing = "not tested" if name in ("randomisation", "prompt") else None
    found = grade("m", "t", replace(BEST, **{name: missing}))
    assert found.grade == "NOT GRADED" and name in found.reason
    assert found.acceptable_up_to is None and not any(found.acceptable(r) for r in ("low", "moderate", "high"))
    if missing is None:
        nan = float("nan")
        assert letter(replace(BEST, **{name: Measured(nan, (nan, nan))})) == "NOT GRADED"
        assert letter(replace(BEST, **{name: Measured(1.0, (nan, nan))})) == "NOT GRADED", "a number without interval"
    others = tuple(f.name for f in fields(Evidence) if f.name not in (name, "circular"))
    assert letter(replace(BEST, **{name: missing}), needed=others) == "A", "the user may need less"


def test_what_is_not_needed_still_counts_against():
    assert letter(replace(BEST, prompt="fail"), needed=("faithfulness",)) == "D"
    found = grade("m", "t", replace(BEST, faithfulness=None, prompt="fail"))
    assert (found.grade, found.reason) == ("D", "prompt: fail"), "what is missing could not mend it"
    found = grade("m", "t", replace(BEST, faithfulness=None, curves=at(0.5)))
    assert found.grade == "NOT GRADED" and "at most B (curves)" in found.reason


def test_risk_follows_the_grade():
    for curves, up_to in ((0.9, "high"), (0.5, "moderate"), (0.2, "low"), (0.0, None)):
        found = grade("m", "t", replace(BEST, curves=at(curves)))
        assert found.acceptable_up_to == up_to
        assert [found.acceptable(r) for r in ("low", "moderate", "high")] == [
            up_to in ("low", "moderate", "high"),
            up_to in ("moderate", "high"),
            up_to == "high",
        ]
    strict = Thresholds(acceptable={"low": "A", "moderate": "A", "high": "A"})
    assert grade("m", "t", replace(BEST, curves=at(0.5)), strict).acceptable_up_to is None


def test_circular_evidence_is_refused():
    with pytest.raises(UsageError, match="occlusion on effusion"):
        grade("occlusion", "effusion", replace(BEST, circular=True))


def test_thresholds_must_make_sense():
    for wrong in (
        {"faithfulness": (0.2, 0.5, 0.8)},
        {"excess": (0.5, 0.1, 0.0)},
        {"needed": ("beauty",)},
        {"needed": ()},
        {"acceptable": {"low": "C"}},
    ):
        with pytest.raises(UsageError):
            Thresholds(**wrong)
