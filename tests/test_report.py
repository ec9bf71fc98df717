"""The report is one file that loads nothing, runs nothing, and shows every text as text."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mechinterp.audit import report
from mechinterp.audit.catalogue import Example, Heat
from mechinterp.audit.drivers import Driver, find_drivers, judge, place_of
from mechinterp.audit.figures import forest, performance_plot
from mechinterp.audit.questions import power_of, questions
from mechinterp.audit.settings import Settings
from mechinterp.audit.untested import untested
from mechinterp.data import ImageData
from mechinterp.pages.heat import heat_picture, thumbnail
from tests.browser import PROGRAM, Browser

PAYLOADS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</style><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "<!--",
    "&lt;b&gt;",
    "a\u202eb\u0000c\x1b[31m",
    "$\\mathrm{x}$",
    "\ud800lone",
)


class Page(html.parser.HTMLParser):
    """What a browser would see: tags with their attributes, and text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def shortcut(name: str, verdict: str = "FAIL", **changes: Any) -> dict[str, Any]:
    row = {
        **{"candidate": name, "kind": "attribute", "column": name, "attribute_kind": "acquisition"},
        **{"features": [f"site{name}:1"], "present": 0.5, "detectable_auroc": 0.9, "association_odds_ratio": 1.2},
        **{"association_ci95": [0.8, 1.9], "observed_score_gap": 1.1, "observed_ci95": [0.9, 1.3], "smallest_cell": 20},
        **{"used_share": 0.2, "causal_effect": 0.9, "causal_ci95": [0.7, 1.1], "causal_p": 0.001},
        **{"causal_p_holm": 0.004, "causal_p_joint": 0.01, "effect_with_attribute": 0.9, "null_band": [-0.1, 0.1]},
        **{"null_sets": 300, "detectable_effect": 0.1, "detectable_gap": 0.15, "removed_share": 0.8},
        **{"removed_share_ci95": [0.7, 0.9], "harm_auroc_gap": 0.2, "harm_ci95": [0.1, 0.3]},
        **{"auroc_aligned": 0.9, "auroc_conflicting": 0.7, "gap_after_removal": 0.05, "recovered": 0.15},
        **{"recovered_ci95": [0.1, 0.2], "verdict": verdict, "reason": f"because of {name}"},
    }
    return row | changes


def graph(text: str) -> dict[str, Any]:
    row = {
        **{"image": text, "nodes": 120, "edges": 700, "nodes_before_pruning": 4000, "edges_before_pruning": 70_000},
        **{"completeness": 0.97, "completeness_counting_inputs": 0.98, "replacement": 0.95, "error_share": 0.05},
        **{"max_relative_residual": 9e-7, "free_spearman": None, "free_spearman_activation": 0.2, "ablated": 100},
        "free_spearman_gradient": 0.9,
    }
    return {**row, "effects": 100, "anchor_spearman": 0.72, "images": [row], "lines_drawn": 77, "flow_drawn": 0.48}


def explainer(text: str) -> dict[str, Any]:
    scores = dict.fromkeys(("R", "F", "IS", "R_excess", "R_floor", "coverage", "auprc", "auprc_chance", "seconds"), 0.5)
    checks = {"randomisation": 1.0, "prompt_randomisation": None, "other_prompt": 0.97}
    verdicts = {"randomisation_verdict": "fail", "prompt_randomisation_verdict": "not tested"}
    verdicts["other_prompt_verdict"] = "fail"
    row = {
        "method": text,
        "built_from": "gradient",
        "anchor": False,
        "images": 6,
        **scores,
        **checks,
        **verdicts,
        "grade": "D",
    }
    row["n"] = {"auprc": 4, f"mass {text}": 3}
    return row | {f"mass {text}": 2.0, "ci95": {"R": [0.4, 0.6], "F": None, "auprc": [0.1, 0.9], f"mass {text}": None}}


