"""iq-tabular: does an injected column turn explanations around, and does RBP turn them back?

1. Networks (several seeds) learn y = x1 sin(x2) from six columns; x3 to x6 are noise in training.
2. At test time x3 = psi * output + noise. R, F, IS, R_null and R_excess of every explainer, at each psi.
3. The same explainers under RBP (lambda 0.1, three perturbations, 5 %), and an exaggerated RBP (lambda 10).

The published directions are that injection raises R, lowers F and raises IS, and that RBP lowers IS (arXiv:2504.08919).
About 2 minutes on one core.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mechinterp.experiments.canvas import COLOURS, GREY, axes_of, canvas, png
from mechinterp.experiments.iq_rows import Difference, Network, compare, corrected, measure, paired, train
from mechinterp.experiments.result import Claim, Result, Row, Table
from mechinterp.explain.rbp import with_rbp_rows
from mechinterp.explain.tabular import EXPLAINERS, TabularExplainer
from mechinterp.metrics.iq import expected_absolute_r
from mechinterp.progress import progress

__all__ = ["Sizes", "network_of", "run"]

ANCHORS = ("random", "constant", "echo")
SHOWN = ("R", "F_dist", "IS_p2", "IS_zero_p2", "R_null", "R_excess", "coverage")


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    rows: int = 150
    seeds: int = 5
    draws: int = 30
    steps: int = 1500
    psi: tuple[float, ...] = (0.0, 0.2, 0.5, 0.8)


QUICK = Sizes(rows=10, seeds=1, draws=8, steps=100, psi=(0.0, 0.8))


def network_of(seed: int, steps: int) -> Network:
    """A network that learnt x1 sin(x2) from columns in [-2, 2]; its skill is R2 on 1,000 other rows."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    x = torch.rand(3000, 6, generator=generator, dtype=torch.float64) * 4 - 2
    y = x[:, 0] * torch.sin(x[:, 1])
    net = train(x[:2000], y[:2000], seed, steps)
    with torch.no_grad():
        out = net(x[2000:])[:, 0]
    skill = 1 - float((out - y[2000:]).square().mean() / y[2000:].var())
    return Network(lambda rows: net(rows)[:, 0], 2, float(out.std()), skill, torch.zeros(6, dtype=torch.float64))


def run(seed: int = 0, quick: bool = False, sizes: Sizes | None = None) -> Result:
    """Run the experiment. `sizes` overrides both versions."""
    size = sizes or (QUICK if quick else Sizes())
    explainers = dict(EXPLAINERS)
    hardened: dict[str, TabularExplainer] = {}
    for name, explain in EXPLAINERS.items():
        hardened[f"{name} + RBP"] = with_rbp_rows(explain)
        hardened[f"{name} + RBP, lambda 10"] = with_rbp_rows(explain, strength=10.0)
    scores: dict[float, list[dict]] = {psi: [] for psi in size.psi}
    gates: dict[float, list[np.ndarray]] = {psi: [] for psi in size.psi}
    skills = []
    for s in progress(range(size.seeds), "networks", unit="network"):
        network = network_of(seed * 100 + s, size.steps)
        skills.append(network.skill)
        x = torch.rand(size.rows, 6, generator=torch.Generator().manual_seed(s), dtype=torch.float64) * 4 - 2
        for psi in size.psi:
            measured, kept = measure(network, explainers | hardened, x, psi, size.draws, 0.05, seed + s)
            scores[psi].append(compare(measured))
            gates[psi].append(kept)
    pooled = {
        psi: {
            name: {column: np.concatenate([of[name].columns[column] for of in scores[psi]]) for column in SHOWN}
            for name in explainers | hardened
        }
        for psi in size.psi
    }
    kept = {psi: np.concatenate(gates[psi]) for psi in size.psi}
    return _result(pooled, kept, skills, size)


