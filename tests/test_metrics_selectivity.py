"""Monosemanticity in both readings, corrected for chance, and label entropy: brute force and known answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechinterp.errors import UsageError
from saes.metrics.selectivity import (
    chance_corrected,
    label_divergence,
    label_entropy,
    label_shares,
    mean_cosine,
    monosemanticity,
    monosemanticity_pairs,
    weighted_monosemanticity,
)


def pairs_by_hand(acts, embeddings):
    """MS of Pach et al. with the double loop: as their code divides, and by the number of pairs."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    code, fixed = [], []
    for z in acts.T:
        a = (z - z.min()) / (z.max() - z.min())
        top = bottom = 0.0
        for n in range(len(a)):
            for m in range(n + 1, len(a)):
                top += a[n] * a[m] * (unit[n] @ unit[m])
                bottom += a[n] * a[m]
        code.append(top / bottom)
        fixed.append(2 * top / (len(a) * (len(a) - 1)))
    return np.array(code), np.array(fixed)


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_fast_form_equals_the_double_loop(seed):
    chance = np.random.default_rng(seed)
    acts, embeddings = chance.random((12, 3)), chance.normal(size=(12, 4))
    code, fixed = pairs_by_hand(acts, embeddings)
    np.testing.assert_allclose(monosemanticity(acts, embeddings), code, atol=1e-10)
    np.testing.assert_allclose(monosemanticity_pairs(acts, embeddings), fixed, atol=1e-10)
    scaled = monosemanticity(7 * acts + 3, embeddings * chance.uniform(1, 5, (12, 1)))
    np.testing.assert_allclose(scaled, code, atol=1e-9)


def test_agreement_with_scikit_learn_on_the_chance_level():
    from sklearn.metrics.pairwise import cosine_similarity

    embeddings = np.random.default_rng(0).normal(size=(30, 5)) + 1
    cosine = cosine_similarity(embeddings)
    assert mean_cosine(embeddings) == pytest.approx(cosine[np.triu_indices(30, 1)].mean())


@pytest.mark.parametrize("offset", [0.0, 1.0, 4.0])  # the last is the narrow cone of embeddings of one kind of image
def test_chance_corrected_score_does_not_depend_on_the_cone(offset):
    chance = np.random.default_rng(0)
    groups = chance.integers(0, 20, 600)
    embeddings = chance.normal(size=(20, 64))[groups] + chance.normal(size=(600, 64)) * 0.5
    embeddings[:, 0] += offset * 8
    perfect, blind = (groups[:, None] == np.arange(20)).astype(float), chance.random((600, 20))
    level = mean_cosine(embeddings)
    good, bad = (chance_corrected(monosemanticity(z, embeddings), level) for z in (perfect, blind))
    assert abs(bad.mean()) < 0.01 and good.mean() > 0.6
    if offset == 4.0:
        assert monosemanticity(blind, embeddings).mean() > 0.85  # uncorrected, noise looks monosemantic


def test_latents_without_a_pair_are_nan():
    acts = np.zeros((10, 3))
    acts[:, 1] = 0.4
    acts[3, 2] = 1.0  # one image alone makes no pair
    embeddings = np.random.default_rng(0).normal(size=(10, 4))
    assert np.isnan(monosemanticity(acts, embeddings)).all()
    assert np.isnan(monosemanticity_pairs(acts, embeddings)[:2]).all()
    with pytest.raises(UsageError, match="none of them zero"):
        mean_cosine(np.zeros((3, 2)))


def test_weights_leave_out_and_do_not_pair_copies():
    chance = np.random.default_rng(1)
    acts, embeddings = chance.random((15, 4)), chance.normal(size=(15, 3))
    acts[0], acts[1] = 0, 1  # so that min and max stay when images are left out
    weights = np.ones((2, 15))
    weights[1, 10:] = 0
    found = weighted_monosemanticity(acts, embeddings, weights)
    np.testing.assert_allclose(found[0], monosemanticity(acts, embeddings))
    np.testing.assert_allclose(found[1], monosemanticity(acts[:10], embeddings[:10]))
    doubled = weighted_monosemanticity(acts, embeddings, weights[:1] * 2)
    np.testing.assert_allclose(doubled[0], found[0])


def test_label_entropy_by_hand_and_by_scipy():
    from scipy.stats import entropy

    labels = np.eye(3)[[0, 0, 0, 1, 1, 2]]
    acts = np.array([[1.0, 1], [1, 0], [1, 0], [0, 1], [0, 0], [0, 2]])
    shares = label_shares(acts, labels, least=1)
    assert shares.tolist() == [[1, 0, 0], [0.25, 0.25, 0.5]]
    assert label_entropy(acts, labels, least=1).tolist() == pytest.approx([0, 1.5 * np.log(2)])
    prior = np.array([3, 2, 1]) / 6
    expected = [entropy(p, prior) for p in shares]
    assert label_divergence(acts, labels, least=1).tolist() == pytest.approx(expected)
    assert label_shares(acts, labels, top=1, least=1)[1].tolist() == [0, 0, 1]  # only the strongest image counts
    assert np.isnan(label_entropy(acts, labels, least=4)).all()  # too few images to say


def test_divergence_does_not_reward_a_common_label():
    chance = np.random.default_rng(0)
    labels = np.eye(2)[(chance.random(3000) < 0.05).astype(int)]
    blind = chance.random((3000, 5))
    assert (label_entropy(blind, labels, top=3000) < 0.25).all()  # of at most 0.69: looks selective
    assert (label_divergence(blind, labels, top=3000) < 0.001).all()
