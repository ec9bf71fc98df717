"""What iq-multimodal says: rows, claims, tables and figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mechinterp.experiments.canvas import COLOURS, GREY, axes_of, canvas, png
from mechinterp.experiments.iq_references import level
from mechinterp.experiments.iq_study import PLAIN, Difference, Study, corrected
from mechinterp.experiments.result import Claim, Result, Row, Table

__all__ = ["APART", "COPIES", "JOINT", "KINDS", "ONE", "PAIR", "Found", "condition", "report"]

APART, JOINT, PAIR, ONE = "RBP, each modality", "RBP, both at once", "RBP, one pair", "RBP, one perturbation"
KINDS = (APART, JOINT, PAIR, ONE)
COPIES = {JOINT: 3, PAIR: 2, ONE: 1}
"""Perturbations of image and text at once; JOINT has as many as the method was published with."""
MOST = 3  # explanations that RBP of both modalities may cost
SHOWN = ("R", "F_dist", "IS_p2", "IS_zero_p2", "R_null", "R_excess", "coverage", "R_floor", "slot")


@dataclass(frozen=True)
class Found:
    """Of one model: the trials, the share of each method's attribution on words, and RBP's cost in explanations.

    `own`: the kinds of RBP that were put on each method, for those with any.
    """

    study: Study
    words: dict[str, float]
    cost: dict[tuple[str, str], float]
    own: dict[str, tuple[str, ...]]


def condition(psi: float) -> str:
    """Name of the condition with injection strength `psi`."""
    return f"psi {psi:g}"


def report(found: dict[str, Found], strengths: Sequence[float]) -> Result:
    """Rows, claims, tables and the figure; `strengths`: every psi.

    The methods of a model are those of its `words`, those whose cost was taken the ones in `cost`.
    """
    strongest = max(strengths)
    rows: list[Row] = []
    tables: list[Table] = []
    claims: list[Claim] = []
    for name, f in found.items():
        methods, own = tuple(f.words), f.own
        arms = [(m, PLAIN) for m in methods] + [(m, v) for m, kinds in own.items() for v in kinds]
        for psi in strengths:
            kept = f.study.kept(condition(psi))
            rows.append(Row("gated out", float(1 - kept.mean()), len(kept), None, {"model": name, "psi": psi}))
            for method, variant in arms:
                of = {"model": name, "explainer": method, "variant": variant, "psi": psi}
                for column in SHOWN:
                    values = f.study.values((condition(psi), method, variant), column)
                    mean = f.study.mean((condition(psi), method, variant), column)
                    rows.append(Row(column, mean, int(np.isfinite(values).sum()), None, of))
        for (method, variant), value in f.cost.items():
            rows.append(Row("cost", value, 1, None, {"model": name, "explainer": method, "variant": variant}))
        moved = _moved(f, methods, strongest)
        tables.append(_levels(name, f, methods))
        tables.append(_changes(name, moved, methods, strongest))
        if own:
            tables.append(_rbp_table(name, f, own, strengths))
        for column, sign, verb in (("R", 1, "raises R"), ("F_dist", -1, "lowers F"), ("IS_p2", 1, "raises IS")):
            claims.append(_direction(f"{name}: injection {verb}", moved[column], methods, sign))
        claims += _rbp_claims(name, f, own, strongest)
    notes = [
        "F is judged with other fillings (blur; mean word vector) than the explainers use (grey; unknown word).",
        "Patches and words are on one scale here: the attribution of the same score.",
    ]
    return Result(rows, claims, tables, _figure(found, strengths), notes)


def _moved(f: Found, methods: Sequence[str], psi: float) -> dict[str, dict[str, Difference]]:
    after, before = condition(psi), condition(0.0)
    return {
        column: {m: f.study.change((after, m, PLAIN), (before, m, PLAIN), column) for m in methods}
        for column in ("R", "F_dist", "IS_p2", "slot")
    }


def _direction(claim: str, differences: dict[str, Difference], methods: Sequence[str], sign: int) -> Claim:
    adjusted = corrected({m: differences[m] for m in methods})
    right = [m for m in methods if sign * differences[m].value > 0 and adjusted[m] < 0.05]
    wrong = [m for m in methods if sign * differences[m].value < 0 and adjusted[m] < 0.05]
    said = "; ".join(f"{m} {differences[m]}" for m in methods)
    return Claim(
        claim, len(right) == len(methods), f"{len(right)} of {len(methods)} do, {len(wrong)} the opposite: {said}"
    )


def _rbp_claims(name: str, f: Found, own: dict[str, tuple[str, ...]], psi: float) -> list[Claim]:
    at = condition(psi)
    claims = [_cost_claim(name, f, kind, perturbations) for kind, perturbations in COPIES.items()]
    for kind in (PAIR, ONE):
        gains = {m: f.study.change((at, m, kind), (at, m, PLAIN), "IS_p2") for m in own if kind in own[m]}
        if gains:
            claims.append(_direction(f"{name}: {kind}, lowers IS under injection", gains, list(gains), -1))
        same = {
            m: _apart(f.study.values((at, m, kind), "IS_p2"), f.study.values((at, m, APART), "IS_p2"))
            for m in own
            if APART in own[m]
        }
        if same:
            claims.append(
                Claim(
                    f"{name}: {kind}, does what the dear one does (IS within 0.01 in every image)",
                    max(same.values()) <= 0.01,
                    "; ".join(f"{m}: largest difference {v:.4f}" for m, v in same.items()),
                )
            )
    return claims


def _cost_claim(name: str, f: Found, kind: str, perturbations: int) -> Claim:
    """Whether RBP of image and text costs at most `MOST` explanations, for so many perturbations."""
    timed = list(dict.fromkeys(m for m, k in f.cost if k == kind))
    spent = "; ".join(f"{m} {f.cost[m, kind]:.2f}" for m in timed)
    many = f"{perturbations} perturbation{'s' if perturbations > 1 else ''}"
    return Claim(
        f"{name}: {kind} ({many}), costs at most {MOST} explanations",
        bool(timed) and max(f.cost[m, kind] for m in timed) <= MOST,
        f"{spent} (in CPU time; by count {1 + perturbations})",
    )


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference in any image that has both; nan where none has."""
    apart = np.abs(one - other)
    return float(apart[np.isfinite(apart)].max()) if np.isfinite(apart).any() else float("nan")


