"""Questions: patches, words and columns are removed, perturbed and injected exactly as they say."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny

from mechinterp.errors import UsageError
from mechinterp.explain import tabular
from mechinterp.explain.ask import about_both, about_function, about_image, about_words
from mechinterp.explain.inject import Injected, Scale, injected, scale_of
from mechinterp.explain.question import Part, Question
from mechinterp.explain.rbp import rbp, shares, with_rbp, with_rbp_rows
from mechinterp.explain.shake import shaken
from mechinterp.metrics.iq import iq
from mechinterp.metrics.iq.ask import effects_of, measure_question, stage
from mechinterp.metrics.iq.measure import measure_rows
from mechinterp.models import HookedVLM
from mechinterp.types import Target

TARGET = Target("pneumonia", "a chest x-ray with pneumonia", "a chest x-ray without pneumonia")
WEIGHTS = torch.tensor([2, -1, 0.5, 0], dtype=torch.float64)


@pytest.fixture(scope="module")
def asked():
    """A model of every family, and its batch of three images."""
    found = {}
    for family in ("clip", "siglip", "vit", "llava", "gemma3"):
        model = HookedVLM(*tiny(family))
        pixels = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))
        found[family] = model, model.prepare(pixels, [TARGET])
    return found


def columns(f, n=5, d=4, seed=0):
    x = torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4 - 2
    return about_function(f, x, torch.zeros(d, dtype=torch.float64), torch.arange(d))


def gradient_times_value(question, generator):
    gradients, _ = question.gradients(question.values)
    parts = zip(gradients, question.parts, strict=True)
    return question.gathered(tuple(g * (p.value - p.reference) for g, p in parts))


@pytest.mark.parametrize("family", ["clip", "siglip", "llava", "gemma3"])
@pytest.mark.parametrize("about", [about_image, about_words, about_both])
def test_with_every_element_in_place_the_score_is_the_models(asked, family, about):
    model, batch = asked[family]
    question = about(model, batch, TARGET)
    with torch.no_grad():
        score = model.score(batch, [TARGET])[:, 0]
    torch.testing.assert_close(question.score(), score, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(question.shared(torch.ones(1, question.count))[:, 0], score, atol=1e-5, rtol=1e-5)


def test_a_classifier_has_patches_and_no_words(asked):
    model, batch = asked["vit"]
    assert about_image(model, batch, TARGET).count == 16
    with pytest.raises(UsageError, match="reads no"):
        about_words(model, batch, TARGET)


def test_removing_a_patch_fills_that_square_and_nothing_else(asked):
    model, batch = asked["clip"]
    question = about_image(model, batch, TARGET)
    member = torch.ones(1, 16, dtype=torch.bool)
    member[0, 6] = False  # row 1, column 2 of a 4 x 4 grid of 8-pixel patches
    pixels = batch.pixel_values.clone()
    pixels[:, :, 8:16, 16:24] = 0
    with torch.no_grad():
        expected = model.score(batch.with_pixels(pixels), [TARGET])[:, 0]
    torch.testing.assert_close(question.shared(member)[:, 0], expected)
    torch.testing.assert_close(effects_of(question)[:, 6], question.score() - expected)


def test_removing_a_word_is_writing_the_unknown_word(asked):
    """In the prompt of a dual encoder: the score with all words but one equals that of the prompt with <unk> there."""
    model, batch = asked["clip"]
    question = about_words(model, batch, TARGET)
    place = question.names.index("chest")
    unknown = model.tokenizer.unk_token
    blank = Target("p", TARGET.positive.replace("chest", unknown), TARGET.negative)
    member = torch.ones(1, question.count)
    member[0, place] = 0
    with torch.no_grad():
        expected = model.score(batch, [blank])[:, 0]
        as_it_was = model.score(batch, [TARGET])[:, 0]
    assert not torch.allclose(expected, as_it_was)
    torch.testing.assert_close(question.shared(member)[:, 0], expected, atol=1e-5, rtol=1e-5)


def test_both_together_remove_what_each_alone_removes(asked):
    model, batch = asked["llava"]
    both, image = about_both(model, batch, TARGET), about_image(model, batch, TARGET)
    words = about_words(model, batch, TARGET)
    assert both.names == image.names + words.names
    effect = effects_of(both)
    torch.testing.assert_close(effect[:, :16], effects_of(image), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(effect[:, 16:], effects_of(words), atol=1e-5, rtol=1e-4)


@given(st.integers(0, 2**31 - 1), st.integers(1, 7))
def test_chunks_and_repeats_change_no_number(seed, chunk):
    question = columns(lambda x: (x @ WEIGHTS).sin(), n=4, seed=seed)
    member = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed)) < 0.5
    small = replace(question, chunk=chunk)
    torch.testing.assert_close(small.shared(member), question.shared(member))
    torch.testing.assert_close(small.gradients(small.values)[0][0], question.gradients(question.values)[0][0])
    torch.testing.assert_close(question.repeated(2).score()[::2], question.score())


def test_gradients_sum_over_the_positions_of_an_element():
    """f = the sum of squares of a 4 x 4 image: gradient times value is twice that of each patch."""
    image = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    owner = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])
    question = about_function(
        lambda x: x.square().flatten(1).sum(1), image, torch.zeros(1, 4, 4), owner, kind="patch", shape=(2, 2)
    )
    found = gradient_times_value(question, torch.Generator())
    patches = image[:, 0].unfold(1, 2, 2).unfold(2, 2, 2).flatten(1, 2).flatten(2)
    torch.testing.assert_close(found, 2 * patches.square().sum(-1))
    margin = owner.masked_fill(owner == 3, -1)  # the lower right belongs to no element, as what a model crops away
    outside = replace(question, parts=(replace(question.parts[0], owner=margin),), count=4)
    cropped = gradient_times_value(outside, torch.Generator())
    assert torch.equal(cropped[:, :3], found[:, :3]) and not cropped[:, 3].any(), "and none gets what is outside"


def test_a_perturbation_moves_each_block_by_its_share(asked):
    """Every patch is scaled by one number; over many draws the relative change has standard deviation `noise`."""
    model, batch = asked["clip"]
    near = shaken(about_both(model, batch, TARGET), 200, 0.05, torch.Generator().manual_seed(0))
    pixels, words = (v.unflatten(0, (3, 201)) for v in near.values)
    assert torch.equal(pixels[:, 0], batch.pixel_values)  # x itself comes first, untouched
    for value, block in ((pixels, (..., slice(0, 8), slice(8, 16))), (words, (..., 2, slice(None)))):
        part = value[block].flatten(2)
        ratio = (part[:, 1:] / part[:, :1]) - 1
        torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), atol=1e-3, rtol=1e-2)  # one number a block
        assert abs(float(ratio[..., 0].std()) - 0.05) < 0.005
    assert len(near.source.batch) == 603 and torch.equal(near.source.batch.pixel_values, near.values[0])


def test_small_elements_move_as_if_they_had_the_floor_and_pairs_are_antithetic():
    question = about_function(lambda x: x.sum(1), torch.tensor([[0.0, 2.0]]), torch.zeros(2), torch.arange(2))
    near = shaken(question, 2000, 0.1, torch.Generator().manual_seed(0), antithetic=True).values[0]
    assert torch.equal(near[0], torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(near[1:].std(0), torch.tensor([0.1 * 0.05, 0.1 * 2]), rtol=0.1, atol=0)
    torch.testing.assert_close(near[1:1001] + near[1001:], 2 * near[:1].expand(1000, -1))
    small = about_function(lambda x: x.sum(1), torch.tensor([[-0.01, 2.0]]), torch.zeros(2), torch.arange(2))
    near = shaken(small, 2000, 0.1, torch.Generator().manual_seed(0)).values[0]
    torch.testing.assert_close(near[1:].std(0), torch.tensor([0.1 * 0.05, 0.1 * 2]), rtol=0.1, atol=0)
    with pytest.raises(UsageError, match="even"):
        shaken(question, 3, 0.1, torch.Generator(), antithetic=True)


def test_a_question_about_columns_is_measured_like_rows():
    """Two ways to the same closed form: gradient times input of a linear function."""
    question = columns(lambda x: x @ WEIGHTS, n=20)
    draws = 3000
    found = iq(measure_question(question, {"gxi": gradient_times_value}, draws=draws)["gxi"])
    rows = measure_rows(
        lambda x: x @ WEIGHTS,
        {"gxi": tabular.gradient_times_input},
        question.values[0],
        question.parts[0].reference[0],
        draws=draws,
    )["gxi"]
    np.testing.assert_allclose(found.R, iq(rows).R, atol=4 / np.sqrt(draws))
    np.testing.assert_allclose(found.F_dist, 1, atol=1e-9)


def test_another_judge_changes_the_effects_and_nothing_else():
    x = torch.rand(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ask = [about_function(lambda x: x.square() @ WEIGHTS, x, torch.full((4,), r), torch.arange(4)) for r in (0.0, 0.5)]
    one, other = stage(ask[0], draws=5), stage(ask[0], judge=ask[1], draws=5)
    assert np.array_equal(one.output, other.output)
    np.testing.assert_allclose(other.effect[:, 0], ((x.square() - 0.25) * WEIGHTS).numpy())
    np.testing.assert_allclose(one.effect[:, 0], (x.square() * WEIGHTS).numpy())
    with pytest.raises(UsageError, match="judge"):
        stage(ask[0], judge=ask[1][:3], draws=5)


def test_a_judge_removes_from_the_perturbed_inputs_and_not_from_the_first_again():
    """Effects at copies are those of the copies, towards the judge's references of x; R_excess needs their movement."""
    ask = columns(lambda x: x.square() @ WEIGHTS)
    judge = replace(ask, parts=(replace(ask.parts[0], reference=torch.full_like(ask.values[0], 0.5)),))
    bench = stage(ask, judge, draws=6)
    copies = bench.near.values[0].view(len(ask), 7, 4)
    np.testing.assert_allclose(bench.effect, ((copies.square() - 0.25) * WEIGHTS).numpy())
    once = stage(ask, judge, draws=6, co_movement=False)
    np.testing.assert_array_equal(once.effect, bench.effect[:, :1])


