"""Explainers side by side: anchors stand where they must, a planted mark is shown, numbers do not wander."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from mechinterp.audit.explainers import Effort, compare_explainers, methods_of
from mechinterp.audit.explainers.choose import chosen_rows, masks_of
from mechinterp.audit.explainers.command import _unseen
from mechinterp.audit.explainers.figures import _canvas, _name, maps_picture, plane_picture
from mechinterp.audit.explainers.folder import console_of, table_of, write_folder
from mechinterp.audit.explainers.further import FURTHER
from mechinterp.audit.explainers.grading import curve_share, graded, read_thresholds
from mechinterp.audit.explainers.records import mean_and_interval
from mechinterp.data import open_data
from mechinterp.errors import DataError, UsageError
from mechinterp.experiments.main_report import _rows, _table
from mechinterp.explain.ask import about_image
from mechinterp.metrics.faithfulness import comprehensiveness, saco, sufficiency
from mechinterp.metrics.grades import Measured
from mechinterp.metrics.iq import expected_absolute_r
from mechinterp.metrics.scored import Scored
from mechinterp.storage import verify_folder
from mechinterp.types import Target
from tests.audit_toys import SIZE, trained_clip, write_cohort

METHODS = ("occlusion", "gradient_times_input", "attention_rollout", "edges", "random", "constant", "echo", "oracle")
OTHER = Target("other", "a photograph of a marker", "a photograph without one")
EFFORT = Effort(images=12, draws=8, masks=("mark",))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """160 images; where the mark is, its mask is drawn: pixels 1 to 5 of the first 8 x 8 patch."""
    folder = write_cohort(tmp_path_factory.mktemp("cohort") / "data", n=160)
    data = open_data(folder)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[1:6, 1:6] = 255
    (folder / "masks" / "mark").mkdir(parents=True)
    for row in np.flatnonzero(data.attribute("mark").values == 1):
        Image.fromarray(mask).save(folder / "masks" / "mark" / data.images[row].removeprefix("images/"))
    return open_data(folder)


@pytest.fixture(scope="module")
def models():
    return {"shortcut": trained_clip(0.9), "clean": trained_clip(0.0)}


@pytest.fixture(scope="module")
def compared(models, cohort):
    """Twelve images, of which six have the mark."""
    target, rows = cohort.targets["finding"], chosen_rows(cohort, "finding", 12, 0, ("mark",)).tolist()
    return {n: compare_explainers(m, cohort, target, methods_of(METHODS), EFFORT, 0, rows) for n, m in models.items()}


def row_of(compared, method, model="shortcut"):
    return next(row for row in compared[model].rows if row["method"] == method)


def test_masks_are_shares_of_patches(models, cohort):
    rows = np.flatnonzero(cohort.attribute("mark").values == 1)[:3]
    shares, known = masks_of(models["clean"], cohort, "mark", rows)
    assert known.all() and np.allclose(shares[:, 0], 25 / 64) and not shares[:, 1:].any()
    without = np.flatnonzero(cohort.attribute("mark").values == 0)[:3]
    assert not masks_of(models["clean"], cohort, "mark", without)[1].any()


def test_many_images_of_a_patient_make_no_interval_narrower():
    """Patients are resampled: 6 patients with 20 equal images each know as much as 6 with one, and 4 too little."""
    values, patients = np.array([0.1, 0.4, 0.2, 0.9, 0.5, 0.3]), tuple("abcdef")
    once, often = mean_and_interval(values, patients), mean_and_interval(np.repeat(values, 20), patients_of(20))
    assert once[0] == pytest.approx(often[0]) and once[1] == pytest.approx(often[1])
    scored = [Scored(v, ("ok",) * len(v)) for v in (values, np.repeat(values, 20))]
    assert scored[0].interval(patients) == pytest.approx(scored[1].interval(patients_of(20)))
    few = np.where(np.arange(120) < 80, np.repeat(values, 20), np.nan)
    assert mean_and_interval(few, patients_of(20)) == (pytest.approx(values[:4].mean()), None)


def patients_of(images):
    """Six patients with as many images each."""
    return tuple(np.repeat(list("abcdef"), images).tolist())


def test_masks_that_no_image_has_are_said(models, cohort):
    """Whoever asks for the masks of a mark hears that there is no column for it; one image with it is enough."""
    values = cohort.attribute("mark").values
    without, one = np.flatnonzero(values == 0)[:3], np.r_[np.flatnonzero(values == 0)[:2], np.flatnonzero(values)[:1]]
    for rows, said in ((without, 1), (one, 0)):
        found = {"mark": masks_of(models["clean"], cohort, "mark", rows)}
        assert [line.startswith("masks of mark: none") for line in _unseen(found, ["mark"])] == [True] * said


def test_images_are_of_test_patients_one_each_and_half_with_the_target(cohort):
    rows = chosen_rows(cohort, "finding", 12, seed=3)
    assert (cohort.split[rows] == "test").all() and len({cohort.patients[r] for r in rows}) == 12
    assert cohort.labels("finding")[rows].sum() == 6
    assert not np.array_equal(rows, chosen_rows(cohort, "finding", 12, seed=4))
    asked = chosen_rows(cohort, "finding", 12, seed=3, masks=("mark",))
    with_mark = cohort.attribute("mark").values[asked] == 1
    assert len({cohort.patients[r] for r in asked}) == 12
    assert [int(with_mark[cohort.labels("finding")[asked] == label].sum()) for label in (0, 1)] == [3, 3]
    few = chosen_rows(cohort, "finding", 6, seed=3, masks=("mark",))
    assert (cohort.attribute("mark").values[few] == 1).sum() == 4, "the odd one of each three has it"
    with pytest.raises(DataError, match="test patient"):
        chosen_rows(cohort.subset(cohort.split != "test"), "finding", 12, seed=0)


def test_a_target_that_no_image_has_is_refused(cohort):
    """A misspelt value in dataset.json labels every image 0: nothing could be found in any map."""
    with pytest.raises(DataError, match=r"no image has the target 'finding'.*misspelt"):
        chosen_rows(cohort.subset(cohort.labels("finding") == 0), "finding", 12, seed=0)


def test_the_anchors_stand_where_they_must(compared):
    oracle, echo, random, constant = (row_of(compared, n) for n in ("oracle", "echo", "random", "constant"))
    assert oracle["F_own"] == pytest.approx(1) and 0.3 < oracle["F"] < 0.999  # judged by another filling
    assert echo["R"] == pytest.approx(1) and echo["R_null"] in (None, pytest.approx(1))
    assert echo["R_excess"] > 1.5 * oracle["R_excess"]
    assert abs(random["R"] - random["R_floor"]) < 0.1
    assert constant["R"] is None and constant["statuses"] == {"const_attr": 12} and constant["coverage"] == 0
    assert {row["built_from"] for row in (random, constant, echo)} == {"none"}


def test_as_many_draws_are_made_as_keep_the_floor_of_reliance_low():
    """The floor of R by chance is .15 at the draws that a comparison makes; at 4 it would be .50."""
    assert expected_absolute_r(Effort().draws) < 0.155


def test_what_does_not_move_has_no_reliance_on_the_output(compared):
    """Nothing of a constant map moves: R, R_null and R_excess are not defined, and are not printed as 0."""
    constant, oracle = row_of(compared, "constant"), row_of(compared, "oracle")
    for score in ("R", "IS", "R_null", "R_excess"):
        assert constant[score] is None and constant["ci95"][score] is None and constant["n"][score] == 0, score
        assert oracle[score] is None or oracle["n"][score] > 0
    line = next(line for line in table_of(compared["shortcut"].rows).splitlines() if "*constant*" in line)
    cells = [cell.strip() for cell in line.split("|")[2:9]]
    assert [cells[i] for i in (0, 2, 4, 5)] == ["-"] * 4 and cells[6].startswith("0.00") and cells[1] != "-"
    main = next(line for line in _table("toy", compared["shortcut"], "mark").lines if line[0] == "*constant*")
    assert [main[i] for i in (1, 3, 5, 6)] == ["-"] * 4 and main[7].startswith("0.00")


def test_every_number_says_of_how_many_images_it_is(compared, cohort):
    """Images without the mark's mask are left out of its column alone, there and in the rows of the main table."""
    made = compared["shortcut"].made
    with_mark = int((cohort.attribute("mark").values[made.rows] == 1).sum())
    assert with_mark == 6
    occlusion = row_of(compared, "occlusion")
    assert occlusion["n"]["mass mark"] == with_mark and occlusion["n"]["F"] == occlusion["n"]["randomisation"] == 12
    assert f"mass mark (1: chance; {with_mark} images)" in table_of(compared["shortcut"].rows)
    rows = {(r.of["explainer"], r.name): r for r in _rows("toy", compared["shortcut"])}
    assert rows["occlusion", "mass mark"].n == with_mark and rows["occlusion", "F"].n == 12
    assert rows["occlusion", "auprc"].n == 0, "the finding has no masks"
    assert rows["occlusion", "randomisation"].ci95 == tuple(occlusion["ci95"]["randomisation"])
    assert "relevance on the mark (1: chance), 6 images" in _table("toy", compared["shortcut"], "mark").header


