"""Colours and lengths in the pictures of graphs mean what the legends say."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb

from graphs.causal.figure import suppression_figure
from graphs.causal.suppression import Measured, Suppression
from graphs.draw.png import figure_of
from graphs.nodes import NodeType
from tests.graph_scenes import lot


def orange(colour) -> bool:
    """Whether a colour is warm; else it is blue."""
    red, _, blue = to_rgb(tuple(colour)[:3])
    assert abs(red - blue) > 0.2
    return red > blue


def test_orange_raises_and_blue_lowers():
    """A line has the colour of the sign of its weight, a frame of its total effect, as the legend has them."""
    drawn = figure_of(lot(1, chained=True), None)
    (axes,) = drawn.figure.axes
    (lines,) = [found for found in axes.collections if isinstance(found, PathCollection)]
    spots = drawn.layout.spots
    weights = [e.weight for e in sorted(drawn.scene.lines, key=lambda e: e.score) if {e.source, e.target} <= set(spots)]
    assert {weight > 0 for weight in weights} == {True, False}
    assert [orange(colour) for colour in lines.get_edgecolor()] == [weight > 0 for weight in weights]
    boxes = [b for i, b in enumerate(drawn.scene.boxes) if i in spots and b.kind != NodeType.PATCH]
    frames = [frame for frame in axes.patches if type(frame).__name__ == "FancyBboxPatch" and frame.get_zorder() == 6]
    seen = [(b, f) for b, f in zip(boxes, frames, strict=True) if b.kind == NodeType.FEATURE and b.effect]
    assert {b.effect > 0 for b, _ in seen} == {True, False}
    assert all(orange(frame.get_edgecolor()) == (box.effect > 0) for box, frame in seen)
    keys = {text.get_text(): text for text in axes.texts}
    for word in ("raises", "lowers"):
        x, y = keys[word].get_position()
        (line,) = [k for k in axes.lines if np.asarray(k.get_path().vertices).tolist() == [[x - 38, y], [x - 8, y]]]
        assert orange(to_rgb(line.get_color())) == (word == "raises")


def test_grey_stood_before_and_red_after():
    """The grey bar is as long as what was measured before, the red one as what the suppression left, outputs as is."""
    node = Measured("promoted", "supernode", 8.0, 2.0, (7.0, 6.0), 0.01)
    score = Measured("score", "output", 2.0, -3.0, (1.5,), 0.02)
    figure = suppression_figure(Suppression("group", 3, -1.0, "free", (node, score), 0, 0))
    for axis, row, unit in zip(figure.axes, (node, score), (8.0, 1.0), strict=True):
        labels = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        for label, value, grey in (("before", row.before, True), ("suppressed", row.after, False)):
            (bar,) = labels[label].patches
            red, _, blue = to_rgb(bar.get_facecolor())
            assert bar.get_width() == pytest.approx(value / unit) and (abs(red - blue) < 0.01) == grey
            assert grey or red > blue + 0.3
        dots = [np.asarray(line.get_path().vertices)[:, 0].tolist() for line in axis.lines if line.get_marker() == "."]
        assert dots == [pytest.approx([value / unit for value in row.random])]
