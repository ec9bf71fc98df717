"""The figure of intervention-fidelity: every dictionary beside its nulls, and the leakage of a family's best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mechinterp.experiments.canvas import COLOURS, GREY, axes_of, heat, png, stacked
from mechinterp.experiments.fidelity_parts import Reading
from saes.truth.fidelity import Leakage

__all__ = ["fidelity_figure"]

Key = tuple[str, str]
Median = Callable[[Sequence[Reading], str, str], float]

MARKS = (
    ("zero", "swap matched", COLOURS[0], "o", "matched latents"),
    ("random", "swap random", GREY, "x", "random sets (mean)"),
    ("untrained", "swap untrained", COLOURS[1], "+", "untrained twin"),
    ("patch all", "swap all", COLOURS[2], "|", "all latents, patched or swapped"),
)


def fidelity_figure(
    groups: Sequence[tuple[Key, list[Reading]]], leaks: dict[Key, Leakage], outputs: Sequence[str], median: Median
) -> bytes:
    """Above: medians of every dictionary. Below: true and ablation effects on all outputs, a row a family's best."""
    families: dict[str, tuple[Key, list[Reading]]] = {}
    for key, mine in groups:
        family = key[0].removesuffix("-shortcut")
        best = families.get(family)
        if best is None or np.nan_to_num(median(mine, "zero", "r2")) > np.nan_to_num(median(best[1], "zero", "r2")):
            families[family] = (key, mine)
    figure, axes = stacked([0.2 * len(groups) + 1.5, *(4.3 for _ in families)], 13.5, 2)
    _dots(axes[0][0], groups, 0, "r2", median, "a  R2 of effects on those of the removal (median over factors)")
    _dots(axes[0][1], groups, 1, "disentangle", median, "b  mean of cause and isolation (median over factors)")
    axes[0][1].axvline(0.5, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    axes[0][1].set_yticklabels([])
    for line, (key, mine) in enumerate(families.values(), start=1):
        leak = leaks[key]
        factors = [r.factor for r in mine if r.own is not None and r.present.sum() > 0]
        limit = float(np.abs(leak.true).max())
        words = ("removing the factor (row)", "ablating its latents")
        for column, (matrix, word) in enumerate(zip((leak.true, leak.ablated), words, strict=True)):
            letter = "cdefghij"[2 * (line - 1) + column]
            title = f"{letter}  {word}: mean effect on outputs, in their sd\n{key[0]}, {key[1]}"
            heat(figure, axes[line][column], matrix, factors, list(outputs), title, limit)
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(MARKS), fontsize=9, frameon=False)
    return png(figure)


def _dots(
    axes: Any, groups: Sequence[tuple[Key, list[Reading]]], side: int, what: str, median: Median, title: str
) -> None:
    """A line a dictionary, a mark a way of intervening (`side` 0: ablation, 1: swap)."""
    axes_of(axes, title)
    y = np.arange(len(groups), dtype=float)
    for *how, colour, shape, label in MARKS:
        values = [median(mine, how[side], what) for _, mine in groups]
        axes.plot(values, y, shape, color=colour, markersize=6, label=label, linestyle="none")
    axes.set_yticks(y, [f"{model}: {dictionary}" for (model, dictionary), _ in groups], fontsize=7.5)
    for at in range(1, len(groups)):
        if groups[at][0][0] != groups[at - 1][0][0]:
            axes.axhline(at - 0.5, color=GREY, linewidth=0.6)
    axes.set_xlim(-0.04, 1.04)
    axes.set_ylim(len(groups) - 0.5, -0.5)
