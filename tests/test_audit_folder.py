"""A stranger's model: a CLIP trained here and saved as a transformers folder without any dictionary is audited."""

from __future__ import annotations

import html
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mechinterp.audit import defaults
from mechinterp.audit import dictionary as dictionaries
from mechinterp.audit.explainers.choose import chosen_rows
from mechinterp.audit.pipeline import AuditResult, choose_target
from mechinterp.cli import main
from mechinterp.data import open_data
from mechinterp.models import HookedVLM
from mechinterp.storage import verify_folder
from tests.audit_toys import SIZE, trained_clip, write_cohort


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """(model folder, data folder): a CLIP that was trained where the mark goes with the finding; marks have masks."""
    root = tmp_path_factory.mktemp("stranger")
    model = trained_clip(0.8, seed=5)
    model.hf.save_pretrained(root / "model")
    model.processor.save_pretrained(root / "model")
    folder = write_cohort(root / "data", seed=7)
    data = open_data(folder)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[1:6, 1:6] = 255
    (folder / "masks" / "mark").mkdir(parents=True)
    for row in np.flatnonzero(data.attribute("mark").values == 1):
        Image.fromarray(mask).save(folder / "masks" / "mark" / Path(data.images[row]).name)
    return root / "model", folder


@pytest.fixture(scope="module")
def first(stranger, tmp_path_factory):
    """The folder of an audit by the command line at its defaults, the cache beside it, and what was printed."""
    root = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MECHINTERP_CACHE", str(root / "cache"))
        patch.setattr(dictionaries, "STEPS", 500)
        assert main(["audit", *map(str, (stranger[0], "--data", stranger[1], "--out", root / "audit"))]) == 0
    return root / "audit", root / "cache"


CHECKED = ("randomisation", "prompt_randomisation")


def near(one, other):
    """Equal to the six digits of audit.json; both may be without a number."""
    if one is None or other is None:
        return one is other
    return one == pytest.approx(other, rel=1e-5)


def untimed(record):
    """The record without what a clock measured."""
    kept = {k: v for k, v in record.items() if k != "seconds"}
    return kept | {"explainers": [{k: v for k, v in row.items() if k != "seconds"} for row in record["explainers"]]}


def test_a_folder_without_dictionaries_is_audited_and_its_dictionary_is_kept(
    first, stranger, tmp_path, monkeypatch, capsys
):
    """The mark that the model learnt is found, and a second audit takes the dictionary that the first one trained."""
    out, cache = first
    record = json.loads((out / "audit.json").read_text())
    mark = next(row for row in record["shortcuts"] if row["candidate"] == "mark")
    assert mark["verdict"] == "FAIL" and mark["features"], mark["reason"]
    assert mark["causal_effect"] > 0.25 and mark["harm_auroc_gap"] > 0.05
    assert record["dictionary"]["source"].startswith("trained for this audit")
    assert verify_folder(out) == []
    by_method = {row["method"]: row for row in record["explainers"]}
    assert by_method["echo"]["R"] == pytest.approx(1, abs=1e-4)
    assert by_method["edges"]["randomisation_verdict"] == "fail"
    assert (out / "figures" / "maps.png").is_file()
    assert not list(stranger[0].rglob("dictionaries")), "a user's model folder stays as it was"

    kept = sorted(p for p in (cache / "dictionaries").rglob("*") if p.is_file())
    times = {path: path.stat().st_mtime_ns for path in kept}
    monkeypatch.setenv("MECHINTERP_CACHE", str(cache))
    monkeypatch.setattr(dictionaries, "STEPS", 500)
    folder, data = map(str, stranger)
    assert main(["audit", folder, "--data", data, "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    assert "report:" in capsys.readouterr().out
    assert times and times == {path: path.stat().st_mtime_ns for path in times}, "trained again instead of kept"
    assert untimed(json.loads((tmp_path / "audit.json").read_text())) == untimed(record)


def test_the_command_in_the_report_prints_the_numbers_of_the_audit(first, stranger, tmp_path, capsys):
    """Masks of what the verdicts accuse move no image: `mechinterp iq` prints the audit's numbers."""
    record = json.loads((first[0] / "audit.json").read_text())
    said = re.search(r"<code>(mechinterp iq .*?)</code>", (first[0] / "report.html").read_text())
    assert said is not None
    words = shlex.split(html.unescape(said[1]))[1:]
    assert words == [*"iq model --data FOLDER --target finding --seed 0 --images 6 --masks mark".split()]
    words[1], words[3] = map(str, stranger)
    command = [*words, "--methods", "occlusion,gradient_times_input,random"]
    assert main([*command, "--out", str(tmp_path / "iq")]) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "iq" / "iq.json").read_text())
    assert verify_folder(tmp_path / "iq") == [] and found["images"] == record["explained"]
    cohort = open_data(stranger[1])
    assert record["explained"] == [cohort.images[row] for row in chosen_rows(cohort, "finding", 6, 0)], "verdicts apart"
    again = f"--images 6 --data {stranger[1]} --target finding --methods {command[-1]} --masks mark`"
    assert again in (tmp_path / "iq" / "table.md").read_text(), "the command that makes this table again"
    audited = {row["method"]: row for row in record["explainers"]}
    shown = ("R", "F", "IS", "R_null", "R_excess", "coverage", "curves", "mass mark", "n", *CHECKED)
    for row in found["explainers"]:
        said, own = audited[row["method"]], dict(row)
        own["n"] = {score: own["n"][score] for score in said["n"]}  # the command has further metrics
        assert said["mass mark"] is not None and 0 < said["n"]["mass mark"] < 6, "images without one are left out"
        for score in shown:
            assert near(said[score], own[score]) and near(said["ci95"].get(score), own["ci95"].get(score)), score


