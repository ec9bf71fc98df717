"""The audit says FAIL for a model that was trained on a shortcut, and not for its clean twin."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from mechinterp.audit import Settings, audit, standing
from mechinterp.audit import dictionary as dictionaries
from mechinterp.audit.ablation import ablation_table
from mechinterp.audit.candidates import Candidate, Observed, gap_beside, observe
from mechinterp.audit.causal import Causal, Harm, Trial
from mechinterp.audit.defaults import default_data
from mechinterp.audit.evidence import Evidence
from mechinterp.audit.probe import logistic_scores
from mechinterp.audit.shortcuts import Case, _causal_p, _hold_the_lead_equal
from mechinterp.audit.standing import Standing, stands_for
from mechinterp.audit.verdicts import rule, worst
from mechinterp.data import Attribute, open_data
from mechinterp.errors import DataError, UsageError
from mechinterp.metrics.contingency import OddsRatio
from mechinterp.metrics.statistics import PatientBootstrap
from mechinterp.models import HookedVLM
from mechinterp.storage import verify_folder
from mechinterp.types import Placed
from saes import TopKConfig, untrained
from tests.audit_toys import trained_clip, write_cohort
from tests.tiny_models import tiny

QUICK = Settings(draws=500, random_sets=300, explainer_images=0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache for all audits of this file, and a short training of the dictionaries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MECHINTERP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(dictionaries, "STEPS", 500)
        yield


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return open_data(write_cohort(tmp_path_factory.mktemp("toy") / "data"))


@pytest.fixture(scope="module")
def shortcut_model():
    return trained_clip(0.8)


@pytest.fixture(scope="module")
def verdicts(cache, cohort, shortcut_model, tmp_path_factory):
    """Audits of the model that leans on the mark, and of its clean twin on as many images and on three times more."""
    out, clean = tmp_path_factory.mktemp("out"), trained_clip(0.0)
    many = open_data(write_cohort(tmp_path_factory.mktemp("many") / "data", n=1440))
    return {
        "shortcut": audit(shortcut_model, cohort, out=out / "shortcut", settings=QUICK),
        "clean": audit(clean, many, out=out / "clean", settings=QUICK),
        "clean, few images": audit(clean, cohort, out=out / "few", settings=QUICK),
    }


def row_of(result, candidate):
    return next(row for row in result.record["shortcuts"] if row["candidate"] == candidate)


def test_a_planted_shortcut_fails_and_its_features_look_at_the_mark(verdicts):
    row = row_of(verdicts["shortcut"], "mark")
    assert row["verdict"] == "FAIL", row["reason"]
    assert row["causal_effect"] > 0.25 and row["causal_ci95"][0] > 0 and row["causal_p"] < 0.05
    assert row["harm_auroc_gap"] > 0.05 and row["detectable_auroc"] > 0.95
    assert row["removed_share_ci95"][0] > 0.5 > abs(row_of(verdicts["shortcut"], "sex=M")["removed_share"] or 0.0)
    cards = {card["id"]: card for card in verdicts["shortcut"].record["features"]}
    named = [cards[feature] for feature in row["features"] if feature in cards]
    assert named and all(card["best_attribute"] == "mark" for card in named)
    assert verdicts["shortcut"].record["questions"][0]["verdict"] == "FAIL"


def test_the_clean_twin_does_not_fail(verdicts):
    for row in verdicts["clean"].record["shortcuts"]:
        assert row["verdict"] != "FAIL", row["reason"]
    assert row_of(verdicts["clean"], "mark")["verdict"] == "PASS"


def test_a_clean_model_is_not_cleared_without_power(verdicts):
    """The mark's features hold little of it: that removing them moves nothing is no PASS, nor is a wide score gap."""
    row = row_of(verdicts["clean, few images"], "mark")
    assert row["verdict"] == "NOT TESTED" and "do not stand for it" in row["reason"]
    assert abs(row["causal_effect"]) < 0.25 and row["removed_share_ci95"][0] < 0.5 and row["detectable_gap"] > 0.25
    power = verdicts["clean, few images"].record["questions"][-1]
    assert power["verdict"] == "CONCERN" and f"{row['detectable_gap']:.2f}" in power["answer"]


def test_attributes_that_nothing_depends_on_do_not_fail(verdicts):
    for row in verdicts["shortcut"].record["shortcuts"]:
        if row["candidate"] != "mark":
            assert row["verdict"] != "FAIL", row


