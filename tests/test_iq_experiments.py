"""The IQ experiments: each quick version runs, bounds do what they say, and claims come out true and false."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from mechinterp.audit.defaults import default_data
from mechinterp.errors import UsageError
from mechinterp.experiments import iq_image, iq_main, iq_text, run_experiment
from mechinterp.experiments.iq_claims import Aim, averages, direction
from mechinterp.experiments.iq_judges import OWN_FILL, RBP_SAME, by, check_judges, left_out
from mechinterp.experiments.iq_multiverse import Multiverse, flips, rows_needed
from mechinterp.experiments.iq_references import References, explained_to, reference_claims, reference_tables
from mechinterp.experiments.iq_rows import judges_of
from mechinterp.experiments.iq_study import PLAIN, RBP, Difference, Study, Trial, arms, shuffled, trial, two_level
from mechinterp.experiments.iq_sweep import DEFAULT, GRID, scores_of
from mechinterp.experiments.iq_toys import explainers_for, toy_study
from mechinterp.explain.bounds import Check, bounded, capped, with_bounds
from mechinterp.explain.inject import Scale, injected
from mechinterp.explain.question import Part, Question
from mechinterp.explain.tabular import EXPLAINERS
from mechinterp.explain.tabular_questions import about_rows, of_rows
from mechinterp.metrics.iq import Measurement, iq
from mechinterp.metrics.iq.ask import effects_of, stage
from mechinterp.metrics.iq.measure import measure_rows
from mechinterp.storage import verify_folder

NAMES = ("iq-tabular", "iq-real-table", "iq-shapley-rbp", "iq-image", "iq-text", "iq-sweep")
ZERO = torch.zeros(6, dtype=torch.float64)


def product(x):
    """x1 sin(x2), and four columns without effect."""
    return x[:, 0] * torch.sin(x[:, 1])


def rows(n=40, seed=0):
    return torch.rand(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4 - 2


@pytest.mark.parametrize("name", NAMES)
def test_quick_versions_run_and_say_what_they_found(name, tmp_path):
    result = run_experiment(name, tmp_path / name, quick=True)
    assert verify_folder(tmp_path / name) == []
    written = json.loads((tmp_path / name / "result.json").read_text())
    assert written["quick"] and len(written["claims"]) >= 10
    assert len({claim.claim for claim in result.claims}) == len(result.claims), "every claim is made once"
    assert sum(row["value"] is not None for row in written["rows"]) > 100
    assert (tmp_path / name / "figure.png").read_bytes()[:4] == b"\x89PNG"


# -- bounds


def test_a_check_never_asks_for_the_whole_input_and_is_asked_once():
    seen = []

    def f(x):
        seen.append((x == 0).sum(1))
        return x.sum(1)

    question = about_rows(f, torch.ones(3, 6, dtype=torch.float64), ZERO)
    for seed in range(5):
        check = Check(contexts=4, kept=0.9, seed=seed)
        effect, error = check(question)
        assert torch.allclose(effect, torch.ones(3, 6).double()) and torch.allclose(error, torch.zeros(3, 6).double())
    assert 0 not in torch.cat(seen), "the whole input less one element is how F is scored"
    before = len(seen)
    assert check(question)[0] is effect and len(seen) == before
    with pytest.raises(UsageError, match="at least 2"):
        Check(contexts=1)


def test_a_check_can_fill_from_other_rows():
    question = about_rows(lambda x: x @ torch.arange(6.0).double(), rows(5), ZERO)
    other = rows(1, seed=3)
    effect, _ = Check((other,))(question)
    assert torch.allclose(effect, (question.values[0] - other) * torch.arange(6.0).double())


def test_bounds_keep_what_is_supported_and_move_what_is_not():
    effect, error = torch.tensor([[6.0, 3.0, 1.0]]), torch.tensor([[1.0, 0.5, 0.1]])
    inside = torch.tensor([[5.5, -3.5, 1.0]])
    assert torch.allclose(bounded(inside, effect, error), inside), "signs are the explainer's"
    outside = torch.tensor([[1.0, 1.0, 8.0]])  # shares .1 .1 .8 against [.4, .8] [.2, .4] [.08, .12]
    assert torch.allclose(bounded(outside, effect, error), torch.tensor([[4.0, 2.0, 1.2]]))
    assert torch.allclose(capped(outside, effect, error), torch.tensor([[1.0, 1.0, 1.2]]))
    assert torch.allclose(bounded(-50 * outside, effect, error), -50 * bounded(outside, effect, error))
    nothing = torch.zeros(1, 3)
    assert torch.equal(bounded(outside, nothing, nothing), outside)
    raised = bounded(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[-4.0, 4.0, 0.0]]), nothing)
    assert torch.allclose(raised, torch.tensor([[-0.5, 0.5, 0.0]])), "a 0 that must rise takes the effect's sign"


def test_bounds_turn_an_echo_into_its_check_and_leave_exact_values():
    question, check = about_rows(product, rows(), ZERO), Check()
    exact, echo = of_rows(EXPLAINERS["shapley"]), of_rows(EXPLAINERS["echo"])
    bench = stage(question, draws=6)

    def scored(explain):
        return iq(bench.measurement(bench.explain(explain)[0]))

    plain, held = scored(echo), scored(with_bounds(echo, check))
    assert np.nanmean(held.F_dist) > np.nanmean(plain.F_dist) + 0.3 and np.nanmean(held.R_null) < 0.1
    assert np.nanmean(scored(with_bounds(exact, check)).F_dist) > 0.99


# -- who judges


def test_no_trial_is_judged_by_what_the_explainers_remove_to():
    """The explainers' own reference is refused under any name, for any row, and as the silent default."""
    question = about_rows(product, rows(), ZERO)
    wanted = arms({"occlusion": of_rows(EXPLAINERS["occlusion"])}, (PLAIN,))
    one_row = rows(seed=4)
    one_row[7] = 0
    part = question.parts[0]
    for judges in (
        {},
        {"blur": question},
        {"training rows": about_rows(product, rows(), ZERO.clone())},
        {"some": replace(question, parts=(replace(part, reference=one_row),))},
        {"fine": about_rows(product, rows(), ZERO + 1), "own": question},
    ):
        with pytest.raises(UsageError, match="circular"):
            trial("here", question, wanted, judges, draws=3)


