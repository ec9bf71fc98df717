"""Claims, tables and figure of an injection study: what the spurious element changes, and what RBP and caps change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mechinterp.experiments.canvas import COLOURS, GREY, axes_of, canvas, png
from mechinterp.experiments.iq_claims import Aim, averages, direction
from mechinterp.experiments.iq_judges import OWN_FILL, RBP_SAME, by
from mechinterp.experiments.iq_references import References, level, reference_claims, reference_rows, reference_tables
from mechinterp.experiments.iq_study import (
    BOUNDS,
    CHECK,
    PLAIN,
    RBP,
    RBP_SHARES,
    SHARES,
    TREATMENTS,
    Difference,
    Key,
    Study,
)
from mechinterp.experiments.result import Claim, Result, Row, Table

__all__ = ["Layout", "forest", "injection_result", "levels"]

SHOWN = ("R", "R_floor", "F_dist", "IS_p2", "IS_zero_p2", "R_null", "R_excess", "coverage", "slot")
HEADER = ("R", "R by shuffling", "F", "IS (skip)", "IS (zero)", "R_null", "R_excess", "coverage", "on the slot")
MOVED = ("R", "F_dist", "IS_p2", "IS_zero_p2", "R_excess", "slot")
JUDGED = ("F_dist", "IS_p2", "IS_zero_p2", "R_excess")
TITLES = {
    "F_dist": "F",
    "IS_p2": "IS (skip)",
    "IS_zero_p2": "IS (zero)",
    "R": "R",
    "R_excess": "R_excess",
    "slot": "slot",
}


AIMS = (
    Aim("bounds raise F more than RBP", "F_dist", +1),
    Aim("bounds lower IS (undefined r skipped) more than RBP", "IS_p2", -1),
    Aim("bounds lower IS (undefined r as 0) more than RBP", "IS_zero_p2", -1),
    Aim("bounds lower R_excess more than RBP", "R_excess", -1),
    Aim("bounds lower R_null more than RBP", "R_null", -1),
)
PLAIN_AIMS = (
    Aim("bounds raise F, against no treatment", "F_dist", +1),
    Aim("bounds lower R_excess, against no treatment", "R_excess", -1),
    Aim("bounds take attribution from the injected element", "slot", -1),
)
DRAWN = tuple(t for t in TREATMENTS if t != CHECK)
CHECK_AIM = (Aim("bounds have a higher F than their check alone", "F_dist", +1),)
SAME_AIM = (Aim("leaving out perturbations that move the output lowers IS under RBP", "IS_p2", -1),)
SHARES_AIM = (Aim("RBP on shares lowers IS more than scaling to shares alone", "IS_p2", -1),)


@dataclass(frozen=True)
class Layout:
    """Which arms of a study are what.

    Args:
        base, spur: the conditions before and after injection on which claims rest.
        line: conditions from weak to strong and their positions, for the figure.
        real: explainers that claims are about.
        anchors: explainers that only mark a scale.
        slot: what the spurious element is, in words.
        circular: explainers that remove single elements, as F does, though to another reference; no claim on F counts
            them.
        also: further conditions to set against `base`.
        control: the condition with the injected values of `spur`, shuffled over inputs.
        removed_to: the explainers' reference and, where `base` and `spur` were measured twice, the second one.
    """

    base: str
    spur: str
    line: tuple[tuple[str, float], ...]
    real: tuple[str, ...]
    anchors: tuple[str, ...]
    slot: str
    circular: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    control: str | None = None
    removed_to: tuple[str, ...] = ()

    @property
    def fair(self) -> tuple[str, ...]:
        """Explainers that claims on F count."""
        return tuple(n for n in self.real if n not in self.circular)


def injection_result(study: Study, layout: Layout, notes: Sequence[str]) -> Result:
    """Everything an injection study shows."""
    names, spurs = (*layout.real, *layout.anchors), (layout.spur, *layout.also)
    judged = tuple(c for name in references(study) for c in (by("F_dist", name), by("IS_p2", name)))
    moved = {
        (spur, column): {n: study.change((spur, n, PLAIN), (layout.base, n, PLAIN), column) for n in names}
        for spur in spurs
        for column in (*MOVED, *judged)
    }
    treated = {
        (condition, treatment, column): {
            n: study.change((condition, n, treatment), (condition, n, PLAIN), column) for n in names
        }
        for condition in (layout.base, *spurs)
        for treatment in TREATMENTS
        for column in (*JUDGED, "slot", *judged)
    }
    rows = _rows(study)
    for (spur, column), by_name in moved.items():
        rows += [_row(f"delta {column}", d, {"explainer": n, "condition": spur}) for n, d in by_name.items()]
    for (condition, treatment, column), by_name in treated.items():
        where = {"condition": condition, "treatment": treatment}
        rows += [_row(f"delta {column} by treatment", d, where | {"explainer": n}) for n, d in by_name.items()]
    tables = [levels(study, c, names) for c in (layout.base, layout.control) if c is not None]
    for spur in spurs:
        tables += [levels(study, spur, names), _moved_table(layout.base, spur, moved, names)]
        tables += [_treated_table(spur, treated, names, t) for t in TREATMENTS]
        tables.append(_reference_table(study, layout, spur))
    claims = [claim for spur in spurs for claim in _claims(study, layout, spur, moved, treated)]
    if layout.removed_to:
        twice = References(study, layout.base, layout.spur, layout.removed_to)
        rows += reference_rows(twice, names)
        tables += reference_tables(twice, names)
        claims += reference_claims(twice, layout.slot, layout.real, layout.fair)
    gates = [line for spur in spurs for line in gate_notes(study, spur)]
    return Result(rows, claims, tables, _figure(study, layout, treated), (*notes, *gates, *READING_NOTES))


def references(study: Study) -> tuple[str, ...]:
    """References that F is scored by beside the first; the explainers' own is among them where it was measured."""
    first = next(iter(study.trials.values()))[0]
    columns = next(iter(first.columns.values()))
    return tuple(name for name in (*first.judges[1:], OWN_FILL) if by("F_dist", name) in columns)


