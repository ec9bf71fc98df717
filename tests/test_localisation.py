"""Localisation: known answers, chance of random maps, agreement with scikit-learn, and the statuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from mechinterp.errors import UsageError
from mechinterp.explain.ask import patch_owner
from mechinterp.metrics.localisation import SCORES, average_precision, localise, mask_shares


def discs(n=40, size=32, seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    middle, radius = rng.uniform(8, size - 8, (n, 2, 1, 1)), rng.uniform(3, 7, (n, 1, 1))
    return (y - middle[:, 0]) ** 2 + (x - middle[:, 1]) ** 2 < radius**2


MASKS = discs()
INSIDE = mask_shares(MASKS, 8, 8)


def test_shares_follow_the_owner_of_each_pixel():
    owner = patch_owner(32, 32, 8, 8).numpy()
    assert np.isclose(INSIDE[3, 20], MASKS[3][owner == 20].mean())
    with pytest.raises(UsageError, match="do not fall"):
        mask_shares(MASKS, 5, 8)


def test_the_mask_itself_is_the_best_map_and_its_negative_the_worst():
    best, worst = localise(INSIDE, INSIDE), localise(1 - INSIDE, INSIDE)
    for name in SCORES:
        assert (best[name].score.value > best[name].chance).all(), name
        assert (worst[name].score.value < worst[name].chance + 1e-12).all(), name
    pixels = MASKS.reshape(len(MASKS), -1).astype(float)
    exact = localise(pixels, pixels)
    assert all(np.allclose(exact[name].score.value, 1) for name in ("pointing_game", "auprc", "top_k"))
    assert np.allclose(exact["mass_ratio"].score.value, 1 / pixels.mean(1))


def test_what_speaks_against_the_target_is_no_mass():
    """Only positive relevance counts: 3 of 4 inside a quarter of the area are 3 times chance, whatever is negative."""
    maps, inside = np.array([[3.0, -50.0, 1.0, -7.0]]), np.array([[1.0, 0.0, 0.0, 0.0]])
    assert localise(maps, inside)["mass_ratio"].score.value[0] == pytest.approx(0.75 / 0.25)


def test_random_maps_are_at_their_chance():
    rng = np.random.default_rng(1)
    inside = np.repeat(INSIDE, 30, 0)
    found = localise(np.exp(rng.standard_normal(inside.shape)), inside)
    for name, located in found.items():
        gap = located.above_chance.value
        assert abs(gap.mean()) < 3.5 * gap.std() / len(gap) ** 0.5, name
    # on few patches the area is too low a chance for the AUPRC
    assert (found["auprc"].chance > inside.mean(1) + 0.01).all()


def test_average_precision_is_scikit_learns():
    rng = np.random.default_rng(2)
    maps = rng.integers(0, 6, (30, 50)).astype(float)  # many ties
    labels = rng.random((30, 50)) < 0.2
    labels[:, 0] = True
    theirs = [average_precision_score(y, m) for y, m in zip(labels, maps, strict=True)]
    assert np.allclose(average_precision(maps, labels.astype(float)), theirs)


def test_a_map_of_patches_scores_as_its_pixels():
    rng = np.random.default_rng(3)
    maps = rng.standard_normal(INSIDE.shape)
    owner = patch_owner(32, 32, 8, 8).numpy().ravel()
    flat_mask = MASKS.reshape(len(MASKS), -1).astype(float)
    ours, pixels = localise(maps, INSIDE), localise(maps[:, owner], flat_mask)
    for name in ("pointing_game", "auprc", "mass_ratio"):
        assert np.allclose(ours[name].score.value, pixels[name].score.value), name


def test_statuses_instead_of_numbers():
    maps = np.random.default_rng(0).standard_normal((5, 64))
    inside = INSIDE[:5].copy()
    maps[0], maps[1, 3], maps[2] = 2.0, np.nan, -np.abs(maps[2])
    inside[3], inside[4] = 0.0, 1.0
    found = localise(maps, inside)
    assert found["auprc"].score.status == ("const_attr", "nonfinite", "ok", "no_region", "no_region")
    assert found["mass_ratio"].score.status[2] == "no_mass", "nothing of the map is positive"
    assert np.isnan(found["pointing_game"].score.value[[0, 1, 3, 4]]).all()
    assert found["auprc"].score.coverage == 0.2
    with pytest.raises(UsageError, match="inside"):
        localise(maps, inside[:, :3])
    with pytest.raises(UsageError, match=r"\[0, 1\]"):
        localise(maps, inside * 3)


def test_ties_give_the_expected_share():
    maps = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).double().numpy()
    inside = np.array([[1.0, 0.0, 0.0, 0.0]])
    found = localise(maps, inside)
    assert found["pointing_game"].score.value[0] == found["top_k"].score.value[0] == 0.5