def test_audit_json_holds_what_the_interface_promises(verdicts):
    result = verdicts["shortcut"]
    record = json.loads((result.folder / "audit.json").read_text())
    assert record["schema_version"] == 1
    assert {"id", "family", "sha256"} <= set(record["model"]) and {"id", "images", "patients", "sha256"} <= set(
        record["data"]
    )
    assert [row["group"] for row in record["performance"][:2]] == ["overall", "metadata_only"]
    for row in record["shortcuts"]:
        assert {
            *("candidate", "kind", "features", "present", "detectable_auroc", "association_odds_ratio", "used_share"),
            *("causal_effect", "causal_ci95", "causal_p", "harm_auroc_gap", "verdict", "reason"),
        } <= set(row)
    for card in record["features"]:
        wanted = {"id", "site", "name", "name_score", "frequency", "seed_stability", "best_attribute", "f1", "f1_null"}
        assert wanted <= set(card)
    for name in ("target", "seed", "versions", "seconds", "graph", "explainers", "power", "truth", "not_tested"):
        assert name in record
    assert all({"what", "why"} == set(entry) for entry in record["not_tested"])
    assert record["cautions"] == []
    assert verify_folder(result.folder) == []
    assert (result.folder / "figures" / "shortcuts.png").exists()


def test_one_seed_gives_one_record(verdicts, cohort, shortcut_model, tmp_path):
    again = audit(shortcut_model, cohort, out=tmp_path, settings=QUICK)
    first = (verdicts["shortcut"].folder / "audit.json").read_text()
    records = [json.loads(text) for text in (first, (again.folder / "audit.json").read_text())]
    for record in records:
        record.pop("seconds")
    assert records[0] == records[1]
    for name in ("shortcuts.png", "performance.png"):
        assert (again.folder / "figures" / name).read_bytes() == (
            verdicts["shortcut"].folder / "figures" / name
        ).read_bytes()


def test_without_metadata_nothing_passes(cache, shortcut_model, tmp_path):
    data = open_data(write_cohort(tmp_path / "bare", columns=()))
    record = audit(shortcut_model, data, out=tmp_path / "out", settings=QUICK).record
    assert [row for row in record["shortcuts"] if row["kind"] == "attribute"] == []
    lines = {line["question"]: line["verdict"] for line in record["questions"]}
    assert lines["Does the model lean on a shortcut?"] == "NOT TESTED"
    assert lines["Does it find the target better than metadata alone would?"] == "NOT TESTED"
    assert lines["Does it serve every group alike?"] == "NOT TESTED"
    assert record["performance"][1] == {"group": "metadata_only", "n": 0, "auroc": None, "ci95": [None, None]}
    missing = [entry for entry in record["not_tested"] if "metadata has no such column" in entry["why"]]
    assert len(missing) == 2


def test_wrong_use_is_refused(cohort, shortcut_model, tmp_path):
    with pytest.raises(UsageError, match="no target 'edema'"):
        audit(shortcut_model, cohort, target="edema", out=tmp_path)
    with pytest.raises(DataError, match="test patients do not hold both values"):
        audit(shortcut_model, cohort.subset(cohort.split != "test"), out=tmp_path)


# ---------------------------------------------------------------------------------------------- the rule itself


def seen(gap=0.0, reach=0.1, cell=30):
    return Observed(0.5, OddsRatio(1.0, (0.5, 2.0)), 0.8, gap, (gap - reach, gap + reach), cell)


def found(effect=1.0, reach=0.1):
    return Causal(effect, (effect - reach, effect + reach), effect, 0.001, (-0.1, 0.1), 300, 0.1, np.zeros(3))


def hurt(gap=0.2, reach=0.05):
    return Harm(0.9, 0.9 - gap, gap, (gap - reach, gap + reach), 0.0, gap, (gap - reach, gap + reach))


def stands(share=0.8, reach=0.1):
    return Standing(share, (share - reach, share + reach))


def verdict(observed, causal, harmed, p=0.001, kind="acquisition", gap_p=0.001, standing=None):
    return rule(kind, observed, gap_p, causal, p, harmed, standing or stands(), Settings()).verdict


def test_every_verdict_has_its_reasons():
    assert verdict(seen(1.5), found(), hurt()) == "FAIL"
    assert verdict(seen(1.5), found(), hurt(0.04)) == "CONCERN"  # below the line of harm
    assert verdict(seen(1.5), found(), hurt(0.2, 0.3)) == "CONCERN"  # harm with an interval that holds 0
    assert verdict(seen(-1.5), found(), hurt()) == "CONCERN"  # the features push against what is seen
    assert verdict(seen(8.0), found(), hurt()) == "CONCERN"  # they account for an eighth of it
    assert verdict(seen(1.5), found(), hurt(), kind="finding") == "CONCERN"
    assert verdict(seen(0.0), found(0.1), hurt(), gap_p=0.9) == "PASS"
    assert verdict(seen(0.0), found(0.1, 0.4), hurt(), gap_p=0.9) == "NOT TESTED"  # too wide to say
    assert verdict(seen(0.0), found(), hurt(), p=0.2, gap_p=0.9) == "NOT TESTED"  # large, but as random sets are
    assert verdict(seen(1.5), found(), hurt(), p=0.4) == "CONCERN"  # random sets do it too; still seen
    assert verdict(seen(1.5, cell=3), found(), hurt()) == "NOT TESTED"
    assert verdict(seen(0.0), None, None, gap_p=0.9) == "PASS"
    assert verdict(seen(0.0, 0.5), None, None, gap_p=0.9) == "NOT TESTED"
    assert verdict(seen(0.6), None, None) == "CONCERN"
    assert verdict(seen(float("nan"), cell=0), None, None, gap_p=float("nan")) == "NOT TESTED"
    assert worst([]) == "NOT TESTED" and worst(["PASS", "NOT TESTED"]) == "NOT TESTED"