def test_a_part_that_keeps_the_explainers_fill_makes_a_judge_circular():
    """Patches by blur do not excuse words by the explainers' own fill; parts without elements may stay."""
    part = Part("column", torch.ones(3, 2), torch.zeros(3, 2), torch.arange(2))
    words = Part("column", torch.ones(3, 2), torch.zeros(3, 2), torch.arange(2) + 2)
    blurred = replace(part, reference=part.reference + 0.5)

    def asked(*parts):
        return Question(parts, lambda values: values[0].sum(1), 4, tuple("abcd"))

    with pytest.raises(UsageError, match="circular"):
        check_judges(asked(part, words), {"blur": asked(blurred, words)})
    still = replace(words, kind="still")
    check_judges(asked(part, still), {"blur": asked(blurred, still)})


def test_the_bundled_judges_of_images_are_not_the_explainers_fill():
    """iq-main's injection hands a judge of its own to every trial: with the explainers' fill it would not run."""
    seen = []

    def fake(_condition, question, wanted, judges, *_rest, **_more):
        check_judges(question, judges)
        seen.append(sorted(judges))
        return Trial("psi 0", {}, np.ones(len(question), bool))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iq_main, "trial", fake)
        size = replace(iq_main.QUICK, psi=(0.0,))
        iq_main._injection("phantom-clip", default_data(64), size, 0)
    assert seen == [["blur"]]
    toy = iq_image.toy_of(0, iq_image.QUICK)
    check_judges(toy.question, toy.judges)
    assert len(toy.judges) == 2, "two references a modality"


def test_explainers_have_a_second_reference_in_images_and_text():
    """What removes follows the second reference and what does not stays; who judges is held out from each."""
    asked = ("no injection", "no injection, explainers remove to {}")
    for toy in (
        iq_image.toy_of(0, iq_image.QUICK),
        iq_text.toy_of(iq_text.corpus(400, 0), 0, iq_text.QUICK),
    ):
        explainers = {n: m for n, m in explainers_for(toy.question).items() if n in ("occlusion", "grad_cam")}
        study = toy_study([toy], {asked[0]: None}, (), explainers, 3, 0, asked[:1])
        first, second = asked[0], asked[1].format(toy.second.name)
        assert list(study.trials) == [first, second] and toy.second.name not in study.trials[second][0].judges
        kept, moved = ({c: study.values((c, n, PLAIN), "R") for c in study.trials} for n in ("grad_cam", "occlusion"))
        assert np.array_equal(kept[first], kept[second], equal_nan=True)
        assert not np.allclose(moved[first], moved[second], equal_nan=True)


