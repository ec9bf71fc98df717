"""`graph.png`: an attribution graph on one page, the image with the patches that matter at its bottom left."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from graphs.draw.notes import notes_of
from graphs.draw.place import Layout, Spot, place
from graphs.draw.scene import Box, Names, Scene, certificate, make_scene
from graphs.nodes import NodeType
from graphs.supernodes import Supernodes
from mechinterp.pages.html import clean
from mechinterp.storage import write_bytes

if TYPE_CHECKING:
    from graphs.graph import AttributionGraph

__all__ = ["Drawn", "draw", "figure_of"]

INK, SOFT, FAINT = "#202124", "#5f6368", "#9aa0a6"
UP, DOWN = "#c2410c", "#1f5fa8"
"""Raises, lowers: orange and blue, told apart by every kind of colour vision."""
NAME, DETAIL, TITLE = 8.6, 7.4, 15.0  # points at 100 dots an inch
THUMB, PAD, MOST_NAME, MOST_DETAIL = 32.0, 6.0, 30, 34
_HOT = np.array([[0.99, 0.75, 0.15], [0.93, 0.33, 0.10], [0.75, 0.05, 0.20]])


@dataclass(frozen=True)
class Drawn:
    """A figure, and where everything in it stands (page units: 1/100 inch, y upwards)."""

    figure: Any
    scene: Scene
    layout: Layout


def draw(
    graph: AttributionGraph,
    image: Float[np.ndarray, "height width"] | None,
    out: Path | str,
    names: Names | None = None,
    supernodes: Supernodes | None = None,
    most: int = 60,
    title: str | None = None,
    scale: float = 1.5,
) -> Path:
    """Draw a graph, best a pruned one, to a PNG file; returns its path.

    Args:
        graph: the graph.
        image: what the model saw, grey, in [0, 1], cropped as the model crops; None leaves it out.
        out: file.
        names: of features, by `vision.blocks.2.hook_mlp_out:301`.
        supernodes: groups to draw as one box each.
        most: boxes of features, at most; the rest is counted in the caption.
        title: default: the outputs and their values.
        scale: pixels for each 1/100 inch; the page is 16 inches wide.
    """
    drawn = figure_of(graph, image, names, supernodes, most, title)
    buffer = io.BytesIO()
    drawn.figure.savefig(buffer, format="png", dpi=100 * scale, metadata={"Software": None}, facecolor="white")
    write_bytes(Path(out), buffer.getvalue())
    return Path(out)


def figure_of(
    graph: AttributionGraph,
    image: Float[np.ndarray, "height width"] | None,
    names: Names | None = None,
    supernodes: Supernodes | None = None,
    most: int = 60,
    title: str | None = None,
) -> Drawn:
    """The figure behind `draw`, as a matplotlib figure without global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scene = make_scene(graph, names, supernodes, most)
    figure = Figure(figsize=(16, 10), dpi=100)
    FigureCanvasAgg(figure)
    ruler = _Ruler(figure)
    layout = place(scene, [_size(box, ruler) for box in scene.boxes])
    figure.set_size_inches(16, layout.height / 100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, layout.width)
    axes.set_ylim(0, layout.height)
    axes.set_autoscale_on(False)
    if layout.image is not None:
        _draw_image(axes, scene, layout, image)
    _draw_lines(axes, scene, layout)
    strongest = max((b.influence for b in scene.boxes if b.kind == NodeType.FEATURE), default=1.0) or 1.0
    for i, box in enumerate(scene.boxes):
        if i in layout.spots and box.kind != NodeType.PATCH:
            _draw_box(axes, box, layout.spots[i], image, scene, strongest)
    _draw_rows(axes, scene, layout)
    _draw_legend(axes, layout)
    _draw_words(axes, graph, scene, layout, title)
    return Drawn(figure, scene, layout)


class _Ruler:
    """Measures text before it is drawn."""

    def __init__(self, figure: Any):
        self.renderer = figure.canvas.get_renderer()

    def width(self, text: str, size: float, bold: bool = False) -> float:
        from matplotlib.font_manager import FontProperties

        font = FontProperties(size=size, weight="bold" if bold else "normal")
        return self.renderer.get_text_width_height_descent(text, font, False)[0]


