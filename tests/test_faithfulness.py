"""Faithfulness scores on functions whose best and worst explanations are known, and against captum."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from captum import metrics as captum

from mechinterp.errors import UsageError
from mechinterp.explain.ask import about_function
from mechinterp.metrics.faithfulness import (
    Removal,
    best_and_worst,
    check_held_out,
    comprehensiveness,
    faithfulness_correlation,
    held_out,
    infidelity,
    insertion_deletion,
    judged_by,
    naopc,
    random_subsets,
    ranked,
    refilled,
    removals,
    saco,
    scored_by,
    sensitivity,
    sufficiency,
)
from mechinterp.metrics.scored import Scored

WEIGHTS = torch.tensor([3, -1, 0.5, 0, 2, 0, 0.1, -0.3], dtype=torch.float64)
ROWS, COUNT = 60, len(WEIGHTS)


def about(f, seed=0, reference=0.0):
    x = torch.rand(ROWS, COUNT, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.2
    return about_function(f, x, torch.full((COUNT,), reference, dtype=torch.float64), torch.arange(COUNT))


def linear(x):
    return x @ WEIGHTS


def bent(x):
    return torch.tanh(x @ WEIGHTS) + x[:, 0] * x[:, 5] ** 2


@pytest.fixture(scope="module")
def question():
    return about(linear)


@pytest.fixture(scope="module")
def maps(question):
    exact = question.values[0] * WEIGHTS
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=exact.dtype)
    return {"exact": exact, "reversed": -exact, "random": noise, "constant": torch.full_like(exact, 0.7)}


@pytest.fixture(scope="module")
def scores(question, maps):
    """Every score of every map, each turned so that high is good."""
    seen = removals(question, random_subsets(COUNT, 200, torch.Generator().manual_seed(2), size=4))
    ends = best_and_worst(question)
    found: dict[str, dict[str, Scored]] = {}
    for name, a in maps.items():
        curves = insertion_deletion(question, a)
        found[name] = {
            "deletion": curves.deletion_auc,
            "insertion": curves.insertion_auc,
            "aopc": curves.aopc,
            "gain": curves.gain,
            "naopc": naopc(curves, *ends),
            "comprehensiveness": comprehensiveness(question, a),
            "sufficiency": sufficiency(question, a),
            "correlation": faithfulness_correlation(a, seen),
            "infidelity": infidelity(a, seen),
            "infidelity, scaled": infidelity(a, seen, scaled=True),
            "saco": saco(question, a),
        }
    return found


LOW_IS_GOOD = {"deletion", "sufficiency", "infidelity", "infidelity, scaled"}


def test_an_exact_map_of_a_sum_is_the_best_and_its_reverse_the_worst(scores):
    for name, best in scores["exact"].items():
        if name == "infidelity, scaled":
            continue  # the sign is part of the scale
        sign = -1 if name in LOW_IS_GOOD else 1
        for other in ("random", "reversed"):
            assert (sign * (best.value - scores[other][name].value) >= -1e-9).all(), (name, other)
        assert sign * (scores["random"][name].mean - scores["reversed"][name].mean) > 0, name
    assert np.allclose(scores["exact"]["naopc"].value, 1) and np.allclose(scores["reversed"]["naopc"].value, 0)
    assert np.allclose(scores["exact"]["correlation"].value, 1)
    assert np.allclose(scores["reversed"]["correlation"].value, -1)
    assert np.allclose(scores["exact"]["saco"].value, 1) and np.allclose(scores["reversed"]["saco"].value, -1)
    assert np.allclose(scores["exact"]["infidelity"].value, 0, atol=1e-12)


def test_random_is_at_chance(scores):
    """Of a sum of effects, a random order removes half of it half way."""
    for name, chance in (("deletion", 0.5), ("insertion", 0.5), ("correlation", 0.0), ("saco", 0.0), ("gain", 0.0)):
        value = scores["random"][name].value
        assert abs(value.mean() - chance) < 3.5 * value.std() / len(value) ** 0.5, name


def test_a_constant_map_has_a_status_and_no_value(scores):
    for name, score in scores["constant"].items():
        assert set(score.status) == {"const_attr"} and np.isnan(score.value).all(), name
        assert np.isnan(score.mean) and score.coverage == 0
        assert np.isnan(score.interval([str(i) for i in range(ROWS)])).all()


def test_an_output_that_never_moves_has_a_status(maps):
    still = about(lambda x: torch.ones_like(x[:, 0]))
    assert set(insertion_deletion(still, maps["exact"]).deletion_auc.status) == {"const_output"}
    seen = removals(still, random_subsets(COUNT, 20, torch.Generator()))
    assert set(faithfulness_correlation(maps["exact"], seen).status) == {"const_output"}
    assert set(saco(still, maps["exact"]).status) == {"const_output"}
    few = removals(still, random_subsets(COUNT, 2, torch.Generator()))
    assert set(faithfulness_correlation(maps["exact"], few).status) == {"const_output"}


def single(question):
    """The question in single precision; its function sees float32 and answers in it."""
    parts = tuple(replace(p, value=p.value.float(), reference=p.reference.float()) for p in question.parts)
    return replace(question, parts=parts, function=lambda values: question.function((values[0].double(),)).float())


def test_what_moves_by_the_rounding_of_single_precision_alone_has_a_status(maps):
    """A score near 10 that float32 rounds up or down is constant, and so is such a map, also once kept in float64."""
    still, a = single(about(lambda x: 10 + 1e-6 * linear(x))), maps["exact"]
    seen = removals(still, random_subsets(COUNT, 20, torch.Generator().manual_seed(0)))
    assert seen.drop.any(), "it moves by rounding"
    curves = insertion_deletion(still, a)
    for score in (curves.gain, comprehensiveness(still, a), faithfulness_correlation(a, seen), saco(still, a)):
        assert set(score.status) == {"const_output"}
    moving = single(about(linear))
    rounded = 1 + 1e-7 * torch.rand(a.shape, generator=torch.Generator().manual_seed(3), dtype=a.dtype)
    for given, status in ((rounded, "const_attr"), (a, "ok")):
        moved = sensitivity(moving, lambda question, generator, given=given: given.repeat_interleave(2, 0), draws=1)
        for score in (saco(moving, given), insertion_deletion(moving, given).gain, moved.mean):
            assert set(score.status) == {status}


def test_one_broken_row_breaks_no_other(question, maps):
    a = maps["exact"].clone()
    a[3, 2] = float("nan")
    a[5] = 0
    for score in (insertion_deletion(question, a).deletion_auc, saco(question, a), sufficiency(question, a)):
        assert score.status[3] == "nonfinite" and score.status[5] == "const_attr"
        assert np.isfinite(np.delete(score.value, [3, 5])).all()


def test_curves_start_and_end_where_they_must(question, maps):
    curves = insertion_deletion(question, maps["random"], steps=4)
    full, empty = question.score().numpy(), np.zeros(ROWS)
    assert np.allclose(curves.share, [0, 0.25, 0.5, 0.75, 1])
    assert np.allclose(curves.deletion[:, 0], full) and np.allclose(curves.deletion[:, -1], empty)
    assert np.allclose(curves.insertion[:, 0], empty) and np.allclose(curves.insertion[:, -1], full)
    # of a sum, what one order removes is what it puts back
    assert np.allclose(curves.deletion + curves.insertion, full[:, None])
    with pytest.raises(UsageError, match="skip steps"):
        naopc(curves, full, full)


def test_equal_values_favour_no_place():
    ranks = torch.cat([ranked(torch.zeros(1, 30), seed=s) for s in range(400)]).double()
    assert (ranks.mean(0) - 14.5).abs().max() < 4 * ranks.std() / 400**0.5
    assert torch.equal(ranked(torch.tensor([[0.0, 3.0, 1.0]])), torch.tensor([[2, 0, 1]]))


def test_beam_search_finds_the_best_order_of_a_bent_function():
    from itertools import permutations

    x = torch.rand(1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def f(v):
        return v[:, 0] * v[:, 1] + v[:, 2] - v[:, 3] * v[:, 0]

    small = about_function(f, x, torch.zeros(4, dtype=torch.float64), torch.arange(4))
    every = [
        insertion_deletion(small, -torch.tensor([order]).argsort(1).double()).aopc.value[0]
        for order in permutations(range(4))
    ]
    best, worst = best_and_worst(small, width=24)
    assert np.isclose(best[0], max(every)) and np.isclose(worst[0], min(every))


def test_infidelity_is_captums():
    bend = about(bent)
    x, reference = bend.values[0], torch.zeros(COUNT, dtype=torch.float64)
    a = x * torch.autograd.functional.jacobian(lambda v: bent(v).sum(), x)
    removed = random_subsets(COUNT, 40, torch.Generator().manual_seed(0))
    seen = removals(bend, removed)
    for scaled in (False, True):

        def perturb(inputs):
            # captum repeats each row 40 times in a row
            mask = removed.repeat(len(inputs) // 40, 1)
            return mask.double(), torch.where(mask, reference, inputs)

        theirs = captum.infidelity(
            bent, perturb, x, a, n_perturb_samples=40, max_examples_per_batch=ROWS * 40, normalize=scaled
        )
        assert np.allclose(infidelity(a, seen, scaled).value, theirs.numpy(), rtol=1e-9)


def test_sensitivity_is_captums():
    bend = about(bent)
    x, draws = bend.values[0], 12
    noise = 0.04 * (torch.rand(ROWS * draws, COUNT, generator=torch.Generator().manual_seed(0), dtype=x.dtype) - 0.5)

    def gradient(inputs):
        at = inputs.detach().clone().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(bent(at).sum(), at)[0]

    found = sensitivity(bend, lambda q, g: gradient(q.values[0]), draws=draws, noise=(noise,))
    theirs = captum.sensitivity_max(
        lambda inputs: (gradient(inputs[0]),),
        x,
        perturb_func=lambda inputs: (inputs + noise,),  # a tensor goes in, a tuple must come out
        n_perturb_samples=draws,
        max_examples_per_batch=ROWS * draws,
    )
    assert np.allclose(found.greatest.value, theirs.numpy(), rtol=1e-9)
    assert (found.mean.value <= found.greatest.value).all()
    inside = sensitivity(bend, lambda q, g: q.values[0], radius=0.01).greatest.value
    assert (inside <= 0.01 * COUNT**0.5 / x.norm(dim=1).numpy() + 1e-12).all(), "the noise stays in its ball"
    constant = sensitivity(bend, lambda q, g: torch.ones_like(q.values[0]))
    assert set(constant.greatest.status) == {"const_attr"}, "a constant map is no perfect one"


GREY, BLUR, LATENT = Removal("grey"), Removal("blur"), Removal("zero", "latent")


def test_what_was_built_from_a_removal_is_not_scored_by_it():
    assert held_out("single_fill", GREY, GREY) == "circular" and held_out("single_fill", GREY, BLUR) == "held out"
    assert held_out("subset_fill", GREY, GREY) == "circular"
    assert held_out("subset_fill", Removal("grey+neutral"), Removal("blur+neutral")) == "circular", "the words' fill"
    assert held_out("latent", None, LATENT) == held_out("graph", None, Removal("mean", "latent")) == "circular"
    assert held_out("latent", None, GREY) == held_out("gradient", None, GREY) == "held out"
    assert scored_by("single_fill", GREY, [GREY, BLUR, Removal("mean")]) == (BLUR, Removal("mean"))
    assert scored_by("graph", None, [GREY, LATENT]) == (GREY,)
    with pytest.raises(UsageError, match="no removal is held out"):
        scored_by("single_fill", GREY, [GREY])
    with pytest.raises(UsageError, match="occlusion: built from single fill"):
        check_held_out("occlusion", "single_fill", GREY, GREY)
    check_held_out("occlusion", "single_fill", GREY, BLUR)
    with pytest.raises(UsageError, match="which fill"):
        held_out("single_fill", None, GREY)


def test_questions_say_by_their_fill_who_may_judge(question):
    """The same name is circular for what removes, another is not; a question without a name judges nothing."""
    grey, blur = replace(question, fill="grey"), refilled(question, "mean")
    assert blur.fill == "mean"
    assert judged_by("single_fill", grey, grey) == judged_by("subset_fill", grey, grey) == "circular"
    assert judged_by("subset_fill", grey, blur) == judged_by("gradient", grey, grey) == "held out"
    with pytest.raises(UsageError, match="does not say what removed elements become"):
        judged_by("single_fill", grey, question)


def test_other_rows_as_reference(question):
    x = question.values[0]
    mean = refilled(question, "mean")
    assert torch.allclose(mean.parts[0].reference, x.mean(0).expand_as(x))
    other = refilled(question, "resample").parts[0].reference
    assert torch.equal(other.sort(0).values, x.sort(0).values) and not (other == x).all(1).any()
    # the occlusion map of one fill is not the effect of another, so it can lose
    with pytest.raises(UsageError, match="one row"):
        refilled(question[:1], "mean")


def test_wrong_shapes_are_refused(question):
    for use in (insertion_deletion, sufficiency):
        with pytest.raises(UsageError, match="attribution"):
            use(question, torch.zeros(ROWS, COUNT + 1))
    with pytest.raises(UsageError, match="shares"):
        sufficiency(question, torch.rand(ROWS, COUNT), shares=(0.0,))
    with pytest.raises(UsageError, match="size"):
        random_subsets(4, 3, torch.Generator(), size=4)
    with pytest.raises(UsageError, match="patients"):
        Scored(np.ones(3), ("ok",) * 3).interval(["a"])
