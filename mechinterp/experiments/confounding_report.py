"""What confounding-dose says: rows, claims that can come out false, tables, and the figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mechinterp.experiments.canvas import COLOURS, GREY, axes_of, canvas, png
from mechinterp.experiments.result import Claim, Result, Row, Table
from mechinterp.experiments.seeds import seed_interval, with_interval
from saes.truth.merging import Separation

__all__ = ["Dose", "report"]

HOW = ("naive", "balanced", "oracle")
GAIN, SAME = 0.05, 0.1

NOTES = (
    "separable: how much more each set of latents follows its own factor than the other (AUROC within strata of the "
    "other factor, on phantoms of other patients with rho = 0), the smaller of the two sets. 0 or less: merged.",
    "naive: latents matched to each label as they stand in the confounded data. balanced: the four cells finding x "
    "shortcut of the same data drawn to equal size first; impossible at rho = 1, where two cells are empty. oracle: "
    "matched on the same patients drawn with rho = 0, the dictionary as trained: the most it allows.",
    "name: the finding or device that the finding's first latent truly follows most, on the rho = 0 phantoms.",
    "Intervals: 95 % (Student's t) over seeds of training and matching, patients held; result.json has a patient "
    "bootstrap interval of every single dictionary beside them.",
    "The dictionaries stand on the CLS token after the last block, 6 active: where findings meet.",
)


@dataclass(frozen=True, eq=False)
class Dose:
    """One dictionary at one association. `found` and `names` by how latents were matched; None: impossible."""

    model: str
    rho: float
    kind: str
    width: int
    seed: int
    n: int
    found: dict[str, Separation | None]
    names: dict[str, str | None]

    def separable(self, how: str) -> float:
        """Separability under one matching; nan where it was impossible."""
        s = self.found[how]
        return float("nan") if s is None else s.separable


def report(doses: Sequence[Dose], finding: str) -> Result:
    """Rows, claims, tables and figure of all doses."""
    rows = [row for dose in doses for row in _rows(dose)]
    for how in HOW:
        for d in {(d.model, d.kind, d.width, d.rho): d for d in doses}.values():
            at = {"model": d.model, "kind": d.kind, "width": d.width, "rho": d.rho}
            values = _values(doses, how, **at)
            if values:
                of = at | {"matching": how}
                rows.append(Row("separable over seeds", float(np.mean(values)), len(values), seed_interval(values), of))
    claims = [claim for model in _each(doses, "model") for claim in _claims(model, doses, finding)]
    return Result(rows, claims, _tables(doses, finding), _figure(doses), NOTES)


def _rows(dose: Dose) -> list[Row]:
    rows = []
    for how, s in dose.found.items():
        of: dict[str, Any] = {"model": dose.model, "kind": dose.kind, "width": dose.width, "rho": dose.rho}
        of |= {"sae_seed": dose.seed, "matching": how}
        if s is None:
            rows.append(Row("separable", float("nan"), 0, of=of | {"reason": "a cell of finding x shortcut is empty"}))
            continue
        rows += [
            Row("separable", s.separable, dose.n, s.ci95, of | {"merged": s.merged, "named": dose.names[how]}),
            Row("shared latents", s.shared, dose.n, of=of),
            Row("finding's latents follow finding", s.own[0], dose.n, of=of),
            Row("finding's latents follow shortcut", s.other[0], dose.n, of=of),
            Row("shortcut's latents follow shortcut", s.own[1], dose.n, of=of),
            Row("shortcut's latents follow finding", s.other[1], dose.n, of=of),
        ]
    return rows


def _at(doses: Sequence[Dose], **at: Any) -> list[Dose]:
    return [d for d in doses if all(getattr(d, k) == v for k, v in at.items())]


def _values(doses: Sequence[Dose], how: str, **at: Any) -> list[float]:
    """Separability at a setting, one a seed; impossible ones left out."""
    found = [d.separable(how) for d in _at(doses, **at)]
    return [v for v in found if np.isfinite(v)]


def _mean(doses: Sequence[Dose], how: str, **at: Any) -> float:
    values = _values(doses, how, **at)
    return float(np.mean(values)) if values else float("nan")


def _each(doses: Sequence[Dose], name: str) -> list[Any]:
    return list(dict.fromkeys(getattr(d, name) for d in doses))


def merge_dose(doses: Sequence[Dose], how: str, **at: Any) -> float:
    """The smallest rho from which on, up to the largest that could be judged, mean separability is 0 or less; nan."""
    rhos = sorted({d.rho for d in _at(doses, **at) if np.isfinite(d.separable(how))})
    first = float("nan")
    for rho in reversed(rhos):
        if _mean(doses, how, rho=rho, **at) > 0:
            break
        first = rho
    return first


def _tables(doses: Sequence[Dose], finding: str) -> list[Table]:
    heads = []
    for model in _each(doses, "model"):
        for kind in _each(doses, "kind"):
            for width in _each(doses, "width"):
                at = {"model": model, "kind": kind, "width": width}
                heads.append((*at.values(), *(_dose_text(doses, how, **at) for how in HOW)))
    header = ("model", "kind", "width", *(f"{how} (each seed)" for how in HOW))
    tables = [Table("Association from which on the latents are merged", header, tuple(heads))]
    for model in _each(doses, "model"):
        for width in _each(doses, "width"):
            lines = []
            for kind in _each(doses, "kind"):
                for rho in _each(_at(doses, width=width), "rho"):
                    at = {"model": model, "kind": kind, "width": width, "rho": rho}
                    mine = _at(doses, **at)
                    right = sum(d.names["naive"] == finding for d in mine)
                    shared = float(np.mean([s.shared for d in mine if (s := d.found["naive"])] or [np.nan]))
                    values = [with_interval(_values(doses, how, **at)) for how in HOW]
                    lines.append((kind, f"{rho:g}", values[0], shared, f"{right} of {len(mine)}", *values[1:]))
            seeds = len({d.seed for d in _at(doses, model=model, width=width)})
            title = f"Separability, {model}, width {width} (mean and 95 % over {seeds} seeds)"
            head = ("kind", "rho", "naive", "shared", f"named {finding}", "balanced", "oracle")
            tables.append(Table(title, head, tuple(lines)))
    return tables


def _dose_text(doses: Sequence[Dose], how: str, **at: Any) -> str:
    """The dose of the mean, and of each seed alone."""
    each = [merge_dose(doses, how, **at, seed=seed) for seed in _each(_at(doses, **at), "seed")]
    alone = ", ".join(f"{v:g}" if np.isfinite(v) else "never" for v in each)
    found = merge_dose(doses, how, **at)
    return f"{found:g} ({alone})" if np.isfinite(found) else f"at none tested ({alone})"


def _claims(model: str, doses: Sequence[Dose], finding: str) -> list[Claim]:
    mine = _at(doses, model=model)
    rhos = sorted(_each(mine, "rho"))
    low, high, strong = rhos[0], rhos[-1], [r for r in rhos if 0.8 <= r < 1]
    settings = {f"{k} {w}": {"kind": k, "width": w} for k in _each(mine, "kind") for w in _each(mine, "width")}
    start = {name: _mean(mine, "naive", rho=low, **at) for name, at in settings.items()}
    end = {name: _mean(mine, "naive", rho=high, **at) for name, at in settings.items()}
    claims = [
        Claim(
            f"{model}: every kind and width has separate latents for the two at rho = {low:g}, none has at {high:g}",
            min(start.values()) > 0 and max(end.values()) <= 0,
            f"separability at {low:g}: {_said(start)}; at {high:g}: {_said(end)}",
        )
    ]
    if strong:
        gain = _by_seed([d for d in mine if d.rho in strong], "balanced", "naive")
        interval = seed_interval(gain)
        claims.append(
            Claim(
                f"{model}: balanced matching beats naive matching at 0.8 <= rho < 1, on average by {GAIN} or more",
                float(np.mean(gain)) >= GAIN and not interval[0] <= 0,  # an interval needs two seeds
                f"mean gain, 95 % over seeds: {with_interval(gain)}",
            )
        )
        best = {
            f"{name}, {r:g}": value
            for name, at in settings.items()
            for r in strong
            if np.isfinite(value := _mean(mine, "oracle", rho=r, **at))
        }
        claims.append(
            Claim(
                f"{model}: the dictionaries still separate the two at 0.8 <= rho < 1 (oracle matching > 0)",
                min(best.values()) > 0,
                _said(best),
            )
        )
    named = [d.names["naive"] == finding for d in mine if d.rho == high]
    claims.append(
        Claim(
            f"{model}: at rho = {high:g} the first latent of {finding} follows {finding} most, in every run",
            all(named),
            f"{sum(named)} of {len(named)} runs",
        )
    )
    return claims + _width_claim(model, mine)


def _width_claim(model: str, mine: Sequence[Dose]) -> list[Claim]:
    """Width against the narrowest dictionary, at the associations that were tried with both."""
    widths = sorted(_each(mine, "width"))
    if len(widths) < 2:
        return []
    both = {d.rho for d in _at(mine, width=widths[0])} & {d.rho for d in _at(mine, width=widths[-1])} - {0.0}
    change = []
    for seed in _each(mine, "seed"):
        at = [[d for d in mine if (d.width, d.seed) == (w, seed) and d.rho in both] for w in (widths[0], widths[-1])]
        change.append(
            float(np.mean([d.separable("naive") for d in at[1]]) - np.mean([d.separable("naive") for d in at[0]]))
        )
    return [
        Claim(
            f"{model}: width {widths[-1]} in place of {widths[0]} moves naive separability by less than {SAME}",
            abs(float(np.mean(change))) < SAME,
            f"mean change at rho > 0, 95 % over seeds: {with_interval(change)}",
        )
    ]


def _by_seed(doses: Sequence[Dose], one: str, other: str) -> list[float]:
    """Mean difference of two matchings over all settings, one number a seed."""
    found = []
    for seed in _each(doses, "seed"):
        values = [d.separable(one) - d.separable(other) for d in _at(doses, seed=seed)]
        found.append(float(np.nanmean(values)))
    return found


def _said(values: dict[str, float]) -> str:
    return "; ".join(f"{name}: {value:.2f}" for name, value in values.items())


def _figure(doses: Sequence[Dose]) -> bytes:
    """A row a model and width, a column a matching; means over seeds with 95 % intervals, and each seed as a dot."""
    models, kinds, widths = (_each(doses, name) for name in ("model", "kind", "width"))
    lines = [(model, width) for model in models for width in widths]
    figure, axes = canvas(len(lines), 3, 12.5, 2.7 * len(lines) + 0.7, sharey=True, sharex=True)
    for row, (model, width) in enumerate(lines):
        for column, how in enumerate(HOW):
            last, first = row == len(lines) - 1, column == 0
            here = axes_of(
                axes[row, column],
                f"{model}, width {width}, {how}",
                "association rho" if last else "",
                "separability" if first else "",
            )
            for number, (colour, kind) in enumerate(zip(COLOURS, kinds, strict=False)):
                at = {"model": model, "width": width, "kind": kind}
                rhos = sorted({d.rho for d in _at(doses, **at) if np.isfinite(d.separable(how))})
                each = [_values(doses, how, **at, rho=r) for r in rhos]
                x = np.array(rhos) + (number - (len(kinds) - 1) / 2) * 0.009
                here.plot(x, [np.mean(v) for v in each], "o-", color=colour, markersize=4, linewidth=1.4, label=kind)
                for place, values in zip(x, each, strict=True):
                    here.plot([place] * len(values), values, ".", color=colour, markersize=2.5, alpha=0.6)
                    low, high = seed_interval(values)
                    here.vlines(place, low, high, color=colour, linewidth=0.8, alpha=0.55)
            here.axhline(0, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
            here.set_xlim(-0.04, 1.04)
            here.set_ylim(-0.85, 0.75)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=9, frameon=False)
    return png(figure)