def _size(box: Box, ruler: _Ruler) -> tuple[float, float]:
    """Width and height that a box needs."""
    if box.kind == NodeType.TOKEN:
        return ruler.width(_short(box.name, 16), NAME) + 2 * PAD + 4, 26.0
    name, detail = _short(box.name, MOST_NAME), _short(box.detail, MOST_DETAIL)
    if box.kind == NodeType.OUTPUT:
        # long bold text is drawn a little wider than it is measured
        text = max(1.06 * ruler.width(_short(box.name, 46), NAME + 1, True), ruler.width(detail, NAME + 1))
    else:
        text = max(ruler.width(name, NAME, True), ruler.width(detail, DETAIL))
    return text + 3 * PAD + (THUMB + 4 if box.patches else 0), 44.0


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _colour(effect: float) -> str:
    return UP if effect > 0 else DOWN if effect < 0 else FAINT


def _draw_image(axes: Any, scene: Scene, layout: Layout, image: np.ndarray | None) -> None:
    """The image, and outlines of the patches that matter most."""
    from matplotlib.patches import Rectangle

    spot = layout.image
    assert spot is not None and scene.grid is not None
    extent = (spot.x - spot.width / 2, spot.x + spot.width / 2, spot.y - spot.height / 2, spot.y + spot.height / 2)
    pixels = np.full(scene.grid, 0.9) if image is None else np.clip(image, 0, 1)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=extent, aspect="auto", zorder=1, interpolation="bilinear")
    patches = [i for i, box in enumerate(scene.boxes) if box.kind == NodeType.PATCH and i in layout.spots]
    strongest = max((scene.boxes[i].influence for i in patches), default=0.0) or 1.0
    for i in sorted(patches, key=lambda i: scene.boxes[i].influence):
        box, at = scene.boxes[i], layout.spots[i]
        share = box.influence / strongest
        corner = (at.x - at.width / 2, at.y - at.height / 2)
        fill = Rectangle(
            corner, at.width, at.height, color=_colour(box.effect), alpha=0.32 * share, linewidth=0, zorder=2
        )
        axes.add_patch(fill)
        if i in scene.top_patches:
            width = 0.8 + 1.7 * share
            line = Rectangle(corner, at.width, at.height, fill=False, edgecolor=_colour(box.effect), linewidth=width)
            line.set_zorder(5)
            axes.add_patch(line)


def _draw_lines(axes: Any, scene: Scene, layout: Layout) -> None:
    """Edges as curves from the top of the source to the bottom of the target, strongest last."""
    from matplotlib.collections import PathCollection
    from matplotlib.path import Path as Curve

    strongest = max((line.score for line in scene.lines), default=1.0) or 1.0
    ports = _ports(scene, layout)
    curves, colours, widths = [], [], []
    for line in sorted(scene.lines, key=lambda line: line.score):
        if line.source not in layout.spots or line.target not in layout.spots:
            continue
        source, target = layout.spots[line.source], layout.spots[line.target]
        on_image = scene.boxes[line.source].kind == NodeType.PATCH
        x0, y0 = (
            (source.x, source.y + source.height / 2) if on_image else (ports[line, "out"], source.y + source.height / 2)
        )
        x1, y1 = ports[line, "in"], target.y - target.height / 2
        bend = max(26.0, 0.42 * abs(y1 - y0))
        curves.append(Curve([(x0, y0), (x0, y0 + bend), (x1, y1 - bend), (x1, y1)], [1, 4, 4, 4]))
        part = line.score / strongest
        widths.append(0.45 + 4.6 * part**0.6)
        from matplotlib.colors import to_rgba

        colours.append(to_rgba(_colour(line.weight), 0.22 + 0.5 * part**0.4))
    if curves:
        axes.add_collection(PathCollection(curves, facecolors="none", edgecolors=colours, linewidths=widths, zorder=3))


def _ports(scene: Scene, layout: Layout) -> dict[tuple[Any, str], float]:
    """Where along its boxes each line begins and ends: in the order of the other ends, so that few cross there."""
    found: dict[tuple[Any, str], float] = {}
    for end, other, side in (("source", "target", "out"), ("target", "source", "in")):
        mine: dict[int, list[Any]] = {}
        for line in scene.lines:
            if line.source in layout.spots and line.target in layout.spots:
                mine.setdefault(getattr(line, end), []).append(line)
        for box, lines in mine.items():
            spot = layout.spots[box]
            span = min(spot.width - 16, 9.0 * (len(lines) - 1))
            lines.sort(key=lambda line: layout.spots[getattr(line, other)].x)
            for k, line in enumerate(lines):
                part = k / (len(lines) - 1) - 0.5 if len(lines) > 1 else 0.0
                found[line, side] = spot.x + part * span
    return found