def test_the_prompt_of_another_finding_is_told_from_nonsense(models, cohort):
    """Likeness under another finding's prompt is measured and printed beside that under nonsense, as its own number."""
    data = replace(cohort, targets={**cohort.targets, "other": OTHER})
    made = compare_explainers(
        models["shortcut"], data, data.targets["finding"], methods_of(("occlusion", "attention_rollout")), EFFORT
    )
    occlusion, rollout = made.rows
    assert rollout["other_prompt"] == pytest.approx(1) and rollout["other_prompt_verdict"] == "fail"
    assert occlusion["other_prompt"] < 0.99 and occlusion["other_prompt"] != occlusion["prompt_randomisation"]
    assert occlusion["n"]["other_prompt"] == 12 and occlusion["ci95"]["other_prompt"] is not None
    for header, line in (
        [[c.strip() for c in s.split("|")[1:-1]] for s in table_of([rollout]).splitlines()[::2]],
        (_table("toy", made, "mark").header, next(x for x in _table("toy", made, "mark").lines if "rollout" in x[0])),
    ):
        said = dict(zip(header, line, strict=True))
        title = next(name for name in header if "other finding" in name or "another finding" in name)
        assert said[title].startswith("1.00") and "=" in said[title]
    assert {r.name for r in _rows("toy", made)} >= {"other_prompt", "prompt_randomisation"}