def aims_by(name: str) -> tuple[Aim, ...]:
    """What bounds would do against RBP by another reference."""
    return (
        Aim(f"bounds raise F more than RBP, by {name}", by("F_dist", name), +1),
        Aim(f"bounds lower IS more than RBP, by {name}", by("IS_p2", name), -1),
    )


def _claims(study: Study, layout: Layout, spur: str, moved: dict, treated: dict) -> list[Claim]:
    def of(differences: Mapping[str, Difference], names: Sequence[str]) -> dict[str, Difference]:
        return {n: differences[n] for n in names}

    base, real, fair = layout.base, layout.real, layout.fair
    told = "" if spur == layout.spur else f" ({spur})"
    claims = [
        direction(f"{layout.slot} takes a larger share of the attribution", of(moved[spur, "slot"], real), +1),
        direction("injection raises R", of(moved[spur, "R"], real), +1),
        direction("injection lowers F", of(moved[spur, "F_dist"], fair), -1),
        direction("injection raises IS", of(moved[spur, "IS_p2"], real), +1),
        direction("RBP (as written) lowers IS under injection", of(treated[spur, RBP, "IS_p2"], real), -1),
        direction("RBP (as written) raises F under injection", of(treated[spur, RBP, "F_dist"], fair), +1),
        direction("RBP on shares lowers IS under injection", of(treated[spur, RBP_SHARES, "IS_p2"], real), -1),
        *averages(study, spur, RBP_SHARES, SHARES, real, SHARES_AIM),
        *averages(study, spur, BOUNDS, RBP, fair, AIMS),
        *averages(study, spur, BOUNDS, PLAIN, fair, PLAIN_AIMS),
        *averages(study, spur, BOUNDS, CHECK, fair, CHECK_AIM),
        *averages(study, spur, RBP_SAME, RBP, real, SAME_AIM),
    ]
    for name in references(study):
        if name != OWN_FILL:
            claims += averages(study, spur, BOUNDS, RBP, fair, aims_by(name))
            claims.append(direction(f"injection lowers F by {name}", of(moved[spur, by("F_dist", name)], fair), -1))
            claims.append(direction(f"injection raises IS by {name}", of(moved[spur, by("IS_p2", name)], real), +1))
    if not told:
        claims += _following(study, layout, of)
        claims.append(
            direction("RBP (as written) lowers IS without injection", of(treated[base, RBP, "IS_p2"], real), -1)
        )
    return [Claim(c.claim + told, c.holds, c.evidence) for c in claims]


