"""R, F and IS by two references of the explainers, each scored by every judge that is held out from it.

What a removed element becomes is left open by the paper and moves R as well as F: it is part of the explanation of
every method that removes, and the start of every path. So an injection study may be measured twice without and with the
strongest injection, on the same rows and perturbed copies, with another reference for the explainers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mechinterp.experiments.iq_claims import direction
from mechinterp.experiments.iq_judges import Judges, by
from mechinterp.experiments.iq_study import PLAIN, Difference, Key, Study
from mechinterp.experiments.result import Claim, Row, Table
from mechinterp.explain.question import Question

__all__ = ["References", "Second", "explained_to", "level", "reference_claims", "reference_rows", "reference_tables"]

MOVING = ("R", "IS_p2", "R_null", "R_excess")

TITLES = {"F_dist": "F", "IS_p2": "IS (skip)", "IS_zero_p2": "IS (zero)"}


@dataclass(frozen=True)
class Second:
    """A second reference for the explainers: its name, the rows with it, and who judges F then."""

    name: str
    question: Question
    judges: Judges


def explained_to(condition: str, reference: str) -> str:
    """The name of a condition in which the explainers remove to their second reference."""
    return f"{condition}, explainers remove to {reference}"


@dataclass(frozen=True)
class References:
    """A study whose conditions `base` and `spur` were measured with two references of the explainers.

    Args:
        removed_to: the first reference and the second.
    """

    study: Study
    base: str
    spur: str
    removed_to: tuple[str, ...]

    def condition(self, condition: str, reference: str) -> str:
        """Where `condition` stands in the study with that reference."""
        return condition if reference == self.removed_to[0] else explained_to(condition, reference)

    def columns(self, reference: str) -> dict[str, str]:
        """Every score that is shown of explainers with that reference, and its title: R once, F and IS by each judge.

        The explainers' own fill is no judge.
        """
        judges = self.study.trials[self.condition(self.base, reference)][0].judges
        found = {"R": "R"}
        for i, judge in enumerate(judges):
            found |= {column if i == 0 else by(column, judge): by(title, judge) for column, title in TITLES.items()}
        return found

    def changes(self, reference: str, names: Sequence[str], column: str) -> dict[str, Difference]:
        """What injection changes in a score of each explainer with that reference."""
        base, spur = (self.condition(c, reference) for c in (self.base, self.spur))
        return {n: self.study.change((spur, n, PLAIN), (base, n, PLAIN), column) for n in names}

    def swapped(self, names: Sequence[str], column: str) -> dict[str, Difference]:
        """What the second reference changes in a score of each explainer, without injection."""
        after = self.condition(self.base, self.removed_to[1])
        return {n: self.study.change((after, n, PLAIN), (self.base, n, PLAIN), column) for n in names}


def reference_tables(found: References, names: Sequence[str]) -> list[Table]:
    """R, F and IS by each reference, without and with the injection, and what the injection changes."""
    tables = []
    for reference in found.removed_to:
        columns = found.columns(reference)
        for condition in (found.base, found.spur):
            here = found.condition(condition, reference)
            lines = tuple((n, *(level(found.study, (here, n, PLAIN), c) for c in columns)) for n in names)
            title = f"R, F and IS where explainers remove to {reference}, {condition}"
            tables.append(Table(title, ("explainer", *columns.values()), lines))
        moved = {c: found.changes(reference, names, c) for c in columns}
        lines = tuple((n, *(str(moved[c][n]) for c in columns)) for n in names)
        title = f"What injection changes where explainers remove to {reference} ({found.spur} minus {found.base})"
        tables.append(Table(f"{title}; paired, 95 %", ("explainer", *columns.values()), lines))
    return tables


def reference_rows(found: References, names: Sequence[str]) -> list[Row]:
    """What injection changes with the second reference, and what that reference changes in R."""
    second, rows = found.removed_to[1], []
    for column in (*found.columns(second), "slot"):
        where = {"condition": found.condition(found.spur, second)}
        for n, d in found.changes(second, names, column).items():
            rows.append(_row(f"delta {column}", d, where | {"explainer": n}))
    for n, d in found.swapped(names, "R").items():
        rows.append(_row("delta R by reference", d, {"condition": found.base, "reference": second, "explainer": n}))
    return rows


def reference_claims(found: References, slot: str, real: Sequence[str], fair: Sequence[str]) -> list[Claim]:
    """The published directions with the second reference. Claims on F count `fair` explainers only."""
    second = found.removed_to[1]
    told = f", where explainers remove to {second}"
    claims = [
        direction(f"{slot} takes a larger share of the attribution{told}", found.changes(second, real, "slot"), +1),
        direction(f"injection raises R{told}", found.changes(second, real, "R"), +1),
    ]
    for column, title in found.columns(second).items():
        if title.startswith("F"):
            claims.append(direction(f"injection lowers {title}{told}", found.changes(second, fair, column), -1))
        if title.startswith("IS (skip)"):
            claims.append(direction(f"injection raises {title}{told}", found.changes(second, real, column), +1))
    return claims


def _row(name: str, d: Difference, of: dict[str, str]) -> Row:
    return Row(name, d.value, d.n, d.ci95, of | {"p": d.p, "sd_between_models": d.between})


def level(study: Study, key: Key, column: str) -> float | str:
    """A mean score for a table; "-" for reliance on the output where no attribution moves (coverage 0)."""
    still = column.split(" by ")[0] in MOVING and study.mean(key, "coverage") == 0
    return "-" if still else study.mean(key, column)
