"""A stranger's model: a CLIP trained here and saved as a transformers folder without any dictionary is audited."""

from __future__ import annotations

import json

import pytest

from mechinterp.audit import dictionary as dictionaries
from mechinterp.cli import main
from mechinterp.storage import verify_folder
from tests.audit_toys import trained_clip, write_cohort


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """(model folder, data folder): a CLIP that was trained where the mark goes with the finding."""
    root = tmp_path_factory.mktemp("stranger")
    model = trained_clip(0.8, seed=5)
    model.hf.save_pretrained(root / "model")
    model.processor.save_pretrained(root / "model")
    return root / "model", write_cohort(root / "data", seed=7)


def untimed(record):
    """The record without what a clock measured."""
    kept = {k: v for k, v in record.items() if k != "seconds"}
    return kept | {"explainers": [{k: v for k, v in row.items() if k != "seconds"} for row in record["explainers"]]}


def audited(stranger, out, capsys):
    folder, data = stranger
    assert main(["audit", str(folder), "--data", str(data), "--out", str(out)]) == 0, capsys.readouterr().err
    return json.loads((out / "audit.json").read_text()), capsys.readouterr().out


def test_a_folder_without_dictionaries_is_audited_and_its_dictionary_is_kept(stranger, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dictionaries, "STEPS", 500)
    record, said = audited(stranger, tmp_path / "first", capsys)
    mark = next(row for row in record["shortcuts"] if row["candidate"] == "mark")
    assert mark["verdict"] == "FAIL" and mark["features"], mark["reason"]
    assert mark["causal_effect"] > 0.25 and mark["harm_auroc_gap"] > 0.05
    assert record["dictionary"]["source"].startswith("trained for this audit") and "report:" in said
    assert verify_folder(tmp_path / "first") == []
    by_method = {row["method"]: row for row in record["explainers"]}
    assert by_method["echo"]["R"] == pytest.approx(1, abs=1e-4)
    assert by_method["edges"]["randomisation_verdict"] == "fail"
    assert (tmp_path / "first" / "figures" / "maps.png").is_file()
    assert not list(stranger[0].rglob("dictionaries")), "a user's model folder stays as it was"

    kept = sorted(p for p in (tmp_path / "cache" / "dictionaries").rglob("*") if p.is_file())
    times = {path: path.stat().st_mtime_ns for path in kept}
    again, _ = audited(stranger, tmp_path / "second", capsys)
    assert times and times == {path: path.stat().st_mtime_ns for path in times}, "trained again instead of kept"
    assert untimed(again) == untimed(record)


def test_the_iq_command_prints_the_numbers_of_the_audit(stranger, tmp_path, monkeypatch, capsys):
    """Same images, draws and seed: what `mechinterp iq` writes for a method is what the audit's section says."""
    from mechinterp.audit import audit
    from mechinterp.audit.settings import Settings
    from mechinterp.data import open_data
    from mechinterp.models import HookedVLM

    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dictionaries, "STEPS", 200)
    folder, data = stranger
    command = ["iq", str(folder), "--data", str(data), "--images", "2", "--methods", "occlusion,random"]
    assert main([*command, "--out", str(tmp_path / "iq")]) == 0, capsys.readouterr().err
    assert "occlusion" in capsys.readouterr().out and verify_folder(tmp_path / "iq") == []
    said = (tmp_path / "iq" / "table.md").read_text()
    assert f"--images 2 --data {data} --methods occlusion,random`" in said, "the command that makes this table again"
    rows = json.loads((tmp_path / "iq" / "iq.json").read_text())["explainers"]
    settings = Settings(draws=200, random_sets=100, joint_sets=20, explainer_images=2)
    made = audit(HookedVLM.from_pretrained(folder), open_data(data), out=tmp_path / "audit", settings=settings)
    said = {row["method"]: row for row in made.record["explainers"]}
    for row in rows:
        for score in ("R", "F", "IS", "R_null", "R_excess", "coverage", "randomisation", "prompt_randomisation"):
            assert said[row["method"]][score] == pytest.approx(row[score], rel=1e-5), score
    assert main([*command[:-1], "nope", "--out", str(tmp_path / "no")]) == 2
    assert "no method 'nope'" in capsys.readouterr().err and not (tmp_path / "no").exists()
