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
    assert not list(stranger[0].rglob("dictionaries")), "a user's model folder stays as it was"

    kept = sorted(p for p in (tmp_path / "cache" / "dictionaries").rglob("*") if p.is_file())
    times = {path: path.stat().st_mtime_ns for path in kept}
    again, _ = audited(stranger, tmp_path / "second", capsys)
    assert times and times == {path: path.stat().st_mtime_ns for path in times}, "trained again instead of kept"
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in record.items() if k != "seconds"}
