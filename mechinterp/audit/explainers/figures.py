"""The maps side by side on the same images, and where each explainer stands between reliance and faithfulness."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from mechinterp.audit.explainers.compare import Comparison
from mechinterp.data import ImageData

__all__ = ["maps_picture", "plane_picture"]

INK, GREY = "#202124", "#80868b"
EDGES = ("#1b6e3c", "#c2410c", "#7b3fa0", "#a88a00")  # the target's mask first
# points across and up from a point to its name, and the name's side that is there: the nearest first
_ROOMS = [(a if s == "left" else -a, u, s) for a, u in ((4, 2), (4, -7)) for s in ("left", "right")]
_ROOMS += [(3 * d, u, s) for n in range(1, 9) for u in (9 * n, -9 * n - 5) for s, d in (("left", 1), ("right", -1))]
ACROSS = 8  # pictures in a row, at most


def maps_picture(made: Comparison, data: ImageData, images: int = 2) -> bytes | None:
    """PNG: a few images, and on each the map of every method; red speaks for the target. None where none may be shown.

    Each map is scaled by its own largest value. Masks are outlined.
    """
    shown = _shown(made, data, images)
    if not shown:
        return None
    names = list(made.judged)
    lines = -(-(len(names) + 1) // ACROSS)
    columns = -(-(len(names) + 1) // lines)
    side = 10.5 / columns
    figure, axes = _canvas(lines * len(shown), columns, 10.5, (side + 0.18) * lines * len(shown) + 0.35)
    for ax in axes.flat:
        ax.set_axis_off()
    for block, place in enumerate(shown):
        row = int(made.rows[place])
        pixels = data.pixels([row])[0]
        masks = [data.mask(name, row) for name in made.masks]
        for spot, name in enumerate([None, *names]):
            ax = axes[block * lines + spot // columns, spot % columns]
            ax.imshow(pixels, cmap="gray", vmin=0, vmax=1)
            if name is not None:
                _overlay(ax, made, place, name, pixels.shape)
            _outline(ax, masks, 1.2 if name is None else 0.6)
            ax.set_title((name or _caption(made, data, row)).replace("_", " "), fontsize=7.5, color=INK, pad=2)
    drawn = zip(EDGES, made.masks.items(), strict=False)
    legend = [_line(colour, name) for colour, (name, (_, known)) in drawn if known[shown].any()]
    if legend:
        figure.legend(handles=legend, loc="outside lower center", ncols=4, fontsize=7, frameon=False, title=None)
    return _png(figure)


def plane_picture(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG: F across, R beyond the effects' own co-movement up, every explainer with its interval; anchors grey."""
    figure, axes = _canvas(1, 2, 10.5, 4.4)
    named: list[tuple[Any, list[tuple[float, float, str, str]]]] = []
    for ax, column, label in (
        (axes[0, 0], "R", "R: moves with the output"),
        (axes[0, 1], "R_excess", "R beyond the true effects' own movement"),
    ):
        top = _top(rows, column)
        points: list[tuple[float, float, str, str]] = []
        for row in rows:
            x, y = row["F"], row[column]
            if x is None or y is None:
                continue
            if y > top:  # an anchor that would squeeze everything else to the bottom
                said = f"{row['method'].replace('_', ' ')}: {y:.2f} \u2191"
                points.append((x, 0.97 * top, said, GREY))
                continue
            colour = GREY if row["anchor"] else EDGES[0] if row["built_from"] in ("latent", "graph") else "#1f5fa8"
            for key, at in (("F", "x"), (column, "y")):
                interval = row["ci95"].get(key)
                if interval:
                    ends = (interval, [y, y]) if at == "x" else ([x, x], interval)
                    ax.plot(*ends, color=colour, linewidth=0.7, alpha=0.6)
            ax.plot(x, y, "o", color=colour, markersize=4)
            points.append((x, y, row["method"].replace("_", " "), colour))
        ax.set_xlabel("F: agrees with held-out removal effects", fontsize=8.5)
        ax.set_ylabel(label, fontsize=8.5)
        ax.set_xlim(0, 1.02)
        ax.set_ylim(0, top)
        ax.tick_params(labelsize=8, length=2)
        ax.grid(color="#eceff1", linewidth=0.7)
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        named.append((ax, points))
    figure.canvas.draw()  # lays the panels out: the room that a name takes is in pixels
    for ax, points in named:
        _name(ax, points)
    return _png(figure)