def _levels(name: str, f: Found, methods: Sequence[str]) -> Table:
    shown = ("R", "F_dist", "IS_p2", "IS_zero_p2", "R_null", "R_excess", "coverage")
    at = condition(0.0)
    lines = [(m, *(level(f.study, (at, m, PLAIN), c) for c in shown), f.words[m]) for m in methods]
    header = ("explainer", "R", "F", "IS (skip)", "IS (zero)", "R_null", "R_excess", "coverage", "share on words")
    return Table(f"{name}: patches and words together, no injection", header, tuple(lines))


def _changes(name: str, moved: dict, methods: Sequence[str], psi: float) -> Table:
    lines = tuple((m, *(str(moved[c][m]) for c in ("R", "F_dist", "IS_p2", "slot"))) for m in methods)
    header = ("explainer", "R", "F", "IS", "share on the injected patch and word")
    return Table(f"{name}: what injection (psi {psi:g}) changes; paired, 95 %", header, lines)


def _rbp_table(name: str, f: Found, own: dict[str, tuple[str, ...]], strengths: Sequence[float]) -> Table:
    lines = []
    for m, kinds in own.items():
        for variant in kinds:
            at = [condition(p) for p in strengths]
            cells = [str(f.study.change((c, m, variant), (c, m, PLAIN), "IS_p2")) for c in at]
            lines.append((m, variant, *cells, f.cost.get((m, variant), "not timed")))
    header = ("explainer", "RBP", *(f"change of IS, psi {p:g}" for p in strengths), "cost in explanations")
    return Table(f"{name}: RBP of both modalities", header, tuple(lines))


def _moves(ax, study: Study, method: str, strengths: Sequence[float], colour: str) -> None:
    """(R, F) of a method without injection, its 95 % intervals, and an arrow to where injection puts it."""
    ends = [(condition(p), method, PLAIN) for p in (min(strengths), max(strengths))]
    start, end = ((study.mean(key, "R"), study.mean(key, "F_dist")) for key in ends)
    ax.plot(*start, "o", markersize=4, color=colour, label=method.replace("_", " "))
    ax.plot(*end, marker="o", markersize=4, color=colour, markerfacecolor="white")
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 1.3})
    for place, column in enumerate(("R", "F_dist")):
        low, high = study.contrast(study.values(ends[0], column), ends[0][0]).ci95
        line = ([low, high], [start[1]] * 2) if place == 0 else ([start[0]] * 2, [low, high])
        if np.isfinite([low, high]).all():
            ax.plot(*line, color=colour, linewidth=0.9, alpha=0.45)


def _figure(found: dict[str, Found], strengths: Sequence[float]) -> bytes:
    figure, axes = canvas(1, 2 * len(found), 5.5 * len(found) + 1, 3.6)
    for place, (name, f) in enumerate(found.items()):
        left, right = axes[0, 2 * place], axes[0, 2 * place + 1]
        axes_of(left, f"{name}: psi {min(strengths):g} to {max(strengths):g} (arrows)", "R (moves with the output)")
        left.set_ylabel("F (matches the effects)")
        for i, m in enumerate(f.words):
            _moves(left, f.study, m, strengths, COLOURS[i % len(COLOURS)])
        left.margins(0.08)
        left.legend(fontsize=7, frameon=False)
        axes_of(right, f"{name}: what RBP costs", "explanations")
        bars = [key for key in f.cost if key[1] != PLAIN]
        right.barh(range(len(bars)), [f.cost[b] for b in bars], color=COLOURS[0], height=0.6)
        right.set_yticks(range(len(bars)), [f"{m.replace('_', ' ')}\n{v}" for m, v in bars], fontsize=6)
        right.axvline(3, color=GREY, linestyle=":")
    return png(figure)
