"""The page: it loads nothing, shows text as text, and does what its buttons and keys say, in a real browser."""

from __future__ import annotations

import html.parser
import json

import numpy as np
import pytest
import torch

from graphs.draw.html import page_of, write_page
from graphs.nodes import NodeType
from graphs.prune import prune
from graphs.supernodes import Supernodes, by_feature, grouped
from mechinterp.pages.heat import thumbnail
from mechinterp.storage import write_json
from tests.browser import PROGRAM, Browser
from tests.graph_scenes import lot, radiograph
from tests.test_graphs_export import HOSTILE, hostile_names


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text of each script."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)


@pytest.fixture(scope="module")
def graph():
    return prune(lot(1, chained=True, kinds=7, layers=(3, 2)), 0.97, 0.98)


@pytest.fixture(scope="module")
def shown(graph):
    """A feature at several positions, its key, and its row in the table."""
    ids = by_feature(graph).groups[0]
    return ids.name, ids.members


def gallery_of(graph, shown):
    tower, layer, feature = shown[0].split(".")
    key = f"{tower}.blocks.{layer[1:]}.hook_mlp_out:{feature[1:]}"
    return key, {key: [(thumbnail(np.full((8, 8), 0.5, np.float32)), "image 7, 100 %")] * 3}


# ------------------------------------------------------------------------------------------------------- the text


def test_the_page_loads_nothing(graph, shown):
    page = Page(page_of(graph, radiograph(), gallery=gallery_of(graph, shown)[1]))
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'") and "unsafe" not in policy
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,"), attributes
    assert [a for tag, a in page.tags if tag == "script"] == [{"type": "application/json", "id": "data"}, {}]
    labels = [a for tag, a in page.tags if tag == "label"]
    fields = [a for tag, a in page.tags if tag in ("input", "textarea")]
    assert len(labels) == len(fields)  # every field stands in its label


def test_the_data_are_the_graph(graph):
    data = json.loads(Page(page_of(graph, radiograph())).scripts[0])
    assert [node["id"] for node in data["nodes"]] == list(graph.nodes.ids)
    assert len(data["edges"]) == graph.n_edges
    rows = graph.row_of.tolist()
    sums = np.zeros(len(rows))
    for _, t, w, _ in data["edges"]:
        sums[t] += w
    for i, node in enumerate(data["nodes"]):
        assert node["row"] == (rows[i] >= 0)
        if node["row"]:
            assert sums[i] + node["rest"] + node["con"] == pytest.approx(node["pre"], rel=1e-4, abs=1e-5)


def test_every_text_is_shown_as_text(graph):
    labels = [HOSTILE] * len(graph.nodes)
    bad = graph.with_nodes(graph.nodes.with_labels(labels))
    groups = Supernodes().add(HOSTILE, [graph.nodes.ids[-2]])
    text = page_of(bad, None, names=hostile_names(graph), supernodes=groups, title=HOSTILE)
    page = Page(text)
    assert [a for tag, a in page.tags if tag == "script"] == [{"type": "application/json", "id": "data"}, {}]
    assert "<script>alert" not in text and "alert(1)" in text and "\u202e" not in text and "\x00" not in text
    assert json.loads(page.scripts[0])["nodes"][0]["label"].startswith('"><script>alert(1)')


def test_it_starts_with_what_can_be_read():
    many = lot(0, side=6, layers=(4, 2), kinds=20, density=0.03)
    inputs = [a for tag, a in Page(page_of(many, None)).tags if tag == "input" and a.get("id") == "nodes"]
    assert 1 <= int(inputs[0]["value"] or 0) < 100
    few = [a for tag, a in Page(page_of(lot(0, kinds=2), None)).tags if tag == "input" and a.get("id") == "nodes"]
    assert few[0]["value"] == "100"


# ------------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser():
    if PROGRAM is None:
        pytest.skip("no Chromium on this machine")
    with Browser() as opened:
        yield opened


@pytest.fixture()
def page(browser, graph, shown, tmp_path):
    path = write_page(graph, radiograph(), tmp_path / "graph.html", gallery=gallery_of(graph, shown)[1])
    browser.open(path)
    browser.value("document.getElementById('nodes').value = 100")
    browser.value("document.getElementById('nodes').dispatchEvent(new Event('input'))")
    browser.value("document.getElementById('nodes').dispatchEvent(new Event('change'))")
    yield browser
    assert browser.problems() == []


def count(page, selector):
    return page.value(f"document.querySelectorAll({json.dumps(selector)}).length")


def text(page, selector):
    return page.value(f"document.querySelector({json.dumps(selector)}).textContent")


def node(key):
    return f'.node[data-key="{key}"]'


