"""Where the boxes of a scene go: rows by tower and layer, inputs below, outputs on top, no box upon another.

Towers that feed one another stand one above the other, towers that do not stand side by side. Within a row, boxes stand
near what they are linked to (barycentre method: Sugiyama, Tagawa and Toda 1981) and as far apart as they are wide.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphs.draw.scene import QUIET, Scene
from graphs.nodes import NodeType

__all__ = ["Layout", "Row", "Spot", "place"]

GUTTER, MARGIN, GAP, ROW_GAP, LINE_GAP = 112.0, 24.0, 12.0, 54.0, 20.0
SWEEPS = 6


@dataclass(frozen=True)
class Spot:
    """A rectangle by its centre; y grows upwards."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Row:
    """The label of a row, in the gutter at its left, at `x`, `y` (middle); `quiet` are boxes that are named there.

    `band` is the row's own space: left, right, low, high.
    """

    text: str
    x: float
    y: float
    quiet: tuple[int, ...]
    band: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Layout:
    """Places of everything.

    Attributes:
        width, height: of the page.
        spots: place of each box by its index; patches stand on the image.
        rows: labels.
        image: the image's place, None without one.
        free: x range right of the image, and its y range, where a legend fits; None without image.
    """

    width: float
    height: float
    spots: dict[int, Spot]
    rows: tuple[Row, ...]
    image: Spot | None
    free: tuple[float, float, float, float] | None


@dataclass
class _Column:
    """One tower while it is being placed; rows from its input up."""

    tower: str
    left: float = 0.0
    right: float = 0.0
    rows: list[tuple[int, list[int], list[int]]] = None  # type: ignore[assignment]

    def lines(self, scene: Scene, sizes: list[tuple[float, float]]) -> list[int]:
        """How many lines each row needs."""
        room = self.right - self.left - GUTTER - MARGIN / 2
        return [_lines_for(scene, boxes, sizes, room) for _, boxes, _ in self.rows]


def place(
    scene: Scene,
    sizes: list[tuple[float, float]],
    width: float = 1600.0,
    top: float = 102.0,
    bottom: float = 110.0,
    image_side: float = 300.0,
) -> Layout:
    """Place a scene on a page of a given width; the height follows.

    Args:
        sizes: width and height of each box.
        top, bottom: room for title and caption.
        image_side: of the image, in a scene with patches.
    """
    levels = _levels(scene)
    spots: dict[int, Spot] = {}
    labels: list[Row] = []
    image: Spot | None = None
    free = None
    y = bottom
    columns = [column for level in levels for column in level]
    for level in levels:
        _share_width(level, sizes, width)
        highest = y
        has_image = scene.grid is not None and any(c.tower == _image_tower(scene) for c in level)
        start = y
        if has_image:
            left = next(c for c in level if c.tower == _image_tower(scene)).left + GUTTER
            image = Spot(left + image_side / 2, y + image_side / 2, image_side, image_side)
            start = y + image_side + ROW_GAP
        for column in level:
            at = start
            if has_image and column.tower != _image_tower(scene):
                at = start - ROW_GAP - 30  # words stand level with the upper edge of the image
            for (layer, boxes, quiet), lines in zip(column.rows, column.lines(scene, sizes), strict=True):
                if has_image and column.tower == _image_tower(scene) and layer < 0 and not boxes:
                    labels.append(Row(_row_name(scene, column, layer), column.left, y + image_side / 2, tuple(quiet)))
                    continue
                tall = max([sizes[b][1] for b in boxes], default=26.0)
                middle = at + (lines * tall + (lines - 1) * LINE_GAP) / 2
                half = (lines * tall + (lines - 1) * LINE_GAP) / 2 + 9
                band = (column.left - 8, column.right - 8, middle - half, middle + half) if boxes else None
                labels.append(Row(_row_name(scene, column, layer), column.left, middle, tuple(quiet), band))
                for i, box in enumerate(boxes):
                    mine = at + tall / 2 + (i % lines) * (tall + LINE_GAP)
                    spots[box] = Spot(column.left + GUTTER, mine, *sizes[box])
                at = middle + (lines * tall + (lines - 1) * LINE_GAP) / 2 + ROW_GAP
            highest = max(highest, at)
        if image is not None and has_image:
            mine = next(c for c in level if c.tower == _image_tower(scene))
            free = (image.x + image_side / 2 + 30, mine.right, y, y + image_side)
            highest = max(highest, start)
        y = highest
    outputs = [i for i, box in enumerate(scene.boxes) if box.kind == NodeType.OUTPUT]
    tall = max((sizes[i][1] for i in outputs), default=0.0)
    lines = _lines_for(scene, outputs, sizes, width - 2 * MARGIN - GUTTER)
    for k, i in enumerate(outputs):
        spots[i] = Spot(width / 2, y + tall / 2 + (k % lines) * (tall + LINE_GAP), *sizes[i])
    tall = lines * tall + (lines - 1) * LINE_GAP
    labels.append(Row("output", MARGIN, y + tall / 2, ()))
    if image is not None:
        spots |= _patches(scene, image)
    rows = _lanes(columns, outputs, spots, width)
    _arrange(scene, rows, spots)
    return Layout(width, y + tall + top, spots, tuple(labels), image, free)


