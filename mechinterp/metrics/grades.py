"""Graded approximation: how approximate is this explanation, and up to which risk is that acceptable?

A grade is as good as the worst piece of its evidence. A piece that was not measured makes the whole NOT GRADED, never a
pass; but where a piece is a D, the whole is, as nothing that is missing could mend it. Each number counts with the end
of its 95 % interval that speaks against the method, so that a small sample cannot earn a good grade.

The thresholds are conventions, written down so that they can be argued with and set; no study ties them to outcomes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mechinterp.errors import UsageError
from mechinterp.metrics.statistics import Interval

__all__ = ["Evidence", "Grade", "GradeLetter", "Measured", "Piece", "Risk", "Thresholds", "grade"]

GradeLetter = Literal["A", "B", "C", "D", "NOT GRADED"]
Letter = Literal["A", "B", "C", "D"]
Risk = Literal["low", "moderate", "high"]
Outcome = Literal["pass", "fail", "not tested"]
LETTERS: tuple[Letter, ...] = ("A", "B", "C", "D")
RISKS: tuple[Risk, ...] = ("low", "moderate", "high")


@dataclass(frozen=True)
class Measured:
    """A number with its 95 % interval (patient bootstrap)."""

    value: float
    ci95: Interval

    @property
    def known(self) -> bool:
        """Whether value and interval are finite numbers."""
        return math.isfinite(self.value) and all(map(math.isfinite, self.ci95))


@dataclass(frozen=True)
class Evidence:
    """What was measured of one method on one task; None: not measured.

    Args:
        faithfulness: F with removals that the method was not built from (`held_out`), in [0, 1].
        curves: insertion minus deletion (`Curves.gain`) beyond that of a random map on the same rows, as a share of
            what the oracle of the same removals gains: 0 is random, 1 the oracle.
        randomisation: whether the map depends on the weights.
        prompt: whether it depends on the prompt.
        localisation: AUPRC minus chance over 1 minus chance, against a mask of what the model is known to use; a method
            is not to blame for a model that looks elsewhere, so give it only where that is known (a phantom).
        excess: R_excess minus its floor by permutation: leaning on the output beyond the true effects.
        circular: whether a score in here was made by the removals that the method was built from.
    """

    faithfulness: Measured | None = None
    curves: Measured | None = None
    randomisation: Outcome = "not tested"
    prompt: Outcome = "not tested"
    localisation: Measured | None = None
    excess: Measured | None = None
    circular: bool = False


@dataclass(frozen=True)
class Thresholds:
    """Least value (most, for `excess`) for A, B and C; below C is D. And the least grade for each risk.

    A fail of a randomisation check is a D: the map does not depend on what it is said to explain. `needed` names the
    pieces without which nothing is graded.
    """

    faithfulness: tuple[float, float, float] = (0.8, 0.6, 0.4)
    curves: tuple[float, float, float] = (0.7, 0.4, 0.1)
    localisation: tuple[float, float, float] = (0.5, 0.25, 0.0)
    excess: tuple[float, float, float] = (0.05, 0.15, 0.3)
    needed: tuple[str, ...] = ("faithfulness", "curves", "randomisation", "prompt", "localisation", "excess")
    acceptable: Mapping[Risk, Letter] = field(default_factory=lambda: {"low": "C", "moderate": "B", "high": "A"})

    def __post_init__(self):
        for name in ("faithfulness", "curves", "localisation"):
            a, b, c = getattr(self, name)
            if not a >= b >= c:
                raise UsageError(f"{getattr(self, name)} do not fall", where=f"thresholds, {name}")
        if not self.excess[0] <= self.excess[1] <= self.excess[2]:
            raise UsageError(f"{self.excess} do not rise", where="thresholds, excess")
        strange = set(self.needed) - set(_PIECES)
        if strange or not self.needed:
            raise UsageError(f"needs {sorted(strange) or 'nothing'}", where="needed", hint=f"of {', '.join(_PIECES)}")
        if set(self.acceptable) != set(RISKS):
            raise UsageError(f"{sorted(self.acceptable)}", where="acceptable", hint="low, moderate and high")


@dataclass(frozen=True)
class Piece:
    """One piece of evidence: its letter (None: not measured), and the number or outcome that decided, in words."""

    name: str
    letter: Letter | None
    evidence: str


@dataclass(frozen=True)
class Grade:
    """The grade of a method on a task.

    Args:
        grade: the worst letter among the pieces, or NOT GRADED where a needed one is missing and none is a D.
        acceptable_up_to: the highest risk for which this grade is enough; None: for no use, or not graded.
        pieces: all evidence.
        reason: which piece decided.
    """

    method: str
    task: str
    grade: GradeLetter
    acceptable_up_to: Risk | None
    pieces: tuple[Piece, ...]
    reason: str

    def acceptable(self, risk: Risk) -> bool:
        """Whether the approximation is acceptable for a use of that risk. What was not graded is not."""
        return self.acceptable_up_to is not None and RISKS.index(risk) <= RISKS.index(self.acceptable_up_to)


def grade(method: str, task: str, evidence: Evidence, thresholds: Thresholds | None = None) -> Grade:
    """Grade the evidence. Raises UsageError for a circular score: it is no evidence at all."""
    if evidence.circular:
        raise UsageError(
            "scored by the removals that it was built from", where=f"{method} on {task}", hint="score it held out"
        )
    limits = thresholds or Thresholds()
    pieces = tuple(_piece(name, getattr(evidence, name), limits) for name in _PIECES)
    missing = [p for p in pieces if p.letter is None and p.name in limits.needed]
    known: list[tuple[Letter, Piece]] = [(p.letter, p) for p in pieces if p.letter is not None]
    worst = max(known, key=lambda k: k[0], default=None)
    if worst is None or (missing and worst[0] != "D"):
        so_far = f"; what was measured allows at most {worst[0]} ({worst[1].name})" if worst else ""
        reason = f"{', '.join(p.name for p in missing)} not measured{so_far}"
        return Grade(method, task, "NOT GRADED", None, pieces, reason)
    letter, piece = worst
    enough: list[Risk] = [risk for risk in RISKS if letter <= limits.acceptable[risk]]
    return Grade(method, task, letter, enough[-1] if enough else None, pieces, f"{piece.name}: {piece.evidence}")


def _piece(name: str, found: Measured | Outcome | None, limits: Thresholds) -> Piece:
    if found is None:
        return Piece(name, None, "not measured")
    if isinstance(found, str):
        letters: dict[Outcome, Letter | None] = {"pass": "A", "fail": "D", "not tested": None}
        return Piece(name, letters[found], found)
    if not found.known:
        return Piece(name, None, "undefined, or without an interval")
    low, high = found.ci95
    bounds = getattr(limits, name)
    said = f"{found.value:.2f} [{low:.2f}, {high:.2f}]"
    enough = [high <= bound for bound in bounds] if name == "excess" else [low >= bound for bound in bounds]
    return Piece(name, LETTERS[enough.index(True) if any(enough) else 3], said)


_PIECES = ("faithfulness", "curves", "randomisation", "prompt", "localisation", "excess")
