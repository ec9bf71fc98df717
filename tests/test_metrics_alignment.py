"""Concept alignment, matching and pairs: known answers, brute force, and agreement with scikit-learn."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from saes.metrics.alignment import (
    align,
    auroc_table,
    average_precision,
    average_precision_table,
    best_thresholds,
    f_beta,
    f_score,
    feature_tests,
    sensitivity,
)
from saes.metrics.matching import fbmp, match, match_score, tapa_score
from saes.nulls.labels import permuted_labels, permuted_rows

SEEDS = st.integers(0, 10**6)


def random_case(seed, n=60, latents=5, ties=True):
    chance = np.random.default_rng(seed)
    acts = chance.normal(size=(n, latents)).clip(0)
    labels = (chance.random(n) < 0.4).astype(float)
    labels[:2] = 0, 1
    return (np.round(acts, 1) if ties else acts), labels


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("ties", [True, False])
def test_agreement_with_scikit_learn(seed, ties):
    from sklearn import metrics

    acts, y = random_case(seed, ties=ties)
    labels = np.stack([y, 1 - y], 1)
    labels[3, 0] = np.nan
    known = np.isfinite(labels[:, 0])
    ap, area = average_precision_table(acts, labels), auroc_table(acts, labels)
    for j in range(acts.shape[1]):
        assert ap[j, 0] == pytest.approx(metrics.average_precision_score(y[known], acts[known, j]))
        assert area[j, 0] == pytest.approx(metrics.roc_auc_score(y[known], acts[known, j]))
        assert area[j, 1] == pytest.approx(metrics.roc_auc_score(1 - y, acts[:, j]))
        fires = acts[:, j] > 0.5
        assert f_score(fires, y) == pytest.approx(metrics.f1_score(y, fires))
        assert f_score(fires, y, beta=0.5) == pytest.approx(metrics.fbeta_score(y, fires, beta=0.5))


@pytest.mark.parametrize("seed", range(5))
def test_weights_are_repeated_images(seed):
    from sklearn import metrics

    acts, y = random_case(seed)
    weights = np.random.default_rng(seed).integers(0, 4, size=(6, len(y))).astype(float)
    scores, fires = average_precision(acts[:, 0], y, weights), f_score(acts[:, 0] > 0.3, y, weights)
    for draw, w in enumerate(weights.astype(int)):
        again = np.repeat(np.arange(len(y)), w)
        assert scores[draw] == pytest.approx(metrics.average_precision_score(y[again], acts[again, 0]))
        assert fires[draw] == pytest.approx(metrics.f1_score(y[again], acts[again, 0] > 0.3))


@given(SEEDS, st.sampled_from([0.5, 1.0, 2.0]))
@settings(max_examples=25, deadline=None)
def test_best_threshold_is_the_best_of_all(seed, beta):
    acts, y = random_case(seed, n=25)
    found, score = best_thresholds(acts, y, beta)
    for j, z in enumerate(acts.T):
        tried = [f_score(z > t, y, beta=beta) for t in np.unique(np.r_[0.0, z])]
        assert score[j] == pytest.approx(max(tried))
        assert found[j] == np.inf or f_score(z > found[j], y, beta=beta) == pytest.approx(score[j])


def test_a_dead_latent_and_a_missing_class():
    dead = np.zeros((6, 1))
    threshold, score = best_thresholds(dead, np.array([1.0, 0, 0, 1, 0, 0]))
    assert score[0] == 0 and threshold[0] == np.inf
    threshold, score = best_thresholds(np.ones((3, 1)), np.zeros(3))
    assert np.isnan(score[0]) and threshold[0] == np.inf
    assert np.isnan(average_precision(np.arange(3.0), np.zeros(3))) and np.isnan(f_score(np.ones(3, bool), np.zeros(3)))
    assert f_beta(np.array([0.0]), np.array([0.0]), 0.0)[0] == 0


def held_out_case(seed=0, n=300, latents=40):
    """Latent 7 is the concept on every split; latent 9 is it on train only."""
    chance = np.random.default_rng(seed)
    split = np.repeat(["train", "val", "test"], n // 3)
    y = (chance.random(n) < 0.3).astype(float)
    acts = chance.random((n, latents)) * 0.8
    acts[:, 7] = y * 0.5 + chance.random(n) * 0.6
    return acts, y, split


def test_align_reads_test_images_only_at_the_end():
    acts, y, split = held_out_case()
    before = align(acts, y[:, None], split)
    assert before.latent[0] == 7 and before.f1[0] > 0.7
    z = acts[split == "test", 7]
    assert before.f1[0] == f_score(z > before.threshold[0], y[split == "test"])
    other = acts.copy()
    other[split == "test"] = np.random.default_rng(1).random((100, acts.shape[1]))
    after = align(other, y[:, None], split)
    assert after.latent[0] == 7 and after.threshold[0] == before.threshold[0] and after.f1[0] < before.f1[0]
    moved = acts.copy()
    moved[split == "val", 7] += 10  # the threshold follows validation
    assert align(moved, y[:, None], split).threshold[0] > 10
    winner = acts.copy()
    winner[split == "test", 9] = y[split == "test"]  # best on test, not on train: not chosen
    assert align(winner, y[:, None], split).latent[0] == 7


def test_noise_has_no_held_out_advantage():
    """The best of 400 noise latents on train has AUROC of about 0.5 on test."""
    chance = np.random.default_rng(0)
    split = np.repeat(["train", "val", "test"], 200)
    labels = (chance.random((600, 20)) < 0.3).astype(float)
    found = align(chance.random((600, 400)), labels, split)
    assert found.auroc.mean() == pytest.approx(0.5, abs=0.04)


def test_sensitivity():
    fires = np.array([[1, 0], [1, 1], [0, 1], [0, 0]], bool)
    labels = np.array([[1.0, 0], [1, 0], [1, 0], [0, 0]])
    found = sensitivity(fires, labels, np.array([0, 1]))
    assert found[0] == pytest.approx(2 / 3) and np.isnan(found[1])


# ------------------------------------------------------------------------------------------------------ matching


def test_fbmp_puts_a_split_concept_together():
    """Three latents hold a third of the concept each; a fourth holds all of it and as much else."""
    y = np.repeat([1.0, 1, 1, 0, 0, 0], 10)
    thirds = np.zeros((60, 3), bool)
    for part in range(3):
        thirds[part * 10 : part * 10 + 10, part] = True
    loose = np.ones((60, 1), bool)
    fires = np.hstack([thirds, loose])
    assert fbmp(fires, y) == (0, 1, 2)  # precision first: the loose latent has F_0.5 of 0.56, a third has 0.71
    assert fbmp(fires, y, k=1, beta=2.0) == (3,)
    assert fbmp(fires, y, k=2) == (0, 1)
    assert fbmp(np.hstack([fires, y[:, None] > 0]), y) == (4,)  # one latent suffices: no second is taken
    assert fbmp(np.zeros((60, 3), bool), y) == () and fbmp(fires, np.zeros(60)) == ()


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_fbmp_properties(seed):
    chance = np.random.default_rng(seed)
    y, fires = (chance.random(40) < 0.4).astype(float), chance.random((40, 8)) < 0.3
    chosen = fbmp(fires, y, k=4)
    assert len(chosen) == len(set(chosen)) <= 4
    steps = [f_score(fires[:, list(chosen[:n])].any(1), y) for n in range(1, len(chosen) + 1)]
    assert all(a < b for a, b in itertools.pairwise(steps))
    if y.any() and fires[y > 0].any():
        first = [f_score(column, y, beta=0.5) for column in fires.T]
        assert chosen[0] == int(np.argmax(first))


def test_match_score_is_of_test_images_at_validation_thresholds():
    acts, y, split = held_out_case()
    zero, (at_zero,) = match_score(acts, y[:, None], split)
    held, (at_val,) = match_score(acts, y[:, None], split, thresholds="val")
    assert at_val.latents[0] == 7 and at_val.thresholds[0] > 0.3 and held > zero + 0.2
    test = split == "test"
    assert held == at_val.f1 == f_score(at_val.fires(acts[test]), y[test])
    assert set(at_zero.thresholds) == {0.0} and zero == at_zero.f1
    other = acts.copy()
    other[test] = 0
    assert match(other, y, split, thresholds="val").thresholds == at_val.thresholds
    assert match(other, y, split, thresholds="val").f1 == 0


def test_tapa_score():
    without = np.array([[0, 0], [0, 0], [1, 0], [0, 0]], bool)
    present = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], bool)
    found = tapa_score(without, present)
    assert found.pairs.tolist() == [1, 1, 0, 0] and found.added == 0.5 and found.removed == -0.5
    assert found.value == 1.0 and tapa_score(present, without).value == -1.0
    assert tapa_score(np.zeros((3, 0), bool), np.zeros((3, 0), bool)).value == 0.0  # no latent matched


# ----------------------------------------------------------------------------------------- labels without meaning


def test_permuted_rows_move_patients_as_blocks():
    patients = np.array([f"p{i // 2}" for i in range(200)])
    rows = permuted_rows(patients, seed=0)
    assert sorted(rows) == list(range(200)) and not np.array_equal(rows, np.arange(200))
    assert all(set(patients[rows[patients == name]]) == {patients[rows[i]]} for i, name in enumerate(patients))
    assert np.array_equal(rows, permuted_rows(patients, seed=0))
    assert not np.array_equal(rows, permuted_rows(patients, seed=1))


def test_permuted_labels_stay_in_their_split():
    chance = np.random.default_rng(0)
    patients, split = np.array([f"p{i}" for i in range(90)]), np.repeat(["train", "val", "test"], 30)
    labels = (chance.random((90, 3)) < [0.2, 0.5, 0.8]).astype(float)
    shuffled = permuted_labels(labels, patients, split, seed=3)
    assert not np.array_equal(shuffled, labels)
    for name in ("train", "val", "test"):
        rows = split == name
        assert sorted(map(tuple, shuffled[rows])) == sorted(map(tuple, labels[rows]))


def test_feature_tests_hold_their_level_with_patients_as_the_unit():
    """Latents and labels are both shared by a patient's four images: without an association p is still uniform."""
    chance = np.random.default_rng(0)
    patients = np.repeat(np.arange(150).astype(str), 4)
    acts = np.repeat(chance.random((150, 200)), 4, axis=0)
    y = np.repeat((chance.random(150) < 0.5).astype(float), 4)[:, None]
    found = feature_tests(acts, y, patients)
    assert (found.p < 0.05).mean() == pytest.approx(0.05, abs=0.03) and found.discoveries() <= 3
    naive = [stats.mannwhitneyu(z[y[:, 0] > 0], z[y[:, 0] < 1]).pvalue for z in acts.T[:60]]
    assert (np.array(naive) < 0.05).mean() > 0.15  # images as independent: far too many
    acts[:, :20] += y
    found = feature_tests(acts, y, patients)
    assert (found.q[:20] < 0.05).all() and 20 <= found.discoveries() <= 25
    assert np.isnan(feature_tests(acts, np.ones((600, 1)), patients).p).all()