def test_features_clear_an_attribute_as_far_as_they_stand_for_it():
    """A small effect is no PASS where the removal left the attribute there, unless the score itself shows no gap."""
    weak, nothing, unsure = stands(0.05), Standing(float("nan"), (float("nan"), float("nan"))), stands(0.9, 0.5)
    for shares in (weak, nothing, unsure):
        assert verdict(seen(0.0, 0.5), found(0.05, 0.05), hurt(), gap_p=0.9, standing=shares) == "NOT TESTED"
        assert verdict(seen(0.0), found(0.05, 0.05), hurt(), gap_p=0.9, standing=shares) == "PASS"
    assert verdict(seen(0.0, 0.5), found(0.05, 0.05), hurt(), gap_p=0.9) == "PASS"
    # [0.10, 0.20] of 70 % is up to 0.29 of the whole
    assert verdict(seen(0.0, 0.5), found(0.15, 0.05), hurt(), gap_p=0.9) == "NOT TESTED"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_taken_out_is_what_was_taken_out(share, monkeypatch):
    """Embeddings that lose a known share of an attribute's direction: the probe, fitted on others, reads that share."""
    rng = np.random.default_rng(1)
    n, d = 600, 12
    value, label = rng.integers(0, 2, (2, n)).astype(float)
    direction = rng.normal(size=d)
    embedding = rng.normal(size=(n, d)) + np.outer(label, rng.normal(size=d)) + np.outer(value, direction)
    test = np.arange(n) >= 300
    evidence = Mock(spec=Evidence, test=test, embedding=embedding)
    rows = np.flatnonzero(test)
    bootstrap = PatientBootstrap.of(rows.astype(str), draws=300, seed=0)
    trial = Mock(spec=Trial, position=rows, labels=label[rows], bootstrap=bootstrap)
    taken = embedding[rows] - share * np.outer(value[rows], direction)
    monkeypatch.setattr(standing, "_without", lambda trial, features: taken)
    told = stands_for(trial, Candidate(Attribute("drain", "drain", "acquisition", value), value), (1,), evidence)
    assert abs(told.share - share) < 0.1 and told.ci95[0] <= told.share <= told.ci95[1]
    assert told.enough is (share == 1.0)
    still = Candidate(Attribute("never", "never", "acquisition", 0 * value), 0 * value)
    assert np.isnan(stands_for(trial, still, (1,), evidence).share)


def test_the_other_gaps_are_taken_with_the_lead_held_equal():
    """What the score follows is no noise for the rest: an attribute that plays no part has a far narrower interval."""
    rng = np.random.default_rng(0)
    n = 600
    drain, sex, label = rng.integers(0, 2, (3, n)).astype(float)
    score = 1.5 * drain + label + 0.2 * rng.normal(size=n)
    known = {"test": np.ones(n, bool), "labels": label, "score": score, "sd": 1.0, "embedding": rng.normal(size=(n, 2))}
    evidence = Mock(spec=Evidence, **known)
    bootstrap = PatientBootstrap.of(np.arange(n).astype(str), draws=500, seed=0)
    cases = [
        Case(Candidate(Attribute(name, name, "acquisition", values), values), ())
        for name, values in (("sex", sex), ("drain", drain))
    ]
    before = [observe(case.candidate, evidence, bootstrap, Settings()) for case in cases]
    for case, observed in zip(cases, before, strict=True):
        case.observed = observed
    _hold_the_lead_equal(cases, evidence, bootstrap, Settings())
    sex_now, drain_now = (case.observed for case in cases)
    assert sex_now and sex_now.beside == "drain" and sex_now.gap_error < before[0].gap_error / 3
    assert drain_now is before[1]