def test_grades_follow_the_evidence(compared, tmp_path):
    """Curves run from a random order (0) to that of the true effects (1); one failed check is a D."""
    made = compared["shortcut"].made
    oracle, random, rollout = (row_of(compared, n) for n in ("oracle", "random", "attention_rollout"))
    assert curve_share(made, made.judged["oracle"]).value > 0.6 and abs(random["curves"]) < 0.4
    same = replace(made.judged["random"], curve=made.curve_oracle)
    found = curve_share(made, same)
    assert (found.value, *found.ci95) == pytest.approx((1, 1, 1))
    assert rollout["prompt_randomisation_verdict"] == "fail" and rollout["grade"] == "D"
    assert rollout["grade_pieces"]["prompt"] == {"grade": "D", "evidence": "fail"}
    assert row_of(compared, "constant")["grade_pieces"]["curves"]["grade"] is None, "no order, no curve"
    assert oracle["grade_pieces"]["localisation"]["grade"] is None, "not asked for"
    file = tmp_path / "limits.json"
    file.write_text('{"faithfulness": [0.0, 0.0, 0.0], "needed": ["faithfulness"]}')
    kind = graded(made, {**random, "randomisation_verdict": "not tested", "prompt_randomisation_verdict": "not tested"},
                  Measured(1.0, (1.0, 1.0)), read_thresholds(file))  # fmt: skip
    assert {p.name: p.letter for p in kind.pieces}["faithfulness"] == "A"
    for text, said in (("{", "cannot be read"), ('{"f": 1}', "'f'"), ('{"curves": [1]}', "curves is"),
                       ('{"curves": [0.1, 0.2, 0.3]}', "do not fall")):  # fmt: skip
        file.write_text(text)
        with pytest.raises(UsageError, match=said) as error:
            read_thresholds(file)
        assert "limits.json" in str(error.value)


def test_what_is_judged_by_its_own_fill_is_marked_and_not_graded(compared, models, cohort, tmp_path):
    """Occlusion fills with grey: judged by grey its F is circular, judged by blur it is not; a gradient's never is."""
    by_blur = {name: row_of(compared, name)["circular"] for name in METHODS}
    assert {name for name, which in by_blur.items() if "F" in which} == set()
    assert {name for name, which in by_blur.items() if which == ["F_own"]} == {"occlusion", "oracle"}
    target, rows = cohort.targets["finding"], compared["shortcut"].made.rows.tolist()
    grey = replace(EFFORT, draws=3, judge="grey")
    methods = methods_of(("occlusion", "gradient_times_input"))
    made = compare_explainers(models["shortcut"], cohort, target, methods, grey, 0, rows)
    occlusion, gradient = made.rows
    assert {"F", "IS", "R_excess", "curves"} <= set(occlusion["circular"]) and gradient["circular"] == []
    assert occlusion["F"] == pytest.approx(1) and occlusion["grade"] == "NOT GRADED"
    assert "circular" in occlusion["grade_reason"] and "circular" not in gradient["grade_reason"]
    table = write_folder(made, cohort, tmp_path, 0, 1.0, "mechinterp iq toy")
    shown = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()}
    assert "1.00 °" in shown["occlusion"] and "°" not in shown["gradient_times_input"]
    assert json.loads((tmp_path / "iq.json").read_text())["fills"] == {"explainers": "grey", "judge": "grey"}


