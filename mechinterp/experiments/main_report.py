"""What iq-main says: rows, claims, one table a model, the injection, and the figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mechinterp.audit.explainers import Compared
from mechinterp.audit.explainers.folder import BESIDE
from mechinterp.audit.explainers.records import missing
from mechinterp.experiments.canvas import COLOURS, GREY, INK, axes_of, canvas, png
from mechinterp.experiments.iq_study import PLAIN, Difference, Study, corrected
from mechinterp.experiments.main_shortcut import Shown, least_p, shortcut_claims, shortcut_rows, shortcut_table
from mechinterp.experiments.result import Claim, Result, Row, Table
from mechinterp.metrics.iq import expected_absolute_r
from mechinterp.metrics.statistics import PatientBootstrap, holm, percentile_interval, sign_flip_p

__all__ = ["Found", "picture", "report"]

NUMBERS = (
    "R", "F", "IS", "IS_zero", "R_null", "R_excess", "coverage", "F_corr", "F_own", "R_floor", "auprc", "auprc_chance",
    "randomisation", "prompt_randomisation", "other_prompt", "label_randomisation", "repeatability", "reproducibility",
    "seconds",
)  # fmt: skip


TITLES = {
    "label_randomisation": "permuted labels",
    "repeatability": "trained again",
    "reproducibility": "other architecture",
}
SCORES = (
    ("R", "R"),
    ("F", "F"),
    ("IS", "IS (skip)"),
    ("IS_zero", "IS (zero)"),
    ("R_null", "R_null"),
    ("R_excess", "R_excess"),
    ("coverage", "coverage"),
)
PROMPTED = {
    "randomisation": "random weights",
    "prompt_randomisation": "nonsense prompt",
    "other_prompt": "prompt of another finding",
}
SAME = ("repeatability", "reproducibility")
CLAIMS = {
    "randomisation": "changes with the weights",
    "prompt_randomisation": "changes with the prompt",
    "label_randomisation": "changes with the labels of training",
    "repeatability": "comes back when the model is trained again",
    "reproducibility": "comes back in another architecture",
}


@dataclass(frozen=True)
class Found:
    """Comparisons by model, the injection, its methods and strengths, and the attribute of the planted shortcut.

    `shown`: relevance on the shortcut in more images, by model.
    """

    compared: dict[str, Compared]
    turned: Study
    inverted: Sequence[str]
    strengths: Sequence[float]
    shortcut: str
    shown: Mapping[str, Shown] = field(default_factory=dict)


def report(found: Found, real: bool) -> Result:
    """Rows, claims, tables and the figure."""
    rows = [r for name, compared in found.compared.items() for r in _rows(name, compared)]
    tables = [_table(name, compared, found.shortcut) for name, compared in found.compared.items()]
    moved = _moved(found)
    tables.append(_turned(found, moved))
    for column, by_method in moved.items():
        for method, d in by_method.items():
            of = {"explainer": method, "psi": max(found.strengths)}
            rows.append(Row(f"delta {column}", d.value, d.n, d.ci95, of))
    claims = [claim for name, compared in found.compared.items() for claim in _claims(name, compared)]
    claims += shortcut_claims(found.shown, found.shortcut)
    rows += shortcut_rows(found.shown, found.shortcut)
    pairs = shortcut_table(found.shown, found.shortcut)
    tables += [pairs] if pairs else []
    claims += [_direction(found, moved, column, sign) for column, sign in (("R", 1), ("F_dist", -1), ("IS_p2", 1))]
    notes = [
        "F is judged by replacing each patch with the blurred image; methods fill with mean grey. Methods that remove "
        "patches one at a time are still closest in kind to the judge; F_own (grey) is in result.json.",
        "-: not defined, as no element's attribution moves (coverage 0). IS (skip) leaves out what never moves, "
        "IS (zero) counts it as R = 0.",
        "Likeness after random weights or another prompt is the rank correlation of the maps' sizes; = marks a "
        "method whose maps stay more alike than maps of different patients (a failure). Beside other models: = the "
        "same for permuted labels; ≠ did not come back, which may be the models' doing as well as the method's.",
        f"R by chance with 30 draws: {expected_absolute_r(30):.2f}.",
    ]
    if not real:
        notes.append("cxr-clip on real radiographs: NOT TESTED, no folder was given (--data FOLDER).")
    return Result(rows, claims, tables, _figure(found), notes)


def _rows(name: str, compared: Compared) -> list[Row]:
    made = []
    for r in compared.rows:
        for key in [*NUMBERS, *(k for k in r if k.startswith("mass "))]:
            value = r.get(key)
            interval = r["ci95"].get(key)
            of = {"model": name, "explainer": r["method"], "anchor": r["anchor"]}
            number = float("nan") if value is None else float(value)
            n = 0 if value is None else r["n"].get(key, r["images"])
            made.append(Row(key, number, n, (interval[0], interval[1]) if interval else None, of))
    return made


def _table(name: str, compared: Compared, shortcut: str) -> Table:
    mass = f"mass {shortcut}"
    beside = [column for column in BESIDE if any(r.get(column[0]) is not None for r in compared.rows)]
    lines = []
    for r in sorted(compared.rows, key=lambda r: (r["anchor"], -(r["F"] or 0))):
        cells: list[Any] = [f"*{r['method']}*" if r["anchor"] else r["method"]]
        cells += [_cell(r, key) for key in (*(key for key, _ in SCORES), "auprc", mass)]
        cells += [_checked(r, key) for key in (*PROMPTED, *(key for key, _ in beside))]
        lines.append((*cells, f"{r['seconds']:.3f}"))
    of_masks = (f"AUPRC{_of(compared, 'auprc')}", f"relevance on the {shortcut} (1: chance){_of(compared, mass)}")
    header = ("explainer", *(title for _, title in SCORES), *of_masks, *PROMPTED.values(),
              *(TITLES[key] for key, _ in beside), "seconds")  # fmt: skip
    made = compared.made
    return Table(f"{name}: {made.target.name}, {len(made.rows)} test patients (*anchors*)", header, tuple(lines))


def _of(compared: Compared, key: str) -> str:
    """How many images a column is of, where it is not all of them."""
    n = max([r["n"].get(key, 0) for r in compared.rows if r.get(key) is not None], default=0)
    return f", {n} images" if 0 < n < len(compared.made.rows) else ""


def _cell(r: Mapping[str, Any], key: str) -> str:
    value, interval = r.get(key), r["ci95"].get(key)
    if value is None:
        return missing(r, key)
    return f"{value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def _checked(r: Mapping[str, Any], key: str) -> str:
    if key in TITLES and r.get(key) is None:
        return ""
    failed = " ≠" if key in SAME else " ="
    verdict = {"fail": failed, "pass": "", "not tested": " ?"}[r[f"{key}_verdict"]]
    return _cell(r, key) + verdict


def _claims(name: str, compared: Compared) -> list[Claim]:
    real = [r for r in compared.rows if not r["anchor"]]
    made = compared.made
    claims = []
    if "random" in made.judged:
        noise = made.judged["random"].scores.F_dist
        gains = {r["method"]: made.judged[r["method"]].scores.F_dist - noise for r in real}
        p = dict(zip(gains, holm(np.array([sign_flip_p(g[np.isfinite(g)]) for g in gains.values()])), strict=True))
        better = [m for m, g in gains.items() if np.nanmean(g) > 0 and p[m] < 0.05]
        said = "; ".join(f"{m} {_interval(g, made.patients)}" for m, g in gains.items())
        least = least_p(min((int(np.isfinite(g).sum()) for g in gains.values()), default=0), len(gains))
        power = f" (NOT TESTED: with {len(noise)} images no p after Holm is below {least:.2f})" if least >= 0.05 else ""
        claims.append(Claim(f"{name}: every explainer is more faithful than random maps", len(better) == len(gains),
                            f"{len(better)} of {len(gains)} are{power}: {said}"))  # fmt: skip
    for key, words in CLAIMS.items():
        asked = [r for r in real if key not in TITLES or r.get(key) is not None]
        if not asked:
            continue  # the model has no such control
        failed = [r["method"] for r in asked if r[f"{key}_verdict"] == "fail"]
        open_ = [r["method"] for r in asked if r[f"{key}_verdict"] == "not tested"]
        evidence = f"fail: {', '.join(failed) or 'none'}; undecided: {', '.join(open_) or 'none'} (of {len(asked)})"
        claims.append(Claim(f"{name}: every explainer's map {words}", not failed and not open_, evidence))
    return claims


def _interval(gains: np.ndarray, patients: tuple[str, ...]) -> str:
    kept = np.isfinite(gains)
    if kept.sum() < 2:
        return "undefined"
    draws = PatientBootstrap.of([p for p, k in zip(patients, kept, strict=True) if k]).mean(gains[kept])
    low, high = percentile_interval(draws)
    return f"{gains[kept].mean():+.2f} [{low:+.2f}, {high:+.2f}]"


def _moved(found: Found) -> dict[str, dict[str, Difference]]:
    after, before = (f"psi {psi:g}" for psi in (max(found.strengths), min(found.strengths)))
    return {
        column: {m: found.turned.change((after, m, PLAIN), (before, m, PLAIN), column) for m in found.inverted}
        for column in ("R", "F_dist", "IS_p2", "R_excess", "slot")
    }


def _direction(found: Found, moved: dict[str, dict[str, Difference]], column: str, sign: int) -> Claim:
    differences = moved[column]
    adjusted = corrected(differences)
    right = [m for m, d in differences.items() if sign * d.value > 0 and adjusted[m] < 0.05]
    wrong = [m for m, d in differences.items() if sign * d.value < 0 and adjusted[m] < 0.05]
    word = {"R": "raises R", "F_dist": "lowers F", "IS_p2": "raises IS"}[column]
    said = "; ".join(f"{m} {d}" for m, d in differences.items())
    evidence = f"{len(right)} of {len(differences)} do, {len(wrong)} the opposite: {said}"
    return Claim(f"an injected corner patch {word}, for every explainer", len(right) == len(differences), evidence)


def _turned(found: Found, moved: dict[str, dict[str, Difference]]) -> Table:
    lines = tuple(
        (m, *(str(moved[column][m]) for column in ("R", "F_dist", "IS_p2", "R_excess", "slot"))) for m in found.inverted
    )
    strongest = f"psi {max(found.strengths):g}"
    kept = found.turned.kept(strongest)
    title = f"A corner patch that follows the output ({strongest}); {kept.sum()} of {len(kept)} images pass the gate"
    return Table(title, ("explainer", "R", "F", "IS", "R_excess", "share on the patch"), lines)


def _figure(found: Found) -> bytes:
    """Dots: F, R_excess, AUPRC and relevance on the shortcut for every explainer, a colour for each model."""
    return picture({name: compared.rows for name, compared in found.compared.items()}, found.shortcut)


def picture(rows: Mapping[str, Sequence[Mapping[str, Any]]], shortcut: str) -> bytes:
    """PNG of the records of each model; explainers by their mean F, anchors below. Lines: 95 % over patients.

    What is not defined (reliance of a map that never moves) is not drawn; what lies off an axis is written at its end.
    """
    records = {(name, r["method"]): r for name, of in rows.items() for r in of}
    anchors = {m: r["anchor"] for (_, m), r in records.items()}

    def mean_f(method: str) -> float:
        return float(np.mean([r["F"] for (_, m), r in records.items() if m == method and r["F"] is not None] or [0.0]))

    names = sorted(anchors, key=lambda m: (not anchors[m], mean_f(m)))
    panels = (
        ("F", "F: agrees with held-out removal effects", (0, 1), None),
        ("R_excess", "R beyond the true effects' own", (0, 0.3), None),
        ("auprc", "AUPRC in the finding's mask", (0, 0.7), None),
        (f"mass {shortcut}", f"relevance on the {shortcut} (1: chance)", (0, 12), 1.0),
    )
    figure, axes = canvas(1, len(panels), 3.4 * len(panels), 0.32 * len(names) + 1.2, sharey=True)
    for ax, (key, label, limits, line) in zip(axes[0], panels, strict=True):
        n = max([r.get("n", {}).get(key, 0) for of in rows.values() for r in of], default=0)
        axes_of(ax, "", f"{label}{f', n = {n}' if n else ''}", "")
        if line is not None:
            ax.axvline(line, color=GREY, linewidth=0.8, linestyle="--")
        for place, name in enumerate(rows):
            for y, method in enumerate(names):
                r = records.get((name, method))
                if r is None or r.get(key) is None:
                    continue
                at = y + 0.28 - 0.14 * place
                low, high = np.clip(r["ci95"].get(key) or (r[key], r[key]), *limits)
                ax.plot([low, high], [at, at], color=COLOURS[place], linewidth=0.9, alpha=0.7)
                beyond = r[key] > limits[1]
                ax.plot(min(r[key], limits[1]), at, ">" if beyond else "o", markersize=3.2, color=COLOURS[place],
                        label=name if y == len(names) - 1 else None, clip_on=False)  # fmt: skip
                if beyond:  # off the axis: the number instead of a place
                    ax.annotate(f"{r[key]:.2f}", (limits[1], at), (-5 - 17 * (place % 2), 0), fontsize=5, ha="right",
                                va="center", textcoords="offset points", color=COLOURS[place])  # fmt: skip
        ax.set_xlim(*limits)
    axes[0, 0].set_yticks(range(len(names)), [m.replace("_", " ") for m in names])
    for tick, method in zip(axes[0, 0].get_yticklabels(), names, strict=True):
        tick.set_color(GREY if anchors[method] else INK)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(rows), fontsize=8, frameon=False)
    return png(figure)