def test_the_table_of_references_names_who_judged():
    """R once, F and IS by each judge, with either reference; a higher R with the second one is claimed of it alone."""
    base, spur, second = "psi 0", "psi 1", "blur"
    study, n = Study(), 20
    rng = np.random.default_rng(0)
    for condition, r in (
        (base, 0.3),
        (spur, 0.3),
        (explained_to(base, second), 0.3),
        (explained_to(spur, second), 0.5),
    ):
        judges = ("grey", "others") if second in condition else ("blur", "others")
        of = {c: rng.normal(0.5, 0.01, n) for c in ("F_dist", "IS_p2", "IS_zero_p2", "coverage", "slot")}
        of |= {by(c, "others"): rng.normal(0.5, 0.01, n) for c in ("F_dist", "IS_p2", "IS_zero_p2")}
        columns = {("lime", PLAIN): of | {"R": rng.normal(r, 0.01, n)}}
        study.add(Trial(condition, columns, np.ones(n, bool), judges))
    found = References(study, base, spur, ("grey", second))
    tables = reference_tables(found, ["lime"])
    assert [t.header[1:3] for t in tables] == [("R", "F by blur")] * 3 + [("R", "F by grey")] * 3
    assert all("IS (skip) by others" in t.header for t in tables)
    claims = {c.claim: c.holds for c in reference_claims(found, "it", ["lime"], ["lime"])}
    assert claims["injection raises R, where explainers remove to blur"]
    assert not claims["injection lowers F by grey, where explainers remove to blur"]
    assert direction("R", found.changes("grey", ["lime"], "R"), +1).holds is False


def test_rows_are_judged_by_training_rows_of_their_own():
    """Every explained row has one of the training rows as its reference, and effects are those of going there."""
    training, x, w = rows(30, seed=8), rows(12), torch.arange(6.0).double()
    question = about_rows(lambda some: some @ w, x, ZERO)
    judges = judges_of(question, training, seed=1)
    assert list(judges) == ["training rows", "ones"]
    reference = judges["training rows"].parts[0].reference
    found = (reference[:, None] == training).all(2)
    assert found.any(1).all() and len(found.int().argmax(1).unique()) > 6
    assert torch.allclose(effects_of(judges["training rows"]), (x - reference) * w)
    assert torch.equal(judges_of(question, training, 1)["training rows"].parts[0].reference, reference)


def test_a_removal_is_perfect_by_its_own_fill_and_by_no_other():
    """Occlusion is what it is judged by only under the explainers' own fill, which no claim may use."""
    question = about_rows(product, rows(), ZERO)
    wanted = arms({"occlusion": of_rows(EXPLAINERS["occlusion"])}, (PLAIN,))
    found = trial("here", question, wanted, judges_of(question, rows(30, seed=8), 1), draws=4)
    columns = found.columns["occlusion", PLAIN]
    assert found.judges == ("training rows", "ones")
    assert np.allclose(columns[by("F_dist", OWN_FILL)], 1)
    assert columns["F_dist"].mean() < 0.8 and columns[by("F_dist", "ones")].mean() < 0.8


def test_rbp_may_leave_out_perturbations_that_move_the_prediction():
    """With no tolerance every row is shrunk as before; with none of the perturbations left, no row is."""
    question = about_rows(product, rows(), ZERO)
    explainers = {"random": of_rows(EXPLAINERS["random"])}
    for sd, same_as in ((1e9, RBP), (0.0, PLAIN)):
        generator = torch.Generator().manual_seed(0)
        made = {a.treatment: a.explain(question, generator) for a in arms(explainers, (PLAIN, RBP, RBP_SAME), sd=sd)}
        assert torch.equal(made[RBP_SAME], made[same_as]) and not torch.equal(made[RBP], made[PLAIN])
    assert left_out(question, 1e9) == 0 and left_out(question, 0.0) == 1
    assert 0.2 < left_out(question, float(product(rows()).std())) < 0.8


# -- trials and studies


