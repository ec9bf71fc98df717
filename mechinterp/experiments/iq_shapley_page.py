"""Claims, tables and figure of iq-shapley-rbp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mechinterp.experiments.canvas import axes_of, canvas, png
from mechinterp.experiments.iq_claims import Aim, averages, direction
from mechinterp.experiments.iq_judges import OWN_FILL, RBP_SAME, by
from mechinterp.experiments.iq_page import TITLES, forest
from mechinterp.experiments.iq_study import PLAIN, Difference, Study
from mechinterp.experiments.result import Claim, Result, Row, Table

__all__ = ["Judged", "shapley_result"]

BY_FILLS = ("F_dist", "IS_p2", "IS_zero_p2", "R_excess")
COLUMNS = ("F_dist", "IS_p2", "IS_zero_p2", "R_excess", "R_null")
COMPARED = ("RBP", RBP_SAME, "RBP on shares", "RBP, lambda 10", "bounds", "own")
CONTROLS = ("shares only", "RBP, lambda 10, dealt at random", "10 % of noise", "check alone")
HEADER = {**TITLES, "R_null": "R_null"}
SIZES = {
    "F_dist": "raises F_dist more",
    "IS_p2": "lowers IS (skip) more",
    "IS_zero_p2": "lowers IS (zero) more",
}
AIMS = (
    Aim("{0} raises F_dist more than RBP as written", "F_dist", +1),
    Aim("{0} lowers IS (skip) more than RBP as written", "IS_p2", -1),
    Aim("{0} lowers IS (zero) more than RBP as written", "IS_zero_p2", -1),
    Aim("{0} lowers R_excess more than RBP as written", "R_excess", -1),
    Aim("{0} lowers R_null more than RBP as written", "R_null", -1),
)
PLAIN_AIMS = (
    Aim("{0} raises F_dist, against no treatment", "F_dist", +1),
    Aim("{0} lowers R_excess, against no treatment", "R_excess", -1),
)
ALONE_AIMS = (Aim("{0} has a higher F_dist than its check alone", "F_dist", +1),)
MITIGATIONS = {"bounds": "what ships (bounds)", "own": "the form chosen on development functions"}


@dataclass(frozen=True)
class Judged:
    """What was compared: explainers, the mitigation chosen on development functions, and the test functions."""

    real: tuple[str, ...]
    anchors: tuple[str, ...]
    chosen: str
    tried: list[tuple[str, float, float, float, float, float]]
    known: tuple[str, ...]
    learnt: tuple[str, ...]


def shapley_result(study: Study, judged: Judged) -> Result:
    """Everything the experiment shows."""
    names = (*judged.real, *judged.anchors)

    def against(treatment: str, other: str, column: str, of: Sequence[str]) -> dict[str, Difference]:
        return {n: study.change(("test", n, treatment), ("test", n, other), column) for n in of}

    changed = {(t, c): against(t, PLAIN, c, names) for t in (*COMPARED, *CONTROLS) for c in COLUMNS}
    stability = {
        (treatment, c): study.change(("test", "shapley", treatment), ("test", "shapley", PLAIN), c)
        for treatment in STABILITY
        for c in COLUMNS
    }
    rows = _rows(study, changed, stability)
    tables = [_tried(judged), _levels(study, names), *(_changes(changed, names, t) for t in (*COMPARED, *CONTROLS))]
    tables += [_stability(stability), _by_reference(study, judged.real)]
    return Result(
        rows,
        _claims(study, judged, changed, against),
        tables,
        _figure(changed, stability, judged.real),
        _notes(study, judged),
    )


STABILITY = {
    "RBP on shares": "perturbations, lambda 0.1",
    "coalition sizes, lambda 0.1": "coalition sizes, lambda 0.1",
    "RBP on shares, lambda 10": "perturbations, lambda 10",
    "coalition sizes, lambda 10": "coalition sizes, lambda 10",
}


def _claims(study: Study, judged: Judged, changed: Mapping, against) -> list[Claim]:
    real = judged.real

    def of(key: tuple[str, str]) -> dict[str, Difference]:
        return {n: changed[key][n] for n in real}

    claims = [
        direction("RBP (as written) lowers IS (skip)", of(("RBP", "IS_p2")), -1),
        direction("RBP (as written) raises F_dist", of(("RBP", "F_dist")), +1),
    ]
    for strength in ("0.1", "10"):
        rival = "RBP on shares" if strength == "0.1" else "RBP on shares, lambda 10"
        for column, sign in (("F_dist", +1), ("IS_p2", -1), ("IS_zero_p2", -1)):
            d = study.change(
                ("test", "shapley", f"coalition sizes, lambda {strength}"), ("test", "shapley", rival), column
            )
            said = f"stability from coalition sizes {SIZES[column]} than from perturbations (lambda {strength})"
            claims.append(direction(said, {"shapley": d}, sign))
    for label in MITIGATIONS:
        claims += averages(study, "test", label, "RBP", real, _aims(label, AIMS))
        claims += averages(study, "test", label, PLAIN, real, _aims(label, PLAIN_AIMS))
        claims += averages(study, "test", label, "check alone", real, _aims(label, ALONE_AIMS))
        for name in study.trials["test"][0].judges[1:]:
            claims += averages(study, "test", label, "RBP", real, _aims(label, AIMS[:3], name))
    same = Aim("leaving out perturbations that move the output lowers IS under RBP", "IS_p2", -1)
    claims += averages(study, "test", RBP_SAME, "RBP", real, [same])
    harder = against("RBP, lambda 10", "RBP, lambda 10, dealt at random", "IS_p2", real)
    claims += [
        direction("RBP with lambda 10 lowers IS more than the same shrinkage dealt at random", harder, -1),
        _unbought(of(("10 % of noise", "IS_p2"))),
    ]
    return claims


def _aims(label: str, aims: Sequence[Aim], judge: str = "") -> list[Aim]:
    """The aims said of one mitigation, by the first judge or by another."""
    said, told = MITIGATIONS[label], f", by {judge}" if judge else ""
    return [Aim(a.claim.format(said) + told, by(a.column, judge) if judge else a.column, a.sign) for a in aims]


def _unbought(noise: Mapping[str, Difference]) -> Claim:
    """False where noise alone lowers IS of any method."""
    lowered = direction("", noise, -1)
    bought = int(lowered.evidence.split(" ", 1)[0])
    return Claim("10 % of noise lowers IS of no method: IS cannot be bought", bought == 0, lowered.evidence)


def _rows(study: Study, changed: Mapping, stability: Mapping) -> list[Row]:
    rows = []
    for condition, found in study.trials.items():
        for explainer, treatment in found[0].columns:
            where = {"explainer": explainer, "treatment": treatment, "functions": condition}
            for column in found[0].columns[explainer, treatment]:
                key = (condition, explainer, treatment)
                n = int(np.isfinite(study.values(key, column)).sum())
                rows.append(Row(column, study.mean(key, column), n, None, where))
    for (treatment, column), by_name in changed.items():
        for n, d in by_name.items():
            of = {"explainer": n, "treatment": treatment, "p": d.p, "sd_between_functions": d.between}
            rows.append(Row(f"delta {column}", d.value, d.n, d.ci95, of))
    for (treatment, column), d in stability.items():
        rows.append(Row(f"delta {column}", d.value, d.n, d.ci95, {"explainer": "shapley", "treatment": treatment}))
    return rows


def _tried(judged: Judged) -> Table:
    lines = tuple(
        (f"**{label}** (chosen)" if label == judged.chosen else label, *(f"{v:+.3f}" for v in rest))
        for label, *rest in judged.tried
    )
    header = ("form", "F less R_excess", "F", "R_excess", "IS (skip)", "IS (zero)")
    return Table("Forms of our own mitigation on the development functions; mean change over explainers", header, lines)


def _levels(study: Study, names: Sequence[str]) -> Table:
    shown = ("R", "R_floor", *COLUMNS, "coverage")
    lines = tuple((n, *(study.mean(("test", n, PLAIN), c) for c in shown)) for n in names)
    header = ("explainer", "R", "R by shuffling", *(HEADER[c] for c in COLUMNS), "coverage")
    return Table("Plain explanations of the test functions", header, lines)


def _changes(changed: Mapping, names: Sequence[str], treatment: str) -> Table:
    lines = tuple((n, *(str(changed[treatment, c][n]) for c in COLUMNS)) for n in names)
    return Table(
        f"What {treatment} changes (test functions; paired with plain, 95 %)", ("explainer", *_header()), lines
    )


def _stability(stability: Mapping) -> Table:
    lines = tuple((label, *(str(stability[t, c]) for c in COLUMNS)) for t, label in STABILITY.items())
    title = "Shapley values shrunk by two kinds of instability, all on shares (test functions; against plain)"
    return Table(title, ("instability from", *_header()), lines)


def _by_reference(study: Study, names: Sequence[str]) -> Table:
    first, *others = study.trials["test"][0].judges
    lines = []
    for name in (first, *others, OWN_FILL):
        columns = BY_FILLS if name == first else tuple(by(c, name) for c in BY_FILLS)
        for label, said in MITIGATIONS.items():
            for against in ("RBP", PLAIN, "check alone"):
                found = [study.pooled("test", label, against, names, c) for c in columns]
                lines.append((name + (" (circular)" if name == OWN_FILL else ""), said, against, *map(str, found)))
    title = "Mitigations by every reference that F is scored by (test functions; mean over explainers, 95 %)"
    return Table(title, ("F scored by", "mitigation", "against", *(HEADER[c] for c in BY_FILLS)), tuple(lines))


def _header() -> tuple[str, ...]:
    return tuple(HEADER[c] for c in COLUMNS)


def _notes(study: Study, judged: Judged) -> tuple[str, ...]:
    n = len(study.kept("test"))
    return (
        f"Test: {n} rows of {len(study.trials['test'])} functions: {', '.join((*judged.known, *judged.learnt))} (in "
        "the quick version the first few). Development functions are others.",
        "How the forms came about: checks filled from rows were tried first, and a run of iq-tabular (networks of "
        "x1 sin(x2)) showed that they lower F; checks filled from the reference were added after that. The choice "
        "among them was made on the development functions alone, shapes, captions and the table were seen after it, "
        "and bounds were taken and ship. F was then scored by the reference that bounds fill from. Scored by "
        f"another, as here, the same rule takes: {judged.chosen}.",
        "Costs, in explanations and scores a row: RBP 4 explanations; coalition sizes 1 (all 64 subsets are known "
        "anyway); own mitigation (bounds, cut only) 1 explanation and 8 x 7 scores, shared by all explainers; output "
        "projected out and mean over perturbations 9 explanations.",
        "RBP 'as written' leaves attributions in their own units; 'on shares' scales to sum|a| = 1 first, which "
        "alone raises R_excess, as a share moves with all others ('shares only').",
        "IS falls when attributions get noisier: r is diluted by the square root of signal to noise, F hardly moves. A "
        "fall of IS counts for something only beside F and R_excess.",
        "R_null counts columns whose removal changes nothing; under 'skip', an attribution that is exactly 0 there is "
        "left out of R, so taking noise off dummies can raise IS.",
        "Intervals: bootstrap over functions, then rows within them; p from the same draws, Holm over explainers.",
    )


def _figure(changed: Mapping, stability: Mapping, real: Sequence[str]) -> bytes:
    figure, axes = canvas(2, 4, 13.5, 8)
    shown = ("F_dist", "IS_p2", "IS_zero_p2", "R_excess")
    for k, column in enumerate(shown):
        arrow = "up is better" if column == "F_dist" else "down is better"
        axes_of(axes[0, k], f"change of {HEADER[column]}", arrow)
        series = {
            t: [changed[t, column][n] for n in real]
            for t in ("RBP", "RBP, lambda 10", "bounds", "own", "10 % of noise")
        }
        forest(axes[0, k], real, series, False)
        axes_of(axes[1, k], f"Shapley values: {HEADER[column]}", arrow)
        forest(
            axes[1, k],
            list(STABILITY.values()),
            {"": [stability[t, column] for t in STABILITY]},
            False,
        )
    for row, labels in ((0, real), (1, STABILITY.values())):
        axes[row, 0].set_yticklabels([n.replace("_", " ").replace(", ", ",\n") for n in labels])
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False
    )
    return png(figure)