def _name(ax: Any, points: Sequence[tuple[float, float, str, str]]) -> list[Any]:
    """Write each name beside its point where it covers no other name and no point, as near as there is room."""
    from matplotlib.transforms import Bbox

    renderer = ax.figure.canvas.get_renderer()
    spots = [ax.transData.transform((x, y)) for x, y, _, _ in points]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in spots]
    made = []
    for i, (x, y, said, colour) in enumerate(points):
        text = ax.annotate(said, (x, y), (0, 0), textcoords="offset points", fontsize=6.5, color=colour)
        text.set_in_layout(False)
        others = taken[:i] + taken[i + 1 :]
        for across, up, side in _ROOMS:
            text.set_position((across, up))
            text.set_horizontalalignment(side)
            box = text.get_window_extent(renderer)
            inside = ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1 and ax.bbox.y0 <= box.y0 and box.y1 <= ax.bbox.y1
            if inside and not any(box.overlaps(other) for other in others):
                break
        if abs(up) > 8:
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.4, "alpha": 0.7, "shrinkA": 0, "shrinkB": 2}
            ax.annotate("", (x, y), (across, up + 3), textcoords="offset points", arrowprops=line)
        taken.append(text.get_window_extent(renderer))
        made.append(text)
    return made


def _top(rows: Sequence[Mapping[str, Any]], column: str) -> float:
    """Upper end of an axis that holds every explainer's interval; all rows where there are only anchors."""
    counted = [row for row in rows if not row["anchor"]] or rows
    ends = [max([row[column], *(row["ci95"].get(column) or ())]) for row in counted if row[column] is not None]
    return 1.1 * max([*ends, 0.05])


def _shown(made: Comparison, data: ImageData, images: int) -> list[int]:
    """Images with the most masks first, of those that may be shown."""
    count = np.zeros(len(made.rows))
    for _, known in made.masks.values():
        count += known
    order = np.argsort(-count, kind="stable")
    return [int(i) for i in order if data.may_show[int(made.rows[i])]][:images]


def _caption(made: Comparison, data: ImageData, row: int) -> str:
    label = data.labels(made.target.name)[row]
    return f"labelled {made.target.name}" if label == 1 else f"not labelled {made.target.name}"


def _overlay(ax: Any, made: Comparison, place: int, name: str, shape: tuple[int, ...]) -> None:
    grid = made.judged[name].attribution[place].reshape(made.model.grid_shape)
    owner = made.model.grid(*shape).numpy() - made.model.patch_tokens().start
    values = np.where(owner >= 0, grid.flatten()[np.clip(owner, 0, None)], 0.0)
    limit = float(np.abs(values).max())
    if not np.isfinite(limit) or limit == 0:
        ax.text(0.5, 0.5, "no map", transform=ax.transAxes, ha="center", fontsize=7, color="white")
        return
    ax.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.15 + 0.65 * np.abs(values) / limit)


def _outline(ax: Any, masks: Sequence[Bool[np.ndarray, "height width"] | None], width: float) -> None:
    for colour, mask in zip(EDGES, masks, strict=False):
        if mask is not None and mask.any():
            ax.contour(mask.astype(float), levels=[0.5], colors=[colour], linewidths=width)


def _line(colour: str, name: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linewidth=1.2, label=f"mask of {name}")


def _canvas(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, facecolor="white")
    return buffer.getvalue()