def test_an_injected_element_follows_the_output_and_the_gate_sees_a_use(asked):
    question = columns(lambda x: x[:, 0] * 3 + 5, n=200)
    scale = scale_of(question)
    unused, used = (injected(question, (slot,), 0.8, scale) for slot in (3, 0))
    z = (question.score() - scale.mean) / scale.sd
    slope = torch.linalg.lstsq(z[:, None], unused.question.values[0][:, 3:]).solution
    assert unused.kept.all() and abs(float(slope) - 0.8) < 0.03 and not used.kept.all()
    assert torch.equal(unused.question.values[0][:, :3], question.values[0][:, :3])
    assert torch.equal(injected(question, (3,), 0.0, scale).question.values[0], question.values[0])
    model, batch = asked["clip"]
    both = about_both(model, batch, TARGET)
    found = injected(both, (0, both.count - 1), 0.8, scale_of(both)).question
    level = found.values[0][:, :, :8, :8]
    assert torch.equal(level, level[:, :1, :1, :1].expand_as(level))  # an even field
    moved = (found.values[1] - both.values[1]).norm(dim=-1) > 0
    assert torch.equal(moved, torch.tensor([[False] * (moved.shape[1] - 1) + [True]] * 3))


def test_the_gate_drops_an_output_that_fell_as_one_that_rose():
    """Rows stay whose output moved by at most 0.05 standard deviations, up or down; a broken one does not."""
    question = columns(lambda x: x.sum(1), n=5)
    moved = torch.tensor([0.09, -0.09, 0.11, -0.11, float("nan")])
    assert Injected(question, moved, sd=2.0).kept.tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("slots", [(4,), (-1,), (0, 4), ()])