def test_a_node_opens_with_sums_and_pictures(page, graph, shown):
    key, _ = shown
    page.click(node(key))
    assert text(page, "#details h3") == key.rsplit(".", 1)[1]
    values = page.value(
        "Array.from(document.querySelectorAll('.kv tr')).map(r => Array.from(r.children).map(c => c.textContent))"
    )
    values = {name: value.replace("−", "-") for name, value in values}
    together = grouped(graph, by_feature(graph))
    i = together.nodes.index("group.0")
    assert together.nodes.labels[i] == key
    assert float(values["activation, summed"]) == pytest.approx(float(together.nodes.activation[i]), rel=1e-3)
    sums = float(values["edges in this graph"]) + float(values["edges left out"]) + float(values["constant"])
    assert sums == pytest.approx(float(together.nodes.pre[i]), rel=1e-2, abs=1e-2)
    assert float(values["= pre-activation"]) == pytest.approx(float(values["in the model"]), rel=1e-3, abs=1e-4)
    assert count(page, ".shots img") == 3
    strongest = page.value("document.querySelector('.edges td.w').textContent").replace("−", "-")
    _, weights = together.in_edges(i)
    assert abs(float(strongest)) <= float(together.nodes.pre.abs().max()) and len(weights) > 0
    assert count(page, ".node.chosen") == 1 and count(page, ".node.dim") > 0
    page.click(".edges button")  # a neighbour opens
    assert text(page, "#details h3") != key.rsplit(".", 1)[1]
    page.press("Escape")
    assert count(page, ".node.chosen") == 0 == count(page, ".node.dim")


def test_no_node_lies_on_another(page):
    boxes = page.value(
        "Array.from(document.querySelectorAll('.node .frame')).map(n => n.getBoundingClientRect())"
        ".map(r => [r.left, r.top, r.right, r.bottom])"
    )
    assert len(boxes) > 30
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert min(a[2], b[2]) - max(a[0], b[0]) < 0.5 or min(a[3], b[3]) - max(a[1], b[1]) < 0.5
    inside = page.value(
        "Array.from(document.querySelectorAll('.node')).every(n => {"
        " const f = n.querySelector('.frame').getBoundingClientRect();"
        " return Array.from(n.querySelectorAll('.name, .detail')).every(t => { const r = t.getBoundingClientRect();"
        " return r.left >= f.left - 1 && r.right <= f.right + 1; }); })"
    )
    assert inside


def test_thresholds(page):
    def set_to(name, value):
        page.value(f"document.getElementById('{name}').value = {value}")
        page.value(f"document.getElementById('{name}').dispatchEvent(new Event('input'))")
        return count(page, ".node:not(.quiet)"), count(page, ".link")

    every = set_to("edges", 100)
    some = set_to("edges", 30)
    assert some[0] == every[0] and 0 < some[1] < every[1]
    few = set_to("nodes", 20)
    assert few[0] < every[0] and count(page, ".node.output") == 1
    assert text(page, "#nodes-said") == "20 %"
    page.click("#quiet")
    assert count(page, ".node.quiet") > 0


def test_a_pinned_node_stays(page, shown):
    key, _ = shown
    page.click(node(key))
    page.click("#pin")
    page.press("Escape")
    page.value("document.getElementById('nodes').value = 1")
    page.value("document.getElementById('nodes').dispatchEvent(new Event('input'))")
    assert count(page, node(key) + ".pinned") == 1
    page.click(node(key))
    page.press("p")
    page.press("Escape")
    assert count(page, node(key)) == 0


def test_pins_follow_the_nodes(page, shown):
    """A pinned feature is pinned at each of its places, and together again; what is unpinned apart stays unpinned."""
    key, members = shown
    page.click(node(key))
    page.click("#pin")
    page.press("Escape")
    page.click("#together")
    page.value("document.getElementById('nodes').value = 1")
    page.value("document.getElementById('nodes').dispatchEvent(new Event('input'))")
    found = page.value("Array.from(document.querySelectorAll('.node.pinned')).map(n => n.dataset.key)")
    assert len(members) > 1 and sorted(found) == sorted(members)
    page.value("document.getElementById('together').click()")
    assert count(page, node(key) + ".pinned") == 1 == count(page, ".node.pinned")
    page.click(node(key))
    page.click("#pin")
    page.press("Escape")
    page.value("document.getElementById('together').click()")
    assert count(page, ".node.pinned") == 0