def test_rows_are_explained_alike_through_questions():
    x, g = rows(), torch.Generator()
    question = about_rows(product, x, ZERO)
    for name in ("shapley", "integrated_gradients", "lime"):
        ours = of_rows(EXPLAINERS[name])(question, g.manual_seed(1))
        assert torch.equal(ours, EXPLAINERS[name](product, x, ZERO, g.manual_seed(1)))
    lime, times = (EXPLAINERS[n](product, x, ZERO + 1, g.manual_seed(2)) for n in ("lime", "lime_times_input"))
    assert torch.allclose(times, lime * (x - 1))


def test_treatments_see_the_same_explanation():
    question = about_rows(product, rows(), ZERO)
    wanted = arms(
        {"random": of_rows(EXPLAINERS["random"])}, (PLAIN, RBP, "shares only", "bounds", "check alone"), Check()
    )
    generator = torch.Generator().manual_seed(0)
    found = {arm.treatment: arm.explain(question, generator) for arm in wanted}
    plain = found[PLAIN]
    assert torch.allclose(found["shares only"], plain / plain.abs().sum(1, keepdim=True))
    assert (found[RBP].abs() < plain.abs()).all() and torch.equal(found[RBP].sign(), plain.sign())
    assert (found[RBP].abs().sum(1) > 1.2).all(), "as written: in the attribution's own units"
    assert torch.equal(found["check alone"], Check()(question)[0])


def test_a_methods_draws_do_not_depend_on_its_company():
    """Noise and LIME get the same numbers alone as behind another method, and others with another seed."""
    question = about_rows(product, rows(8), ZERO)
    of = {name: of_rows(EXPLAINERS[name]) for name in ("gradient", "lime", "random")}
    judges = {"one": about_rows(product, rows(8), ZERO + 1)}
    together = trial("here", question, arms(of, (PLAIN,)), judges, draws=3, seed=1).columns
    measured = measure_rows(product, {n: EXPLAINERS[n] for n in of}, rows(8), ZERO, 3)
    for name in ("lime", "random"):
        alone = trial("here", question, arms({name: of[name]}, (PLAIN,)), judges, draws=3, seed=1).columns
        for score, values in alone[name, PLAIN].items():
            assert np.array_equal(values, together[name, PLAIN][score], equal_nan=True), score
        again = measure_rows(product, {name: EXPLAINERS[name]}, rows(8), ZERO, 3)[name]
        assert np.array_equal(again.attributions, measured[name].attributions)
    other = trial("here", question, arms({"random": of["random"]}, (PLAIN,)), judges, draws=3, seed=2).columns
    assert not np.array_equal(other["random", PLAIN]["R"], together["random", PLAIN]["R"])


def test_the_shuffled_control_keeps_values_and_loses_who_they_belong_to():
    near = about_rows(product, rows(60), ZERO)
    scale = Scale(0.0, 1.0)
    follows, dealt = injected(near, (2,), 0.8, scale, 3).question, shuffled(near, (2,), 0.8, scale, 3).question
    ours, theirs = dealt.values[0], follows.values[0]
    assert torch.equal(ours[:, 2].sort().values, theirs[:, 2].sort().values)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(ours[:, others], near.values[0][:, others])

    def follow(values):
        return abs(np.corrcoef(values[:, 2], near.score())[0, 1])

    assert follow(theirs) > 0.95 and follow(ours) < 0.4


def test_a_trial_drops_rows_whose_output_moved():
    question = about_rows(lambda x: product(x) + 3 * (x[:, 2] - 1).clamp(min=0), rows(), ZERO)
    inject = partial(injected, slots=(2,), psi=0.8, scale=Scale(0.0, 1.0), seed=1)
    wanted = arms({"occlusion": of_rows(EXPLAINERS["occlusion"])}, (PLAIN,))
    found = trial("psi 0.8", question, wanted, judges_of(question, rows(9, seed=5), 0), inject, (2,), draws=4)
    assert 0 < found.kept.sum() < 40
    # an element that does nothing where it is kept gets nothing
    slot = found.columns["occlusion", PLAIN]["slot"]
    assert (slot[found.kept] == 0).all() and set(found.columns) == {("occlusion", PLAIN)}


