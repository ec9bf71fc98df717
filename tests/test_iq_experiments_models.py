"""IQ experiments on models that ship, and iq-sanity: known maps get known answers, and claims can come out false."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mechinterp.audit.defaults import default_data
from mechinterp.audit.dictionary import dictionary_of
from mechinterp.errors import UsageError
from mechinterp.experiments import multimodal_report, run_experiment
from mechinterp.experiments.iq_multimodal import _hardened, separate_rbp
from mechinterp.experiments.iq_sanity import Likeness, another_dictionary, memorised, pooled
from mechinterp.experiments.iq_study import Study
from mechinterp.experiments.main_shortcut import (
    Shown,
    least_p,
    needed,
    shortcut_claims,
    shortcut_rows,
    shortcut_table,
)
from mechinterp.experiments.multimodal_report import APART, COPIES, JOINT, KINDS, ONE, PAIR
from mechinterp.experiments.sanity_report import ALL, ON_TOYS, _drawn, report
from mechinterp.explain.question import Part, Question
from mechinterp.metrics.sanity import judge
from mechinterp.models import HookedVLM
from mechinterp.storage import verify_folder


def bare(kind, **fields):
    """A record with some of its fields only."""
    made = object.__new__(kind)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Each experiment's quick version, run once: its result and what it wrote."""
    done = {}

    def of(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name) / "out"
            result = run_experiment(name, folder, quick=True)
            assert verify_folder(folder) == []
            done[name] = result, json.loads((folder / "result.json").read_text()), (folder / "table.md").read_text()
        return done[name]

    return of


def test_maps_that_no_model_made_are_the_same_for_every_network(quick):
    """Edges and noise of one seed do not know the network: they fail where maps must change and pass where not."""
    result, _, table = quick("iq-sanity")
    toys = [row for row in result.rows if "model" not in row.of]
    found = {(row.of["explainer"], row.of["other"]): (row.value, row.of["verdict"]) for row in toys}
    for other, verdict in (
        ("random weights", "fail"),
        ("permuted labels", "fail"),
        ("trained again", "pass"),
        ("other architecture", "pass"),
    ):
        assert found["random", other] == (pytest.approx(1), verdict)
    assert not any(name in claim.evidence for claim in result.claims for name in ("random,", "oracle")), "anchors"
    assert "*random*" in table and "1.00 [1.00, 1.00] fails" in table
    own = [value for (method, other), (value, _) in found.items() if method == "lime" and other == "random weights"]
    assert own[0] < 0.9


def test_a_medical_model_is_held_beside_its_controls(quick):
    """Noise of one seed and edges know no model; findings together are the mean of the findings."""
    result, _, table = quick("iq-sanity")
    rows = [row for row in result.rows if row.of.get("model") == "phantom-clip"]
    by = {(row.of["finding"], row.of["explainer"], row.of["other"]): row for row in rows}
    kinds = ("random weights", "permuted labels", "trained again", "other architecture", "trained on")
    for method in ("edges", "random"):
        for kind, verdict in zip(kinds, ("fail", "fail", "pass", "pass", "pass"), strict=True):
            row = by["all findings", method, kind]
            assert (row.value, row.of["verdict"]) == (pytest.approx(1), verdict)
    for kind in kinds:
        one, together = (
            by["consolidation", "gradient_times_input", kind],
            by["all findings", "gradient_times_input", kind],
        )
        assert one.value == together.value < 0.9 and one.of["baseline"] == together.of["baseline"]
    claims = [claim for claim in result.claims if "of phantom-clip" in claim.claim]
    assert len(claims) == 5 and all("of 1 do" in claim.evidence for claim in claims), "anchors are not counted"
    assert "phantom-clip, all findings" in table


def test_findings_are_held_together_by_image():
    one = Likeness(np.array([0.1, 0.3]), 0.2, ("a", "b"))
    other = Likeness(np.array([0.8]), 0.5, ("a",))
    together = pooled([one, other])
    assert together.values.tolist() == [0.1, 0.3, 0.8] and together.patients == ("a", "b", "a")
    assert together.baseline == pytest.approx(0.35)


def test_coin_flips_are_learnt_by_heart_and_by_nothing_else():
    assert memorised(3, count=24, steps=400)[1] == 1
    assert memorised(3, count=24, steps=1)[1] < 0.9