def test_all_metrics_are_those_of_their_functions_on_the_removals_that_judge(compared, models, cohort, tmp_path):
    """Each is what its function gives for the map, without it nothing else changes, and all files hold the same."""
    target, rows = cohort.targets["finding"], compared["shortcut"].made.rows.tolist()
    methods, effort = methods_of(("occlusion", "random", "constant")), replace(EFFORT, further=True)
    made = compare_explainers(models["shortcut"], cohort, target, methods, effort, 0, rows)
    by = {row["method"]: row for row in made.rows}
    judge = about_image(models["shortcut"], made.made.question.source.batch, target, "blur")
    map_of = {name: torch.from_numpy(made.made.judged[name].attribution) for name in by}
    for name in ("occlusion", "random"):
        assert by[name]["saco"] == pytest.approx(saco(judge, map_of[name]).mean)
        assert by[name]["comprehensiveness"] == pytest.approx(comprehensiveness(judge, map_of[name]).mean)
        assert by[name]["sufficiency"] == pytest.approx(sufficiency(judge, map_of[name]).mean)
    for score in ("comprehensiveness", "faithfulness_correlation", "saco"):
        assert by["occlusion"][score] > by["random"][score], score
    for score in ("sufficiency", "infidelity", "sensitivity_max"):
        assert by["occlusion"][score] < by["random"][score], score
    assert all(by["constant"][score] is None for score in FURTHER), "no order, no movement"
    plain = row_of(compared, "occlusion")
    assert not set(FURTHER) & set(plain) and plain["F"] == by["occlusion"]["F"]
    write_folder(made, cohort, tmp_path, 0, 1.0, "mechinterp iq toy")
    text = (tmp_path / "table.md").read_text()
    assert "## All metrics" in text and all(f"{title} {arrow}" in text for title, arrow in FURTHER.values())
    csv, parquet = pd.read_csv(tmp_path / "scores.csv"), pd.read_parquet(tmp_path / "scores.parquet")
    for found in (csv, parquet):
        one = found[(found.method == "occlusion") & (found.score == "saco")].iloc[0]
        assert one.value == pytest.approx(by["occlusion"]["saco"]) and one.low <= one.value <= one.high and one.n == 12
        assert found[(found.method == "occlusion") & (found.score == "F_own")].circular.tolist() == [True]


def test_a_planted_mark_is_shown_by_what_removes_patches(compared):
    """In the model that learnt the mark, relevance lies on it; in the clean one and for noise, it does not."""
    shown = row_of(compared, "occlusion")
    assert shown["mass mark"] > 4 and shown["ci95"]["mass mark"][0] > 1
    assert row_of(compared, "occlusion", "clean")["mass mark"] < 0.5 * shown["mass mark"]
    noise = row_of(compared, "random")
    assert noise["ci95"]["mass mark"][0] < 1.5 and noise["mass mark"] < 0.6 * shown["mass mark"]


def test_what_looks_at_the_image_alone_fails_the_sanity_checks(compared):
    edges, occlusion, rollout = (row_of(compared, n) for n in ("edges", "occlusion", "attention_rollout"))
    assert edges["randomisation"] == pytest.approx(1) and edges["randomisation_verdict"] == "fail"
    assert edges["prompt_randomisation"] == pytest.approx(1) and edges["prompt_randomisation_verdict"] == "fail"
    assert occlusion["randomisation"] < 0.8
    # attention in the image tower of a dual encoder cannot know the prompt
    assert rollout["prompt_randomisation"] == pytest.approx(1) and rollout["prompt_randomisation_verdict"] == "fail"


def test_a_methods_numbers_do_not_depend_on_its_company(compared, models, cohort):
    target = cohort.targets["finding"]
    rows = compared["shortcut"].made.rows.tolist()
    alone = compare_explainers(models["shortcut"], cohort, target, methods_of(("random", "occlusion")), EFFORT, 0, rows)
    for row in alone.rows:
        beside = row_of(compared, row["method"])
        assert {k: v for k, v in row.items() if k != "seconds"} == {k: v for k, v in beside.items() if k != "seconds"}