def test_nothing_is_injected_into_elements_that_are_not_there(slots):
    """A slot beyond the elements would pass every gate and show no effect of an injection that never was."""
    with pytest.raises(UsageError, match="of 4 elements"):
        injected(columns(lambda x: x.sum(1)), slots, 0.8, Scale(0.0, 1.0))


def test_rbp_of_a_question_is_its_formula_and_is_free_of_scale():
    question = columns(lambda x: (x @ WEIGHTS) ** 2, n=7)
    found = with_rbp(gradient_times_value, perturbations=4)(question, torch.Generator().manual_seed(3))
    near = shaken(question, 4, 0.05, torch.Generator().manual_seed(3))
    a = gradient_times_value(near, torch.Generator()).view(7, 5, 4)
    torch.testing.assert_close(found, rbp(a[:, 0], a[:, 1:]))
    scaled = with_rbp(lambda q, g: 100 * gradient_times_value(q, g), perturbations=4)
    torch.testing.assert_close(scaled(question, torch.Generator().manual_seed(3)), found)


def test_rbp_shrinks_by_a_tenth_of_the_movement():
    """Shares of .5 that move by .25 at every perturbation become .5 / (1 + .1 * .25)."""

    def moving(question, generator):
        near = torch.arange(len(question)) % 4 > 0
        return torch.stack([1 + 2.0 * near, torch.ones(len(question))], dim=1)

    question = about_function(lambda x: x[:, 0], torch.rand(3, 2) + 1, torch.zeros(2), torch.arange(2))
    found = with_rbp(moving)(question, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, torch.full((3, 2), 0.5 / 1.025))