def _following(study: Study, layout: Layout, of) -> list[Claim]:
    """The same injected values dealt to other rows: what is left is that they follow the output."""
    if layout.control is None:
        return []
    spur, control = layout.spur, layout.control
    found = {
        c: {n: study.change((spur, n, PLAIN), (control, n, PLAIN), c) for n in layout.real}
        for c in ("slot", "R", "F_dist", "IS_p2", "R_excess")
    }
    said = "that follows the output, against the same values shuffled over inputs,"
    return [
        direction(f"an element {said} takes a larger share", found["slot"], +1),
        direction(f"an element {said} raises R", found["R"], +1),
        direction(f"an element {said} lowers F", of(found["F_dist"], layout.fair), -1),
        direction(f"an element {said} raises IS", found["IS_p2"], +1),
        direction(f"an element {said} raises R_excess", found["R_excess"], +1),
    ]


def _row(name: str, d: Difference, of: dict) -> Row:
    return Row(name, d.value, d.n, d.ci95, of | {"p": d.p, "sd_between_models": d.between})


def _rows(study: Study) -> list[Row]:
    rows = []
    for condition, found in study.trials.items():
        for explainer, treatment in found[0].columns:
            key: Key = (condition, explainer, treatment)
            where = {"explainer": explainer, "treatment": treatment, "condition": condition}
            for column in found[0].columns[explainer, treatment]:
                value, n = level(study, key, column), int(np.isfinite(study.values(key, column)).sum())
                rows.append(Row(column, *((float("nan"), 0) if isinstance(value, str) else (value, n)), None, where))
        kept = study.kept(condition)
        rows.append(Row("gated out", float(1 - kept.mean()), len(kept), None, {"condition": condition}))
    return rows


def levels(study: Study, condition: str, names: Sequence[str], treatment: str = PLAIN) -> Table:
    """Every score of every explainer under one condition."""
    shown = {c: h for c, h in zip(SHOWN, HEADER, strict=True) if _has(study, condition, c)}
    shown |= {by("F_dist", name): f"F by {name}" for name in references(study)}
    here = [(n, *(level(study, (condition, n, treatment), c) for c in shown)) for n in names]
    header = tuple(shown.values())
    return Table(f"Scores, {condition}", ("explainer", *header), tuple(here))


def _has(study: Study, condition: str, column: str) -> bool:
    return column in next(iter(study.trials[condition][0].columns.values()))


def _moved_table(base: str, spur: str, moved: dict, names: Sequence[str]) -> Table:
    lines = tuple((n, *(str(moved[spur, c][n]) for c in MOVED)) for n in names)
    title = f"What injection changes ({spur} minus {base}; paired, 95 %)"
    return Table(title, ("explainer", *(TITLES[c] for c in MOVED)), lines)


def _reference_table(study: Study, layout: Layout, spur: str) -> Table:
    """Bounds against RBP as written, no treatment and the check alone, mean over explainers, by every reference."""
    lines = []
    first = study.trials[spur][0].judges[0]
    for name in (first, *references(study)):
        for other in (RBP, PLAIN, CHECK):
            scores = ("F_dist", "IS_p2", "IS_zero_p2", "R_excess")
            columns = scores if name == first else tuple(by(c, name) for c in scores)
            found = [study.pooled(spur, BOUNDS, other, layout.fair, c) for c in columns]
            lines.append((name + (" (circular)" if name == OWN_FILL else ""), other, *map(str, found)))
    title = f"Bounds by every reference that F is scored by ({spur}; mean over {len(layout.fair)} explainers, 95 %)"
    return Table(title, ("F scored by", "bounds against", "F", "IS (skip)", "IS (zero)", "R_excess"), tuple(lines))