def planted(gain: float, seed: int = 0) -> Study:
    """Five models of 20 rows; treatment t adds `gain` to F of every explainer, give or take."""
    rng, study = np.random.default_rng(seed), Study()
    for _ in range(5):
        base = rng.random((2, 20))
        columns = {}
        for name, f in zip(("a", "b"), base, strict=True):
            columns[name, PLAIN] = {"F_dist": f}
            columns[name, "t"] = {"F_dist": f + gain + 0.02 * rng.normal(size=20)}
        study.add(Trial("here", columns, np.arange(20) > 1))
    return study


@pytest.mark.parametrize(("gain", "expected"), [(0.1, [True, False]), (-0.1, [False, True]), (0.0, [False, False])])
def test_claims_follow_the_differences(gain, expected):
    study = planted(gain)
    each = {n: study.change(("here", n, "t"), ("here", n, PLAIN), "F_dist") for n in ("a", "b")}
    assert all(d.n == 90 and d.value == pytest.approx(gain, abs=0.01) for d in each.values()), "gated rows are out"
    assert [direction("x", each, sign).holds for sign in (1, -1)] == expected
    aims = [Aim("up", "F_dist", 1), Aim("down", "F_dist", -1)]
    assert [c.holds for c in averages(study, "here", "t", PLAIN, ("a", "b"), aims)] == expected
    one = {"a": each["a"], "undefined": Difference(float("nan"), (0.0, 0.0), float("nan"), 0, float("nan"))}
    assert not direction("x", one, 1).holds, "what is undefined did not move"


def test_models_are_a_level_of_the_bootstrap():
    group = np.repeat(np.arange(6), 50)
    weights = two_level(group)
    assert (weights.sum(1) == 300).all()
    rng = np.random.default_rng(0)
    by_model = np.repeat(rng.normal(size=6), 50) + 0.01 * rng.normal(size=300)
    spread = float((weights @ by_model / 300).std())
    expected = np.array([by_model[group == g].mean() for g in range(6)]).std() / 6**0.5
    assert spread == pytest.approx(expected, rel=0.1), "rows of one model are no independent evidence"


# -- the sweep


def test_the_default_cell_is_iq_and_ranks_ignore_what_does_not_move():
    rng = np.random.default_rng(1)
    a, y, e = rng.normal(size=(5, 31, 4)), rng.normal(size=(5, 31)), rng.normal(size=(5, 4))
    a[:, :, 3] = 2.0
    measured = Measurement(a[:, 0], y[:, 0], a[:, 1:], y[:, 1:], e)
    _, draws, _, *rest = DEFAULT
    found = scores_of(measured)
    assert np.allclose(found[draws, *rest], iq(measured).IS[2])
    assert np.allclose(found[30, 1, "Pearson", "zero", "F_dist"], iq(measured).IS_zero[1])
    few = Measurement(a[:, 0], y[:, 0], a[:, 1:6], y[:, 1:6], e)
    assert np.allclose(found[5, 4, "Pearson", "skip", "F_dist"], iq(few).IS[4])
    monotone = Measurement(a[:, 0], y[:, 0], np.exp(y[:, 1:, None]) * np.ones(4), y[:, 1:], e)
    R = 2 * scores_of(monotone)[30, 1, "Spearman", "skip", "F_dist"] - (1 - iq(monotone).F_dist)
    assert np.allclose(R, 1), "ranks see any monotone echo"


def test_pairs_are_ordered_only_beyond_chance():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(3, 80))
    noise[2, :77] = np.nan  # three rows are no evidence
    cells = {(DEFAULT, n): v + shift for n, v, shift in zip("abc", noise, (0.0, 1.0, 9.0), strict=True)}
    cells[DEFAULT, "d"] = cells[DEFAULT, "a"] + 0.01 * rng.normal(size=80)
    universe = Multiverse(tuple("abcd"), GRID, DEFAULT, cells, two_level(np.repeat(np.arange(8), 10)))
    signs = universe.signs(DEFAULT)
    assert signs[0, 1] == -1 and signs[1, 3] == 1 and np.count_nonzero(signs) == 2
    assert [cell[3] for cell in universe.along("p")] == [1, 2, 4]
    assert all(cell[:3] == DEFAULT[:3] for cell in universe.along("p"))


def test_power_and_flips():
    assert rows_needed(0.018, 0.10) == 242
    one, two = np.zeros((3, 3), int), np.zeros((3, 3), int)
    one[0, 1], two[0, 1], one[0, 2] = 1, -1, 1
    assert np.argwhere(flips([one, two])).tolist() == [[0, 1]]