def _draw_box(axes: Any, box: Box, spot: Spot, image: np.ndarray | None, scene: Scene, strongest: float) -> None:
    """A node: its name, a line of detail, its place on the image, its influence as a bar along the lower edge."""
    from matplotlib.patches import FancyBboxPatch, Rectangle

    left, low = spot.x - spot.width / 2, spot.y - spot.height / 2
    output = box.kind == NodeType.OUTPUT
    colour = INK if output else FAINT if box.kind == NodeType.TOKEN and box.influence < 0.001 else _colour(box.effect)
    frame = FancyBboxPatch((left, low), spot.width, spot.height, boxstyle="round,pad=0,rounding_size=5")
    frame.set(facecolor=INK if output else "white", edgecolor=colour, linewidth=1.2, zorder=6, clip_on=False)
    axes.add_patch(frame)
    start = left + PAD
    if box.patches and scene.grid:
        size = spot.height - 8
        extent = (left + 4, left + 4 + size, low + 4, low + 4 + size)
        axes.imshow(_thumb(box, image, scene.grid), extent=extent, aspect="auto", zorder=7, interpolation="nearest")
        start = left + 4 + size + PAD
    common = {"parse_math": False, "zorder": 8, "va": "center"}
    if box.kind == NodeType.TOKEN:
        axes.text(spot.x, spot.y - 1, _short(box.name, 16), fontsize=NAME, color=INK, ha="center", **common)
    elif output:
        name = _short(box.name, 46)
        axes.text(start, spot.y + 9, name, fontsize=NAME + 1, weight="bold", color="white", **common)
        axes.text(start, spot.y - 9, box.detail, fontsize=NAME + 1, color="white", **common)
    else:
        above = 9 if box.detail else 0
        name, detail = _short(box.name, MOST_NAME), _short(box.detail, MOST_DETAIL)
        axes.text(start, spot.y + above, name, fontsize=NAME, weight="bold", color=INK, **common)
        axes.text(start, spot.y - 8, detail, fontsize=DETAIL, color=SOFT, **common)
    if not output:
        share = min(1.0, box.influence / strongest)
        bar = Rectangle((left + 5, low), (spot.width - 10) * share, 3, color=colour, linewidth=0, zorder=9)
        axes.add_patch(bar)


def _thumb(box: Box, image: np.ndarray | None, grid: tuple[int, int], side: int = 64) -> np.ndarray:
    """The image, small and dark, with the patches where a feature fires."""
    heat = np.zeros(grid, dtype=np.float32)
    for (row, column), value in box.patches.items():
        heat[row, column] = value
    heat /= heat.max() or 1.0
    pixels = np.full(grid, 0.5, np.float32) if image is None else np.clip(image, 0, 1).astype(np.float32)
    grey = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR))[..., None]
    strength = np.asarray(Image.fromarray(heat).resize((side, side), Image.Resampling.NEAREST))
    position = np.clip(strength, 0, 1) * (len(_HOT) - 1)
    below = np.minimum(position.astype(int), len(_HOT) - 2)
    colour = _HOT[below] + (position - below)[..., None] * (_HOT[below + 1] - _HOT[below])
    alpha = np.where(strength > 0, 0.45 + 0.4 * strength, 0.0)[..., None]
    return np.clip(0.8 * grey * (1 - alpha) + colour * alpha, 0, 1)


def _draw_rows(axes: Any, scene: Scene, layout: Layout) -> None:
    """Labels in the gutter, with the share of what is shown without lines."""
    from matplotlib.patches import FancyBboxPatch

    for row in layout.rows:
        if row.band:
            left, right, low, high = row.band
            shape = "round,pad=0,rounding_size=8"
            band = FancyBboxPatch((left, low), right - left, high - low, boxstyle=shape, color="#f5f6f8", linewidth=0)
            band.set_zorder(0)
            axes.add_patch(band)
        quiet = [scene.boxes[i] for i in row.quiet if scene.boxes[i].influence >= 0.001]
        lines = [f"{box.name} {_percent(box.influence)}" for box in sorted(quiet, key=lambda b: -b.influence)]
        height = 13.0
        top = row.y + height * len(lines) / 2
        axes.text(row.x, top, row.text, fontsize=NAME, weight="bold", color=SOFT, va="center", parse_math=False)
        for k, text in enumerate(lines, start=1):
            axes.text(row.x, top - k * height, text, fontsize=DETAIL, color=SOFT, va="center", parse_math=False)


