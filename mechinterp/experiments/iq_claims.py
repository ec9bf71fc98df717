"""Claims on paired differences: that every explainer moves one way, or that explainers do on average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mechinterp.experiments.iq_study import Difference, Study, corrected
from mechinterp.experiments.result import Claim

__all__ = ["Aim", "averages", "direction"]


@dataclass(frozen=True)
class Aim:
    """A claim about the change of one score, and the sign that makes it true."""

    claim: str
    column: str
    sign: int


def direction(claim: str, differences: Mapping[str, Difference], sign: int) -> Claim:
    """True where every method moves that way beyond chance (Holm over methods); undefined ones count as not moving."""
    adjusted = corrected(differences)
    right = [n for n, d in differences.items() if sign * d.value > 0 and adjusted[n] < 0.05]
    wrong = [n for n, d in differences.items() if sign * d.value < 0 and adjusted[n] < 0.05]
    said = "; ".join(f"{n} {d}" for n, d in differences.items())
    evidence = f"{len(right)} of {len(differences)} do, {len(wrong)} do the opposite: {said}"
    return Claim(claim, bool(differences) and len(right) == len(differences), evidence)


def averages(
    study: Study, condition: str, after: str, before: str, names: Sequence[str], wanted: Sequence[Aim]
) -> list[Claim]:
    """One claim a score on treatment `after` against `before`: the mean over explainers, Holm over the claims."""
    pooled = {aim.claim: study.pooled(condition, after, before, names, aim.column) for aim in wanted}
    adjusted = corrected(pooled)
    claims = []
    for aim in wanted:
        d = pooled[aim.claim]
        each = {n: study.change((condition, n, after), (condition, n, before), aim.column) for n in names}
        said = "; ".join(f"{n} {one}" for n, one in each.items())
        holds = bool(aim.sign * d.value > 0 and adjusted[aim.claim] < 0.05)
        claims.append(
            Claim(aim.claim, holds, f"mean over {len(names)} explainers {d}, p {adjusted[aim.claim]:.3f}: {said}")
        )
    return claims