def _treated_table(spur: str, treated: dict, names: Sequence[str], treatment: str) -> Table:
    columns = (*JUDGED, "slot")
    lines = tuple((n, *(str(treated[spur, treatment, c][n]) for c in columns)) for n in names)
    title = f"What {treatment} changes ({spur}; paired with plain, 95 %)"
    return Table(title, ("explainer", *(TITLES[c] for c in columns)), lines)


def gate_notes(study: Study, condition: str) -> tuple[str, ...]:
    """How many rows the gate dropped."""
    kept = study.kept(condition)
    return (
        f"Gated out, {condition} (the injection itself moved the output by over 0.05 sd, or the row was not injected): "
        f"{1 - kept.mean():.0%} of {len(kept)} rows of {len(study.trials[condition])} models.",
    )


READING_NOTES = (
    "R, F and IS are those of iq-reading-1; the paper's own formulas are not public in full, so its numbers cannot be "
    "compared with these. High R is bad, low IS is good; IS alone cannot tell an exact explanation (R 1, F 1) from "
    "noise (R 0, F 0). 'skip' leaves out elements whose attribution never moves, 'zero' counts them as r = 0.",
    "RBP as written leaves attributions in their own units, on which its strength then depends; 'on shares' it first "
    "scales them to sum|a| = 1, which alone changes R and R_excess, as a share moves with all others ('shares only').",
    "Bounds cost 8 * (elements + 1) scores a row, once for all explainers; RBP costs 4 explanations instead of 1.",
    "Intervals: bootstrap over models, then rows within them. p: the same draws, Holm over explainers; claims on means "
    "over explainers are Holm-corrected among themselves.",
)


def _figure(study: Study, layout: Layout, treated: dict) -> bytes:
    figure, axes = canvas(2, 4, 13.5, 7.4)
    titles = {"R": "R: moves with the output", "F_dist": "F: matches the effects", "IS_p2": "IS (skip, p = 2)"}
    places = [place for _, place in layout.line]
    for ax, (column, title) in zip(axes[0], {**titles, "slot": "share on the slot"}.items(), strict=True):
        axes_of(ax, title, "strength of injection, psi")
        for i, name in enumerate((*layout.real, *layout.anchors)):
            anchor = name in layout.anchors
            line = [study.mean((condition, name, PLAIN), column) for condition, _ in layout.line]
            ax.plot(
                places,
                line,
                marker="o",
                markersize=3,
                linewidth=1.2,
                linestyle=("--", ":", "-.")[i % 3] if anchor else ("-", (0, (5, 1)))[i // len(COLOURS)],
                color=GREY if anchor else COLOURS[i % len(COLOURS)],
                label=name.replace("_", " "),
            )
        ax.set_xticks(places)
        ax.set_ylim(-0.03, 1.05 if column != "slot" else None)
    names = layout.real
    for k, (ax, column) in enumerate(zip(axes[1], JUDGED, strict=True)):
        arrow = "up is better" if column == "F_dist" else "down is better"
        axes_of(ax, f"{TITLES[column]} under {layout.spur}, against plain", f"change ({arrow})")
        forest(ax, names, {t: [treated[layout.spur, t, column][n] for n in names] for t in DRAWN}, k == 0)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8, frameon=False
    )
    return png(figure)


def forest(ax, names: Sequence[str], series: Mapping[str, Sequence[Difference]], labelled: bool) -> None:
    """Differences and their intervals, one line of dots a name, one colour a series."""
    for i, (label, differences) in enumerate(series.items()):
        at = np.arange(len(names)) + (i - (len(series) - 1) / 2) * 0.8 / (len(series) + 1)
        value = np.array([d.value for d in differences])
        ends = np.array([d.ci95 for d in differences])
        error = np.abs(np.nan_to_num(np.stack([value - ends[:, 0], ends[:, 1] - value])))
        ax.errorbar(value, at, xerr=error, fmt="o", markersize=3, linewidth=1, color=COLOURS[i], label=label)
    ax.locator_params(axis="x", nbins=5)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set_yticks(range(len(names)), [n.replace("_", " ") for n in names] if labelled else [""] * len(names))
    ax.set_ylim(len(names) - 0.5, -0.5)
    if labelled:
        ax.legend(fontsize=7, frameon=False, loc="best")