def _draw_legend(axes: Any, layout: Layout) -> None:
    """How to read the page, at its upper right."""
    left, y = layout.width - 24 - 410, layout.height - 26
    for at, text, colour in ((left, "raises", UP), (left + 110, "lowers", DOWN)):
        axes.plot([at, at + 30], [y, y], color=colour, linewidth=3, solid_capstyle="butt", zorder=4)
        axes.text(at + 38, y, text, fontsize=DETAIL + 0.4, color=SOFT, va="center")
    for k, text in enumerate(
        (
            "Lines: the next node, directly; width: influence along the line.",
            "Frames: the output, in total; bar: influence through the node.",
        )
    ):
        axes.text(left, y - 17 - 14 * k, text, fontsize=DETAIL + 0.4, color=SOFT, va="center")


def _draw_words(axes: Any, graph: AttributionGraph, scene: Scene, layout: Layout, title: str | None) -> None:
    """Title, and the caption with the certificate."""
    meta = graph.meta
    model = meta.get("model") or {}
    said = title or title_of(graph)
    top = layout.height - 34
    axes.text(24, top, clean(_short(said, 84)), fontsize=TITLE, weight="bold", color=INK, va="center", parse_math=False)
    below = [f"model {model.get('label')}" if model.get("label") else ""]
    below += [f"image {meta['image']}" if isinstance(meta.get("image"), str) else ""]
    below = clean(_short("   ".join(part for part in below if part), 170))
    axes.text(24, top - 26, below, fontsize=NAME + 0.6, color=SOFT, va="center", parse_math=False)
    notes = clean("   ".join(notes_of(graph)))
    axes.text(24, top - 43, notes, fontsize=NAME + 0.6, color=INK, va="center", parse_math=False)
    for k, line in enumerate(caption(graph, scene)):
        axes.text(24, 80 - 17 * k, line, fontsize=NAME, color=SOFT, va="center", parse_math=False)


def title_of(graph: AttributionGraph) -> str:
    """The outputs with their values; halves of one similarity, each of which is all of it, count once."""
    whole = {o.name.partition(" (")[0] for o in graph.outputs}
    shown = graph.outputs[:1] if len(whole) == 1 and len(graph.outputs) > 1 else graph.outputs[:3]
    names = [o.name.partition(" (")[0] if len(whole) == 1 else o.name for o in shown]
    values = [f"{o.value:+.3f}".replace("-", "−") for o in shown]
    return ";  ".join(f"{name}  {value}" for name, value in zip(names, values, strict=True))


def caption(graph: AttributionGraph, scene: Scene) -> list[str]:
    """The lines under the picture: exactness, scores, what was left out, and what this is not."""
    found = certificate(graph)
    residual = found["max_relative_residual"]
    residual = found["residual_here"] if residual is None else residual
    active, expanded = found["active_features"], found["expanded_features"]
    some = f" ({expanded:,} of {active:,} active features have one)" if active and expanded < active else ""
    lines = [f"Every row adds up: largest relative residual {residual:.1e} over {found['rows']:,} rows{some}."]
    scores = found["whole"]
    if scores:
        lines[0] += (
            f" Completeness {scores['completeness']:.2f} (as circuit-tracer counts it "
            f"{scores['completeness_circuit_tracer']:.2f}), replacement {scores['replacement']:.2f}."
        )
    pruning = found["pruning"]
    if pruning:
        left = pruning["scores"]
        lines.append(
            f"Pruned at {pruning['node_threshold']:g} of node and {pruning['edge_threshold']:g} of edge influence: "
            f"{pruning['nodes']:,} of {pruning['nodes_before']:,} nodes, {pruning['edges']:,} of "
            f"{pruning['edges_before']:,} edges; completeness {left['completeness']:.2f} with the rest as error."
        )
    features = sum(box.kind == NodeType.FEATURE for box in scene.boxes)
    shown = f"Drawn: {features} boxes of features (same feature at several places: one box)"
    if scene.hidden_boxes:
        most = _percent(scene.hidden_influence)
        shown += f", {scene.hidden_boxes} weaker ones not (of {most} of the influence at most)"
    shown += f"; {len(scene.top_patches)} patches with lines" if scene.grid else ""
    lines.append(f"{shown}. Lines carry {_percent(scene.line_share)} of the flow; errors, positions, biases have none.")
    held = "patterns, norms and MLP gates" if graph.meta.get("mode") == "sae" else "patterns and norms"
    lines.append(
        f"Attention {held} are held at their values on this input: why attention looks where it does is not "
        "explained.  Research use only. Not a medical device."
    )
    return lines


def _percent(share: float) -> str:
    return "< 0.1 %" if share < 0.0005 else f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"