def test_a_gap_that_another_attribute_explains_is_taken_again_beside_it():
    """hospital goes with the drain, the score follows the drain alone: no gap of the hospital is left beside it."""
    rng = np.random.default_rng(0)
    n = 800
    drain, label = rng.integers(0, 2, (2, n)).astype(float)
    hospital = np.where(rng.random(n) < 0.75, drain, 1 - drain)
    score = 1.0 * drain + label + 0.3 * rng.normal(size=n)
    evidence = Mock(spec=Evidence, test=np.ones(n, bool), labels=label, score=score, sd=1.0)
    bootstrap = PatientBootstrap.of(np.arange(n).astype(str), draws=500, seed=0)
    there = [
        Candidate(Attribute(name, name, "acquisition", values), values)
        for name, values in (("hospital", hospital), ("drain", drain))
    ]
    plain = replace(seen(0.5), score_gap=0.5)
    left = gap_beside(there[0], there[1], plain, evidence, bootstrap, Settings())
    assert left.beside == "drain" and left.score_gap_ci95[0] < 0 < left.score_gap_ci95[1] and abs(left.score_gap) < 0.1
    kept = gap_beside(there[1], there[0], plain, evidence, bootstrap, Settings())
    assert kept.score_gap > 0.9, "what the score does follow stays"
    few = Mock(spec=Evidence, test=np.arange(n) < 40, labels=label, score=score, sd=1.0)
    assert gap_beside(there[0], there[1], plain, few, bootstrap, Settings()) is plain


def test_removal_together_decides_where_it_was_measured():
    """Features that stand in for one another: nothing one by one (p = 0.8), much together (p = 0.003)."""
    case = Case(Mock(spec=Candidate), (1, 2), causal=replace(found(), p=0.8))
    assert _causal_p(case) == 0.8
    case.together_p = 0.003
    assert _causal_p(case) == 0.003
    assert np.isnan(_causal_p(Case(Mock(spec=Candidate), ())))


def test_the_probe_is_scikit_learns():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 12)), rng.integers(0, 2, 200)
    x = (x - x.mean(0)) / x.std(0)
    peer = LogisticRegression(C=0.1, tol=1e-10, max_iter=1000).fit(x, y)
    assert np.allclose(logistic_scores(x, y, x[:50]), peer.decision_function(x[:50]), atol=1e-4)
    x[:3, 0] = np.nan
    assert np.isfinite(logistic_scores(x, y, x)).all()


def test_the_model_is_left_as_it_was(verdicts, shortcut_model):
    assert not shortcut_model.hooked()
    assert torch.is_grad_enabled() and Path(verdicts["shortcut"].folder).is_dir()


# --------------------------------------------------------------------------- other families, other data, ablation


def untrained_at(model, site):
    """A random dictionary: enough to see that every step works where no training is at stake."""
    config = TopKConfig(k=8, width=160)
    return Placed.sae(untrained(config, model.d_model("vision"), 0, torch.zeros(model.d_model("vision"))), site)


@pytest.mark.parametrize("family", ["siglip", "llava"])
def test_other_families_and_mixed_sizes_go_all_the_way(family, cohort, tmp_path):
    hf, processor = tiny(family)
    model = HookedVLM(hf, processor, name=family)
    mixed = cohort.subset(range(0, 200))
    for i, file in enumerate(mixed.images):  # a third of the images come larger, and not square
        if i % 3 == 0:
            (tmp_path / "images").mkdir(exist_ok=True)
            Image.open(cohort.root / file).resize((48, 40)).save(tmp_path / file)
        else:
            (tmp_path / "images").mkdir(exist_ok=True)
            (tmp_path / file).write_bytes((cohort.root / file).read_bytes())
    lines = (cohort.root / "metadata.csv").read_text().splitlines()[:201]
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "dataset.json").write_text((cohort.root / "dataset.json").read_text())
    placed = untrained_at(model, "vision.blocks.0.hook_resid_post")
    result = audit(model, open_data(tmp_path), out=tmp_path / "out", placed=placed, settings=QUICK)
    assert any("sizes were resized" in note for note in result.record["data"]["notes"])
    assert result.verdict("mark") in ("FAIL", "CONCERN", "PASS", "NOT TESTED")
    assert (result.folder / "report.html").stat().st_size < 25e6


def test_ablation_table_agrees_with_the_audit_cache(verdicts, cohort, shortcut_model, cache, tmp_path):
    row = row_of(verdicts["shortcut"], "mark")
    text = ablation_table(shortcut_model, cohort, row["features"][:3], out=tmp_path)
    assert "100 matched random sets" in text and "AUROC" in text
    written = json.loads((tmp_path / "ablation.json").read_text())
    assert written["features"] == sorted(row["features"][:3], key=lambda f: int(f.rpartition(":")[2]))
    with pytest.raises(UsageError, match="no dictionary at"):
        ablation_table(shortcut_model, cohort, ["vision.blocks.0.hook_resid_post:1"], out=tmp_path)


def test_default_phantom_has_truth_and_full_cells(cache):
    data = default_data(images=40, seed=3)
    assert data.truth is not None and set(data.split) == {"train", "val", "test"}
    assert default_data(images=40, seed=3).sha256 == data.sha256
