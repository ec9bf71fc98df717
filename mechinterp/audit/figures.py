"""The figures of the report, drawn with matplotlib's objects (no global state) as PNG bytes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

__all__ = ["COLOURS", "forest", "performance_plot"]

COLOURS = {"FAIL": "#b3261e", "CONCERN": "#a85b00", "PASS": "#1b6e3c", "NOT TESTED": "#5f6368"}
_INK, _GREY, _BAND = "#202124", "#80868b", "#dadce0"


def forest(rows: list[dict[str, Any]], truth: dict[str, Any] | None, line: float) -> bytes | None:
    """Causal effect and score gap of every tested candidate with their intervals, against matched random sets.

    None when no candidate was tested: neither features removed, nor images enough for a gap. On a phantom a cross marks
    the true do() effect.
    """
    asked = [row for row in rows if row["kind"] == "attribute"]
    tested = [row for row in asked if row["causal_effect"] is not None or row["detectable_gap"] is not None]
    if not tested:
        return None
    tested = sorted(tested, key=lambda row: abs(row["causal_effect"] or 0.0))
    true = {row["candidate"]: row["do_effect"] for row in (truth or {}).get("planted", []) if row["candidate"]}
    figure, axes = _canvas(len(tested))
    for y, row in enumerate(tested):
        colour = COLOURS[row["verdict"]]
        axes.plot(row["observed_ci95"], [y, y], color=_GREY, linewidth=1.0, solid_capstyle="butt", zorder=2)
        axes.plot(row["observed_score_gap"], y, "D", color="white", markeredgecolor=_GREY, markersize=5, zorder=2)
        if row["null_band"][0] is not None:
            left, right = row["null_band"]
            axes.barh(y, right - left, left=left, height=0.72, color=_BAND, zorder=1)
        if row["causal_effect"] is not None:
            axes.plot(row["causal_ci95"], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt", zorder=3)
            axes.plot(row["causal_effect"], y, "o", color=colour, markersize=7, zorder=4)
        if row["candidate"] in true:
            axes.plot(true[row["candidate"]], y, "x", color=_INK, markersize=7, markeredgewidth=1.6, zorder=5)
    for x in (-line, line):
        axes.axvline(x, color=_GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axes.axvline(0, color=_INK, linewidth=0.8, zorder=0)
    _labels(
        axes, [f"{_plain(row['candidate'])}   {row['verdict']}" for row in tested], [row["verdict"] for row in tested]
    )
    keys = "features removed (dot);  score gap at equal label (diamond), both with 95 % intervals"
    keys += ";  true do() effect (cross)" if true else ""
    axes.set_xlabel(f"change of the score in sd\n{keys}", fontsize=8.5)
    _legend(figure, "grey band: 95 % of matched random feature sets;  dashed: the line that matters", len(tested))
    return _png(figure)


def performance_plot(rows: list[dict[str, Any]]) -> bytes | None:
    """AUROC with interval of every row of the performance table; None when there is none."""
    shown = [row for row in rows if row["auroc"] is not None and row["ci95"][0] is not None][::-1]
    if not shown:
        return None
    figure, axes = _canvas(len(shown))
    overall = next((row["auroc"] for row in shown if row["group"] == "overall"), None)
    for y, row in enumerate(shown):
        bold = row["group"] in ("overall", "metadata_only")
        colour = _INK if row["group"] == "overall" else COLOURS["CONCERN"] if bold else "#3c6e91"
        axes.plot(row["ci95"], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
        axes.plot(row["auroc"], y, "s" if bold else "o", color=colour, markersize=6.5)
    if overall is not None:
        axes.axvline(overall, color=_GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axes.axvline(0.5, color=_INK, linewidth=0.8, zorder=0)
    low = min([0.45, *(row["ci95"][0] - 0.02 for row in shown)])
    axes.set_xlim(max(0.0, low), 1.01)
    _labels(axes, [f"{_plain(row['group'])}   n={row['n']}" for row in shown], None)
    axes.set_xlabel("AUROC on test patients, 95 % patient-bootstrap interval", fontsize=8.5)
    return _png(figure)


def _canvas(n: int):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 1.15 + 0.29 * n), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="both", length=0, labelsize=8.5)
    axes.tick_params(axis="x", length=3)
    axes.grid(axis="x", color="#f1f3f4", zorder=-1)
    axes.set_axisbelow(True)
    axes.set_ylim(-0.7, n - 0.3)
    return figure, axes


def _labels(axes, labels: list[str], verdicts: list[str] | None) -> None:
    axes.set_yticks(np.arange(len(labels)), labels, parse_math=False)
    for i, label in enumerate(axes.get_yticklabels()):
        label.set_color(COLOURS[verdicts[i]] if verdicts else _INK)


def _legend(figure, text: str, n: int) -> None:
    figure.suptitle(text, fontsize=8.5, color=_GREY, x=0.995, ha="right")


def _plain(text: str, most: int = 34) -> str:
    """A name fit for a figure: printable, and short."""
    clean = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return clean if len(clean) <= most else clean[: most - 1] + "…"


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, facecolor="white")
    return buffer.getvalue()
