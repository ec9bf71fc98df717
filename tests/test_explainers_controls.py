"""Maps held beside those of other models: the same model, one that knows nothing, one trained again."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny

from mechinterp.audit.dictionary import dictionary_of, model_folder, training_record
from mechinterp.audit.explainers import Comparison, Effort, audit_section, compare, methods_of, section
from mechinterp.audit.explainers.checks import check_fields, checked
from mechinterp.audit.explainers.controls import Controls, controls_of
from mechinterp.audit.explainers.folder import BESIDE, table_of
from mechinterp.audit.explainers.grading import graded
from mechinterp.audit.explainers.records import explainer_rows
from mechinterp.audit.settings import settings_of
from mechinterp.cli import main
from mechinterp.data import open_data
from mechinterp.errors import UsageError
from mechinterp.metrics.grades import Measured, Thresholds
from mechinterp.metrics.sanity import randomising, stages
from mechinterp.models import HookedVLM
from mechinterp.models.bundles import bundled_folder
from tests.audit_toys import trained_clip, write_cohort

METHODS = ("occlusion", "edges", "attention_rollout")


@pytest.fixture(scope="module")
def model():
    return trained_clip(0.9)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_data(write_cohort(tmp_path_factory.mktemp("controls") / "data", n=160))


@pytest.fixture(scope="module")
def made(model, data) -> Comparison:
    return compare(model, data, data.targets["finding"], methods_of(METHODS), Effort(images=12, draws=3))


def fields_beside(made, data, controls):
    return {name: check_fields(of) for name, of in checked(made, data, None, 0, controls).items()}


def test_the_same_model_comes_back_and_does_not_pass_as_trained_on_other_labels(made, data, model):
    found = fields_beside(made, data, Controls(permuted=model, again=model, other=model))
    for name in METHODS:
        assert found[name]["label_randomisation"] == pytest.approx(1)
        assert found[name]["label_randomisation_verdict"] == "fail"
    for key in ("repeatability", "reproducibility"):
        assert found["occlusion"][key] == pytest.approx(1) and found["occlusion"][f"{key}_verdict"] == "pass"


def test_a_model_that_knows_nothing_is_told_from_it_by_what_asks_the_model_alone(made, data, model):
    blank = trained_clip(0.0)
    with randomising(blank, seed=5) as weights:
        for stage in stages(blank, "vision"):
            weights.randomise(stage)
        found = fields_beside(made, data, Controls(permuted=blank, again=blank))
    assert found["edges"]["label_randomisation"] == pytest.approx(1), "an edge detector never asks the model"
    assert found["edges"]["label_randomisation_verdict"] == "fail"
    assert found["occlusion"]["label_randomisation"] < found["occlusion"]["label_randomisation_baseline"]
    assert found["occlusion"]["repeatability_verdict"] != "pass"


def test_without_other_models_it_is_not_tested_and_not_shown(made, data, model):
    without = checked(made, data, None, 0)
    rows = explainer_rows(made, None, without)
    for row in rows:
        for field, title in BESIDE:
            assert row[field] is None and row[f"{field}_verdict"] == "not tested"
            assert f" {title} |" not in table_of(rows)
    with_one = explainer_rows(made, None, checked(made, data, None, 0, Controls(permuted=model)))
    header, _, *lines = table_of(with_one).splitlines()
    assert " labels |" in header and " again |" not in header
    assert all("1.00 =" in line for line in lines)
    assert all(row["ci95"]["label_randomisation"] == pytest.approx([1, 1]) for row in with_one)


def test_a_method_that_needs_features_is_held_beside_models_that_have_them(made, data, model):
    judged, other = dict(made.judged), trained_clip(0.0)
    own = replace(judged["occlusion"].method, name="own", needs="model", explains=lambda model: model is not other)
    alone = replace(made, judged={"own": replace(judged["occlusion"], method=own)})
    found = checked(alone, data, None, 0, Controls(permuted=other, again=model))["own"]
    assert set(found) == {"weights", "nonsense", "again"}


def test_controls_are_those_named_else_those_of_the_models_own_record(monkeypatch, model):
    models = {"me": model, "a": trained_clip(0.0), "b": trained_clip(0.0, steps=2)}
    record: dict[str, object] = {"controls": {"permuted": "a", "other": "a"}}
    monkeypatch.setattr("mechinterp.audit.explainers.controls.training_record", lambda model: record)
    found = controls_of(model, models.__getitem__, {"other": "b", "again": None})
    assert (found.permuted, found.again, found.other) == (models["a"], None, models["b"])
    with pytest.raises(UsageError, match="--again me: is the model itself"):
        controls_of(model, models.__getitem__, {"again": "me"})
    record["controls"] = "nonsense"
    assert vars(controls_of(model, models.__getitem__)) == {"permuted": None, "again": None, "other": None}


@pytest.mark.parametrize("name", ["phantom-clip", "phantom-llava"])
def test_the_models_that_ship_name_their_controls(name, data):
    model = HookedVLM.from_pretrained(name)
    found = controls_of(model, HookedVLM.from_pretrained)
    # phantom-llava is none of phantom-clip's: its tower started from phantom-clip, so it is no other architecture
    assert {k: m and m.label for k, m in vars(found).items()} == {
        "permuted": f"{name}-permuted",
        "again": f"{name}-again",
        "other": f"{name}-deep",
    }
    for other in (found.permuted, found.again):
        assert other is not None
        assert [p.shape for p in other.hf.parameters()] == [p.shape for p in model.hf.parameters()]
        pairs = zip(other.hf.parameters(), model.hf.parameters(), strict=True)
        assert not any(torch.equal(a, b) for a, b in pairs if a.unique().numel() > 1)
    for other in vars(found).values():
        assert dictionary_of(other, data, 0)[1].startswith("stored with the model")
        assert training_record(other).get("by_heart", 1.0) == 1.0  # of permuted labels


def test_a_folder_called_like_a_bundled_model_is_not_that_model(tmp_path):
    """Else its dictionaries, target and controls would be those of another model."""
    own = tmp_path / "phantom-clip"
    shutil.copytree(bundled_folder("phantom-clip-shortcut"), own, ignore=shutil.ignore_patterns("transcoders"))  # type: ignore[arg-type]
    (own / "training.json").write_text('{"target": "mine"}')
    model = HookedVLM.from_pretrained(own)
    assert model.label == "phantom-clip" and model_folder(model) == own
    assert training_record(model) == {"target": "mine"}
    bundled = HookedVLM.from_pretrained("phantom-clip")
    assert model_folder(bundled) == bundled_folder("phantom-clip")


def test_a_recorded_control_may_stand_beside_its_model_and_is_named_when_it_is_gone(tmp_path):
    own, beside = tmp_path / "mine", tmp_path / "shuffled"
    for folder, name in ((own, "phantom-clip-shortcut"), (beside, "phantom-clip-permuted")):
        source = bundled_folder(name)
        assert source is not None
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("transcoders", "saes"))
    (own / "training.json").write_text('{"controls": {"permuted": "../shuffled"}}')
    model = HookedVLM.from_pretrained(own)
    found = controls_of(model, HookedVLM.from_pretrained)
    assert found.permuted is not None and found.permuted.sha256 == HookedVLM.from_pretrained(beside).sha256
    shutil.rmtree(beside)
    with pytest.raises(UsageError, match=r"training\.json: controls\.permuted: names '\.\./shuffled'.*take it out"):
        controls_of(model, HookedVLM.from_pretrained)
    assert controls_of(model, HookedVLM.from_pretrained, {"permuted": "phantom-clip-permuted"}).permuted is not None


def test_an_audit_takes_the_controls_of_the_models_record_and_the_thresholds(monkeypatch, data, model, caplog):
    """What `mechinterp iq` would take; one that does not open is left out with a warning: no verdict needs it."""
    seen = []
    monkeypatch.setattr(section, "compare_explainers", lambda *args: seen.append(args[-2:]))
    monkeypatch.setattr("mechinterp.audit.explainers.controls.training_record", lambda model: {"controls": said})
    limits = Thresholds(faithfulness=(0.9, 0.5, 0.1))
    said = {"again": "phantom-clip"}
    audit_section(model, data, data.targets["finding"], [], 2, 0, limits)
    said = {"again": "is not there"}
    audit_section(model, data, data.targets["finding"], [], 2, 0)
    (given, controls), (default, none) = seen
    assert given is limits and default is None
    assert controls.again.label == "phantom-clip" and controls.permuted is None
    assert none == Controls() and "is not there" in caplog.text


def test_a_classifier_is_graded_without_a_prompt_and_no_other_model_is(made):
    """A classifier reads no prompt: what cannot be tested keeps no grade from it. A dual encoder must pass it."""
    row = {"method": "occlusion", "circular": [], "F": 0.9, "R_excess": 0.01}
    row |= {"randomisation_verdict": "pass", "prompt_randomisation_verdict": "not tested"}
    row["ci95"] = {"F": [0.85, 0.95], "R_excess": [0.0, 0.02]}
    curves, classifier = Measured(0.9, (0.8, 1.0)), replace(made, model=HookedVLM(*tiny("vit")))
    assert graded(classifier, row, curves).grade == "A"
    assert graded(classifier, row | {"randomisation_verdict": "fail"}, curves).grade == "D"
    assert graded(made, row, curves).grade == "NOT GRADED"


def test_audit_reads_its_thresholds_before_anything_else(tmp_path, capsys):
    """A file that is none ends in one line that names it; a good one stands in the settings."""
    file = tmp_path / "limits.json"
    file.write_text('{"curves": [1]}')
    assert main(["audit", "no-such-model", "--thresholds", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "limits.json" in capsys.readouterr().err
    file.write_text('{"curves": [0.5, 0.4, 0.3]}')
    found = settings_of(file).grades
    assert found is not None and found.curves == (0.5, 0.4, 0.3) and settings_of(None).grades is None
