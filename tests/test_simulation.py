"""Students and readers: what is planted is found, controls gain nothing, and a persuasive wrong explanation harms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mechinterp.errors import UsageError
from mechinterp.metrics.reader import Advice, conviction, read
from mechinterp.metrics.simulation import (
    Lessons,
    as_shares,
    given,
    leak,
    patch_features,
    random_maps,
    shuffled,
    simulate,
)

PATCHES = 9


def world(n: int, seed: int) -> tuple[Lessons, torch.Tensor]:
    """A teacher that reads a number off the one marked patch of each image."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, PATCHES, 4, generator=g)
    at = torch.randint(0, PATCHES, (n,), generator=g)
    x[:, :, 0] *= 0.3
    x[torch.arange(n), at, 0] += 1.5
    where = torch.nn.functional.one_hot(at, PATCHES).float()
    return Lessons(x, x[torch.arange(n), at, 1], tuple(f"{seed}-{i}" for i in range(n))), where


@pytest.fixture(scope="module")
def worlds():
    return world(80, 0), world(60, 1), world(200, 2)


@pytest.fixture(scope="module")
def taught(worlds):
    (train, where), (valid, _), (test, _) = worlds
    g = torch.Generator().manual_seed(5)
    explanations = {
        "none": None,
        "truth": where,
        "random": random_maps(80, PATCHES, g),
        "shuffled": shuffled(where, train.patients, g),
        "leak": leak(train.scores, PATCHES),
    }
    return simulate(train, valid, test, explanations, 20, seeds=3, strengths=(1.0,), steps=120)


def test_only_the_true_explanation_helps(taught):
    gain = {name: s.r2 - taught["none"].r2 for name, s in taught.items()}
    points = {name: s.accuracy - taught["none"].accuracy for name, s in taught.items()}
    assert gain["truth"].min() > 0.3 and points["truth"].min() > 0.05
    for control in ("random", "shuffled", "leak"):
        assert gain[control].mean() < 0.1 and points[control].mean() < 0.05, control


def test_a_leak_wins_where_explanations_are_shown_at_test_time(worlds):
    (train, _), _, (test, _) = worlds
    maps = leak(train.scores, PATCHES), leak(test.scores, PATCHES)
    shown = given(train, test, *maps, 40, seeds=3, steps=300)
    noise = (random_maps(len(of), PATCHES, torch.Generator().manual_seed(i)) for i, of in enumerate((train, test)))
    unread = given(train, test, *noise, 40, seeds=3, steps=300)
    assert shown.accuracy.mean() > 0.8 > unread.accuracy.mean() + 0.1


def test_the_same_seed_teaches_the_same(worlds):
    (train, where), (valid, _), (test, _) = worlds
    one, two, other = (
        simulate(train, valid, test, {"truth": where}, 20, 2, steps=20, seed=seed)["truth"].r2 for seed in (3, 3, 4)
    )
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_a_patient_in_two_sets_is_refused(worlds):
    (train, where), (valid, _), (test, _) = worlds
    leaky = replace(valid, patients=(train.patients[0], *valid.patients[1:]))
    with pytest.raises(UsageError, match="two sets"):
        simulate(train, leaky, test, {"none": None}, 20)
    with pytest.raises(UsageError, match="truth"):
        simulate(train, valid, test, {"truth": where[:5]}, 20)
    with pytest.raises(UsageError, match="size"):
        simulate(train, valid, test, {"none": None}, 81)


