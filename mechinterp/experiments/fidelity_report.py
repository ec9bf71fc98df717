"""What intervention-fidelity says: rows, claims that can come out false, tables, and the figure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from mechinterp.experiments.canvas import COLOURS, GREY, INK, axes_of, canvas, heat, png
from mechinterp.experiments.fidelity_parts import Reading
from mechinterp.experiments.result import Claim, Result, Row, Table
from saes.truth.fidelity import Leakage, leakage

__all__ = ["report"]

READABLE, F1_GAIN, MATCHED_SHARE, MEDIAN_R2 = 0.95, 0.3, 0.8, 0.7
HOW = ("zero", "mean", "resample", "untrained", "random", "patch matched", "patch all")

NOTES = (
    "R2 and slope: least-squares line of the ablation's effect on the true effect over all test images; where the "
    "factor is absent the true effect is 0. 'present' counts only images with the factor.",
    "Zero ablation changes a token only where the latent fires, so ablating at all of the dictionary's tokens and only "
    "where it fires are the same. Mean and resample ablation also write where it does not fire.",
    "patch matched / patch all: the matched latents, or all, take the values that they have without the factor. What "
    "patch all lacks of the true effect is in the error term or at tokens that the dictionary does not read.",
    "F1 counts a latent as firing above the threshold that is best on validation patients, for the dictionary and for "
    "its untrained twin alike; 'at 0' counts any activation, as MATCHScore was published.",
    "Split: several latents beat the best one by 0.05 of F1. Merged: shares a matched latent with another (where "
    "both matches beat always saying yes by 0.1 of F1). Absorbed: its latents find it less often, by 0.3 of recall, "
    "where the other factor is there.",
)


def report(readings: Sequence[Reading], outputs: Sequence[str]) -> Result:
    """Rows, claims, tables and figure of all readings (in order of model and dictionary)."""
    groups = [(key, list(mine)) for key, mine in groupby(readings, lambda r: (r.model, r.dictionary))]
    rows = [row for reading in readings for row in _rows(reading)]
    leaks = {key: _leakage(mine) for key, mine in groups}
    for (model, dictionary), leak in leaks.items():
        of = {"model": model, "dictionary": dictionary}
        n = leak.true.size
        rows += [
            Row("across slope", leak.slope, n, of=of),
            Row("across r2", leak.r2, n, of=of),
            Row("off-target, do()", leak.off_true, n, of=of),
            Row("off-target, ablation", leak.off_ablated, n, of=of),
        ]
    summary = [_summary(key, mine, leaks[key]) for key, mine in groups]
    tables = [Table("Dictionaries", SUMMARY, tuple(summary)), *(_table(key, mine) for key, mine in groups)]
    claims = [claim for model in dict.fromkeys(r.model for r in readings) for claim in _claims(model, groups)]
    return Result(rows, claims, tables, _figure(groups, leaks, outputs), NOTES)


def _rows(r: Reading) -> list[Row]:
    of: dict[str, Any] = {"model": r.model, "dictionary": r.dictionary, "site": r.site, "factor": r.factor}
    n, present = len(r.present), int(r.present.sum())
    rows = [
        Row("f1", r.f1["trained"], n, of=of | {"latents": list(r.latents), **vars(r.shape)}),
        Row("f1 untrained", r.f1["untrained"], n, of=of),
        Row("f1 gain", r.f1_gain, n, r.gain_ci95, of),
        Row("f1 at 0", r.f1_zero["trained"], n, of=of),
        Row("f1 at 0 untrained", r.f1_zero["untrained"], n, of=of),
        Row("probe auroc", r.probe, n, of=of),
    ]
    for how, found in r.effect.items():
        kind = of | {"ablation": how, "sets": len(found)}
        if len(found) > 1:  # random sets: the mean, and the range over sets
            values = np.array([f.r2 for f in found])
            rows.append(Row("r2", float(values.mean()), n, _range(values), kind))
            values = np.array([f.slope for f in found])
            rows.append(Row("slope", float(values.mean()), n, _range(values), kind))
            continue
        f = found[0]
        rows += [
            Row("r2", f.r2, n, f.r2_ci95, kind),
            Row("slope", f.slope, n, f.slope_ci95, kind),
            Row("r2 identity", f.r2_identity, n, of=kind),
            Row("r2 present", f.r2_present, present, f.r2_present_ci95, kind),
            Row("slope present", f.slope_present, present, of=kind),
            Row("share", f.share, present, of=kind),
            Row("sign agreement", f.sign, present, of=kind),
        ]
    return rows


def _range(values: np.ndarray) -> tuple[float, float]:
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def _leakage(mine: list[Reading]) -> Leakage:
    """Mean effects over the images with the factor, in sd of each output over the test images."""
    asked = [r for r in mine if r.own is not None and r.present.sum() > 0]
    true = np.array([r.true[r.present].mean(0) for r in asked])
    ablated = np.array([r.ablated[r.present].mean(0) for r in asked])
    own = np.zeros(true.shape, bool)
    for i, r in enumerate(asked):
        own[i, r.own] = True
    return leakage(true, ablated, own)


def _readable(mine: list[Reading]) -> list[Reading]:
    return [r for r in mine if r.probe >= READABLE]


def _median(mine: list[Reading], how: str, what: str) -> float:
    found = [[getattr(f, what) for f in r.effect[how]] for r in mine if how in r.effect]
    values = [float(np.mean(v)) for v in found]
    return float(np.median(values)) if values else float("nan")


SUMMARY = (
    *(
        "model",
        "dictionary",
        "readable",
        "matched",
        "median F1",
        "twin F1",
        "median R2",
        "slope",
        "R2 present",
        "share",
    ),
    *("random R2", "twin R2", "patch matched R2", "patch all R2", "across R2", "off do()", "off ablation"),
)


def _summary(key: tuple[str, str], mine: list[Reading], leak: Leakage) -> tuple[Any, ...]:
    readable = _readable(mine)
    return (
        *key,
        f"{len(readable)} of {len(mine)}",
        sum(r.f1_gain >= F1_GAIN for r in readable),
        float(np.median([r.f1["trained"] for r in mine])),
        float(np.median([r.f1["untrained"] for r in mine])),
        _median(mine, "zero", "r2"),
        _median(mine, "zero", "slope"),
        _median(mine, "zero", "r2_present"),
        _median(mine, "zero", "share"),
        _median(mine, "random", "r2"),
        _median(mine, "untrained", "r2"),
        _median(mine, "patch matched", "r2"),
        _median(mine, "patch all", "r2"),
        leak.r2,
        leak.off_true,
        leak.off_ablated,
    )


def _table(key: tuple[str, str], mine: list[Reading]) -> Table:
    header = ("factor", "probe", "latents", "F1", "twin", "gain", "95 %", "split", "merged with", "absorbed by")
    header = (*header, "R2", "95 %", "slope")
    header = (
        *header,
        "R2 present",
        "share",
        "sign",
        "mean abl. R2",
        "resample R2",
        "random R2",
        "twin R2",
        "patch all",
    )
    lines = []
    for r in mine:
        cells: list[Any] = [r.factor, r.probe, len(r.latents), r.f1["trained"], r.f1["untrained"], r.f1_gain]
        cells += [_interval(r.gain_ci95), "yes" if r.shape.split else ""]
        cells += [", ".join(r.shape.merged), ", ".join(r.shape.absorbed)]
        if r.effect:
            f = r.effect["zero"][0]
            cells += [f.r2, _interval(f.r2_ci95), f.slope, f.r2_present, f.share, f.sign]
            cells += [_median([r], how, "r2") for how in ("mean", "resample", "random", "untrained", "patch all")]
        lines.append(tuple(cells + [""] * (len(header) - len(cells))))
    return Table(f"{key[0]}, {key[1]}", header, tuple(lines))


def _interval(ci: tuple[float, float]) -> str:
    return f"{ci[0]:.2f} to {ci[1]:.2f}" if np.isfinite(ci[0]) else ""


def _claims(model: str, groups: list) -> list[Claim]:
    """The two target lines for the best dictionary of a model, and what has to hold for them to mean something."""
    mine = {dictionary: found for (name, dictionary), found in groups if name == model}
    shares, medians, margins = {}, {}, {}
    for dictionary, found in mine.items():
        readable = _readable(found)
        shares[dictionary] = float(np.mean([r.f1_gain >= F1_GAIN for r in readable])) if readable else 0.0
        medians[dictionary] = _median(found, "zero", "r2")
        null = max(_median(found, how, "r2") if f"{how}" else 0.0 for how in ("random", "untrained"))
        margins[dictionary] = medians[dictionary] - (null if np.isfinite(null) else 0.0)

    def said(values: dict[str, float]) -> str:
        return "; ".join(f"{name}: {value:.2f}" for name, value in values.items())

    return [
        Claim(
            f"{model}: a dictionary matches at least {MATCHED_SHARE:.0%} of the factors that a probe reads at AUROC >= "
            f"{READABLE} with at most 3 latents and F1 at least {F1_GAIN} above its untrained twin",
            max(shares.values()) >= MATCHED_SHARE,
            f"share matched: {said(shares)}",
        ),
        Claim(
            f"{model}: a dictionary has median fidelity R2 >= {MEDIAN_R2}",
            max(medians.values()) >= MEDIAN_R2,
            f"median R2 over factors with an output: {said(medians)}",
        ),
        Claim(
            f"{model}: in every dictionary median R2 is at least 0.2 above that of matched random sets and the twin",
            min(margins.values()) >= 0.2,
            f"margin over the larger of the two: {said(margins)}",
        ),
    ]


def _figure(groups: list, leaks: dict, outputs: Sequence[str]) -> bytes:
    """Above: R2 of each factor by dictionary. Below: true and ablation effects on all outputs, best dictionary."""
    best = max(groups, key=lambda g: np.nan_to_num(_median(g[1], "zero", "r2"), nan=-1))
    factors = [r.factor for r in best[1] if r.own is not None]
    figure, axes = canvas(2, 2, 12.5, 9.2)
    left, right = axes_of(axes[0, 0], "a  R2 of ablation on removal, 95 % interval", "R2"), axes[0, 1]
    for number, ((model, dictionary), mine) in enumerate(groups):
        shown = [r for r in mine if r.effect]
        y = [factors.index(r.factor) + (number - (len(groups) - 1) / 2) * 0.8 / max(len(groups), 2) for r in shown]
        colour = COLOURS[number % len(COLOURS)]
        for at, r in zip(y, shown, strict=True):
            left.plot(r.effect["zero"][0].r2_ci95, [at, at], color=colour, linewidth=1.1)
        left.plot([r.r2 for r in shown], y, "o", color=colour, markersize=4, label=f"{model}: {dictionary}")
    left.axvline(MEDIAN_R2, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    left.set_xlim(-0.02, 1.02)
    left.set_yticks(range(len(factors)), factors)
    left.invert_yaxis()
    _bars(right, groups)
    leak = leaks[best[0]]
    limit = float(np.abs(leak.true).max())
    for at, matrix, word in (
        (axes[1, 0], leak.true, "true: removing"),
        (axes[1, 1], leak.ablated, "ablating latents of"),
    ):
        letter = "c" if at is axes[1, 0] else "d"
        title = f"{letter}  {word} the factor (row), effect on the output (column)"
        title = f"{title}\n{best[0][0]}, {best[0][1]}; in sd of the output"
        heat(figure, at, matrix, factors, list(outputs), title, limit)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8.5, frameon=False)
    return png(figure)


def _bars(axes: Any, groups: list) -> None:
    """Median R2 by how the ablation is done."""
    axes_of(axes, "b  median R2 by ablation and null", "", "median R2")
    width = 0.8 / len(groups)
    for number, (_, mine) in enumerate(groups):
        values = [_median(mine, how, "r2") for how in HOW]
        at = np.arange(len(HOW)) + (number - (len(groups) - 1) / 2) * width
        axes.bar(at, np.nan_to_num(values), width * 0.92, color=COLOURS[number % len(COLOURS)])
    axes.axhline(MEDIAN_R2, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_ylim(0, 1)
    axes.set_xticks(range(len(HOW)), [how.replace(" ", "\n") for how in HOW], color=INK)
