"""Points of a path integral are put where the score turns: poles that are known are found, fewer points suffice."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechinterp.audit.defaults import default_data
from mechinterp.explain.ask import about_function, about_image
from mechinterp.explain.gradients import integrated_gradients, integrated_gradients_of_copies
from mechinterp.explain.path import PILOT, crowded, gauss_legendre, path_rules, poles_of, rule_for
from mechinterp.explain.shake import shaken
from mechinterp.models import HookedVLM

PLACES = (1 - np.cos(np.pi * np.arange(PILOT) / (PILOT - 1))) / 2


def turning(at, centre=0.3, width=0.1):
    """A score that turns sharply at one place; its derivative has double poles at centre +- i width."""
    return 1 / ((at - centre) ** 2 + width**2)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.1, 0.9), st.floats(0.05, 0.3))
def test_a_known_pole_is_found_and_its_turn_integrated(centre, width):
    scores = turning(PLACES, centre, width)
    poles = poles_of(PLACES, scores)
    assert np.abs(poles.at - (centre + 1j * width)).min() < 1e-3
    at, weight = rule_for(24, poles)
    slope = -2 * (at - centre) / ((at - centre) ** 2 + width**2) ** 2
    assert abs(weight @ slope - (scores[-1] - scores[0])) < 1e-3 * np.ptp(scores)


def test_the_turn_needs_many_plain_points():
    wrong = {}
    for name, (at, weight) in {
        "plain": gauss_legendre(16),
        "put": rule_for(16, poles_of(PLACES, turning(PLACES))),
    }.items():
        found = weight @ (-2 * (at - 0.3) / ((at - 0.3) ** 2 + 0.1**2) ** 2)
        wrong[name] = abs(found - (turning(1.0) - turning(0.0)))
    assert wrong["put"] < 1e-2 * wrong["plain"]


@given(st.floats(0, 1), st.floats(0.1, 3))
def test_crowded_points_are_a_rule(centre, width):
    at, weight = crowded(24, centre, width)
    assert ((at > 0) & (at < 1)).all() and (weight > 0).all()
    assert abs(weight.sum() - 1) < 1e-5 and abs(weight @ at - 0.5) < 1e-5


@pytest.mark.parametrize("scores", [np.zeros(PILOT), np.full(PILOT, 3.0), PLACES, PLACES**2], ids=str)
def test_without_a_turn_the_points_are_plain(scores):
    assert rule_for(16, poles_of(PLACES, scores)) is gauss_legendre(16)


def test_rounding_is_no_turn():
    noisy = 5 * PLACES + 1e-6 * np.random.default_rng(0).standard_normal(PILOT)
    at, weight = rule_for(16, poles_of(PLACES, noisy))
    assert abs(weight @ (5 * np.ones_like(at)) - 5) < 1e-4


def test_a_function_of_columns_adds_up():
    def score(x):
        return 1 / ((x.sum(1) - 0.9) ** 2 + 0.09)

    question = about_function(score, torch.tensor([[1.0, 2.0]]), torch.zeros(2), torch.arange(2), chunk=64)
    question = shaken(question, 4, 0.01, torch.Generator().manual_seed(0))
    truth = question.score() - question.at(tuple(p.reference for p in question.parts)).score()
    put = integrated_gradients_of_copies(question, torch.Generator(), 16).sum(1)
    plain = integrated_gradients(question, torch.Generator(), 16).sum(1)
    assert (put - truth).abs().max() < 1e-4 * truth.abs().max()
    assert (put - truth).abs().max() < 0.02 * (plain - truth).abs().max()


def test_what_the_points_miss_of_the_first_is_added_to_all():
    """Copies that are exact come out as by twice the points, and those 0.2 % away ten times nearer than without."""

    def score(x):
        return 1 / ((x.sum(1) - 0.9) ** 2 + 0.09)

    def wrong(rule, of):
        at = torch.from_numpy(rule[0])[:, None, None] * of.values[0].double()
        slope = -2 * (at.sum(2) - 0.9) / ((at.sum(2) - 0.9) ** 2 + 0.09) ** 2
        return torch.from_numpy(rule[1]) @ slope * of.values[0].double().sum(1)

    one = about_function(
        score, torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.zeros(2).double(), torch.arange(2)
    )
    draw = torch.Generator().manual_seed(0)
    coarse, fine = path_rules(one, (8, 16))
    same = integrated_gradients_of_copies(shaken(one, 3, 0.0, draw), draw, 8).sum(1)
    assert torch.allclose(same, wrong(fine, one).expand(4), atol=1e-9)
    assert abs(wrong(coarse, one) - wrong(fine, one)) > 1e-2
    near = shaken(one, 30, 0.002, draw)
    truth = near.score() - score(torch.zeros(1, 2))
    left = (integrated_gradients_of_copies(near, draw, 8).sum(1) - truth).abs().max()
    assert left < 0.1 * (wrong(coarse, near) - truth).abs().max()


@pytest.fixture(scope="module")
def copies():
    """An image of a phantom and three copies, each patch moved by 5 %."""
    model = HookedVLM.from_pretrained("phantom-clip")
    data = default_data(8)
    target = data.targets["consolidation"]
    question = about_image(model, model.prepare(data.pixels(range(7, 8)), [target]), target)
    return shaken(question, 3, 0.05, torch.Generator().manual_seed(0))


def test_copies_of_an_image_need_fewer_points(copies):
    truth = integrated_gradients(copies, torch.Generator(), 96)
    size = truth.sum(1).abs().max()
    wrong = {
        explain.__name__: float((explain(copies, torch.Generator(), 16) - truth).abs().max() / size)
        for explain in (integrated_gradients, integrated_gradients_of_copies)
    }
    assert wrong["integrated_gradients_of_copies"] < 2e-5 < wrong["integrated_gradients"]


def test_pilots_are_scores_of_the_first_row_alone(copies):
    other = copies[torch.tensor([0, 2])]
    for one, two in zip(path_rules(copies, (16, 32)), path_rules(other, (16, 32)), strict=True):
        assert np.array_equal(one, two)