def test_a_group_is_made_named_and_dissolved(page, graph, tmp_path):
    keys = page.value(
        "Array.from(document.querySelectorAll('.node')).map(n => n.dataset.key)"
        ".filter(k => /^vision.L0.*F\\d+$/.test(k))"
    )[:2]
    before = count(page, ".node")
    page.click(node(keys[0]))
    page.click(node(keys[1]), modifiers=8)  # shift
    assert count(page, ".node.chosen") == 2
    page.press("g")
    page.write_text("mark <b>")
    page.press("Enter")
    assert count(page, ".node") <= before - 1
    assert text(page, "#details h3") == "mark <b>" and count(page, node("group:mark <b>")) == 1
    page.click("#export")
    made = json.loads(page.value("document.getElementById('json').value"))
    (group,) = made["supernodes"]
    assert group["name"] == "mark <b>" and set(group["members"]) <= set(graph.nodes.ids)
    write_json(tmp_path / "groups.json", made)
    groups = Supernodes.load(tmp_path / "groups.json")  # what the page gives is what the command takes
    i = grouped(graph, groups).nodes.index("group.0")
    shown = page.value(
        "Array.from(document.querySelectorAll('.kv tr'))"
        ".find(r => r.children[0].textContent === 'in the model').children[1].textContent"
    ).replace("−", "-")
    assert float(shown) == pytest.approx(float(grouped(graph, groups).nodes.pre[i]), rel=1e-3, abs=1e-3)
    page.click("#groups button")
    assert count(page, ".node") == before and count(page, node("group:mark <b>")) == 0


def test_search(page, graph):
    page.press("/")
    page.write_text("consolidation")
    assert 0 < count(page, ".node.found") < count(page, ".node")
    page.press("Enter")
    assert count(page, ".node.chosen") == 1


def test_keys_alone_are_enough(page):
    page.value("document.querySelector('.node[tabindex=\"0\"]').focus()")
    first = page.value("document.activeElement.dataset.key")
    assert first.startswith("out.")
    page.press("ArrowDown")
    below = page.value("document.activeElement.dataset.key")
    assert below != first
    page.press("Enter")
    assert page.value("document.querySelector('.node.chosen').dataset.key") == below
    page.press("ArrowRight")
    page.press("ArrowLeft")
    assert page.value("document.activeElement.dataset.key") == below
    assert count(page, '.node[tabindex="0"]') == 1
    before = page.value("document.getElementById('world').getAttribute('transform')")
    page.press("+")
    assert page.value("document.getElementById('world').getAttribute('transform')") != before
    page.press("0")
    assert page.value("document.getElementById('world').getAttribute('transform')") == before


def test_pan_and_zoom(page):
    def place():
        return page.value("(() => { const m = document.getElementById('world').getCTM(); return [m.a, m.e, m.f]; })()")

    x, y = page.centre("#stage")
    k, e, f = place()
    left = page.value("document.getElementById('stage').getBoundingClientRect().left")
    page.drag((left + 8, y + 200), (left + 68, y + 230))
    moved = place()
    assert (moved[0], moved[1] - e, moved[2] - f) == pytest.approx((k, 60, 30), abs=1)
    page.mouse("mouseWheel", x, y, deltaX=0, deltaY=-300)
    page.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert place()[0] > 1.2 * k
    assert count(page, ".node.chosen") == 0


def test_the_image_and_the_graph_point_at_each_other(page, graph, shown):
    key, members = shown
    places = [graph.nodes.labels[graph.nodes.index(m)] for m in members]
    patches = {place.rpartition("patch ")[2] for place in places if "patch" in place}
    assert key.startswith("vision") and patches
    x, y = page.centre(node(key))
    page.mouse("mouseMoved", x, y)
    assert count(page, "#patches rect.hot") == len(patches)
    page.mouse("mouseMoved", 5, 5)
    assert count(page, "#patches rect.hot") == 0
    page.click("#patches rect")
    assert text(page, "#details h3").startswith("patch 0,0")


def test_hostile_names_in_the_browser(browser, graph, tmp_path):
    bad = graph.with_nodes(graph.nodes.with_labels([HOSTILE] * len(graph.nodes)))
    names = hostile_names(graph)
    browser.open(write_page(bad, radiograph(), tmp_path / "bad.html", names=names, title=HOSTILE))
    key = browser.value("document.querySelector('.node').dataset.key")
    browser.click(node(key))
    assert browser.problems() == [] and count(browser, "script") == 2
    assert browser.value("document.title").startswith('"><script>')


def test_a_language_model_has_no_image(browser, tmp_path):
    graph = lot(0)
    alone = graph.subgraph(torch.as_tensor(graph.nodes.tower == 1) | (graph.nodes.type == NodeType.OUTPUT))
    browser.open(write_page(alone, None, tmp_path / "text.html"))
    assert browser.problems() == [] and count(browser, "#image") == 0 and count(browser, ".node") > 5