def test_the_numbers_of_the_audit_are_those_of_its_seed(first, stranger, tmp_path, capsys):
    """Another seed explains other images, draws and prompts: its numbers are not those of the audit."""
    record = json.loads((first[0] / "audit.json").read_text())
    command = ["iq", *map(str, (stranger[0], "--data", stranger[1])), "--methods", "occlusion,random"]
    assert main([*command, "--seed", "1", "--out", str(tmp_path / "iq")]) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "iq" / "iq.json").read_text())
    assert found["seed"] == 1 and record["seed"] == 0 and found["images"] != record["explained"]
    audited = {row["method"]: row for row in record["explainers"]}
    for row in found["explainers"]:
        for score in ("R", "F", "IS", *(() if row["method"] == "random" else CHECKED)):
            assert not near(audited[row["method"]][score], row[score]), score


def test_a_method_that_does_not_exist_is_refused_and_nothing_is_written(stranger, tmp_path, capsys):
    """A wrong name in --methods is one line on stderr and no folder."""
    folder, data = map(str, stranger)
    command = ["iq", folder, "--data", data, "--images", "2", "--methods", "nope"]
    assert main([*command, "--out", str(tmp_path / "no")]) == 2
    assert "no method 'nope'" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_the_phantom_taken_by_default_is_known_by_its_folder(tmp_path, monkeypatch):
    """Of the same size and seed it is the default; of another seed, or any other folder, it is not."""
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path))
    monkeypatch.setattr(defaults, "DEFAULT_IMAGES", 10)
    data = defaults.default_data(10, 3)
    assert defaults.is_default(data, 3) and not defaults.is_default(data, 4)
    assert not defaults.is_default(open_data(write_cohort(tmp_path / "mine", n=10)), 3)


def test_a_model_of_radiographs_on_the_default_phantom_is_said_aloud(tmp_path, monkeypatch, caplog):
    """The phantom stands in for data that nobody named: a warning before the work, the first line of the summary."""
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path))
    data = defaults.default_data(10, 3)
    cxr, ours = HookedVLM.from_pretrained("cxr-clip"), HookedVLM.from_pretrained("phantom-clip")
    choose_target(ours, data, None)
    choose_target(cxr, open_data(write_cohort(tmp_path / "mine", n=10)), None)
    assert not caplog.records and defaults.stand_in(ours, data) is None
    choose_target(cxr, data, "effusion")
    (said,) = [record.getMessage() for record in caplog.records]
    assert "cxr-clip was asked about synthetic phantoms" in said and "--data FOLDER" in said
    head = {"model": {"id": "cxr-clip"}, "data": {"id": "phantom"}, "target": "effusion", "questions": []}
    assert AuditResult({**head, "cautions": [said]}, tmp_path).summary().splitlines()[1] == f"  CAUTION: {said}"
