"""Figures of experiments: matplotlib's objects without global state, one look, PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

__all__ = ["COLOURS", "GREY", "INK", "axes_of", "canvas", "heat", "log_ticks", "png", "stacked"]

INK, GREY = "#202124", "#80868b"
COLOURS = ("#1f5fa8", "#c2410c", "#1b6e3c", "#7b3fa0", "#a88a00", "#5f6368", "#17a2b8", "#e0569b")


def canvas(rows: int, columns: int, width: float | int, height: float | int, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes `[rows, columns]` (inches)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes


def stacked(heights: Sequence[float], width: float, columns: int) -> tuple[Any, list[Any]]:
    """A figure of rows that do not share their margins, and the axes `[columns]` of each row (inches)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, sum(heights)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=list(heights))
    return figure, [row.subplots(1, columns, squeeze=False)[0] for row in rows[:, 0]]


def axes_of(axes: Any, title: str, x: str = "", y: str = "") -> Any:
    """The common look: small type, no box, a faint grid."""
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8, length=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(color="#eceff1", linewidth=0.7)
    axes.set_axisbelow(True)
    return axes


def log_ticks(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic x axis with ticks at `values` only, written plainly."""
    axes.set_xscale("log")
    axes.set_xticks(list(values), [f"{value:g}" for value in values])
    axes.set_xticks([], minor=True)


def heat(figure: Any, axes: Any, matrix: Any, rows: list[str], columns: list[str], title: str, limit: float) -> None:
    """A matrix with named rows and columns, blue below 0 and red above, its values written in."""
    axes.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=55, ha="right", rotation_mode="anchor", fontsize=7.5)
    axes.set_yticks(range(len(rows)), rows, fontsize=7.5)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    for i, line in enumerate(matrix):
        for j, value in enumerate(line):
            dark = abs(value) > 0.6 * limit
            axes.text(
                j,
                i,
                f"{value + 0.0 if abs(value) >= 0.05 else 0.0:.1f}",
                ha="center",
                va="center",
                fontsize=6.5,
                color="white" if dark else INK,
            )
    axes.set_title(title, fontsize=10, color=INK, loc="left")


def png(figure: Any) -> bytes:
    """The figure as PNG bytes that hold no date."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, facecolor="white")
    return buffer.getvalue()
