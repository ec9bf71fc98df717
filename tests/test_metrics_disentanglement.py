"""DCI, MIG, RAVEL, k-sparse probes and spatial scores: known answers and agreement with scikit-learn and scipy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechinterp.errors import UsageError
from saes.metrics.disentanglement import dci, interchange, mig, mutual_information, probe_importance, ravel
from saes.metrics.probing import k_sparse_probe, linear_probe, rank_by_mean_difference
from saes.metrics.spatial import (
    best_iou_threshold,
    grid_weights,
    iou,
    mask_precision,
    morans_i,
    patch_masks,
    pointing,
)


def coded(n=400, concepts=3, seed=0):
    """Labels, and latents of which 0, 1, 2 are the labels, 3 mixes two, 4 and 5 are noise."""
    chance = np.random.default_rng(seed)
    labels = (chance.random((n, concepts)) < 0.5).astype(float)
    noise = chance.random((n, 2))
    return np.column_stack([labels * [1, 2, 3], labels[:, 0] + labels[:, 1], noise]), labels


def test_dci_known_answers():
    perfect = dci(np.eye(4) * [[1], [2], [3], [4]])
    assert (perfect.disentanglement, perfect.completeness) == (pytest.approx(1), pytest.approx(1))
    mixed = dci(np.ones((5, 4)))
    assert (mixed.disentanglement, mixed.completeness) == (pytest.approx(0), pytest.approx(0))
    half = dci(np.array([[1.0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]))
    assert half.per_latent[:2].tolist() == pytest.approx([1 - np.log(2) / np.log(4), 1]) and np.isnan(
        half.per_latent[2]
    )
    assert half.disentanglement == pytest.approx(2 / 3 * 0.5 + 1 / 3)  # weighted by mass
    assert np.isnan(half.per_concept[3]) and half.completeness == pytest.approx(1)
    assert np.isnan(dci(np.zeros((2, 2))).disentanglement)


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_dci_agrees_with_scipy_entropy(seed):
    from scipy.stats import entropy

    r = np.random.default_rng(seed).random((6, 4))
    found = dci(r)
    assert found.per_latent.tolist() == pytest.approx((1 - entropy(r, base=4, axis=1)).tolist())
    assert found.completeness == pytest.approx((1 - entropy(r, base=6, axis=0)).mean())
    order = np.random.default_rng(seed).permutation(6)
    assert dci(3 * r[order]).disentanglement == pytest.approx(found.disentanglement)


@pytest.mark.parametrize("seed", range(4))
def test_mutual_information_agrees_with_scikit_learn(seed):
    from sklearn.metrics import mutual_info_score

    chance = np.random.default_rng(seed)
    labels = chance.integers(0, 3, (150, 2))
    acts = chance.normal(size=(150, 4)).clip(0) + labels[:, :1]
    found = mutual_information(acts, labels, bins=7)
    for j, z in enumerate(acts.T):
        codes = np.digitize(z, np.linspace(z.min(), z.max(), 8)[1:-1])
        for a in range(2):
            assert found[j, a] == pytest.approx(mutual_info_score(labels[:, a], codes), abs=1e-9)


def test_mig_known_answers():
    acts, labels = coded(2000)
    assert (mig(acts[:, :3], labels) > 0.95).all()
    twice = mig(np.column_stack([acts[:, 0], acts[:, 0], acts[:, 1]]), labels)
    assert twice[0] == pytest.approx(0) and twice[1] > 0.95 and twice[2] < 0.05
    assert np.isnan(mig(acts, np.ones((2000, 1)))).all()


def test_probe_importance_finds_the_latent_of_each_concept():
    acts, labels = coded()
    importance = probe_importance(acts[:, [0, 1, 2, 4, 5]], labels)
    assert importance.argmax(0).tolist() == [0, 1, 2]
    assert dci(importance).disentanglement > 0.9


def test_interchange_keeps_the_error_and_the_other_latents():
    generator = torch.Generator().manual_seed(0)
    W_dec, error = torch.randn(5, 8, generator=generator), torch.randn(3, 8, generator=generator)
    base, source = torch.rand(3, 5, generator=generator), torch.rand(3, 5, generator=generator)
    wanted = base.clone()
    wanted[:, [1, 4]] = source[:, [1, 4]]
    x = base @ W_dec + error
    torch.testing.assert_close(interchange(x, base, source, W_dec, [1, 4]), wanted @ W_dec + error)
    assert torch.equal(interchange(x, base, source, W_dec, []), x)


def test_ravel():
    base, source = np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), np.array([[1, 1], [1, 1], [1, 1], [0, 0]])
    nothing, everything = ravel(base, base, source, 0), ravel(source, base, source, 0)
    assert (nothing.cause, nothing.isolation, nothing.disentangle) == (0, 1, 0.5)
    assert (everything.cause, everything.isolation, everything.disentangle) == (1, 0, 0.5)
    ideal = base.copy()
    ideal[:, 0] = source[:, 0]
    assert ravel(ideal, base, source, 0).disentangle == 1
    ideal[0, 1] = source[0, 1]  # one of the three pairs that disagree on the other attribute leaks
    assert ravel(ideal, base, source, 0).isolation == pytest.approx(2 / 3)
    assert np.isnan(ravel(base, base, base, 0).cause)


# ------------------------------------------------------------------------------------------------------- probing


def probe_case(seed=0, n=600, d=30):
    chance = np.random.default_rng(seed)
    split = np.repeat(["train", "val", "test"], n // 3)
    y = (chance.random(n) < 0.4).astype(float)
    x = chance.normal(size=(n, d)) * 4 + 7
    x[:, 11] += 6 * y
    return x, y, split


def test_linear_probe_agrees_with_a_scikit_learn_pipeline():
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y, split = probe_case()
    train, val, test = (split == name for name in ("train", "val", "test"))
    fitted = {}
    for strength in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))
        fitted[strength] = pipeline.fit(x[train], y[train])
    best = max(fitted, key=lambda c: roc_auc_score(y[val], fitted[c].decision_function(x[val])))
    probe = linear_probe(x, y, split)
    assert probe is not None and probe.strength == best
    np.testing.assert_allclose(probe.scores(x[test]), fitted[best].decision_function(x[test]), atol=1e-4)


def test_probes_do_not_see_test_labels_or_missing_ones():
    x, y, split = probe_case()
    other = np.where(split == "test", 1 - y, y)
    probe, again = linear_probe(x, y, split), linear_probe(x, other, split)
    assert probe is not None and again is not None and np.array_equal(probe.weight, again.weight)
    assert k_sparse_probe(x, y, split, 2).latents == k_sparse_probe(x, other, split, 2).latents
    leak = x.copy()
    leak[:, 3] = np.where(split == "test", 90 * y, x[:, 3])  # tells the label, on test images only
    assert 3 not in k_sparse_probe(leak, y, split, 2).latents
    missing = np.where(np.arange(600) % 5 == 0, np.nan, y)
    kept = np.arange(600) % 5 != 0
    left_out = linear_probe(x[kept], y[kept], split[kept])
    assert left_out is not None
    np.testing.assert_allclose(linear_probe(x, missing, split).weight, left_out.weight)  # type: ignore[union-attr]
    assert linear_probe(x, np.where(split == "val", 0.0, y), split) is None
    assert np.isnan(k_sparse_probe(x, np.zeros(600), split, 2).auroc)


def test_k_sparse_probe():
    x, y, split = probe_case()
    acts = np.maximum(x - 7, 0)
    one, five = k_sparse_probe(acts, y, split, 1), k_sparse_probe(acts, y, split, 5)
    assert one.latents == (11,) and five.latents[0] == 11 and len(five.latents) == 5
    assert one.auroc > 0.8 and five.auroc == pytest.approx(one.auroc, abs=0.06)


def test_ranking_is_that_of_sae_probes():
    """Formula of run_sae_evals.py, sae-probes 0.4.2."""
    chance = np.random.default_rng(0)
    acts, y = chance.normal(size=(80, 20)).clip(0), chance.random(80) < 0.5
    t = torch.from_numpy(acts)
    scaled = t / (t.abs().sum(0) / ((t != 0).sum(0) + 1e-6) + 1e-6)
    difference = scaled[y].mean(0) - scaled[~y].mean(0)
    assert rank_by_mean_difference(acts, y).tolist() == torch.argsort(difference.abs(), descending=True).tolist()


# ------------------------------------------------------------------------------------------------------- spatial


def moran_by_hand(values, rows, columns, corners):
    """The definition, pair by pair."""
    grid, mean = values.reshape(rows, columns), values.mean()
    top = mass = 0.0
    for y in range(rows):
        for x in range(columns):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    near = (dy or dx) and (corners or not (dy and dx))
                    if near and 0 <= y + dy < rows and 0 <= x + dx < columns:
                        top += (grid[y, x] - mean) * (grid[y + dy, x + dx] - mean)
                        mass += 1
    return rows * columns / mass * top / ((values - mean) ** 2).sum()


@pytest.mark.parametrize("neighbours", ["rook", "queen"])
def test_morans_i(neighbours):
    chance = np.random.default_rng(0)
    maps = chance.random((3, 2, 30))
    weights = grid_weights(5, 6, neighbours)
    found = morans_i(maps, weights)
    for i in range(3):
        for j in range(2):
            assert found[i, j] == pytest.approx(moran_by_hand(maps[i, j], 5, 6, neighbours == "queen"))
    board = np.indices((6, 6)).sum(0).ravel() % 2
    assert morans_i(board.astype(float), grid_weights(6, 6, "rook")) == pytest.approx(-1)
    assert np.isnan(morans_i(np.full((1, 36), 0.3), grid_weights(6, 6, "rook"))[0])
    many = morans_i(chance.random((4000, 30)), weights)
    assert many.mean() == pytest.approx(-1 / 29, abs=0.01)


def test_iou_pointing_and_precision():
    heat = np.zeros((3, 4, 4))
    heat[0, :2, :2], heat[1, 3, 3] = 1.0, 2.0
    masks = np.zeros((3, 4, 4), bool)
    masks[0, :2, :3], masks[1, 0, 0] = True, True
    assert iou(heat, masks, 0.5)[:2].tolist() == pytest.approx([4 / 6, 0]) and np.isnan(iou(heat, masks, 0.5)[2])
    assert pointing(heat, masks)[:2].tolist() == [1, 0] and np.isnan(pointing(heat, masks)[2])
    flat = pointing(np.ones((1, 4, 4)), masks[:1])
    assert flat[0] == pytest.approx(6 / 16)  # chance
    assert mask_precision(heat, masks)[0] == pytest.approx(4 / 6 * 1 + 2 / 6 * 6 / 16)
    faint = heat[:1] + 0.2 * (np.arange(16).reshape(1, 4, 4) > 8)
    assert 0.2 <= best_iou_threshold(faint, masks[:1]) < 1


def test_spatial_scores_agree_with_scikit_learn():
    from sklearn.metrics import average_precision_score, jaccard_score

    chance = np.random.default_rng(0)
    heat, masks = chance.random((5, 7, 3)), chance.random((5, 7, 3)) < 0.3
    overlap, precision = iou(heat, masks, 0.6), mask_precision(heat, masks)
    for i in range(5):
        assert overlap[i] == pytest.approx(jaccard_score(masks[i].ravel(), heat[i].ravel() > 0.6))
        assert precision[i] == pytest.approx(average_precision_score(masks[i].ravel(), heat[i].ravel()))


def test_patch_masks():
    masks = np.zeros((1, 8, 8), bool)
    masks[0, 0, :5] = True
    assert patch_masks(masks, 2, 2, least=1 / 4).tolist() == [[[True, False], [False, False]]]
    assert patch_masks(masks, 2, 2).tolist() == [[[True, True], [False, False]]]
    with pytest.raises(UsageError, match="grid"):
        patch_masks(masks, 3, 2)