def record(text: str = "mark") -> dict[str, Any]:
    """A record in which every text field is `text`."""
    rows = [shortcut(text), shortcut(text + "2", "NOT TESTED", causal_effect=None, causal_ci95=[None, None])]
    driver = {
        **{"candidate": f"{text}:7", "kind": "feature", "features": [f"{text}:7"], "present": 0.1},
        **{"used_share": 0.1, "causal_effect": 0.2, "causal_ci95": [0.1, 0.3], "location": text, "gallery": [text]},
        **{"nearest_attribute": text, "nearest_auroc": 0.6, "verdict": "CONCERN", "reason": text},
        **{"detectable_auroc": None, "association_odds_ratio": None, "causal_p": None, "harm_auroc_gap": None},
    }
    card = {
        **{"id": f"{text}:7", "site": text, "name": text, "name_score": 0.8, "frequency": 0.2, "seed_stability": None},
        **{"best_attribute": text, "f1": 0.7, "f1_null": 0.3, "push": 0.01, "place": text},
    }
    group = {"n": 50, "positives": 20, "auroc": 0.8, "ci95": [0.7, 0.9]}
    made: dict[str, Any] = {
        "schema_version": 1,
        "model": {"id": text, "family": text, "sha256": "0" * 64},
        "data": {
            **{"id": text, "images": 100, "patients": 50, "sha256": "1" * 64, "labelled": 100, "test_images": 50},
            **{
                "test_patients": 25,
                "prevalence": 0.5,
                "test_prevalence": 0.5,
                "notes": [text],
                "skipped": {text: text},
            },
        },
        "cautions": [text],
        "cohort": [
            {
                **{"attribute": text, "kind": text, "known": 100, "missing": 0, "present": 0.5, "with_target": 0.5},
                **{"without_target": 0.5, "in_test": None},
            }
        ],
        "target": text,
        "prompts": {"positive": text, "negative": text, "question": text, "yes": text, "no": text},
        "dictionary": {"site": text, "tokens": text, "width": 64, "source": text},
        "settings": {"random_sets": 300, "effect_line": 0.25, "harm_line": 0.05, "min_cell": 10},
        "seed": 0,
        "score_sd": 1.5,
        "graph": graph(text),
        "explainers": [explainer(text), explainer(text) | {"anchor": True, "R": None}],
        "performance": [
            {"group": "overall", **group},
            {"group": "metadata_only", **group, "model_minus_metadata": 0.1, "model_minus_metadata_ci95": [0.0, 0.2]},
            {"group": text, **group, "difference": 0.1, "difference_ci95": [-0.1, 0.3]},
        ],
        "shortcuts": [*rows, driver],
        "features": [card],
        "failures": [
            {
                **{
                    "kind": "false negative",
                    "image": text,
                    "row": 0,
                    "score": 0.1,
                    "standing": 0.9,
                    "attributes": [text],
                },
                "pushes": [{"feature": f"{text}:7", "push": -0.2}, {"feature": f"{text}:8", "push": -0.1}],
            }
        ],
        "truth": {
            "images": 10,
            "planted": [
                {
                    **{"factor": text, "kind": text, "do_effect": 1.0, "do_ci95": [0.8, 1.2], "used_in_truth": True},
                    **{"candidate": text, "verdict": "FAIL"},
                }
            ],
        },
        "margin": [
            {
                **{"region": text, "mean_change_sd": 0.1, "mean_change_ci95": [0.0, 0.2], "auroc_before": 0.8},
                **{"auroc_after": 0.7, "auroc_lost": 0.1, "auroc_lost_ci95": [0.0, 0.2]},
            }
        ],
        "not_tested": [{"what": text, "why": text}],
        "versions": {"mechinterp": text},
        "seconds": 1.0,
    }
    made["power"] = power_of(rows, Settings())
    made["questions"] = questions(made, Settings())
    return made


def page_of(text: str) -> str:
    made = record(text)
    picture = thumbnail(np.full((16, 16), 0.5, np.float32))
    galleries = {f"{text}:7": [{"image": text, "jpeg": picture}, {"image": text, "jpeg": None}]}
    figures = {"shortcuts": forest(made["shortcuts"], made["truth"], 0.25)}
    failed = [{**row, "jpeg": picture} for row in made["failures"]]
    return report.render(made, {k: v for k, v in figures.items() if v}, galleries, failed)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_every_text_is_shown_as_text(payload):
    plain, attacked = Page(page_of("mark")), Page(page_of(payload))
    assert [tag for tag, _ in plain.tags] == [tag for tag, _ in attacked.tags], "a payload made or hid a tag"
    assert [sorted(a) for _, a in plain.tags] == [sorted(a) for _, a in attacked.tags], "a payload made an attribute"
    for tag, attributes in attacked.tags:
        assert tag not in ("script", "iframe", "object", "embed", "form", "base", "link")
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
        assert (attributes.get("href") or "#").startswith("#")
    shown = "".join(attacked.text)
    assert "\x00" not in shown and "\x1b" not in shown and "\u202e" not in shown
    if payload.isprintable() and "style" not in payload:
        assert payload in shown


