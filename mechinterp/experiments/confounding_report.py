"""What confounding-dose says: rows, claims that can come out false, tables, and the figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mechinterp.experiments.canvas import COLOURS, GREY, axes_of, canvas, png
from mechinterp.experiments.result import Claim, Result, Row, Table
from saes.truth.merging import Separation

__all__ = ["Dose", "report"]

HOW = ("naive", "balanced", "oracle")

NOTES = (
    "separable: how much more each set of latents follows its own factor than the other (AUROC within strata of the "
    "other factor, on phantoms of other patients with rho = 0), the smaller of the two sets. 0 or less: merged.",
    "naive: latents matched to each label as they stand in the confounded data. balanced: the four cells finding x "
    "shortcut of the same data drawn to equal size first; impossible at rho = 1, where two cells are empty. oracle: "
    "matched on the same patients drawn with rho = 0, the dictionary as trained: the most it allows.",
    "name: the finding or device that the finding's first latent truly follows most, on the rho = 0 phantoms.",
    "The dictionaries stand on the CLS token after the last block, width 32, 6 active: where findings meet.",
)


@dataclass(frozen=True, eq=False)
class Dose:
    """One dictionary at one association. `found` and `names` by how latents were matched; None: impossible."""

    model: str
    rho: float
    kind: str
    seed: int
    n: int
    found: dict[str, Separation | None]
    names: dict[str, str | None]


def report(doses: Sequence[Dose], finding: str) -> Result:
    """Rows, claims, tables and figure of all doses."""
    rows = [row for dose in doses for row in _rows(dose)]
    return Result(rows, _claims(doses, finding), _tables(doses, finding), _figure(doses), NOTES)


def _rows(dose: Dose) -> list[Row]:
    rows = []
    for how, s in dose.found.items():
        of: dict[str, Any] = {"model": dose.model, "kind": dose.kind, "rho": dose.rho, "sae_seed": dose.seed}
        of["matching"] = how
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


def _of(doses: Sequence[Dose], how: str, **at: Any) -> list[Separation]:
    """What was found at a setting, over seeds; impossible ones left out."""
    chosen = [d.found[how] for d in doses if all(getattr(d, k) == v for k, v in at.items())]
    return [s for s in chosen if s is not None]


def _mean(doses: Sequence[Dose], how: str, what: str = "separable", **at: Any) -> float:
    found = _of(doses, how, **at)
    return float(np.mean([getattr(s, what) for s in found])) if found else float("nan")


def merge_dose(doses: Sequence[Dose], how: str, **at: Any) -> float:
    """The smallest rho from which on, up to the largest that could be judged, mean separability is 0 or less; nan."""
    rhos = sorted({d.rho for d in doses if _of([d], how, **at)})
    first = float("nan")
    for rho in reversed(rhos):
        if _mean(doses, how, rho=rho, **at) > 0:
            break
        first = rho
    return first


def _values(doses: Sequence[Dose], name: str) -> list[Any]:
    return list(dict.fromkeys(getattr(d, name) for d in doses))


def _tables(doses: Sequence[Dose], finding: str) -> list[Table]:
    tables, heads = [], []
    for model in _values(doses, "model"):
        for kind in _values(doses, "kind"):
            at = {"model": model, "kind": kind}
            heads.append((model, kind, *(_dose_text(doses, how, **at) for how in HOW)))
    tables.append(Table("Association from which on the latents are merged", ("model", "kind", *HOW), tuple(heads)))
    header = ("kind", "rho", "naive", "95 % (first seed)", "shared", f"named {finding}", "balanced", "oracle")
    for model in _values(doses, "model"):
        lines = []
        for kind in _values(doses, "kind"):
            for rho in _values(doses, "rho"):
                at = {"model": model, "kind": kind, "rho": rho}
                first = _of(doses, "naive", **at)[0].ci95
                mine = [d for d in doses if (d.model, d.kind, d.rho) == (model, kind, rho)]
                right = sum(d.names["naive"] == finding for d in mine)
                lines.append(
                    (
                        *(kind, f"{rho:g}", _mean(doses, "naive", **at), f"{first[0]:.2f} to {first[1]:.2f}"),
                        *(_mean(doses, "naive", "shared", **at), f"{right} of {len(mine)}"),
                        *(_mean(doses, "balanced", **at), _mean(doses, "oracle", **at)),
                    )
                )
        tables.append(Table(f"Separability, {model} (mean over seeds)", header, tuple(lines)))
    return tables


def _dose_text(doses: Sequence[Dose], how: str, **at: Any) -> str:
    found = merge_dose(doses, how, **at)
    return f"{found:g}" if np.isfinite(found) else "at none tested"


def _claims(doses: Sequence[Dose], finding: str) -> list[Claim]:
    models, kinds, rhos = (_values(doses, name) for name in ("model", "kind", "rho"))
    low, high = min(rhos), max(rhos)
    claims = []
    for model in models:
        at = {"model": model}
        start = {k: _mean(doses, "naive", rho=low, kind=k, **at) for k in kinds}
        end = {k: _mean(doses, "naive", rho=high, kind=k, **at) for k in kinds}
        claims.append(
            Claim(
                f"{model}: every kind has separate latents for the two at rho = {low:g}, none has at {high:g}",
                min(start.values()) > 0 and max(end.values()) <= 0,
                f"separability at {low:g}: {_said(start)}; at {high:g}: {_said(end)}",
            )
        )
        strong = [r for r in rhos if 0.8 <= r < 1]
        if strong:
            gain = {
                f"{k}, {r:g}": _mean(doses, "balanced", rho=r, kind=k, **at)
                - _mean(doses, "naive", rho=r, kind=k, **at)
                for k in kinds
                for r in strong
            }
            claims.append(
                Claim(
                    f"{model}: balanced matching beats naive matching at 0.8 <= rho < 1, on average by 0.05",
                    float(np.mean(list(gain.values()))) >= 0.05,
                    f"mean gain {np.mean(list(gain.values())):.2f}; {_said(gain)}",
                )
            )
            best = {f"{k}, {r:g}": _mean(doses, "oracle", rho=r, kind=k, **at) for k in kinds for r in strong}
            claims.append(
                Claim(
                    f"{model}: the dictionaries still separate the two at 0.8 <= rho < 1 (oracle matching > 0)",
                    min(best.values()) > 0,
                    _said(best),
                )
            )
        named = [d.names["naive"] == finding for d in doses if d.model == model and d.rho == high]
        claims.append(
            Claim(
                f"{model}: at rho = {high:g} the first latent of {finding} follows {finding} most, in every run",
                all(named),
                f"{sum(named)} of {len(named)} runs",
            )
        )
    return claims


def _said(values: dict[str, float]) -> str:
    return "; ".join(f"{name}: {value:.2f}" for name, value in values.items())


def _figure(doses: Sequence[Dose]) -> bytes:
    models, kinds = _values(doses, "model"), _values(doses, "kind")
    figure, axes = canvas(len(models), 3, 12.5, 3.5 * len(models) + 0.6, sharey=True)
    rhos = sorted(_values(doses, "rho"))
    for line, model in enumerate(models):
        for column, how in enumerate(("naive", "balanced", "oracle")):
            here = axes_of(axes[line, column], f"{model}, {how} matching", "association rho", "separability")
            for colour, kind in zip(COLOURS, kinds, strict=False):
                shown = [r for r in rhos if _of(doses, how, model=model, kind=kind, rho=r)]
                values = [_mean(doses, how, model=model, kind=kind, rho=r) for r in shown]
                here.plot(shown, values, "o-", color=colour, markersize=4, linewidth=1.4, label=kind)
                for r in shown:
                    each = [s.separable for s in _of(doses, how, model=model, kind=kind, rho=r)]
                    here.plot([r] * len(each), each, ".", color=colour, markersize=3, alpha=0.6)
            here.axhline(0, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
            here.set_xlim(-0.04, 1.04)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=9, frameon=False)
    return png(figure)