def _levels(scene: Scene) -> list[list[_Column]]:
    """Columns by depth: towers that nothing feeds first. A tower without rows of its own joins what it feeds."""
    solid = (NodeType.FEATURE, NodeType.PATCH, NodeType.TOKEN)
    own = [t for t in scene.towers if any(b.tower == t and b.kind in solid for b in scene.boxes)]
    home = {t: next((b for a, b in scene.feeds if a == t and b in own), own[0] if own else t) for t in scene.towers}
    home |= {t: t for t in own}
    depth = dict.fromkeys(own, 0)
    for tower in own:  # towers are listed in topological order
        below = [depth[a] + 1 for a, b in scene.feeds if b == tower and a in depth and a != tower]
        depth[tower] = max(below, default=0)
    columns = {t: _Column(t, rows=[]) for t in own}
    for tower in own:
        mine = [i for i, b in enumerate(scene.boxes) if home.get(b.tower) == tower and b.kind != NodeType.OUTPUT]
        for layer in sorted({scene.boxes[i].layer for i in mine}):
            row = [i for i in mine if scene.boxes[i].layer == layer and scene.boxes[i].kind != NodeType.PATCH]
            quiet = [i for i in row if scene.boxes[i].kind in QUIET]
            columns[tower].rows.append((layer, [i for i in row if i not in quiet], quiet))
    return [[columns[t] for t in own if depth[t] == d] for d in range(max(depth.values(), default=-1) + 1)]


def _image_tower(scene: Scene) -> str | None:
    return next((b.tower for b in scene.boxes if b.kind == NodeType.PATCH), None)


def _row_name(scene: Scene, column: _Column, layer: int) -> str:
    return f"{column.tower} input" if layer < 0 else f"{column.tower} L{layer}"


def _lines_for(scene: Scene, boxes: list[int], sizes: list[tuple[float, float]], room: float) -> int:
    """Lines that boxes need whatever their order: dealt to the shortest line, none is longer than mean + widest."""
    if not boxes:
        return 1
    widths = [sizes[b][0] + GAP for b in boxes]
    if all(scene.boxes[b].kind == NodeType.TOKEN for b in boxes):
        return len(_wrapped(boxes, widths, room))
    n = 1
    while sum(widths) / n + max(widths) * (1 - 1 / n) > room and n < len(boxes):
        n += 1
    return n


def _wrapped(boxes: list[int], widths: list[float], room: float) -> list[list[int]]:
    """Boxes in reading order, line by line."""
    lines: list[list[int]] = [[]]
    used = 0.0
    for box, width in zip(boxes, widths, strict=True):
        if lines[-1] and used + width > room:
            lines.append([])
            used = 0.0
        lines[-1].append(box)
        used += width
    return lines


def _total(boxes: list[int], sizes: list[tuple[float, float]]) -> float:
    return sum(sizes[b][0] + GAP for b in boxes) - GAP


def _share_width(level: list[_Column], sizes: list[tuple[float, float]], width: float) -> None:
    """Give the towers of a level their parts of the page, by what their rows need."""
    need = [sum(_total(boxes, sizes) for layer, boxes, _ in c.rows if boxes and layer >= 0) + 1 for c in level]
    widest = [max([sizes[b][0] for _, boxes, _ in c.rows for b in boxes], default=0.0) for c in level]
    least = [GUTTER + max(190.0, w + 12) for w in widest]
    spare = width - 2 * MARGIN - sum(least)
    left = MARGIN
    for column, n, minimum in zip(level, need, least, strict=True):
        column.left = left
        column.right = left + minimum + max(0.0, spare) * n / sum(need)
        left = column.right