def test_the_policy_lets_nothing_load_and_knows_the_style():
    page = page_of("mark")
    policy = next(a["content"] for t, a in Page(page).tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    style = re.search(r"<style>(.*?)</style>", page, re.S)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy
    assert not re.search(r"url\(|@import|https?://", page)


def test_the_page_says_what_it_is_and_never_what_a_patient_has():
    page = page_of("mark")
    assert "Research use only. Not a medical device." in page
    assert "the model used" in page and "mechinterp audit mark --data FOLDER" in page
    assert page.count("the patient has") == 1 and "never “the patient has”" in page


def test_a_caution_stands_before_the_verdicts():
    """What makes a whole audit doubtful is read before its first answer."""
    page = page_of("mark")
    assert "<strong>Caution.</strong> mark" in page and page.index("Caution.") < page.index('id="verdict"')


def test_many_rows_with_one_reason_are_one_row_with_a_count():
    """What was not tested for one reason, numbers aside, is one row that names all; two such rows stay as they are."""
    made = record("mark")
    why = "no feature is selective for it (a probe finds it with AUROC 0.{}); the score differs by 0.1"
    idle = {"causal_effect": None, "causal_ci95": [None, None], "features": []}
    for names, said in ((("a1", "a2", "a3"), why), (("b1", "b2"), "too few images ({})")):
        rows = [shortcut(name, "NOT TESTED", reason=said.format(i), **idle) for i, name in enumerate(names)]
        made["shortcuts"] += rows
        made["not_tested"] += [{"what": row["candidate"], "why": row["reason"]} for row in rows]
    text = " ".join(" ".join(Page(report.render(made, {}, {}, [])).text).split())
    assert text.count("no feature is selective for it") == 2 and "3 candidates NOT TESTED no feature" in text
    assert "3: a1, a2, a3" in text and all(f"{name} (present 50 %" in text for name in ("a1", "a2", "a3"))
    assert text.count("too few images (0)") == text.count("too few images (1)") == 2
    assert all(f"site{name}" not in text for name in ("a1", "b1"))


def test_labels_are_called_labels():
    """An image has metadata and labels; what a patient has is not said."""
    text = " ".join(" ".join(Page(page_of("mark")).text).split())
    assert "its metadata: mark" in text and "Images labelled with the target" in text and "has mark" not in text


def test_the_explainers_table_says_of_how_many_images_and_what_another_prompt_did():
    """Columns of masks name their own number of images; likeness under another finding's prompt is printed."""
    text = " ".join(" ".join(Page(page_of("mark")).text).split())
    assert "Mass in mark (1: chance; 3 images)" in text and "target's mask (4 images)" in text
    assert "in 3 of the images (1: chance; a map that hides it stays there)" in text
    assert "after another finding's prompt" in text and "0.97 fails" in text


def test_checks_against_other_models_and_given_thresholds_stand_in_the_report():
    """A column for each control that was there and no other; commands take the thresholds that were given."""
    one = record("mark")
    plain = report.render(one, {}, {}, [])
    assert "permuted labels" not in plain and "--thresholds" not in plain
    for row in one["explainers"]:
        row |= {"label_randomisation": 0.93, "label_randomisation_verdict": "fail"}
    one["settings"]["grades"] = {"curves": [0.5, 0.4, 0.3]}
    said = " ".join(" ".join(Page(report.render(one, {}, {}, [])).text).split())
    assert "to permuted labels" in said and "0.93 fails" in said and "to the same trained again" not in said
    assert said.count("--thresholds FILE") == 2 and "FILE: the thresholds" in said


@pytest.mark.parametrize("masks", [("chest_drain",), ("pneumothorax", "chest_drain", "support_devices", "mass")])
def test_the_explainers_table_fits_its_page(tmp_path, masks):
    """With two masks or five, three controls and intervals, no part of the page is wider than a window of 1100."""
    if PROGRAM is None:
        pytest.skip("no Chromium here")
    one = record("mark")
    row = one["explainers"][0]
    row |= {"method": "gradient_times_input", "ci95": {key: [-0.25, 10.75] for key in ("R", "F", "auprc")}}
    for mask in masks:
        row[f"mass {mask}"], row["n"][f"mass {mask}"], row["ci95"][f"mass {mask}"] = 10.5, 3, [-10.5, 12.5]
    for kind in ("label_randomisation", "repeatability", "reproducibility"):
        row |= {kind: -0.93, f"{kind}_verdict": "fail"}
    one["explainers"] = [row, row | {"method": "integrated_gradients"}, row | {"method": "random", "anchor": True}]
    (tmp_path / "report.html").write_text(report.render(one, {}, {}, []), encoding="utf-8")
    with Browser(width=1100) as browser:
        browser.open(tmp_path / "report.html")
        heads = browser.value("document.querySelectorAll('#explainers ~ table th').length")
        assert heads >= 6 + 1 + len(masks) + 3 + 3 + 1
        assert browser.value("document.documentElement.scrollWidth") <= 1100
        cells = "[...document.querySelectorAll('#explainers ~ table th, #explainers ~ table td')]"
        assert browser.value(f"{cells}.every(cell => cell.scrollWidth <= cell.clientWidth + 1)")


def test_pictures_of_images_that_may_hold_names_are_withheld():
    class Data(ImageData):
        def __init__(self):
            object.__setattr__(self, "images", ("dicom-1", "dicom-2"))
            object.__setattr__(self, "may_show", np.array([True, False]))

        def pixels(self, rows=None, size=None):
            assert rows != [1], "the pixels of a withheld image were read"
            return np.zeros((1, 8, 8), np.float32)

    examples = tuple(Example(row, np.ones((2, 2), np.float32)) for row in (0, 1))
    shots = report._gallery(Heat(examples, np.ones((2, 2)), place_of(np.ones((2, 2)), 0.0)), Data())
    assert shots[0]["jpeg"] and shots[1]["jpeg"] is None


def test_the_page_says_that_the_picture_is_a_part_of_the_graph():
    """The sums hold for the whole graph; of the picture, how many lines it has and what share they carry."""
    said = " ".join(page_of("x").split())
    assert "is the sum of its lines" not in said and "sum of its edges and a constant" in said
    assert "the 77 lines drawn carry 48 % of the flow that pruning keeps" in said and "remainder" in said


@pytest.mark.parametrize("why", ["no transcoder is stored", "no test image with effusion may be shown", None])
def test_what_is_not_tested_gives_the_true_reason_for_a_missing_graph(why):
    """The reason that the graph section gave is the one printed, and there is none where there is a graph."""
    data = object.__new__(ImageData)
    for name, value in {"attributes": (), "skipped": {}, "may_show": np.ones(1, bool)}.items():
        object.__setattr__(data, name, value)
    found = {entry["what"]: entry["why"] for entry in untested(record(), data, why)}
    assert found.get("attribution graph") == why


def test_heat_colours_only_where_the_feature_fires():
    from io import BytesIO

    from PIL import Image

    heat = np.zeros((8, 8), np.float32)
    heat[0, 0] = 1.0
    made = np.asarray(Image.open(BytesIO(heat_picture(np.full((32, 32), 0.4, np.float32), heat, 1.0)))).astype(int)
    colour = made.max(-1) - made.min(-1)
    assert colour[:10, :10].mean() > 40 and colour[80:, 80:].max() < 8


def test_figures_take_any_name_and_none_is_drawn_without_data():
    assert forest([shortcut("$\\frac{", "PASS"), shortcut("a" * 200)], None, 0.25)
    assert forest([shortcut("x", causal_effect=None, detectable_gap=None)], None, 0.25) is None
    bare = {"causal_effect": None, "causal_ci95": [None, None], "null_band": [None, None]}
    assert forest([shortcut("no feature is selective for it", "PASS", **bare)], None, 0.25)
    assert performance_plot([{"group": "overall", "n": 0, "auroc": None, "ci95": [None, None]}]) is None


def test_places_in_words():
    heat = np.zeros((8, 8))
    heat[0, 0] = 1.0
    assert place_of(heat, 0.0).words == "upper left of the image, at the border"
    heat = np.zeros((8, 8))
    heat[6, 6] = 1.0
    assert place_of(heat, 0.0).words == "lower right of the image"
    assert place_of(np.ones((8, 8)), 0.0).words == "all over the image"
    assert place_of(np.zeros((8, 8)), 1.0).words.startswith("class token only")
    assert place_of(np.zeros((8, 8)), 0.0).words == "does not fire"


def test_a_driver_is_a_concern_only_outside_the_chest():
    driver = Driver(7, 0.2, 0.5, (0.4, 0.6), 20, "sex=M", 0.55)
    corner, middle = np.zeros((8, 8)), np.zeros((8, 8))
    corner[0, 0] = middle[4, 4] = 1.0
    assert judge(driver, place_of(corner, 0.0), Settings()).verdict == "CONCERN"
    assert judge(driver, place_of(middle, 0.0), Settings()).verdict == "NOT TESTED"


def test_record_survives_json():
    assert json.loads(json.dumps(record("x")))["questions"][0]["verdict"] == "FAIL"
    assert Path(report.TEMPLATES / "report.css").read_text().isascii()
    assert callable(find_drivers)


def test_two_places_are_both_named():
    heat = np.zeros((9, 9))
    heat[4, 1] = heat[4, 7] = 1.0
    assert place_of(heat, 0.0).words == "middle left and middle right of the image"
