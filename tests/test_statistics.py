"""The statistics agree with scikit-learn and scipy on random cases, and keep their promises in simulation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from mechinterp.errors import UsageError
from mechinterp.metrics import contingency
from mechinterp.metrics import statistics as st


def test_auroc_agrees_with_sklearn_on_a_thousand_random_cases():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        n = int(rng.integers(4, 40))
        scores = rng.integers(0, rng.integers(2, 12), n).astype(float)  # many ties
        labels = rng.integers(0, 2, n)
        if labels.min() == labels.max():
            assert np.isnan(st.auroc(scores, labels))
        else:
            assert st.auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_weighted_auroc_equals_repeating_images():
    rng = np.random.default_rng(1)
    for _ in range(200):
        n = int(rng.integers(4, 30))
        scores, labels = rng.integers(0, 6, n).astype(float), rng.integers(0, 2, n)
        weights = rng.integers(0, 4, (3, n))
        got = st.weighted_auroc(scores, labels, weights)
        for b in range(3):
            expected = st.auroc(np.repeat(scores, weights[b]), np.repeat(labels, weights[b]))
            assert got[b] == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_stratified_auroc_is_the_plain_one_in_one_stratum_and_its_p_is_scipys():
    rng = np.random.default_rng(2)
    columns, labels = rng.integers(0, 5, (60, 20)).astype(float), rng.integers(0, 2, 60)
    area, p = st.stratified_auroc_columns(columns, labels, np.zeros(60))
    assert np.allclose(area, st.auroc_columns(columns, labels), atol=1e-12)
    for f in range(20):
        peer = stats.mannwhitneyu(
            columns[labels == 1, f], columns[labels == 0, f], use_continuity=False, method="asymptotic"
        )
        assert p[f] == pytest.approx(peer.pvalue, rel=1e-9)


def test_stratified_auroc_removes_what_comes_only_through_the_stratum():
    rng = np.random.default_rng(3)
    stratum = rng.integers(0, 2, 4000)
    label = (rng.random(4000) < np.where(stratum == 1, 0.9, 0.1)).astype(int)
    column = stratum + rng.normal(size=4000)
    assert st.auroc(column, label) > 0.65
    area, _ = st.stratified_auroc_columns(column[:, None], label, stratum)
    assert abs(area[0] - 0.5) < 0.03


def test_stratified_mean_difference_by_hand_and_under_weights():
    values = np.array([1.0, 3.0, 2.0, 10.0, 11.0, 12.0])
    attribute = np.array([1, 0, 0, 1, 1, 0])
    strata = np.array([0, 0, 0, 1, 1, 1])
    # stratum 0: 1 - 2.5 = -1.5 with weight 2/3; stratum 1: 10.5 - 12 = -1.5 with weight 2/3
    assert st.stratified_mean_difference(values, attribute, strata)[0] == pytest.approx(-1.5)
    weights = np.array([[1, 1, 1, 1, 1, 1], [2, 1, 1, 0, 3, 1]])
    got = st.stratified_mean_difference(values, attribute, strata, weights)
    repeated = [np.repeat(x, weights[1]) for x in (values, attribute, strata)]
    assert got[1] == pytest.approx(st.stratified_mean_difference(*repeated)[0])
    assert np.isnan(st.stratified_mean_difference(values, np.ones(6), strata)[0])


def test_bootstrap_moves_all_images_of_a_patient_together_and_is_seeded():
    boot = st.PatientBootstrap.of(["a", "a", "b", "c"], draws=500, seed=4)
    assert (boot.weights[:, 0] == boot.weights[:, 1]).all()
    assert (boot.weights[:, 1:].sum(1) == 3).all()
    assert (boot.weights == st.PatientBootstrap.of(["a", "a", "b", "c"], draws=500, seed=4).weights).all()
    with pytest.raises(UsageError):
        st.PatientBootstrap.of([])


def test_interval_is_nan_when_most_draws_have_one_class():
    assert np.isnan(st.percentile_interval(np.array([0.5, np.nan, np.nan]))[0])


def test_auroc_interval_covers_95_percent_of_clustered_cohorts():
    """2,000 cohorts of 100 patients with 1-3 images that share a patient effect; the truth is from the normal model."""
    rng = np.random.default_rng(5)
    truth = stats.norm.cdf(1.2 / np.sqrt(2 * (1 + 0.5)))
    covered = 0
    for cohort in range(2000):
        patients = np.repeat(np.arange(100), rng.integers(1, 4, 100))
        labels = (np.arange(100) % 2)[patients]
        scores = 1.2 * labels + rng.normal(0, np.sqrt(0.5), 100)[patients] + rng.normal(size=len(patients))
        boot = st.PatientBootstrap.of(patients.astype(str), draws=200, seed=cohort)
        low, high = st.percentile_interval(boot.auroc(scores, labels))
        covered += low <= truth <= high
    assert 0.93 <= covered / 2000 <= 0.97


def test_difference_interval_covers_95_percent():
    rng = np.random.default_rng(6)
    covered = 0
    for cohort in range(1000):
        patients = np.repeat(np.arange(80), 2)
        attribute, strata = rng.integers(0, 2, 160), (np.arange(80) % 2)[patients]
        values = 0.5 * attribute + 2.0 * strata + rng.normal(size=80)[patients] + rng.normal(size=160)
        boot = st.PatientBootstrap.of(patients.astype(str), draws=200, seed=cohort)
        low, high = st.percentile_interval(boot.difference(values, attribute, strata))
        covered += low <= 0.5 <= high
    assert 0.925 <= covered / 1000 <= 0.97


def test_false_discovery_adjustment_agrees_with_scipy():
    rng = np.random.default_rng(7)
    for _ in range(200):
        p = rng.random(int(rng.integers(1, 30))) ** 2
        assert np.allclose(st.benjamini_hochberg(p), stats.false_discovery_control(p), atol=1e-12)


def test_holm_by_hand_skips_missing_and_keeps_family_wise_error():
    assert np.allclose(st.holm(np.array([0.01, 0.04, 0.03])), [0.03, 0.06, 0.06])
    adjusted = st.holm(np.array([0.01, np.nan, 0.04]))
    assert np.isnan(adjusted[1]) and np.allclose(adjusted[[0, 2]], [0.02, 0.04])
    rng = np.random.default_rng(8)
    wrong = sum((st.holm(rng.random(12)) < 0.05).any() for _ in range(4000)) / 4000
    assert 0.035 < wrong < 0.06


def test_permutation_p_is_uniform_under_no_effect_and_never_zero():
    rng = np.random.default_rng(9)
    p = np.array([st.permutation_p(rng.normal(), rng.normal(size=99)) for _ in range(2000)])
    assert p.min() >= 0.01
    assert 0.03 < (p <= 0.05).mean() < 0.07
    assert np.isnan(st.permutation_p(float("nan"), np.ones(3))) and np.isnan(st.permutation_p(1.0, np.array([])))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e6])
def test_signs_that_all_agree_have_the_p_of_their_number_in_any_unit(size):
    """Six differences of one sign have p about 2 of 64, whatever their size: a draw of the same signs is a tie."""
    rng = np.random.default_rng(0)
    p = [st.sign_flip_p(size * rng.uniform(0.1, 1, 6), seed=i) for i in range(100)]
    assert min(p) > 0.02 and max(p) < 0.045  # a draw's binomial error is .0025
    both = rng.standard_normal(8)
    every = np.abs(np.array(list(product([-1, 1], repeat=8))) @ both)
    exact = float((every >= abs(both.sum()) - 1e-9).mean())
    assert st.sign_flip_p(size * both) == pytest.approx(exact, abs=0.03)


def test_smallest_detectable_effect_is_found_80_percent_of_the_time():
    effect = st.smallest_detectable_effect(0.1)
    assert effect == pytest.approx(0.2801585, abs=1e-6)
    rng = np.random.default_rng(10)
    assert 0.78 < (np.abs(rng.normal(effect, 0.1, 20000)) > 1.959964 * 0.1).mean() < 0.82


def test_odds_ratio_with_haldane_correction_by_hand():
    exposure, outcome = np.array([1] * 10 + [0] * 10), np.array([1] * 10 + [0] * 10)
    found = contingency.odds_ratio(exposure, outcome)
    assert found.value == pytest.approx(10.5 * 10.5 / (0.5 * 0.5))
    assert found.ci95[0] < found.value < found.ci95[1]
    assert np.isnan(contingency.odds_ratio(np.ones(20), outcome).value)


def test_mantel_haenszel_agrees_with_statsmodels_numbers_and_covers():
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(400):
        strata = rng.integers(0, 4, 400)
        exposure = (rng.random(400) < 0.2 + 0.15 * strata).astype(int)
        logit = -1.5 + 0.6 * strata + np.log(2.0) * exposure
        outcome = (rng.random(400) < 1 / (1 + np.exp(-logit))).astype(int)
        low, high = contingency.mantel_haenszel(exposure, outcome, strata).ci95
        covered += low <= 2.0 <= high
    assert 0.92 <= covered / 400 <= 0.98
    # one stratum: the Mantel-Haenszel ratio is the plain cross product
    one = contingency.mantel_haenszel(np.array([1, 1, 1, 0, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0, 0]), np.zeros(7))
    assert one.value == pytest.approx(2 * 3 / (1 * 1))


def test_two_thousand_draws_are_fast():
    import time

    rng = np.random.default_rng(12)
    patients, scores, labels = (np.arange(800) // 2).astype(str), rng.normal(size=800), rng.integers(0, 2, 800)
    started = time.process_time()
    boot = st.PatientBootstrap.of(patients, draws=2000)
    boot.auroc(scores, labels)
    assert time.process_time() - started < 2.0
