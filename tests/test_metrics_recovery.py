"""Recovery, stability and absorption: known dictionaries, sae-lens, and SAEBench's calculator run row by row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from mechinterp.errors import UsageError
from saes.metrics.absorption import absorption, exact_absorption, merging_rate, splitting_rate
from saes.metrics.matching import fbmp
from saes.metrics.recovery import mcc, mcc_floor, reappearance, recovery, stability, uniqueness

pytestmark = pytest.mark.xdist_group("saes")


def directions(n, d, seed):
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("seed", range(8))
def test_agreement_with_sae_lens(seed):
    from sae_lens.synthetic.evals import feature_uniqueness, mean_correlation_coefficient

    a, b = 3 * directions(20 + seed, 12, seed), directions(25, 12, seed + 100)
    assert mcc(a, b) == pytest.approx(mean_correlation_coefficient(a, b), abs=1e-5)
    assert uniqueness(a, b) == pytest.approx(feature_uniqueness(a, b))


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_mcc_knows_neither_order_sign_nor_length(seed):
    truth = directions(10, 6, seed)
    chance = torch.Generator().manual_seed(seed)
    shuffled = truth[torch.randperm(10, generator=chance)] * (torch.rand(10, 1, generator=chance) + 0.5) * -1
    assert mcc(shuffled, truth) == pytest.approx(1.0)


@pytest.mark.parametrize(("d", "low", "high"), [(16, 0.64, 0.76), (64, 0.35, 0.43), (256, 0.18, 0.22)])
def test_random_directions_have_a_high_mcc(d, low, high):
    """The bands that were computed for this project with 256 latents or more."""
    assert low < mcc_floor(256, 256, d) < high
    assert mcc_floor(40, 30, d, seed=1) == mcc_floor(40, 30, d, seed=1)


def test_recovery_of_a_split_and_merged_dictionary():
    truth = torch.eye(8)
    made = torch.stack(
        [
            truth[0],
            truth[1],
            truth[1] + 0.1 * truth[7],  # two latents for feature 1
            (truth[2] + truth[3]),  # one latent for two features: neither is recalled
            -truth[4],
            truth[4:].sum(0),  # near to none of its four: it does not count for merging
            torch.zeros(8),  # dead
        ]
    )
    found = recovery(made, truth)
    assert found.recall == pytest.approx(3 / 8) and found.split == pytest.approx(1 / 3)
    assert found.merge == pytest.approx(1 / 5)
    assert recovery(truth, truth).corrected == pytest.approx(1.0)
    many = [recovery(directions(64, 16, s), directions(64, 16, s + 50), seed=s + 7).corrected for s in range(5)]
    assert abs(np.mean(many)) < 0.05


def test_stability_is_signed_and_matched():
    basis = torch.eye(7)
    a = basis[:6]
    found = stability(a, basis[[5, 1, 0, 2, 6, 4]])
    assert found.per_latent.tolist() == pytest.approx([1, 1, 1, 0, 1, 1]) and found.shared == pytest.approx(5 / 6)
    assert found.mean_cosine == pytest.approx(5 / 6)
    assert stability(a, -a).mean_cosine <= 0  # the opposite direction is another feature
    wider = stability(torch.cat([a, a]), a)
    assert wider.per_latent.isnan().sum() == 6 and wider.mean_cosine == 1.0


def test_reappearance_needs_three_seeds():
    shared = directions(5, 200, 0)
    seeds = [torch.cat([shared, directions(5, 200, s)]) for s in (1, 2, 3)]
    seeds[2] = torch.cat([seeds[2], seeds[0][5:6]])  # one latent of the first seed comes back in the third only
    found = reappearance(seeds)
    assert found.per_seed[0].tolist() == [1] * 5 + [0.5] + [0] * 4
    assert found.always == pytest.approx(15 / 31) and found.mean == pytest.approx((15 + 0.5 + 0.5) / 31)
    with pytest.raises(UsageError, match="at least three"):
        reappearance(seeds[:2])


# ---------------------------------------------------------------------------------------------------- absorption


def sae_bench_row(x, z, W_dec, p, main):
    """One row as `FeatureAbsorptionCalculator.calculate_absorption` of sae-bench 0.6.0 goes through it."""
    p = p / p.norm()
    cos, there = torch.nn.functional.cosine_similarity(p, W_dec, dim=-1), (x @ p).item()
    proj = z * cos
    kept = proj[main].sum().item()
    allowed = torch.ones(len(z), dtype=torch.bool)
    allowed[main] = False
    allowed &= (cos >= 0.1) & (proj > 0)
    others = proj[allowed]
    taken = others.topk(min(3, others.numel())).values.sum().item()
    if kept >= there or taken / there < 0.4:
        fraction = 0.0
    elif kept <= 0:
        fraction = 1.0
    else:
        moved = min(taken, there - kept)
        fraction = float(np.clip(moved / (moved + kept), 0.0, 1.0))
    top = int(proj.topk(1).indices[0])
    full = all(z[j].item() < 1e-8 for j in main) and cos[top].item() >= 0.025 and there >= 0
    return full and (proj[top].item() / there) >= 0.4, fraction


@pytest.mark.parametrize("seed", range(10))
def test_agreement_with_sae_bench(seed):
    generator = torch.Generator().manual_seed(seed)
    W_dec, p = directions(12, 6, seed), torch.randn(6, generator=generator)
    z = (torch.randn(200, 12, generator=generator) - 0.8).relu()
    x = z @ W_dec + 0.1 * torch.randn(200, 6, generator=generator)
    x[:, :] += 0.5 * p  # the concept is there on most rows
    main = [0, 3]
    found = absorption(x, z, W_dec, p, main)
    expected = [sae_bench_row(x[i], z[i], W_dec, p, main) for i in range(200)]
    assert found.full.tolist() == [full for full, _ in expected]
    assert found.fraction.tolist() == pytest.approx([fraction for _, fraction in expected], abs=1e-5)
    assert found.full_rate == pytest.approx(np.mean([full for full, _ in expected]))
    assert 0 < found.mean_fraction < 1 and not found.full.all()


def test_agreement_with_the_installed_sae_bench():
    """The calculator itself, on a model and a dictionary of a few lines."""
    module = pytest.importorskip("sae_bench.evals.absorption.feature_absorption_calculator")
    generator = torch.Generator().manual_seed(0)
    W_dec, p = directions(12, 6, 0), torch.randn(6, generator=generator)
    z = (torch.randn(30, 12, generator=generator) - 0.8).relu()
    x = z @ W_dec + 0.5 * p
    left = [0]

    class Model:
        def to_tokens(self, text):
            return [[0]]

        def run_with_cache(self, texts, names_filter):
            rows = x[left[0] : left[0] + len(texts)]
            return None, {names_filter[0]: torch.stack([rows, rows], 1)}

    class Sae:
        device = "cpu"

        def __init__(self):
            self.W_dec = W_dec

        def encode(self, rows):
            found = z[left[0] : left[0] + len(rows)]
            left[0] += len(rows)
            return found

    words = [f"word{i}" for i in range(30)]
    calculator = module.FeatureAbsorptionCalculator(Model(), ["one", "two"])
    theirs = calculator.calculate_absorption(Sae(), words, p, [0, 3], layer=0, show_progress=False).word_results
    ours = absorption(x, z, W_dec, p, [0, 3])
    assert ours.full.tolist() == [row.is_full_absorption for row in theirs]
    assert ours.fraction.tolist() == pytest.approx([row.absorption_fraction for row in theirs], abs=1e-5)


def test_absorption_of_a_planted_child():
    """Parent direction e0; the child's latent holds e0 + e1 and the parent's latent is silent there."""
    W_dec = torch.stack([torch.eye(4)[0], normalize(torch.tensor([1.0, 1, 0, 0]), dim=0), torch.eye(4)[2]])
    plain, child = torch.tensor([2.0, 0, 0]), torch.tensor([0.0, 2, 0])
    acts = torch.stack([plain] * 30 + [child] * 10)
    found = absorption(acts @ W_dec, acts, W_dec, torch.eye(4)[0], [0])
    assert found.full.tolist() == [False] * 30 + [True] * 10 and found.full_rate == 0.25
    assert found.fraction.tolist() == [0.0] * 30 + [1.0] * 10
    parent, special = np.ones(40), np.r_[np.zeros(30), np.ones(10)]
    exact = exact_absorption(acts[:, 0].numpy() > 0, acts[:, 1].numpy() > 0, parent, special)
    assert (exact.rate, exact.recall_with, exact.recall_without, exact.gap) == (1, 0, 1, 1)
    healthy = exact_absorption(np.ones(40, bool), acts[:, 1].numpy() > 0, parent, special)
    assert (healthy.rate, healthy.gap) == (0, 0)
    assert np.isnan(exact_absorption(np.ones(40, bool), np.ones(40, bool), parent, np.zeros(40)).rate)


def test_a_weak_latent_is_not_an_absorbed_one():
    chance = np.random.default_rng(0)
    parent = np.ones(4000)
    child, fires = chance.random(4000) < 0.5, chance.random(4000) < 0.5
    found = exact_absorption(fires, child, parent, child)
    assert found.rate == pytest.approx(0.5, abs=0.04) and abs(found.gap) < 0.04
    silent_child = exact_absorption(fires, child & (chance.random(4000) < 0.5), parent, child)
    assert silent_child.rate == pytest.approx(0.25, abs=0.03)  # nothing took the parent's place on the other half


def test_splitting_and_merging():
    y = np.repeat([1.0, 1, 0, 0], 25)
    halves = np.zeros((100, 3), bool)
    halves[:25, 0] = halves[25:50, 1] = True
    whole = np.repeat([True, True, False, False], 25)[:, None]
    labels = np.stack([y, y], 1)
    labels[0, 1] = np.nan
    assert splitting_rate(halves, labels) == (1.0, (2, 2))
    assert splitting_rate(np.hstack([halves, whole]), labels) == (0.0, (1, 1))
    assert splitting_rate(np.zeros((100, 2), bool), labels[:, :1]) == (0.0, (0,))
    nearly = np.zeros((100, 2), bool)
    nearly[:49, 0] = nearly[49, 1] = True
    assert fbmp(nearly, y) == (0, 1) and splitting_rate(nearly, labels[:, :1]) == (0.0, (1,))  # one image is no split
    rate, groups = merging_rate([4, 7, 4, None, 9, 4])
    assert rate == pytest.approx(3 / 5) and groups == ((0, 2, 5),)
    assert merging_rate([1, 2, 3]) == (0.0, ()) and np.isnan(merging_rate([None])[0])