def test_of_few_patients_there_is_no_interval_and_no_grade(compared, models, cohort):
    """Four patients give means, but no interval of any score or check, and so nothing that a grade could rest on."""
    rows = compared["shortcut"].made.rows.tolist()[:4]
    target, few = cohort.targets["finding"], methods_of(("occlusion", "gradient_times_input"))
    for row in compare_explainers(models["shortcut"], cohort, target, few, EFFORT, 0, rows).rows:
        assert row["F"] is not None and row["curves"] is not None and row["randomisation"] is not None
        assert {key for key, interval in row["ci95"].items() if interval is not None} == set()
        assert row["grade"] == "NOT GRADED"


def test_how_many_images_go_through_at_once_changes_no_number(compared, models, cohort):
    """With five at a time all scores and verdicts are those of 256, to rounding, and no pass holds more than five."""
    model, rows = models["shortcut"], compared["shortcut"].made.rows.tolist()
    passes, block = [], model.hf.vision_model.encoder.layers[0]
    hook = block.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    few = ("occlusion", "gradient_times_input", "attention_rollout")
    made = compare_explainers(
        model, cohort, cohort.targets["finding"], methods_of(few), replace(EFFORT, chunk=5), 0, rows
    )
    hook.remove()
    assert passes and max(passes) == 5
    for row in made.rows:
        beside = row_of(compared, row["method"])
        assert row["grade"] == beside["grade"] and row["randomisation_verdict"] == beside["randomisation_verdict"]
        for key in ("R", "F", "IS", "R_null", "R_excess", "curves", "randomisation", "prompt_randomisation"):
            assert row[key] == pytest.approx(beside[key], abs=1e-4), (row["method"], key)


def test_the_folder_holds_what_the_table_says(compared, cohort, tmp_path):
    made = compared["shortcut"]
    table = write_folder(made, cohort, tmp_path, 0, 1.0, "mechinterp iq toy")
    assert verify_folder(tmp_path) == []
    record = json.loads((tmp_path / "iq.json").read_text())
    assert [row["method"] for row in record["explainers"]] == list(METHODS)
    promised = {"method", "R", "F", "IS", "R_null", "R_excess", "coverage", "ci95", "auprc", "randomisation"}
    assert all(promised | {"prompt_randomisation", "seconds"} <= set(row) for row in record["explainers"])
    assert "not tested" in next(line for line in table.splitlines() if "*constant*" in line)
    for picture in (maps_picture(made.made, cohort), plane_picture(made.rows)):
        assert picture is not None and picture.startswith(b"\x89PNG")


def test_an_unknown_method_is_refused_with_the_list():
    with pytest.raises(UsageError, match=r"no method 'gradcam'.*grad_cam"):
        methods_of(("gradcam",))


def test_the_table_on_the_console_fits_a_terminal(compared):
    """No line is over 120 columns; every method is there with F and its interval, and what had no room is named."""
    rows = compared["shortcut"].rows
    many = [row | {f"mass attribute number {i}": 1.0 for i in range(9)} for row in rows]
    for shown in (many, rows):
        header, *lines, last = console_of(shown).splitlines()
        assert max(map(len, [header, *lines])) <= 120 and len(lines) == len(rows)
        assert {line.split()[0] for line in lines} == {row["method"] for row in rows}
        assert header.split()[:3] == ["method", "F", "R"] and "table.md" in last
    assert "mass attribute number 8" in console_of(many).splitlines()[-1] and "mass mark" in header
    best = max((row for row in rows if not row["anchor"]), key=lambda row: row["F"])
    low, high = best["ci95"]["F"]
    assert f"{best['method']} " in lines[0] and f"{best['F']:.2f} [{low:.2f}, {high:.2f}]" in lines[0]


def test_names_of_points_cover_neither_each_other_nor_a_point():
    """Twelve explainers close together are all named legibly."""
    figure, axes = _canvas(1, 2, 10.5, 4.4)
    axes[0, 0].set_xlim(0, 1.02)
    places = 0.5 + 0.05 * np.random.default_rng(0).random((12, 2))
    points = [(float(x), float(y), f"integrated gradients {i}", "black") for i, (x, y) in enumerate(places)]
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in _name(axes[0, 0], points)]
    assert len(boxes) == 12
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    spots = [axes[0, 0].transData.transform(point[:2]) for point in points]
    assert not any(box.contains(*spot) for box in boxes for spot in spots)