def test_the_main_table_says_what_was_not_tested(quick):
    result, written, table = quick("iq-main")
    assert written["quick"] and "cxr-clip on real radiographs: NOT TESTED" in table
    models = {row["model"] for row in written["rows"] if "model" in row}
    assert models == {"phantom-clip-shortcut"}
    methods = {row["explainer"] for row in written["rows"] if row["name"] == "F"}
    assert methods == {"gradient_times_input", "grad_cam", "random"}
    assert any(claim.claim.startswith("an injected corner patch raises R") for claim in result.claims)
    with pytest.raises(UsageError, match="takes no data"):
        run_experiment("iq-sanity", "unused", data=Path("x"))


def shown(images, twin, clean, spread=0.5, methods=14):
    """Masses of methods around `twin` and `clean` (1 is chance), and of an anchor at chance."""
    rng = np.random.default_rng(0)
    patients = tuple(f"p{i}" for i in range(images))

    def of(middle):
        mass = {f"method {i}": middle + spread * rng.uniform(-1, 1, images) for i in range(methods)}
        return Shown(mass | {"noise": np.ones(images)}, patients, frozenset({"noise"}))

    return {"toy-shortcut": of(twin), "toy": of(clean)}


@pytest.mark.parametrize(
    ("images", "twin", "clean", "lies", "tells", "tested"),
    [
        (24, 8.0, 2.0, True, True, True),
        (24, 8.0, 8.0, True, False, True),
        (24, 1.0, 1.0, False, False, True),
        (6, 8.0, 2.0, False, False, False),
    ],
)
def test_a_shortcut_is_shown_only_where_a_paired_test_with_power_says_so(images, twin, clean, lies, tells, tested):
    """Above chance and above the clean model's, paired and Holm-corrected; with 6 images no claim can hold."""
    chance, difference = shortcut_claims(shown(images, twin, clean), "drain")
    assert (chance.holds, difference.holds) == (lies, tells)
    for claim in (chance, difference):
        assert ("NOT TESTED" in claim.evidence) is not tested and "noise" not in claim.evidence
        assert tested or "with 6 images no p after Holm is below 0.44; 10 would do" in claim.evidence


def test_the_least_p_is_that_of_signs_which_all_agree():
    """Two of 2^n sign patterns are as extreme, times the number of methods in Holm's first step."""
    assert least_p(6, 11) == pytest.approx(11 * 2 / 64) and least_p(1, 3) == 1
    assert needed(14) == 10 and least_p(10, 14) < 0.05 <= least_p(9, 14)


def test_one_method_that_does_not_tell_the_twin_makes_the_claim_false_and_the_table_says_which():
    """The claim is of every explainer; rows hold each difference with its p."""
    found = shown(24, 8.0, 2.0)
    found["toy-shortcut"].mass["method 3"][:] = found["toy"].mass["method 3"]
    _, difference = shortcut_claims(found, "drain")
    assert not difference.holds and difference.evidence.startswith("13 of 14 do, 0 the opposite")
    rows = {r.of["explainer"]: r for r in shortcut_rows(found, "drain") if "p" in r.of}
    assert rows["method 3"].of["p"] == 1 and rows["method 4"].of["p"] < 0.05 and rows["method 4"].n == 24
    table = shortcut_table(found, "drain")
    assert table is not None and [line[-1] for line in table.lines if line[0] in ("method 3", "*noise*")] == [
        "1.000",
        "",
    ]


def test_relevance_on_the_shortcut_is_of_images_that_have_one(quick):
    """iq-main measures it on images with a drain only, as many for each method."""
    _, written, _ = quick("iq-main")
    rows = [row for row in written["rows"] if row["name"] == "mass drain, images with one"]
    assert {row["explainer"] for row in rows} == {"gradient_times_input", "grad_cam", "random"}
    by = {row["explainer"]: row for row in rows}
    assert by["random"]["n"] == by["gradient_times_input"]["n"] == 8


def test_both_at_once_costs_fewer_explanations_and_is_counted(quick):
    result, written, _ = quick("iq-multimodal")
    cost = {row["variant"]: row["value"] for row in written["rows"] if row["name"] == "cost"}
    assert set(cost) == {"plain", *KINDS} and cost["plain"] == 1
    assert any("phantom-clip" in claim.claim for claim in result.claims)
    asked = {(row["explainer"], row["variant"]) for row in written["rows"] if row["name"] == "R"}
    assert {kind for method, kind in asked if method == "gradient_times_input"} == {"plain", *KINDS}
    assert {kind for method, kind in asked if method == "integrated_gradients"} == {"plain", ONE}


