"""What iq-main says: rows, claims, one table a model, the injection, and the figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mechinterp.audit.explainers import Compared
from mechinterp.audit.explainers.folder import BESIDE
from mechinterp.experiments.canvas import COLOURS, GREY, INK, axes_of, canvas, png
from mechinterp.experiments.iq_study import PLAIN, Difference, Study, corrected
from mechinterp.experiments.result import Claim, Result, Row, Table
from mechinterp.metrics.iq import expected_absolute_r
from mechinterp.metrics.statistics import PatientBootstrap, holm, percentile_interval, sign_flip_p

__all__ = ["Found", "picture", "report", "shortcut_claims"]

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
    """Comparisons by model, the injection, its methods and strengths, and the attribute of the planted shortcut."""

    compared: dict[str, Compared]
    turned: Study
    inverted: Sequence[str]
    strengths: Sequence[float]
    shortcut: str


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
    claims += shortcut_claims(found)
    claims += [_direction(found, moved, column, sign) for column, sign in (("R", 1), ("F_dist", -1), ("IS_p2", 1))]
    notes = [
        "F is judged by replacing each patch with the blurred image; methods fill with mean grey. Methods that remove "
        "patches one at a time are still closest in kind to the judge; F_own (grey) is in result.json.",
        "Likeness after random weights or a nonsense prompt is the rank correlation of the maps' sizes; = marks a "
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
            made.append(Row(key, number, r["images"], (interval[0], interval[1]) if interval else None, of))
    return made


def _table(name: str, compared: Compared, shortcut: str) -> Table:
    mass = f"mass {shortcut}"
    beside = [column for column in BESIDE if any(r.get(column[0]) is not None for r in compared.rows)]
    lines = []
    for r in sorted(compared.rows, key=lambda r: (r["anchor"], -(r["F"] or 0))):
        cells: list[Any] = [f"*{r['method']}*" if r["anchor"] else r["method"]]
        cells += [_cell(r, key) for key in ("R", "F", "IS", "R_null", "R_excess", "auprc", mass)]
        cells += [_checked(r, key) for key in ("randomisation", "prompt_randomisation", *(key for key, _ in beside))]
        lines.append((*cells, f"{r['seconds']:.3f}"))
    header = ("explainer", "R", "F", "IS", "R_null", "R_excess", "AUPRC", f"relevance on the {shortcut} (1: chance)",
              "random weights", "nonsense prompt", *(TITLES[key] for key, _ in beside), "seconds")  # fmt: skip
    made = compared.made
    return Table(f"{name}: {made.target.name}, {len(made.rows)} test patients (*anchors*)", header, tuple(lines))


def _cell(r: Mapping[str, Any], key: str) -> str:
    value, interval = r.get(key), r["ci95"].get(key)
    if value is None:
        return "not tested"
    return f"{value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def _checked(r: Mapping[str, Any], key: str) -> str:
    if key in TITLES and r.get(key) is None:
        return ""
    failed = " ≠" if key in SAME else " ="
    verdict = {"fail": failed, "pass": "", "not tested": " ?"}[r[f"{key}_verdict"]]
    return _cell(r, key).split(" [")[0] + verdict


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
        least = len(gains) * 2.0 ** (1 - len(noise))  # signs can all agree in two of 2^n ways
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


def shortcut_claims(found: Found) -> list[Claim]:
    """On models that learnt the shortcut, a map shows it where its relevance there lies above chance."""
    key, claims = f"mass {found.shortcut}", []
    for name, compared in found.compared.items():
        if not name.endswith("-shortcut"):
            continue
        real = [r for r in compared.rows if not r["anchor"]]
        shows = [r["method"] for r in real if r["ci95"].get(key) and r["ci95"][key][0] > 1]
        said = "; ".join(f"{r['method']} {_cell(r, key)}" for r in real)
        few = sum(not r["ci95"].get(key) for r in real)
        without = f", {few} NOT TESTED (too few images with one for an interval)" if few else ""
        claims.append(
            Claim(f"{name}: every explainer shows the planted {found.shortcut}", len(shows) == len(real),
                  f"{len(shows)} of {len(real)} do (interval above chance, 1){without}: {said}")
        )  # fmt: skip
    return claims


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
    """PNG of the records of each model; explainers by their mean F, anchors below. Lines are 95 % over patients."""
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
        axes_of(ax, "", label, "")
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
                shown = min(r[key], limits[1])
                ax.plot(shown, at, ">" if r[key] > limits[1] else "o", markersize=3.2, color=COLOURS[place],
                        label=name if y == len(names) - 1 else None)  # fmt: skip
        ax.set_xlim(*limits)
    axes[0, 0].set_yticks(range(len(names)), [m.replace("_", " ") for m in names])
    for tick, method in zip(axes[0, 0].get_yticklabels(), names, strict=True):
        tick.set_color(GREY if anchors[method] else INK)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(rows), fontsize=8, frameon=False)
    return png(figure)
