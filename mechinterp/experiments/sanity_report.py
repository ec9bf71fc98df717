"""What iq-sanity says: rows, claims, tables and figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mechinterp.experiments.canvas import COLOURS, GREY, axes_of, canvas, png
from mechinterp.experiments.result import Claim, Result, Row, Table
from mechinterp.explain.methods import ELEMENT_METHODS
from mechinterp.metrics.sanity import Check

__all__ = ["DIFFERENT", "SAME", "report"]

DIFFERENT = ("random weights", "permuted labels")
"""Where the map must change."""
SAME = ("trained again", "other architecture")
"""Where it should stay."""
WORDS = {
    "random weights": "changes when the weights are random",
    "permuted labels": "changes when labels were permuted in training",
    "trained again": "comes back in a network trained again",
    "other architecture": "comes back in another architecture",
}
MARK = {"pass": "", "fail": " fails", "not tested": " ?"}

Checks = Mapping[str, Mapping[str, Check]]


def report(toys: Checks, phantoms: Checks, skills: Mapping[str, Sequence[float]], models: Sequence[str]) -> Result:
    """Rows, claims, tables and the figure. `toys`: by method and kind; `phantoms`: by finding and method."""
    rows = [_row(check, {"explainer": m, "other": kind}) for m, by in toys.items() for kind, check in by.items()]
    rows += [
        _row(check, {"explainer": m, "other": f"{models[1]} for {models[0]}", "finding": finding})
        for finding, by in phantoms.items()
        for m, check in by.items()
    ]
    claims = [_claim(WORDS[kind], {m: by[kind] for m, by in toys.items()}) for kind in (*DIFFERENT, *SAME)]
    for finding, by in phantoms.items():
        claims.append(_claim(f"for {finding} in {models[0]} comes back in {models[1]}", by))
    kinds = (*DIFFERENT, *SAME)
    lines = tuple(
        (_named(m), f"{next(iter(by.values())).baseline:.2f}", *(_cell(by[kind]) for kind in kinds))
        for m, by in toys.items()
    )
    tables = [Table("Networks on shapes: likeness to the trained network's map",
                    ("explainer", "maps of different images", *kinds), lines)]  # fmt: skip
    if phantoms:
        methods = list(next(iter(phantoms.values())))
        lines = tuple(
            (_named(m), *(f"{_cell(by[m])}; {by[m].baseline:.2f}" for by in phantoms.values())) for m in methods
        )
        tables.append(Table(f"{models[0]} against {models[1]}: likeness; that of maps of different patients",
                            ("explainer", *phantoms), lines))  # fmt: skip
    notes = [
        "Likeness is the rank correlation of the maps' sizes, mean [95 % interval over networks, or over patients]; "
        "? : the interval holds the likeness of maps of different images, so nothing is decided.",
        "A map that does not come back can be the models' doing: two models of equal skill may look at other things.",
        "Images classified rightly, not trained on (permuted labels: of the set learnt by heart): "
        + "; ".join(f"{kind or 'trained'} {min(v):.2f} to {max(v):.2f}" for kind, v in skills.items())
        + ".",
    ]
    return Result(rows, claims, tables, _figure(toys), notes)


def _row(check: Check, of: dict[str, str]) -> Row:
    finite = bool(np.isfinite(check.ci95).all())
    more = {"baseline": check.baseline, "verdict": check.verdict}
    return Row("likeness", check.value, check.n, (check.ci95[0], check.ci95[1]) if finite else None, {**of, **more})


def _named(method: str) -> str:
    return f"*{method}*" if ELEMENT_METHODS[method].anchor else method


def _cell(check: Check) -> str:
    low, high = check.ci95
    return f"{check.value:.2f} [{low:.2f}, {high:.2f}]{MARK[check.verdict]}"


def _claim(words: str, checks: Mapping[str, Check]) -> Claim:
    real = {m: c for m, c in checks.items() if not ELEMENT_METHODS[m].anchor}
    by = {v: [m for m, c in real.items() if c.verdict == v] for v in MARK}
    evidence = f"{len(by['pass'])} of {len(real)} do; not: {', '.join(by['fail']) or 'none'}"
    if by["not tested"]:
        evidence += f"; undecided: {', '.join(by['not tested'])}"
    return Claim(f"every explainer's map {words}", len(by["pass"]) == len(real), evidence)


def _figure(toys: Checks) -> bytes:
    """Likeness less that of maps of different images: left of 0 is another map, right of it the same."""
    names = sorted(toys, key=lambda m: (not ELEMENT_METHODS[m].anchor, m), reverse=False)
    kinds = (*DIFFERENT, *SAME)
    figure, axes = canvas(1, len(kinds), 2.9 * len(kinds), 0.24 * len(names) + 1.3, sharey=True)
    for ax, kind in zip(axes[0], kinds, strict=True):
        axes_of(ax, kind, "likeness, less that of other images", "")
        ax.axvline(0, color=GREY, linewidth=0.8)
        for y, method in enumerate(names):
            check = toys[method][kind]
            colour = GREY if ELEMENT_METHODS[method].anchor else COLOURS[{"pass": 2, "fail": 1}.get(check.verdict, 0)]
            ax.plot(np.array(check.ci95) - check.baseline, [y, y], color=colour, linewidth=1.2)
            ax.plot(check.value - check.baseline, y, "o", color=colour, markersize=4)
        ax.set_xlim(-1.05, 1.05)
    axes[0, 0].set_yticks(range(len(names)), [m.replace("_", " ") for m in names])
    figure.suptitle(
        "must lie left in the first two, right in the others (green: it does; anchors grey)", fontsize=8, color=GREY
    )
    return png(figure)
