"""The catalogue page: right pictures, right numbers, nothing that leaves the machine or runs from elsewhere."""

from __future__ import annotations

import html.parser
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

from mechinterp.cli import main
from mechinterp.data import open_data
from mechinterp.data.phantom import Phantom
from mechinterp.errors import DataError, UsageError
from mechinterp.models import HookedVLM
from mechinterp.pages.heat import heat_picture
from mechinterp.pages.place import place_of
from mechinterp.storage import verify_folder
from mechinterp.types import Placed
from saes.dictionary import ReLU, SparseDictionary
from saes.gallery import catalogue
from saes.gallery.build import Catalogue
from saes.gallery.examples import choose_shots
from saes.gallery.facts import stability, subgroup_rates
from saes.gallery.observe import choose_rows
from saes.gallery.overlap import Covered, overlap
from saes.gallery.page import render
from tests.audit_toys import write_cohort
from tests.tiny_models import tiny

SITE = "vision.blocks.0.hook_resid_post"


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A cohort with a mark in the corner, a tiny CLIP, and a dictionary whose first feature is that mark."""
    data = open_data(write_cohort(tmp_path_factory.mktemp("gallery") / "data", n=160))
    hf, processor = tiny("clip", seed=3)
    model = HookedVLM(hf, processor, name="toy")
    batch = model.preprocess(data.pixels(), ids=data.images)
    value = model.run_with_cache(batch, names_filter=SITE)[1][SITE].detach()
    mark = torch.from_numpy(data.attribute("mark").values) > 0.5
    fit = torch.from_numpy(data.split != "test")
    corner = value[:, 1]
    direction = corner[mark & fit].mean(0) - corner[~mark & fit].mean(0)
    direction = direction / direction.norm()
    # above everything that the other patches reach, as far as that goes
    line = ((corner[mark & fit] @ direction).mean() + (corner[~mark & fit] @ direction).mean()) / 2
    line = torch.maximum(line, (value[:, 2:].flatten(0, 1) @ direction).quantile(0.99))
    others = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([direction[None], others / others.norm(dim=1, keepdim=True)])
    bias = -torch.cat([line[None], (value.flatten(0, 1) @ rows[1:].T).quantile(0.9, dim=0)])
    dictionary = SparseDictionary(rows.T.contiguous(), rows, bias, torch.zeros(32), ReLU())
    return model, data, Placed.sae(dictionary, SITE)


@pytest.fixture(scope="module")
def made(toy, tmp_path_factory) -> Catalogue:
    model, data, placed = toy
    return catalogue(model, data, placed, out=tmp_path_factory.mktemp("features"), top=5, tokens="patch")


def test_a_planted_feature_gets_its_name_and_place(made):
    first = made.naming.names[0]
    assert first.feature == 0 and first.name == "mark" and first.auroc > 0.9 and first.beats > 0.8
    table = pd.read_parquet(made.folder / "features.parquet").set_index("index")
    assert table.loc[0, "name"] == "mark" and table.loc[0, "name_score"] == pytest.approx(first.auroc)
    assert "upper left" in table.loc[0, "place"]
    assert table.loc[0, "fires_with:mark"] > table.loc[0, "fires_without:mark"] + 0.3
    assert np.isfinite(table["push"]).all() and table["seed_stability"].isna().all()
    assert "mark" in made.summary()


def test_the_folder_is_closed_and_says_nothing_about_people(made):
    assert verify_folder(made.folder) == []
    table = pd.read_parquet(made.folder / "features.parquet")
    patients, images = set(made.data.patients), set(made.data.images)
    cells = {str(value) for column in table for value in table[column]} | set(table.columns)
    assert not cells & (patients | images)
    page = (made.folder / "features.html").read_text()
    assert not any(re.search(rf"\b{patient}\b", page) for patient in sorted(patients)[:30])
    assert json.loads((made.folder / "manifest.json").read_text())["kind"] == "features"


def test_the_page_loads_nothing_and_can_be_used_without_a_mouse(made):
    text = (made.folder / "features.html").read_text()
    page = Page(text)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'") and "unsafe" not in policy
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        for name in ("src", "href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:image/jpeg;base64,", "#")), target
    tags = [tag for tag, _ in page.tags]
    assert tags.count("article") == 5 and tags.count("script") == 1
    pictures = [a for tag, a in page.tags if tag == "img"]
    assert len(pictures) >= 20 and all(a.get("alt") for a in pictures)
    assert {"find", "show", "sort"} <= {a.get("id") for _, a in page.tags}
    focusable = [a for tag, a in page.tags if tag in ("button", "input", "select", "a")]
    assert all(a.get("tabindex") in (None, "0") for a in focusable)
    headings = [tag for tag in tags if re.fullmatch(r"h[1-4]", tag)]
    assert headings[0] == "h1" and headings.count("h1") == 1


def test_every_text_is_shown_as_text(made):
    """A hostile name in every field: it appears, as text, and makes no tag."""
    from saes.gallery import page as module

    payload = '"><script>alert(1)</script>'
    about = {k: payload if isinstance(v, str) else v for k, v in module._about(made, pd.DataFrame()).items()}
    line = {
        **dict.fromkeys(("id", "tower", "name", "source", "place", "best_attribute", "text", "held_fixed"), payload),
        **dict.fromkeys(("test_auroc", "within_auroc", "precision", "prevalence", "frequency", "push"), 0.5),
        **dict.fromkeys(("push_size", "push_when_firing", "text_alignment", "beats_untrained", "seed_stability"), 0.5),
        **{"index": 3, "shown": True, "named": True, "ci95": [0.1, 0.2], "within_ci95": [0.1, 0.2], "overlap": None},
        **{"groups": [{"name": "strongest", "shots": [{"image": payload, "share": 1.0, "truth": True, "jpeg": b"x"}]}]},
        **{"subgroups": [{"name": payload, "kind": "other", "with": 0.1, "without": 0.2}]},
        **{"best_attribute_test_auroc": 0.5, "proposal": payload},
    }
    concept = {"name": payload, "kind": "finding", "labelled": True, "with": 1, "without": 0, "best": 0.9}
    text = render(about, [line, {**line, "named": False}], [line], [concept])
    assert Page(text).tags.count(("script", {})) == 1  # ours
    assert "alert(1)" in text and "<script>alert" not in text


def test_the_page_says_when_an_untrained_dictionary_does_as_well(made):
    from dataclasses import replace

    from saes.gallery.page import _better, _short

    names = tuple(replace(made.naming.names[0], feature=i) for i in range(40))
    assert _better(replace(made.naming, names=names, decoys=100, decoys_named=3))
    assert not _better(replace(made.naming, names=names, decoys=100, decoys_named=98))
    assert not _better(replace(made.naming, names=(), decoys=100, decoys_named=3))
    assert [_short(n) for n in ("findings:Edema", "not a:b", "view=AP", "")] == ["Edema", "not b", "view=AP", ""]


def test_the_same_seed_gives_the_same_table(toy, made, tmp_path):
    model, data, placed = toy
    again = catalogue(model, data, placed, out=tmp_path, top=5, tokens="patch", others=[placed])
    first, second = (pd.read_parquet(m.folder / "features.parquet") for m in (made, again))
    assert (second["seed_stability"] == 1).all()
    pd.testing.assert_frame_equal(first.drop(columns="seed_stability"), second.drop(columns="seed_stability"))


def test_withheld_images_are_not_drawn(toy, tmp_path):
    from dataclasses import replace

    model, data, placed = toy
    hidden = replace(data, may_show=np.zeros(len(data), dtype=bool))
    folder = catalogue(model, hidden, placed, out=tmp_path, top=1, tokens="patch").folder
    text = (folder / "features.html").read_text()
    assert "<img" not in text and "withheld" in text


def test_a_model_that_scores_nothing_still_has_features(toy, tmp_path):
    _, data, _ = toy
    hf, processor = tiny("dinov2")
    model = HookedVLM(hf, processor, name="eyes")
    rows = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    dictionary = SparseDictionary(rows.T.contiguous(), rows, torch.zeros(12), torch.zeros(32), ReLU())
    made = catalogue(model, data, Placed.sae(dictionary, SITE), out=tmp_path, top=2)
    assert made.push is None and made.target is None and len(made.naming.names) == 12
    with pytest.raises(DataError, match="test patients"):
        catalogue(model, data.subset(data.split == "test"), Placed.sae(dictionary, SITE), out=tmp_path)


def test_the_command(tmp_path, capsys):
    """On a small phantom with the bundled model and its stored dictionary."""
    folder = Phantom.sample(48, seed=5).write(tmp_path / "data")
    out = tmp_path / "out"
    assert main(["features", "phantom-clip", "--data", str(folder), "--out", str(out), "--top", "3"]) == 0
    said = capsys.readouterr().out
    assert "named on unseen patients" in said and "of an untrained dictionary" in said
    assert verify_folder(out) == []
    assert Page((out / "features.html").read_text()).text
    assert main(["features", "phantom-clip", "--data", str(folder), "--out", str(out), "--top", "0"]) == 2


# ----------------------------------------------------------------------------------------------------------- parts


def test_shots_come_from_the_whole_range():
    n = 400
    strength = np.where(np.arange(n) < 200, np.arange(n) / 200, 0).astype(np.float32)
    closest = np.where((np.arange(n) < 200) & (np.arange(n) > 0), 1, -np.arange(n) - 500.0).astype(np.float32)
    closest[0] = -9999
    patients = np.array([f"p{i // 2}" for i in range(n)])
    shots = choose_shots(strength, closest, patients, np.ones(n, bool))
    groups = {name: [s.image for s in shots if s.group == name] for name in ("strongest", "90 %", "50 %")}
    assert groups["strongest"] == [199, 197, 195, 193]
    assert all(abs(i - 180) < 8 for i in groups["90 %"]) and all(abs(i - 100) < 8 for i in groups["50 %"])
    near = [s for s in shots if s.group == "near misses"]
    assert [s.image for s in near] == [200, 202, 204, 206] and all(s.share == 0 for s in near)
    assert len({s.image for s in shots}) == 16
    few = choose_shots(np.array([0, 2, 1], np.float32), None, np.array(["a", "b", "b"]), np.ones(3, bool))
    assert [(s.image, s.group) for s in few] == [(1, "strongest"), (2, "90 %")]
    assert choose_shots(np.zeros(3, np.float32), None, np.array(["a", "b", "c"]), np.ones(3, bool)) == []


def test_overlap_of_a_feature_that_looks_there_and_of_one_that_does_not():
    share = np.zeros((8, 16))
    share[np.arange(8), np.arange(8)] = 1.0
    covered = Covered(np.arange(8), share)
    there = overlap(share.reshape(8, 4, 4), covered)
    assert there is not None and (there.iou, there.pointing) == (1.0, 1.0)
    assert (there.iou_chance, there.pointing_chance) == (0.0, 0.0)
    still = overlap(np.tile(np.eye(16)[3].reshape(4, 4), (8, 1, 1)), covered)
    assert still is not None and still.pointing == pytest.approx(1 / 8) == still.pointing_chance
    half = share.copy() / 2
    measured = overlap(share.reshape(8, 4, 4), Covered(np.arange(8), half))
    assert measured is not None and measured.iou == pytest.approx(0.5)
    assert overlap(np.zeros((8, 4, 4)), covered) is None


def test_place_in_words():
    heat = np.zeros((8, 8))
    heat[0, 0] = 1
    assert place_of(heat) == "upper left, at the border"
    assert place_of(np.ones((8, 8))) == "all over the image"
    assert place_of(np.zeros((8, 8))) == ""
    heat = np.zeros((9, 9))
    heat[4, 4] = 1
    assert place_of(heat) == "centre"


def test_stability_and_subgroups(toy):
    _, data, placed = toy
    found = stability(placed, [placed])
    assert found is not None and (found == 1).all() and stability(placed, []) is None
    turned = SparseDictionary(*(torch.randn(s) for s in ((32, 8), (8, 32), (8,), (32,))), ReLU())
    other = stability(placed, [placed, Placed.sae(turned, SITE)])
    assert other is not None and (other <= 1).all() and other.mean() < 0.8
    with pytest.raises(UsageError, match="stands at"):
        stability(placed, [Placed.sae(turned, "vision.blocks.1.hook_resid_post")])
    mark = data.attribute("mark")
    rates = subgroup_rates((mark.values > 0.5)[:, None], [mark], np.arange(len(data)))
    assert (rates["mark"][0][0], rates["mark"][1][0]) == (1.0, 0.0)


def test_whole_patients_are_drawn(toy):
    _, data, _ = toy
    rows = choose_rows(data, seed=0, most=50)
    assert 45 <= len(rows) <= 50
    kept = np.asarray(data.patients)[rows]
    assert not set(kept) & set(np.delete(np.asarray(data.patients), rows))


def test_a_picture_shows_heat_outline_and_frame():
    import io

    from PIL import Image

    owner = np.repeat(np.repeat(np.arange(16).reshape(4, 4), 16, 0), 16, 1)
    heat = np.zeros((4, 4), np.float32)
    heat[0, 0] = 2.0
    mask = np.zeros((64, 64), bool)
    mask[40:60, 40:60] = True

    def draw(**options):
        jpeg = heat_picture(np.full((64, 64), 0.4, np.float32), heat, 2.0, owner, **options)
        return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).astype(int)

    plain = draw()
    assert plain.shape == (208, 208, 3)
    red = plain[..., 0] - plain[..., 2]
    assert red[10:40, 10:40].mean() > 50 and abs(red[120:, 120:]).mean() < 5
    outlined = draw(outline=mask, side=136)
    assert outlined.shape == (136, 136, 3)
    assert (outlined[..., 2] - outlined[..., 0])[85:128, 85].mean() > 60
    assert draw(box=15)[200:, 160:][-1].mean() > plain[200:, 160:][-1].mean() + 60