def _result(pooled, kept, skills, size: Sizes) -> Result:
    strongest, names = max(size.psi), list(EXPLAINERS)
    both = kept[strongest] & kept[0.0]
    moved = {
        column: {n: paired(pooled[strongest][n][column], pooled[0.0][n][column], both) for n in names}
        for column in ("R", "F_dist", "IS_p2", "R_excess")
    }
    gains = {
        psi: {n: paired(pooled[psi][f"{n} + RBP"]["IS_p2"], pooled[psi][n]["IS_p2"], kept[psi]) for n in names}
        for psi in (0.0, strongest)
    }
    harder = {
        n: paired(pooled[strongest][f"{n} + RBP, lambda 10"]["IS_p2"], pooled[strongest][n]["IS_p2"], both)
        for n in names
    }
    real = [n for n in names if n not in ANCHORS]
    rows = []
    for psi in size.psi:
        for name in pooled[psi]:
            for column, values in pooled[psi][name].items():
                use = values[kept[psi]]
                value = float(np.nanmean(use)) if np.isfinite(use).any() else float("nan")
                rows.append(Row(column, value, int(np.isfinite(use).sum()), None, {"explainer": name, "psi": psi}))
        rows.append(Row("gated out", float(1 - kept[psi].mean()), len(kept[psi]), None, {"psi": psi}))
    for column, by_name in moved.items():
        for name, d in by_name.items():
            rows.append(Row(f"delta {column}", d.value, d.n, d.ci95, {"explainer": name, "psi": strongest, "p": d.p}))
    for psi, by_name in gains.items():
        for name, d in by_name.items():
            rows.append(Row("delta IS of RBP", d.value, d.n, d.ci95, {"explainer": name, "psi": psi, "p": d.p}))
    claims = [
        _direction("injection raises R", moved["R"], real, +1),
        _direction("injection lowers F", moved["F_dist"], real, -1),
        _direction("injection raises IS", moved["IS_p2"], real, +1),
        _direction("RBP lowers IS under injection", gains[strongest], real, -1),
        _direction("RBP lowers IS without injection", gains[0.0], real, -1),
        _direction("RBP with lambda 10 lowers IS under injection", harder, real, -1),
    ]
    tables = [_levels(pooled[psi], kept[psi], names, psi) for psi in (0.0, strongest)]
    tables.append(_changes(moved, gains[strongest], harder, names, strongest))
    notes = [
        f"R2 of the networks on unseen rows: {min(skills):.3f} to {max(skills):.3f} over {len(skills)} seeds.",
        f"Gated out (the injection moved the output by over 0.05 sd): {1 - kept[strongest].mean():.0%} "
        f"at psi {strongest}.",
        f"R by chance with {size.draws} draws: {expected_absolute_r(size.draws):.3f}. R, F and IS are those of "
        "iq-reading-1; the paper's own formulas are not public in full, so its numbers cannot be compared with these.",
    ]
    return Result(rows, claims, tables, _figure(pooled, kept, size), notes)


def _direction(claim: str, differences: dict[str, Difference], names: list[str], sign: int) -> Claim:
    """True where every method moves that way beyond chance (Holm over methods)."""
    adjusted = corrected({n: differences[n] for n in names})
    right = [n for n in names if sign * differences[n].value > 0 and adjusted[n] < 0.05]
    wrong = [n for n in names if sign * differences[n].value < 0 and adjusted[n] < 0.05]
    said = "; ".join(f"{n} {_cell(differences[n])}" for n in names)
    evidence = f"{len(right)} of {len(names)} do, {len(wrong)} do the opposite: {said}"
    return Claim(claim, len(right) == len(names), evidence)


def _cell(d: Difference) -> str:
    return f"{d.value:+.3f} [{d.ci95[0]:+.3f}, {d.ci95[1]:+.3f}]" if np.isfinite(d.value) else "undefined"


def _levels(of: dict, kept: np.ndarray, names: list[str], psi: float) -> Table:
    lines = []
    for name in names:
        cells = [np.nanmean(of[name][c][kept]) if np.isfinite(of[name][c][kept]).any() else np.nan for c in SHOWN]
        lines.append((name, *(float(v) for v in cells)))
    header = ("explainer", "R", "F", "IS (skip)", "IS (zero)", "R_null", "R_excess", "coverage")
    return Table(f"Scores at psi {psi:g}", header, tuple(lines))


def _changes(moved: dict, gains: dict, harder: dict, names: list[str], psi: float) -> Table:
    lines = tuple(
        (n, *(_cell(moved[c][n]) for c in ("R", "F_dist", "IS_p2", "R_excess")), _cell(gains[n]), _cell(harder[n]))
        for n in names
    )
    header = ("explainer", "R", "F", "IS", "R_excess", "IS by RBP", "IS by RBP, lambda 10")
    return Table(f"What injection (psi {psi:g}) changes, and what RBP changes under it; paired, 95 %", header, lines)


def _figure(pooled: dict, kept: dict, size: Sizes) -> bytes:
    figure, axes = canvas(1, 4, 13, 3.6, sharex=True)
    titles = {"R": "R: moves with the output", "F_dist": "F: matches the effects", "IS_p2": "IS (p = 2)"}
    for ax, (column, title) in zip(axes[0], {**titles, "R_excess": "R beyond the effects' own"}.items(), strict=True):
        axes_of(ax, title, "strength of injection, psi")
        for i, name in enumerate(EXPLAINERS):
            line = [
                np.nanmean(pooled[p][name][column][kept[p]])
                if np.isfinite(pooled[p][name][column][kept[p]]).any()
                else np.nan
                for p in size.psi
            ]
            anchor = name in ANCHORS
            ax.plot(
                size.psi,
                line,
                marker="o",
                markersize=3,
                linewidth=1.2,
                linestyle="--" if anchor else "-",
                color=GREY if anchor else COLOURS[i % len(COLOURS)],
                label=name.replace("_", " "),
            )
        ax.set_ylim(-0.03, 1.05)
    axes[0, 0].axhline(expected_absolute_r(size.draws), color=GREY, linewidth=0.8, linestyle=":")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False
    )
    return png(figure)
