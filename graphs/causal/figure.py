"""One figure of one suppression: what was measured before, after, and under random supernodes instead."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphs.causal.suppression import Measured, Suppression

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_suppression", "suppression_figure"]

BEFORE, AFTER, RANDOM = "#4a4a4a", "#c0392b", "#8fa8bf"


def draw_suppression(found: Suppression, path: Path | str, title: str = "") -> Path:
    """Write `suppression_figure` (the ending of `path` says which format). Returns the path."""
    suppression_figure(found, title).savefig(path, dpi=150)
    return Path(path)


def suppression_figure(found: Suppression, title: str = "") -> Figure:
    """The figure of one suppression.

    One row for each supernode (activation, as a share of the larger of before and after) and for each output (its own
    units): a grey bar where it stood, a red bar where the suppression took it, a blue dot for each random supernode.
    """
    from matplotlib.figure import Figure

    nodes = [m for m in found.measured if m.kind == "supernode"]
    outputs = [m for m in found.measured if m.kind == "output"]
    height = 1.6 + 0.62 * len(found.measured)
    figure = Figure(figsize=(7.5, height), layout="constrained")
    ratios = [max(1, len(nodes)), max(1, len(outputs))]
    axes = figure.subplots(2, 1, height_ratios=ratios) if nodes and outputs else [figure.subplots()]
    for axis, rows in zip(axes, [rows for rows in (nodes, outputs) if rows], strict=True):
        _rows(axis, rows, shares=rows is nodes)
    held = {"free": "nothing held", "frozen_attn": "attention held"}.get(found.mode, found.mode)
    said = f"{found.name}: {found.members} feature{'s' * (found.members > 1)} times {found.factor:g}, {held}"
    axes[0].set_title(f"{title or said}\np: change against the random supernodes", loc="left", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _rows(axis: Axes, rows: list[Measured], shares: bool) -> None:
    draws = np.random.default_rng(0)
    for at, row in enumerate(rows):
        unit = max(abs(row.before), abs(row.after), 1e-9) if shares else 1.0
        axis.barh(at - 0.16, row.before / unit, 0.3, color=BEFORE, label="before" if at == 0 else None)
        axis.barh(at + 0.16, row.after / unit, 0.3, color=AFTER, label="suppressed" if at == 0 else None)
        jitter = draws.uniform(-0.3, 0.3, len(row.random))
        axis.plot(
            np.array(row.random) / unit,
            at + jitter,
            ".",
            color=RANDOM,
            markersize=3.5,
            zorder=3,
            label=f"{len(row.random)} matched random supernodes" if at == 0 else None,
        )
        axis.annotate(
            f"p = {row.p:.3f}" if row.p == row.p else "p: NOT TESTED",
            (1.0, at),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axis.set_yticks(range(len(rows)), [row.name for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel("activation (share of the larger)" if shares else "output")
    axis.spines[["top", "right"]].set_visible(False)
