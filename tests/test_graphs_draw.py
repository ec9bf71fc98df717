"""The picture: what it adds up, what it says, and that its labels can be read."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from graphs.draw.png import caption, draw, figure_of
from graphs.draw.scene import QUIET, feature_names, grid_of, make_scene, patch_of
from graphs.influence import influence, total_effect
from graphs.nodes import NodeType
from graphs.prune import prune
from graphs.supernodes import Supernodes, by_feature, grouped
from mechinterp.errors import UsageError
from tests.graph_scenes import lot, radiograph

LARGE = {"side": 8, "layers": (4, 2), "kinds": 18, "density": 0.06}


def names_of(graph, words="pleural effusion, left costophrenic angle"):
    """A long name for every feature."""
    nodes = graph.nodes
    rows = nodes.is_type(NodeType.FEATURE).nonzero()[:, 0].tolist()
    return {
        f"{nodes.towers[int(nodes.tower[i])]}.blocks.{int(nodes.layer[i])}.hook_mlp_out:{int(nodes.feature[i])}": words
        for i in rows
    }


# ----------------------------------------------------------------------------------------------------------- scene


def test_boxes_and_lines_are_sums():
    graph = lot(1, chained=True)
    scene = make_scene(graph, most=10**6, most_lines=10**6, most_patches=10**6)
    together = grouped(graph, by_feature(graph))
    reach, effect = influence(graph), total_effect(graph)
    owner = {}
    for k, box in enumerate(scene.boxes):
        assert box.influence == pytest.approx(float(reach[list(box.members)].sum()))
        assert box.effect == pytest.approx(float(effect[list(box.members)].sum()), abs=1e-9)
        owner |= dict.fromkeys(box.members, k)
    dense = torch.zeros(len(graph.nodes), len(graph.nodes), dtype=torch.float64)
    dense[graph.targets] = graph.dense()
    for line in scene.lines:
        source, target = (list(scene.boxes[end].members) for end in (line.source, line.target))
        assert line.weight == pytest.approx(float(dense[target][:, source].sum()), abs=1e-12)
        assert scene.boxes[line.source].kind not in QUIET
    features = [box for box in scene.boxes if box.kind == NodeType.FEATURE]
    used = set(graph.edges[1].tolist())  # a feature that feeds nothing needs no box
    assert sum(len(box.members) for box in features) >= len(
        [i for i in used if int(graph.nodes.type[i]) == NodeType.FEATURE]
    )
    assert len(features) <= int(together.nodes.is_type(NodeType.FEATURE).sum())
    assert scene.hidden_boxes == int(together.nodes.is_type(NodeType.FEATURE).sum()) - len(features)


def test_the_strongest_are_shown_and_the_others_counted():
    graph = lot(0, **LARGE)
    scene = make_scene(graph, most=20, most_lines=60, most_patches=5)
    every = make_scene(graph, most=10**6, most_lines=10**6)
    shown = [box for box in scene.boxes if box.kind == NodeType.FEATURE]
    assert len(shown) + scene.hidden_boxes == len(every.boxes) - len(others(every)) + every.hidden_boxes
    assert len(shown) <= 20 and len(scene.lines) <= 60 and 0 < scene.line_share < 1
    assert scene.hidden_influence <= min(box.influence for box in shown)
    with_lines = {e.source for e in scene.lines if scene.boxes[e.source].kind == NodeType.PATCH}
    patches = sorted((b for b in scene.boxes if b.kind == NodeType.PATCH), key=lambda b: -b.influence)
    assert {scene.boxes[i].members for i in with_lines} <= {b.members for b in patches[:5]}
    assert len(patches) == 64 and scene.grid == (8, 8) == grid_of(graph)


def others(scene):
    return [box for box in scene.boxes if box.kind != NodeType.FEATURE]


def test_names_groups_and_places():
    graph = lot(0)
    name = next(iter(names_of(graph)))
    tower, _, layer, rest = name.split(".", 3)
    made = make_scene(graph, names={name: "carina"}, most=10**6, most_lines=10**6)
    box = next(b for b in made.boxes if b.name == "carina")
    assert (box.tower, box.layer) == (tower, int(layer)) and box.detail.startswith(f"F{rest.rpartition(':')[2]}")
    for place in box.patches:
        assert any(patch_of(graph.nodes.labels[i]) == place for i in box.members)
    other = next(b for b in made.boxes if b.kind == NodeType.FEATURE and b.tower == tower and b is not box)
    ids = [graph.nodes.ids[i] for b in (box, other) for i in b.members]
    both = make_scene(graph, supernodes=Supernodes().add("pair", ids), most=10**6, most_lines=10**6)
    pair = next(b for b in both.boxes if b.name == "pair")
    assert set(pair.members) == {*box.members, *other.members} and "2 features" in pair.detail
    words = [b for b in make_scene(graph, most=10**6).boxes if b.tower == "text" and b.kind == NodeType.FEATURE]
    assert any("“" in b.detail for b in words)
    assert feature_names(None) == {} and patch_of("error at CLS") is None
    with pytest.raises(UsageError, match="not in a block"):
        feature_names({"projector.hook_out:3": "x"})


# --------------------------------------------------------------------------------------------------------- picture


def overlaps(boxes: list) -> list[tuple[int, int]]:
    """Pairs of rectangles that share more than half a pixel in both directions."""
    found = []
    for i, a in enumerate(boxes):
        for j in range(i):
            b = boxes[j]
            wide = min(a.x1, b.x1) - max(a.x0, b.x0)
            tall = min(a.y1, b.y1) - max(a.y0, b.y0)
            if wide > 0.5 and tall > 0.5:
                found.append((j, i))
    return found


@pytest.mark.parametrize(
    ("seed", "chained", "named", "outputs"),
    [(0, False, True, 3), (1, True, True, 1), (2, True, False, 9), (3, False, False, 1)],
)
def test_sixty_boxes_and_no_label_on_another(seed, chained, named, outputs):
    graph = prune(lot(seed, chained=chained, outputs=outputs, **LARGE), 0.97, 0.98)
    drawn = figure_of(graph, radiograph(), names=names_of(graph) if named else None, most=60)
    figure = drawn.figure
    features = [i for i, box in enumerate(drawn.scene.boxes) if box.kind == NodeType.FEATURE]
    assert len(features) == 60
    renderer = figure.canvas.get_renderer()
    (axes,) = figure.axes
    texts = [text for text in axes.texts if text.get_text()]
    extents = [text.get_window_extent(renderer) for text in texts]
    assert len(texts) > 130
    assert [(texts[i].get_text(), texts[j].get_text()) for i, j in overlaps(extents)] == []
    page = figure.bbox
    for text, extent in zip(texts, extents, strict=True):
        assert page.x0 <= extent.x0 and extent.x1 <= page.x1 and page.y0 <= extent.y0 and extent.y1 <= page.y1, text
        assert text.get_fontsize() * 100 / 72 >= 10  # pixels, on a page of 1600
    # boxes stand apart, and each holds its own text
    spots = [
        drawn.layout.spots[i]
        for i, b in enumerate(drawn.scene.boxes)
        if b.kind != NodeType.PATCH and i in drawn.layout.spots
    ]
    frames = [frame for frame in axes.patches if type(frame).__name__ == "FancyBboxPatch" and frame.get_zorder() == 6]
    assert len(frames) == len(spots)
    rectangles = [frame.get_window_extent(renderer) for frame in frames]
    assert overlaps(rectangles) == []
    for extent, text in zip(extents, texts, strict=True):
        if text.get_zorder() == 8:
            x, y = (extent.x0 + extent.x1) / 2, (extent.y0 + extent.y1) / 2
            mine = [r for r in rectangles if r.x0 <= x <= r.x1 and r.y0 <= y <= r.y1]
            assert len(mine) == 1 and mine[0].x0 <= extent.x0 and extent.x1 <= mine[0].x1, text


def test_layers_stand_one_above_the_other():
    graph = lot(1, chained=True, **LARGE)
    layout = (drawn := figure_of(graph, radiograph())).layout
    heights: dict[tuple[str, int], list[float]] = {}
    for i, box in enumerate(drawn.scene.boxes):
        if box.kind in (NodeType.FEATURE, NodeType.OUTPUT):
            heights.setdefault((box.tower, box.layer if box.kind == NodeType.FEATURE else 99), []).append(
                layout.spots[i].y
            )
    order = sorted(heights, key=lambda key: (key[1] == 99, key[0] != "vision", key[1]))
    for below, above in pairwise(order):
        assert max(heights[below]) < min(heights[above]), (below, above)
    assert layout.image is not None
    assert layout.image.y + layout.image.height / 2 < min(min(values) for values in heights.values())
    words = [i for i, b in enumerate(drawn.scene.boxes) if b.kind == NodeType.TOKEN]
    assert [layout.spots[i].x for i in words] == sorted(layout.spots[i].x for i in words)  # as one reads them


def test_the_patches_that_matter_stand_out_on_the_image():
    graph = lot(0, **LARGE)
    drawn = figure_of(graph, np.full((64, 64), 0.5, np.float32))
    buffer = io.BytesIO()
    drawn.figure.savefig(buffer, format="png", dpi=100)
    pixels = np.asarray(Image.open(buffer).convert("RGB")).astype(int)
    assert pixels.shape[1] == 1600
    colourful = np.abs(pixels[..., 0] - pixels[..., 2])

    def border(i):
        spot = drawn.layout.spots[i]
        y = round(drawn.layout.height - spot.y)
        return colourful[y - 3 : y + 4, round(spot.x - spot.width / 2)].max()

    top = drawn.scene.top_patches
    assert len(top) == 8
    assert min(border(i) for i in top) > 60


def test_the_caption_says_what_a_reader_must_know():
    graph = prune(lot(0, **LARGE))
    text = "\n".join(caption(graph, make_scene(graph, most=10)))
    scores = graph.meta["scores"]
    for part in (
        "1.0e-16",
        f"Completeness {scores['completeness']:.2f}",
        f"counts it {scores['completeness_circuit_tracer']:.2f}",
        f"replacement {scores['replacement']:.2f}",
        "Pruned at 0.8 of node and 0.98 of edge influence",
        f"{len(graph.nodes):,} of",
        "weaker ones not",
        "Research use only. Not a medical device.",
        "not explained",
    ):
        assert part in text, part
    bare = replace(lot(0), meta={})
    assert "relative residual" in caption(bare, make_scene(bare))[0]


def test_the_file(tmp_path):
    graph = prune(lot(0, **LARGE))
    one = draw(graph, radiograph(), tmp_path / "a.png", scale=1.0).read_bytes()
    assert one == draw(graph, radiograph(), tmp_path / "b.png", scale=1.0).read_bytes()
    assert Image.open(io.BytesIO(one)).size[0] == 1600
    assert draw(graph, None, tmp_path / "c.png", scale=1.0).read_bytes() != one


def test_hostile_names_are_drawn_as_they_are():
    graph = prune(lot(0, **LARGE), 0.95)
    words = "$\\frac{1}{0}$ \u202e<b>\n" + "x" * 300
    drawn = figure_of(graph, radiograph(), names=names_of(graph, words), title="$\\bad{\n" * 40)
    drawn.figure.savefig(io.BytesIO(), format="png")  # mathtext would stop here
    renderer = drawn.figure.canvas.get_renderer()
    texts = [t for t in drawn.figure.axes[0].texts if t.get_text()]
    assert overlaps([t.get_window_extent(renderer) for t in texts]) == []
    assert not any("\u202e" in t.get_text() for t in texts)


def test_a_graph_of_a_language_model_has_no_image():
    graph = lot(0)
    text = graph.subgraph(graph.nodes.tower == 1)
    drawn = figure_of(text, None)
    assert drawn.layout.image is None and drawn.scene.grid is None
    assert {b.tower for b in drawn.scene.boxes} == {"text"}