def test_rbp_leaves_out_the_perturbations_that_move_the_output_by_more_than_its_tolerance():
    """None within it: not shrunk. All within it: as without a tolerance. Some: those alone count."""
    question = columns(lambda x: (x @ WEIGHTS) ** 2, n=7)

    def robust(tolerance):
        made = with_rbp(gradient_times_value, strength=5.0, perturbations=8, tolerance=tolerance)
        return made(question, torch.Generator().manual_seed(3))

    near = shaken(question, 8, 0.05, torch.Generator().manual_seed(3))
    a, y = gradient_times_value(near, torch.Generator()).view(7, 9, 4), near.score().view(7, 9)
    moved = (y[:, 1:] - y[:, :1]).abs()
    middle = float(moved.median())
    torch.testing.assert_close(robust(0.0), shares(a[:, 0]))
    torch.testing.assert_close(robust(1e9), robust(float("inf")))
    torch.testing.assert_close(robust(middle), rbp(a[:, 0], a[:, 1:], 5.0, moved <= middle))
    assert not torch.allclose(robust(middle), rbp(a[:, 0], a[:, 1:], 5.0, moved > middle))
    x, g = question.values[0], torch.Generator()
    for tolerance, still in ((0.0, True), (1e9, False)):
        rows = with_rbp_rows(tabular.gradient_times_input, strength=5.0, tolerance=tolerance)
        found = rows(lambda x: (x @ WEIGHTS) ** 2, x, x.new_zeros(4), g.manual_seed(0))
        plain = shares(tabular.gradient_times_input(lambda x: (x @ WEIGHTS) ** 2, x, x.new_zeros(4), g))
        assert torch.allclose(found, plain) is still


def test_an_injected_word_follows_the_output_with_the_noise_that_was_asked_for():
    """A word is moved by psi z + noise N(0, 1) of its own lengths along the fixed direction, and by nothing else."""
    value = torch.randn(400, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    part = Part("word", value, torch.zeros_like(value), torch.arange(3)[:, None])
    question = Question((part,), lambda values: values[0][:, 0].sum(1), 3, ("a", "b", "c"))
    scale = Scale(0.5, 2.0)
    z = (question.score() - scale.mean) / scale.sd
    direction = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64) / 8**0.5
    left = {}
    for noise in (0.0, 0.1):
        moved = injected(question, (2,), 0.8, scale, seed=1, noise=noise).question.values[0] - value
        assert not moved[:, :2].any()
        level = moved[:, 2] @ direction / value[:, 2].norm(dim=1)
        torch.testing.assert_close(moved[:, 2], (level * value[:, 2].norm(dim=1))[:, None] * direction)
        left[noise] = level - 0.8 * z
    torch.testing.assert_close(left[0.0], torch.zeros(400).double())
    assert float(left[0.1].std()) == pytest.approx(0.1, rel=0.15) and abs(float(left[0.1].mean())) < 0.02


def test_only_elements_below_a_hundredth_of_the_largest_effect_count_as_without_effect():
    """An explainer whose one moving element echoes the output leaks it only where that element does next to nothing."""
    weights = torch.tensor([1.0, 0.3, 0.005, 0.0], dtype=torch.float64)
    question = columns(lambda x: x @ weights, n=5)
    question = question.at((torch.ones_like(question.values[0]),))

    def echoes(element):
        return lambda question, generator: torch.eye(4).double()[element] * question.score()[:, None]

    measured = measure_question(question, {str(i): echoes(i) for i in range(4)}, draws=6)
    leaked = {name: iq(m).R_null for name, m in measured.items()}
    assert (leaked["0"] == 0).all() and (leaked["1"] == 0).all(), "3 parts in 10 are an effect"
    assert np.allclose(leaked["2"], 1 / 2) and np.allclose(leaked["3"], 1 / 2)


def test_the_seconds_of_an_explanation_are_those_it_took():
    """One call explains all copies; its time is shared among them."""
    bench = stage(columns(lambda x: x @ WEIGHTS, n=2), draws=4)

    def slow(question, generator):
        time.sleep(0.1)
        return gradient_times_value(question, generator)

    assert 0.1 / 10 <= bench.explain(slow)[1] < 5 * 0.1 / 10