def _patches(scene: Scene, image: Spot) -> dict[int, Spot]:
    """The squares of the patches on the image, row 0 on top."""
    assert scene.grid is not None
    tall, wide = image.height / scene.grid[0], image.width / scene.grid[1]
    found = {}
    for i, box in enumerate(scene.boxes):
        if box.kind == NodeType.PATCH and box.patches:
            row, column = next(iter(box.patches))
            x = image.x - image.width / 2 + (column + 0.5) * wide
            found[i] = Spot(x, image.y + image.height / 2 - (row + 0.5) * tall, wide, tall)
    return found


@dataclass
class _Lane:
    """The lines of one row of boxes that may trade places."""

    boxes: list[int]
    low: float
    high: float
    heights: list[float]


def _lanes(columns: list[_Column], outputs: list[int], spots: dict[int, Spot], width: float) -> list[_Lane]:
    lanes = []
    for column in columns:
        for _, boxes, _ in column.rows:
            if boxes:
                heights = sorted({spots[b].y for b in boxes})
                lanes.append(_Lane(list(boxes), column.left + GUTTER, column.right - MARGIN / 2, heights))
    if outputs:
        lanes.append(_Lane(outputs, MARGIN + GUTTER, width - MARGIN, sorted({spots[i].y for i in outputs})))
    return lanes


def _arrange(scene: Scene, lanes: list[_Lane], spots: dict[int, Spot]) -> None:
    """Order and spread the boxes of every row, sweeping up and down."""
    near: dict[int, list[tuple[int, float]]] = {i: [] for i in spots}
    for line in scene.lines:
        if line.source in spots and line.target in spots:
            near[line.source].append((line.target, line.score))
            near[line.target].append((line.source, line.score))
    for lane in lanes:  # a first place: where it looks in the image, or the order of the words
        for i, box in enumerate(lane.boxes):
            where = scene.boxes[box].patches
            part = (i + 0.5) / len(lane.boxes)
            if where and scene.grid:
                part = sum((c + 0.5) * v for (_, c), v in where.items()) / (sum(where.values()) or 1) / scene.grid[1]
            spots[box] = _moved(spots[box], lane.low + part * (lane.high - lane.low))
    for sweep in range(SWEEPS):
        for lane in lanes if sweep % 2 == 0 else lanes[::-1]:
            wish = {}
            for box in lane.boxes:
                weight = sum(w for _, w in near[box])
                mean = sum(spots[n].x * w for n, w in near[box]) / weight if weight else spots[box].x
                wish[box] = 0.6 * mean + 0.4 * spots[box].x
            if all(scene.boxes[b].kind == NodeType.TOKEN for b in lane.boxes):
                _write_words(lane, wish, spots)
            else:
                _spread(lane, wish, spots)


def _write_words(lane: _Lane, wish: dict[int, float], spots: dict[int, Spot]) -> None:
    """Words stay in reading order, the upper line first, near the middle of what they wish."""
    widths = [spots[b].width + GAP for b in lane.boxes]
    lines = _wrapped(lane.boxes, widths, lane.high - lane.low)
    longest = max(sum(spots[b].width + GAP for b in line) for line in lines)
    middle = sum(wish.values()) / len(wish)
    start = min(max(lane.low, middle - longest / 2), max(lane.low, lane.high - longest))
    for y, line in zip(lane.heights[::-1], lines, strict=True):
        at = start
        for box in line:
            spots[box] = Spot(at + spots[box].width / 2, y, spots[box].width, spots[box].height)
            at += spots[box].width + GAP


def _spread(lane: _Lane, wish: dict[int, float], spots: dict[int, Spot]) -> None:
    """Give each box a place near its wish: dealt in order to the shortest line, no two boxes closer than GAP."""
    lines: list[list[int]] = [[] for _ in lane.heights]
    used = [0.0] * len(lines)
    for box in sorted(lane.boxes, key=lambda b: wish[b]):
        shortest = used.index(min(used))
        lines[shortest].append(box)
        used[shortest] += spots[box].width + GAP
    for y, line in zip(lane.heights, lines, strict=True):
        at = lane.low
        places = []
        for box in line:  # not before its wish, nor in the box before
            half = spots[box].width / 2
            places.append(max(wish[box], at + half))
            at = places[-1] + half + GAP
        limit = lane.high
        for k in range(len(line) - 1, -1, -1):  # pushed back from the right edge
            half = spots[line[k]].width / 2
            places[k] = min(places[k], limit - half)
            limit = places[k] - half - GAP
        for box, x in zip(line, places, strict=True):
            spots[box] = Spot(x, y, spots[box].width, spots[box].height)


def _moved(spot: Spot, x: float) -> Spot:
    return Spot(x, spot.y, spot.width, spot.height)
