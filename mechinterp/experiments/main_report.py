"""What iq-main says: rows, claims, one table a model, the injection, and the figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mechinterp.audit.explainers import Compared
from mechinterp.experiments.canvas import COLOURS, GREY, axes_of, canvas, png
from mechinterp.experiments.iq_study import PLAIN, Difference, Study, corrected
from mechinterp.experiments.result import Claim, Result, Row, Table
from mechinterp.metrics.iq import expected_absolute_r
from mechinterp.metrics.statistics import PatientBootstrap, holm, percentile_interval, sign_flip_p

__all__ = ["Found", "report", "shortcut_claims"]

NUMBERS = (
    "R", "F", "IS", "IS_zero", "R_null", "R_excess", "coverage", "F_corr", "F_own", "R_floor", "auprc", "auprc_chance",
    "randomisation", "prompt_randomisation", "other_prompt", "seconds",
)  # fmt: skip


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
        "method whose maps stay more alike than maps of different patients (a failure).",
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
    lines = []
    for r in sorted(compared.rows, key=lambda r: (r["anchor"], -(r["F"] or 0))):
        cells: list[Any] = [f"*{r['method']}*" if r["anchor"] else r["method"]]
        cells += [_cell(r, key) for key in ("R", "F", "IS", "R_null", "R_excess", "auprc", mass)]
        cells += [_checked(r, key) for key in ("randomisation", "prompt_randomisation")]
        lines.append((*cells, f"{r['seconds']:.3f}"))
    header = ("explainer", "R", "F", "IS", "R_null", "R_excess", "AUPRC", f"relevance on the {shortcut} (1: chance)",
              "random weights", "nonsense prompt", "seconds")  # fmt: skip
    made = compared.made
    return Table(f"{name}: {made.target.name}, {len(made.rows)} test patients (*anchors*)", header, tuple(lines))


def _cell(r: Mapping[str, Any], key: str) -> str:
    value, interval = r.get(key), r["ci95"].get(key)
    if value is None:
        return "not tested"
    return f"{value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def _checked(r: Mapping[str, Any], key: str) -> str:
    verdict = {"fail": " =", "pass": "", "not tested": " ?"}[r[f"{key}_verdict"]]
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
        claims.append(Claim(f"{name}: every explainer is more faithful than random maps", len(better) == len(gains),
                            f"{len(better)} of {len(gains)} are: {said}"))  # fmt: skip
    for key, words in (("randomisation", "changes with the weights"), ("prompt_randomisation", "with the prompt")):
        failed = [r["method"] for r in real if r[f"{key}_verdict"] == "fail"]
        open_ = [r["method"] for r in real if r[f"{key}_verdict"] == "not tested"]
        evidence = f"fail: {', '.join(failed) or 'none'}; undecided: {', '.join(open_) or 'none'} (of {len(real)})"
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
        claims.append(
            Claim(f"{name}: every explainer shows the planted {found.shortcut}", len(shows) == len(real),
                  f"{len(shows)} of {len(real)} do (interval above chance, 1): {said}")
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
    """F against R_excess for each model: the corner at the lower right is where a faithful explainer stands."""
    names = list(found.compared)
    figure, axes = canvas(1, len(names), 4.6 * len(names), 4.2, sharey=True)
    for ax, name in zip(axes[0], names, strict=True):
        axes_of(ax, name, "F: agrees with held-out removal effects", "R beyond the true effects' own movement")
        for r in found.compared[name].rows:
            if r["F"] is None or r["R_excess"] is None:
                continue
            colour = GREY if r["anchor"] else COLOURS[2] if r["built_from"] == "latent" else COLOURS[0]
            interval = r["ci95"].get("F")
            if interval:
                ax.plot(interval, [r["R_excess"]] * 2, color=colour, linewidth=0.7, alpha=0.6)
            ax.plot(r["F"], r["R_excess"], "o", markersize=3.5, color=colour)
            label = r["method"].replace("_", " ")
            ax.annotate(label, (r["F"], r["R_excess"]), (3, 2), textcoords="offset points", fontsize=6, color=colour)
        ax.set_xlim(0, 1.05)
    axes[0, 0].set_ylim(bottom=0)
    return png(figure)
