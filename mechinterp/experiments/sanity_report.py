"""What iq-sanity says: rows, claims, tables and figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mechinterp.experiments.canvas import COLOURS, GREY, axes_of, canvas, png
from mechinterp.experiments.result import Claim, Result, Row, Table
from mechinterp.explain.methods import ELEMENT_METHODS
from mechinterp.metrics.sanity import Check

__all__ = ["ALL", "DIFFERENT", "ON_TOYS", "Checks", "report"]

DIFFERENT = ("random weights", "permuted labels")
"""Where the map must change."""
ON_TOYS = (*DIFFERENT, "trained again", "other architecture")
"""Kinds of other network; where it is not in DIFFERENT the map should stay."""
ALL = "all findings"
WORDS = {
    "random weights": "changes when the weights are random",
    "permuted labels": "changes when labels were permuted in training",
    "trained again": "comes back in a network trained again",
    "other architecture": "comes back in another architecture",
    "another dictionary": "comes back with another dictionary of the same model",
    "trained on": "comes back in phantom-llava, whose tower was trained on from it",
}
VERDICTS = {
    "pass": ("lies where it must", COLOURS[2]),
    "fail": ("lies where it must not", COLOURS[1]),
    "not tested": ("undecided", COLOURS[0]),
}
"""What a colour of the figure says, by verdict."""
MARK = {"pass": "", "fail": " fails", "not tested": " ?"}

Checks = Mapping[str, Mapping[str, Check]]


def report(toys: Checks, models: Mapping[str, Mapping[str, Checks]], skills: Mapping[str, Sequence[float]]) -> Result:
    """Rows, claims, tables and the figure. Checks by method and kind: of `toys`, and by model and finding."""
    rows = [_row(check, {"explainer": m, "other": kind}) for m, by in toys.items() for kind, check in by.items()]
    rows += [
        _row(check, {"explainer": m, "other": kind, "finding": finding, "model": model})
        for model, by_finding in models.items()
        for finding, by_method in by_finding.items()
        for m, by in by_method.items()
        for kind, check in by.items()
    ]
    claims = [_claim(WORDS[kind], {m: by[kind] for m, by in toys.items()}) for kind in ON_TOYS]
    tables = [_table("Networks on shapes: likeness to the trained network's map", toys)]
    for model, by_finding in models.items():
        together = by_finding[ALL]
        for kind in _kinds(together):
            claims.append(
                _claim(f"of {model} {WORDS[kind]}", {m: by[kind] for m, by in together.items() if kind in by})
            )
        tables += [_table(f"{model}, {finding}: likeness to its map", by) for finding, by in by_finding.items()]
    notes = [
        "Likeness is the rank correlation of the maps' sizes, mean [95 % interval over networks, or over patients]; "
        "? : the interval holds the likeness of maps of different images, so nothing is decided.",
        "A map that does not come back can be the models' doing: two models of equal skill may look at other things.",
        "Images classified rightly, not trained on (permuted labels: of the set learnt by heart): "
        + "; ".join(f"{kind or 'trained'} {min(v):.2f} to {max(v):.2f}" for kind, v in skills.items())
        + ".",
    ]
    drawn = {"networks on shapes": toys} | {f"{model}, {ALL}": found[ALL] for model, found in models.items()}
    return Result(rows, claims, tables, _figure(drawn), notes)


def _kinds(checks: Checks) -> list[str]:
    """Every kind of other network that any method was held beside, in the order in which they came."""
    return list(dict.fromkeys(kind for by in checks.values() for kind in by))


def _drawn(checks: Checks) -> list[str]:
    """The kinds worth a panel: that of one method alone stands in the table."""
    return [kind for kind in _kinds(checks) if sum(kind in by for by in checks.values()) > 1]


def _table(title: str, checks: Checks) -> Table:
    kinds = _kinds(checks)
    lines = tuple(
        (
            _named(m),
            f"{next(iter(by.values())).baseline:.2f}",
            *(_cell(by[kind]) if kind in by else "" for kind in kinds),
        )
        for m, by in checks.items()
    )
    return Table(title, ("explainer", "maps of different images", *kinds), lines)


def _row(check: Check, of: dict[str, str]) -> Row:
    finite = bool(np.isfinite(check.ci95).all())
    more = {"baseline": check.baseline, "verdict": check.verdict}
    return Row("likeness", check.value, check.n, (check.ci95[0], check.ci95[1]) if finite else None, {**of, **more})


def _anchor(method: str) -> bool:
    return method in ELEMENT_METHODS and ELEMENT_METHODS[method].anchor


def _named(method: str) -> str:
    return f"*{method}*" if _anchor(method) else method


def _cell(check: Check | None) -> str:
    if check is None:
        return ""
    low, high = check.ci95
    return f"{check.value:.2f} [{low:.2f}, {high:.2f}]{MARK[check.verdict]}"


def _claim(words: str, checks: Mapping[str, Check]) -> Claim:
    real = {m: c for m, c in checks.items() if not _anchor(m)}
    by = {v: [m for m, c in real.items() if c.verdict == v] for v in MARK}
    evidence = f"{len(by['pass'])} of {len(real)} do; not: {', '.join(by['fail']) or 'none'}"
    if by["not tested"]:
        evidence += f"; undecided: {', '.join(by['not tested'])}"
    return Claim(f"every explainer's map {words}", len(by["pass"]) == len(real), evidence)


def _figure(drawn: Mapping[str, Checks]) -> bytes:
    """Likeness less that of maps of different images, a row each: left of 0 is another map, right of it the same."""
    of_row = {title: sorted(checks, key=lambda m: (not _anchor(m), m)) for title, checks in drawn.items()}
    high = [0.24 * len(names) + 1.0 for names in of_row.values()]
    wide = max(len(_drawn(checks)) for checks in drawn.values())
    figure, axes = canvas(
        len(drawn), wide, 2.7 * wide, sum(high) + 0.5, sharey="row", gridspec_kw={"height_ratios": high}
    )
    for line, (title, checks) in zip(axes, drawn.items(), strict=True):
        of, names = _drawn(checks), of_row[title]
        for ax in line[len(of) :]:
            ax.set_axis_off()
        for ax, kind in zip(line, of, strict=False):
            must = "must lie left" if kind in DIFFERENT else "must lie right"
            axes_of(ax, f"{kind}: {must}", "likeness, less that of other images", "").title.set_fontsize(8.5)
            ax.axvline(0, color=GREY, linewidth=0.8)
            for y, method in enumerate(names):
                if kind not in checks.get(method, {}):
                    continue
                check = checks[method][kind]
                colour = GREY if _anchor(method) else VERDICTS[check.verdict][1]
                ax.plot(np.array(check.ci95) - check.baseline, [y, y], color=colour, linewidth=1.2)
                ax.plot(check.value - check.baseline, y, "o", color=colour, markersize=4)
            ax.set_xlim(-1.05, 1.05)
        line[0].set_yticks(range(len(names)), [m.replace("_", " ") for m in names])
        line[0].set_ylim(-0.6, len(names) - 0.4)
        line[0].set_ylabel(title, fontsize=8)
    said = [*VERDICTS.values(), ("anchor, which explains nothing", GREY)]
    keys = [axes[0, 0].plot([], [], "o-", color=colour, label=words, markersize=4)[0] for words, colour in said]
    figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), fontsize=9, frameon=False)
    return png(figure)