def test_controls_are_what_they_say():
    g = torch.Generator().manual_seed(0)
    maps = torch.rand(40, PATCHES, generator=g)
    patients = tuple("abcdefghij"[i // 4] for i in range(40))
    moved = shuffled(maps, patients, g)
    owner = [patients[int((maps == row).all(1).nonzero())] for row in moved]
    assert all(a != b for a, b in zip(owner, patients, strict=True)), "no patient keeps a map of its own"
    assert torch.equal(moved.sort(0).values, maps.sort(0).values)
    with pytest.raises(UsageError, match="one patient"):
        shuffled(maps, ("a",) * 40, g)
    assert torch.allclose(as_shares(-maps).sum(1), torch.ones(40))
    assert torch.allclose(as_shares(torch.zeros(2, 4)), torch.full((2, 4), 0.25))
    assert torch.equal(leak(torch.tensor([-1.0, 2.0]), 3), torch.tensor([[1.0, 0, 0], [0, 0, 1]]))
    fitted, other = patch_features(
        torch.randn(30, 4, 10, generator=g), torch.randn(3, 4, 10, generator=g), components=5
    )
    assert fitted.shape == (30, 4, 5) and other.shape == (3, 4, 5)
    assert torch.allclose(fitted.flatten(0, 1).std(0), torch.ones(5), atol=1e-4)


def advice(**changes) -> Advice:
    """An AI that is wrong in a quarter of 400 cases; the explanation of a wrong answer looks wrong."""
    truth = np.arange(400) % 2 == 0
    right = np.arange(400) % 8 < 6
    probability = np.where(truth == right, 0.8, 0.2)
    plain = {"conviction": np.full(400, 0.5), "oddness": np.where(right, 0.0, 1.0)}
    return Advice(truth, probability, **(plain | changes))


RIGHT = np.arange(400) % 8 < 6
ONE = {"persuasion": (0.0,), "detection": (0.0,)}


def test_a_persuasive_wrong_explanation_lowers_the_score():
    lures = read(advice(conviction=np.where(RIGHT, 0.0, 1.0), oddness=np.zeros(400)))
    assert (np.diff(lures.accuracy[:, 0]) < 0).all(), "the more it persuades, the worse the team"
    assert lures.gain[-1, 0] < -1 and lures.accuracy[-1, 0] < lures.unexplained
    assert (np.diff(lures.over_reliance[:, 0]) > 0).all()
    assert (np.diff(lures.brier[:, 0]) > 0).all()
    honest = read(advice(conviction=np.where(RIGHT, 1.0, 0.0)))
    assert (np.diff(honest.accuracy[:, 0]) > 0).all() and (np.diff(honest.under_reliance[:, 0]) < 0).all()


def test_detection_only_helps_where_the_oddness_marks_errors():
    marks = read(advice())
    assert (np.diff(marks.accuracy[0]) > 0).all() and (np.diff(marks.over_reliance[0]) < 0).all()
    misleads = read(advice(oddness=np.where(RIGHT, 1.0, 0.0)))
    assert (np.diff(misleads.accuracy[0]) < 0).all()
    blank = read(advice(conviction=np.zeros(400), oddness=np.zeros(400)), draws=20)
    assert np.allclose(blank.gain, 0), "an explanation that shows nothing changes nothing"


def test_the_ends_are_those_of_the_reader_and_the_ai():
    # expectation over draws, so to the error of the draws
    found = read(advice())
    assert np.isclose(read(advice(), trust=-50.0, **ONE).unexplained, found.alone, atol=0.01)
    assert np.isclose(read(advice(), trust=50.0, **ONE).unexplained, 0.75) and found.ai == 0.75
    assert ((found.calibration_error >= 0) & (found.calibration_error <= 1)).all()
    assert (found.brier > 0).all() and (found.brier < 0.3).all()


def test_conviction_is_focus():
    flat, spot = np.ones((1, 16)), np.eye(16)[:1]
    assert np.isclose(conviction(flat)[0], 0) and np.isclose(conviction(spot)[0], 1)
    assert conviction(np.zeros((1, 16)))[0] == 0
    assert 0 < conviction(np.abs(np.random.default_rng(0).standard_normal((1, 16))))[0] < 0.3


def test_advice_must_make_sense():
    with pytest.raises(UsageError, match="oddness"):
        advice(oddness=np.full(400, 1.5))
    with pytest.raises(UsageError, match="truth"):
        read(Advice(np.ones(4, bool), np.full(4, 0.6), np.zeros(4), np.zeros(4)))