def test_what_rbp_costs_is_claimed_for_a_number_of_perturbations():
    """Three explanations are three: 3.04 is more, and the claim names its perturbations."""
    cost = {("lime", "plain"): 1.0, ("lime", JOINT): 3.8, ("lime", PAIR): 3.04, ("lime", ONE): 2.5, ("ig", ONE): 3.0}
    found = multimodal_report.Found(Study(), {}, cost, {})
    claims = {kind: multimodal_report._cost_claim("toy", found, kind, n) for kind, n in COPIES.items()}
    assert {kind: claim.holds for kind, claim in claims.items()} == {JOINT: False, PAIR: False, ONE: True}
    assert "(3 perturbations)" in claims[JOINT].claim and "(1 perturbation)" in claims[ONE].claim
    assert claims[ONE].evidence == "lime 2.50; ig 3.00 (in CPU time; by count 2)"


@pytest.mark.parametrize(("kind", "rows"), [(APART, 7), (JOINT, 4), (PAIR, 3), (ONE, 2)])
def test_explanations_of_each_kind_of_rbp(kind, rows):
    """1 + 3 + 3 for each modality by itself, 1 + 3 for both at once, 1 + 2 for a pair, 1 + 1 for one perturbation."""
    parts = tuple(
        Part("column", torch.ones(4, 2), torch.zeros(4, 2), torch.tensor([2 * i, 2 * i + 1])) for i in range(2)
    )
    asked = []

    def explain(question, _generator):
        asked.append(len(question))
        return torch.cat(question.values, 1)

    _hardened(explain)[kind](Question(parts, lambda values: values[0].sum(1), 4, tuple("abcd")), torch.Generator())
    assert sum(asked) == 4 * rows


def test_a_part_is_hardened_by_its_own_perturbations_alone():
    """The map of the first part follows its values and that of the second is fixed: nothing of the second shrinks."""
    parts = tuple(
        Part("column", torch.rand(4, 2, generator=torch.Generator().manual_seed(i)) + 1, torch.zeros(4, 2),
             torch.tensor([2 * i, 2 * i + 1]))
        for i in range(2)
    )  # fmt: skip
    question = Question(parts, lambda values: values[0].sum(1), 4, tuple("abcd"))

    def explain(asked, _generator):
        return torch.cat([asked.values[0], torch.ones(len(asked), 2)], 1)

    plain = explain(question, None)
    hardened = separate_rbp(explain)(question, torch.Generator().manual_seed(0))
    kept = hardened / (plain / plain.sum(1, keepdim=True))  # RBP scales to sum 1 first
    assert torch.allclose(kept[:, 2:], torch.ones(4, 2)) and (kept[:, :2] < 0.9999).all()


def test_what_only_one_method_was_held_beside_stands_in_the_table_and_has_no_panel():
    check = judge("t", "spearman_abs", np.full(6, 0.7), 0.2, [str(i) for i in range(6)], "above")
    both = dict.fromkeys(("trained again", "random weights"), check)
    checks = {"sae_maps": {**both, "another dictionary": check}, "lime": both}
    toys = {"lime": dict.fromkeys(ON_TOYS, check)}
    made = report(toys, {"a model": {ALL: checks}}, {"": [1.0]})
    table = next(t for t in made.tables if "a model" in t.title)
    assert table.header[-1] == "another dictionary" and [line[-1] for line in table.lines] == ["0.70 [0.70, 0.70]", ""]
    claim = next(c for c in made.claims if "another dictionary" in c.claim)
    assert claim.holds and claim.evidence.startswith("1 of 1 do")
    assert _drawn(checks) == ["trained again", "random weights"]


def test_another_dictionary_is_of_the_same_kind_and_place_and_not_the_same():
    model = HookedVLM.from_pretrained("phantom-clip")
    own, _ = dictionary_of(model, default_data(64), 0)
    own.dictionary.info["data"]["images"], own.dictionary.info["config"]["epochs"] = 64, 1  # type: ignore[attr-defined]
    other = another_dictionary(model, own, 1)
    assert (other.reads, other.writes) == (own.reads, own.writes)
    assert other.dictionary.W_dec.shape == own.dictionary.W_dec.shape
    assert other.dictionary.info["tokens"] == own.dictionary.info["tokens"]  # type: ignore[attr-defined]
    alike = torch.nn.functional.cosine_similarity(other.dictionary.W_dec, own.dictionary.W_dec).abs()
    assert alike.mean() < 0.5  # latent by latent, they have nothing to do with one another
