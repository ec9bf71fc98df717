"""Claims, tables and figure of iq-sweep."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from scipy.stats import kendalltau

from mechinterp.experiments.canvas import COLOURS, GREY, INK, axes_of, canvas, png
from mechinterp.experiments.iq_multiverse import Multiverse, Shrinkage, flips, interval, mean_of, rows_needed
from mechinterp.experiments.result import Claim, Result, Row, Table
from mechinterp.metrics.statistics import smallest_detectable_effect

__all__ = ["sweep_result"]

DIFFERENCE, SD = 0.018, 0.10  # the paper's headline taken as points of IS, and a plausible sd of paired differences
STABLE = 0.02
ANCHORS = ("random", "echo")


def sweep_result(universe: Multiverse, known: Multiverse, shrinkage: Shrinkage, skills: Sequence[float]) -> Result:
    """Everything the experiment shows."""
    signs = {cell: universe.signs(cell) for cell in dict.fromkeys(cell for cell, _ in universe.cells)}
    ranks = {cell: _ranks(universe.mean(cell)) for cell in signs}
    by_setting = {name: flips(signs[c] for c in universe.along(name)) for name in universe.grid}
    everywhere = flips(signs.values())
    rows = [
        Row("IS_p2" if cell[3] == 2 else f"IS_p{cell[3]}", float(value), len(universe.weights[0]), None, of)
        for cell in signs
        for value, of in zip(
            universe.mean(cell),
            ({"explainer": n, **dict(zip(universe.grid, cell, strict=True))} for n in universe.names),
            strict=True,
        )
    ]
    rows += [
        Row("IS under RBP", mean_of(v), int(np.isfinite(v).sum()), interval(v, shrinkage.weights), _where(key))
        for key, v in shrinkage.treated.items()
    ]
    needed = rows_needed(DIFFERENCE, SD)
    rows.append(Row("rows needed", float(needed), needed, None, {"difference": DIFFERENCE, "sd": SD}))
    tables = [_rbp_table(universe.names, shrinkage), _setting_table(universe, by_setting, signs, ranks)]
    tables += [_rank_table(universe, ranks), _known_table(known), _power_table(universe)]
    return Result(
        rows,
        [*_claims(universe, shrinkage, by_setting, everywhere, signs), *_known_claims(known)],
        tables,
        _figure(universe, shrinkage, ranks),
        _notes(universe, everywhere, skills, needed),
    )


def _claims(universe: Multiverse, shrinkage: Shrinkage, by_setting, everywhere, signs) -> list[Claim]:
    claims = []
    for form in ("as written", "on shares"):
        spread = {n: _spread(shrinkage, n, form) for n in universe.names}
        real = [s for n, s in spread.items() if n not in ANCHORS]
        claims.append(
            Claim(
                f"IS under RBP {form} stays within {STABLE} for 1 to 10 perturbations of 1 to 10 % (anchors aside)",
                max(real) < STABLE,
                "; ".join(f"{n} {s:.3f}" for n, s in spread.items()),
            )
        )
    for name, found in by_setting.items():
        claims.append(
            Claim(
                f"changing only {name} turns no pair of explainers around (beyond chance both times)",
                not bool(found.any()),
                _named(universe, found),
            )
        )
    claims.append(
        Claim(
            "no pair of explainers is turned around anywhere in the grid",
            not bool(everywhere.any()),
            _named(universe, everywhere),
        )
    )
    if {"shapley", "random"} <= set(universe.names):
        i, j = universe.names.index("shapley"), universe.names.index("random")
        better = np.mean([np.sign(universe.mean(c)[i] - universe.mean(c)[j]) < 0 for c in signs])
        worse = np.mean([s[min(i, j), max(i, j)] * (1 if i < j else -1) == 1 for s in signs.values()])
        said = f"lower IS in {better:.0%} of {len(signs)} cells; random lower beyond chance in {worse:.0%}"
        claims.append(
            Claim("Shapley values have a lower IS than random numbers in every cell", bool(better == 1), said)
        )
    return claims


def _known_claims(known: Multiverse) -> list[Claim]:
    """What the rule for undefined correlations does where some are undefined."""
    signs = [known.signs(cell) for cell in known.along("undefined")]
    found = flips(signs)
    claim = "on x1 sin(x2) itself, changing only undefined turns no pair of explainers around"
    claims = [Claim(claim, not bool(found.any()), _named(known, found))]
    if {"shapley", "random"} <= set(known.names):
        i, j = sorted((known.names.index("shapley"), known.names.index("random")))
        order = [s[i, j] * (1 if known.names[i] == "shapley" else -1) for s in signs]
        means = [
            f"{rule}: shapley {mean_of(known.cells[c, 'shapley']):.3f}, random {mean_of(known.cells[c, 'random']):.3f}"
            for rule, c in zip(known.grid["undefined"], known.along("undefined"), strict=True)
        ]
        claim = "on x1 sin(x2) itself, exact Shapley values have a lower IS than random numbers under both rules"
        claims.append(Claim(claim, order == [-1, -1], "; ".join(means)))
    return claims


def _known_table(known: Multiverse) -> Table:
    columns = [known.mean(cell) for cell in known.along("undefined")]
    lines = tuple((n, *(float(c[i]) for c in columns)) for i, n in enumerate(known.names))
    return Table(
        "IS on x1 sin(x2) itself, by the rule for undefined correlations", ("explainer", "skip", "zero"), lines
    )


def _named(universe: Multiverse, found: np.ndarray) -> str:
    pairs = [f"{universe.names[i]} / {universe.names[j]}" for i, j in zip(*np.nonzero(found), strict=True)]
    total = len(universe.names) * (len(universe.names) - 1) // 2
    return f"{len(pairs)} of {total} pairs" + (f": {', '.join(pairs)}" if pairs else "")


def _spread(shrinkage: Shrinkage, name: str, form: str) -> float:
    values = [mean_of(shrinkage.treated[name, form, n, s]) for n in shrinkage.counts for s in shrinkage.noises]
    return float(np.ptp(values))


def _rbp_table(names: Sequence[str], shrinkage: Shrinkage) -> Table:
    lines = []
    for name, form in itertools.product(names, ("as written", "on shares")):
        start = "plain" if form == "as written" else "shares only"
        values = [mean_of(shrinkage.treated[name, start, 0, shrinkage.noises[1]])]
        values += [mean_of(shrinkage.treated[name, form, n, s]) for s in shrinkage.noises for n in shrinkage.counts]
        lines.append((name, form, *(f"{v:.3f}" for v in values)))
    header = tuple(f"{n} at {s:.0%}" for s in shrinkage.noises for n in shrinkage.counts)
    return Table(
        "IS under RBP, by perturbations and their size", ("explainer", "RBP", "lambda 0", *header), tuple(lines)
    )


def _setting_table(universe: Multiverse, by_setting, signs, ranks) -> Table:
    lines = []
    for name in by_setting:
        for cell in universe.along(name):
            value = cell[list(universe.grid).index(name)]
            tau = float(kendalltau(ranks[universe.default], ranks[cell])[0])  # type: ignore[arg-type]
            turned = int(flips([signs[universe.default], signs[cell]]).sum())
            best = universe.names[int(np.nanargmin(universe.mean(cell)))]
            lines.append((name, str(value), tau, turned, best))
    header = ("setting", "value", "Kendall tau with the default ranking", "pairs turned around", "lowest IS")
    return Table("One setting at a time, all others at their default", header, tuple(lines))


def _rank_table(universe: Multiverse, ranks) -> Table:
    table = np.stack(list(ranks.values()))
    lines = tuple(
        (
            n,
            int(ranks[universe.default][i]),
            int(table[:, i].min()),
            int(table[:, i].max()),
            f"{np.mean(table[:, i] == 1):.0%}",
        )
        for i, n in enumerate(universe.names)
    )
    header = ("explainer", "rank by default", "best rank", "worst rank", "cells in which it is first")
    return Table(f"Ranks by IS over {len(table)} cells (1 is the lowest IS)", header, lines)


def _power_table(universe: Multiverse) -> Table:
    lines = []
    n = len(universe.weights[0])
    for name in universe.names:
        if name == "shapley":
            continue
        change = universe.cells[universe.default, name] - universe.cells[universe.default, "shapley"]
        sd = float(np.nanstd(change, ddof=1))
        draws = universe.weights @ np.nan_to_num(change) / universe.weights.sum(1)
        seen = smallest_detectable_effect(float(draws.std()))
        lines.append((f"{name} minus shapley", f"{sd:.3f}", f"{seen:.3f}", rows_needed(DIFFERENCE, sd)))
    header = ("pair", "sd of the difference over rows", f"smallest seen with {n} rows", f"rows needed for {DIFFERENCE}")
    return Table("Power at 80 %, two-sided 5 %", header, tuple(lines))


def _notes(universe: Multiverse, everywhere: np.ndarray, skills: Sequence[float], needed: int) -> tuple[str, ...]:
    pairs = len(universe.names) * (len(universe.names) - 1) // 2
    return (
        f"{int(everywhere.sum())} of {pairs} pairs of explainers are ordered one way beyond chance in some cell and "
        "the other way beyond chance in another: a ranking by IS is a statement about the cell.",
        f"A paired difference of {DIFFERENCE} at an sd of {SD} needs {needed} rows (80 % power, two-sided 5 %); rows "
        "of one model are not independent of each other, so models count as a second level.",
        f"R2 of the networks: {min(skills):.3f} to {max(skills):.3f} over {len(skills)} seeds. Intervals: bootstrap "
        "over networks, then rows. 'Beyond chance' is the 95 % interval of one pair, uncorrected.",
        "constant is left out: its R is undefined. Draws of a cell are the first of the same 30.",
    )


def _figure(universe: Multiverse, shrinkage: Shrinkage, ranks) -> bytes:
    figure, axes = canvas(1, 3, 13.5, 4.8)
    for k, form in enumerate(("as written", "on shares")):
        axes_of(axes[0, k], f"IS under RBP {form} (line: 5 %, band: 1 to 10 %)", "perturbations")
        for i, name in enumerate(universe.names):
            value = np.array(
                [[mean_of(shrinkage.treated[name, form, n, s]) for s in shrinkage.noises] for n in shrinkage.counts]
            )
            colour = {"random": GREY, "echo": INK}.get(name, COLOURS[i % len(COLOURS)])
            style = {"random": ":", "echo": "--"}.get(name, "-")
            axes[0, k].plot(
                shrinkage.counts,
                value[:, 1],
                marker="o",
                markersize=3,
                linestyle=style,
                color=colour,
                label=name.replace("_", " "),
            )
            axes[0, k].fill_between(shrinkage.counts, value.min(1), value.max(1), color=colour, alpha=0.15, linewidth=0)
        axes[0, k].set_xticks(shrinkage.counts)
        axes[0, k].set_ylim(0, 1)
    table = np.stack(list(ranks.values()))
    ax = axes_of(axes[0, 2], f"ranks over {len(table)} cells (bars), by default (mark)", "rank by IS, 1 is the lowest")
    places = np.arange(1, len(universe.names) + 1)
    for i, _ in enumerate(universe.names):
        share = np.array([np.mean(table[:, i] == place) for place in places])
        ax.barh(
            i + 0.0 * places,
            np.full(len(places), 0.9),
            left=places - 0.45,
            height=0.8,
            color=[(0.12, 0.37, 0.66, s) for s in share],
        )
        ax.plot(ranks[universe.default][i], i, marker="|", markersize=14, color=COLOURS[1])
    ax.set_yticks(range(len(universe.names)), [n.replace("_", " ") for n in universe.names])
    ax.set_xticks(places)
    ax.invert_yaxis()
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False
    )
    return png(figure)


def _ranks(values: np.ndarray) -> np.ndarray:
    order = np.argsort(np.where(np.isfinite(values), values, np.inf), kind="stable")
    ranks = np.empty(len(values), int)
    ranks[order] = np.arange(1, len(values) + 1)
    return ranks


def _where(key: tuple[str, str, int, float]) -> dict:
    return dict(zip(("explainer", "form", "perturbations", "noise"), key, strict=True))
