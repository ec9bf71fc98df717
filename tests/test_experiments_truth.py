"""Known answers: a linear model in which ablation is removal, planted merges, toy models, the dial of the phantom."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mechinterp.data.phantom import Phantom
from mechinterp.experiments.seeds import seed_interval, with_interval
from mechinterp.interventions import Resample, Zero, ablate, intervene
from mechinterp.interventions.edits import Edit
from mechinterp.metrics.statistics import PatientBootstrap
from mechinterp.models import HookedVLM
from mechinterp.types import Placed
from saes.dictionary import ReLU, SparseDictionary
from saes.metrics.matching import Match
from saes.metrics.recovery import mcc, mcc_floor
from saes.truth.arrays import SITE, store_of
from saes.truth.asking import Questions, resumer
from saes.truth.causes import Pairs, causation, factor_pairs, midpoints
from saes.truth.cohort import Cohort, batch_of, outputs, removals, scores
from saes.truth.fidelity import fidelity, leakage, regression
from saes.truth.merging import balanced_rows, chosen_latents, separation
from saes.truth.readings import Acts, effect_of_sets, matches, overlaps, site_values, swapped
from saes.truth.synthetic import synthetic, trained_by_sae_lens
from saes.truth.toy import Toy, matched_cosines, polysemanticity, train_toy

RNG = np.random.default_rng(0)


def linear_world(n: int = 400, factors: int = 5, seed: int = 0):
    """`x = z G`, `f = x V`: do(a = 0) takes `z_a g_a` away; the dictionary has one latent for each g_a."""
    generator = torch.Generator().manual_seed(seed)
    there = (torch.rand(n, factors, generator=generator) < 0.4).float()
    z = there * (0.5 + torch.rand(n, factors, generator=generator))
    g = torch.linalg.qr(torch.randn(12, factors, generator=generator))[0].T.contiguous()
    readout = torch.randn(12, factors, generator=generator)
    dictionary = SparseDictionary(g.T.contiguous(), g, torch.zeros(factors), torch.zeros(12), ReLU())
    x = z @ g
    true = torch.stack([(z[:, [a]] @ g[[a]]) @ readout for a in range(factors)]).numpy()  # [factor, n, output]
    return dictionary, x, there.numpy(), true, readout


def ablated(dictionary, x, readout, members) -> np.ndarray:
    acts = dictionary.encode(x)
    kept = acts.clone()
    kept[:, list(members)] = 0
    return ((dictionary.decode(acts) - dictionary.decode(kept)) @ readout).numpy()


def patient_weights(n: int) -> np.ndarray:
    return PatientBootstrap.of([f"p{i // 2}" for i in range(n)], draws=200).weights


def test_where_ablation_is_removal_slope_and_r2_are_1():
    dictionary, x, there, true, readout = linear_world()
    split = np.where(np.arange(len(x)) % 4 == 0, "test", np.where(np.arange(len(x)) % 4 == 1, "val", "train"))
    acts = Acts(dictionary.encode(x).numpy(), split)
    found = matches(acts, {str(a): there[:, a] for a in range(5)})
    assert [found[str(a)].latents for a in range(5)] == [(a,) for a in range(5)]
    assert all(m.f1 == 1 for m in found.values())
    for a in range(5):
        effect = ablated(dictionary, x, readout, found[str(a)].latents)
        f = fidelity(true[a][:, a], effect[:, a], there[:, a] > 0, patient_weights(len(x)))
        assert (f.slope, f.r2, f.r2_identity, f.r2_present, f.sign) == pytest.approx((1, 1, 1, 1, 1), abs=1e-5)
        assert f.share == pytest.approx(1, abs=1e-5) and f.r2_ci95[0] > 0.999


def test_a_shuffled_matching_has_no_fidelity():
    dictionary, x, there, true, readout = linear_world(n=2000)
    for a in range(5):
        effect = ablated(dictionary, x, readout, [(a + 1) % 5])
        f = fidelity(true[a][:, a], effect[:, a], there[:, a] > 0, patient_weights(len(x)))
        assert f.r2 < 0.02 and f.r2_identity < 0.05


def test_half_an_ablation_has_slope_one_half_and_none_has_0():
    true = RNG.normal(size=300)
    slope, r2 = regression(true, 0.5 * true)
    assert (slope[0], r2[0]) == pytest.approx((0.5, 1.0))
    slope, r2 = regression(true, np.zeros(300))
    assert (slope[0], r2[0]) == (0, 0)
    assert np.isnan(regression(np.zeros(300), true)[1][0]), "no true effect: nothing to explain, not 0"


def test_weights_are_copies_of_images():
    true, effect = RNG.normal(size=(2, 50))
    weights = RNG.integers(0, 3, 50)
    slope, r2 = regression(true, effect, weights[None].astype(float))
    again = regression(np.repeat(true, weights), np.repeat(effect, weights))
    assert (slope[0], r2[0]) == pytest.approx((again[0][0], again[1][0]))


def test_leakage_sees_what_lands_on_other_outputs():
    own = np.eye(3, dtype=bool)
    clean = leakage(np.eye(3), np.eye(3), own)
    assert (clean.slope, clean.r2, clean.off_true, clean.off_ablated) == pytest.approx((1, 1, 0, 0))
    spilled = leakage(np.eye(3), np.eye(3) + 0.5 * (1 - np.eye(3)), own)
    assert spilled.off_ablated == pytest.approx(0.5) and spilled.off_true == 0


def test_merged_split_and_absorbed_factors_are_named():
    def match(latents, f1):
        return Match(latents, (0.0,) * len(latents), f1)

    has = {name: RNG.random(400) < 0.4 for name in "abcde"}
    acts = np.stack([has["a"], has["c"], has["c"], has["d"] & ~has["a"], has["e"]], axis=1).astype(np.float32)
    found = {"a": match((0,), 0.9), "b": match((0,), 0.8), "c": match((1, 2), 0.9), "d": match((3,), 0.8)}
    single = {"a": match((0,), 0.9), "b": match((0,), 0.8), "c": match((1,), 0.6), "d": match((3,), 0.8)}
    found["e"] = single["e"] = match((0,), 0.5)  # no better than always saying yes: shares nothing that means anything
    shape = overlaps(found, single, acts, has)
    assert shape["a"].merged == ("b",) and shape["b"].merged == ("a",)
    assert shape["c"].merged == shape["d"].merged == shape["e"].merged == ()
    assert [shape[n].split for n in "abcde"] == [False, False, True, False, False]
    assert shape["d"].absorbed == ("a",) and shape["a"].absorbed == shape["c"].absorbed == ()


def confounded(rho: float, n: int = 2000, seed: int = 0):
    rng = np.random.default_rng(seed)
    finding = rng.random(n) < 0.5
    shortcut = rng.random(n) < 0.5 + rho * (finding - 0.5)
    return finding, shortcut, rng


def test_balancing_removes_the_association_and_knows_when_it_cannot():
    finding, shortcut, _ = confounded(0.9)
    rows = balanced_rows(finding, shortcut, 0)
    assert rows is not None
    assert abs(np.corrcoef(finding[rows], shortcut[rows])[0, 1]) < 1e-9
    assert balanced_rows(finding, finding, 0) is None


def test_balanced_matching_finds_the_latent_that_naive_matching_misses():
    finding, shortcut, rng = confounded(0.95)
    noisy = finding + rng.normal(0, 0.6, len(finding))
    acts = np.stack([noisy.clip(0), shortcut.astype(float)], axis=1).astype(np.float32)
    assert chosen_latents(acts, finding, shortcut, "naive", 0) == (1,), "the sharp shortcut is the better label"
    balanced = chosen_latents(acts, finding, shortcut, "balanced", 0)
    assert balanced is not None and balanced[0] == 0
    assert chosen_latents(acts, finding, finding, "balanced", 0) is None


def test_a_planted_merge_is_found_and_a_clean_pair_is_not():
    finding, shortcut, rng = confounded(0.0, n=600)
    weights = patient_weights(600)
    clean = np.stack([finding, shortcut], axis=1) + rng.normal(0, 0.1, (600, 2))
    s = separation(clean.astype(np.float32), finding, shortcut, (0,), (1,), weights)
    assert not s.merged and s.shared == 0 and s.separable > 0.4 and s.ci95[0] > 0.35
    swapped = separation(clean.astype(np.float32), finding, shortcut, (1,), (0,), weights)
    assert swapped.merged and swapped.separable < -0.4
    one = ((finding.astype(float) + shortcut) / 2)[:, None] + rng.normal(0, 0.1, (600, 1))
    assert separation(one.astype(np.float32), finding, shortcut, (0,), (0,), weights).merged
    two = np.concatenate([one, one + rng.normal(0, 0.01, one.shape)], axis=1).astype(np.float32)
    copies = separation(two, finding, shortcut, (0,), (1,), weights)
    assert copies.shared == 0 and copies.separable < 0.1 and copies.ci95[0] < 0 < copies.ci95[1] + 0.1


def test_the_dial_changes_only_the_shortcut():
    """Each dose picks between two renderings of one image; that is right only if nothing else depends on the dial."""
    pair = ("drain", "pneumothorax")
    base = Phantom.sample(300, seed=5, associations={pair: 0.0}).factors
    for rho in (0.6, 1.0):
        drawn = Phantom.sample(300, seed=5, associations={pair: rho}).factors
        assert drawn.drop(columns="drain").equals(base.drop(columns="drain"))
    assert drawn["drain"].tolist() == drawn["pneumothorax"].tolist()


def test_rows_come_back_from_a_store_made_of_arrays(tmp_path):
    rows = RNG.normal(size=(50, 6)).astype(np.float32)
    split = np.where(np.arange(50) < 40, "train", "test")
    store = store_of(rows, split, tmp_path / "store", [f"p{i // 2}" for i in range(50)])
    assert np.array_equal(store.site(SITE)[slice(0, 50)].numpy(), rows)
    assert len(store.rows(SITE, "test")) == 10 and len(set(store.index_of(SITE)["patient"])) == 25


def test_sparse_features_are_superposed_and_dense_ones_are_not():
    dense = train_toy(Toy(8, 3, 1.0), steps=600)
    rare = train_toy(Toy(8, 3, 0.05), steps=600)
    assert dense.per_dimension < 1.25 < 1.5 < rare.per_dimension
    assert len(rare.represented) > len(dense.represented)


def test_polysemanticity_counts_what_drives_a_unit():
    responses = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    found = polysemanticity(responses)
    assert found[0] == 0 and found[1] == pytest.approx(2 / 3) and torch.isnan(found[2])


def test_matched_cosines_average_to_the_mcc():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(9, 5, generator=generator), torch.randn(6, 5, generator=generator)
    assert matched_cosines(a, b).mean() == pytest.approx(mcc(a, b))
    assert np.isnan(matched_cosines(b[:4], a)).sum() == 5, "fewer latents than features: some get none"


@pytest.fixture(scope="module")
def phantom_material():
    model = HookedVLM.from_pretrained("phantom-clip")
    cohort = Cohort.of(Phantom.sample(8, seed=3), split="test")
    return model, cohort, outputs()


def complete(model: HookedVLM, site: str) -> Placed:
    """A dictionary with no error: a latent for each direction of each axis."""
    eye = torch.eye(model.d_model("vision"))
    both = torch.cat([eye, -eye])
    return Placed.sae(
        SparseDictionary(both.T.contiguous(), both, torch.zeros(len(both)), torch.zeros(len(eye)), ReLU()), site
    )


def test_all_latents_of_a_complete_dictionary_carry_the_whole_effect(phantom_material):
    model, cohort, targets = phantom_material
    placed = complete(model, "vision.blocks.2.hook_resid_post")
    removal = removals(cohort, ["ecg_leads"])["ecg_leads"]
    assert np.array_equal(removal.rows, np.flatnonzero(cohort.has("ecg_leads"))) and len(removal.rows)
    true = scores(model, cohort.rendered[removal.rows], targets) - scores(model, removal.rendered, targets)
    everything = tuple(range(placed.dictionary.W_dec.shape[0]))
    x = site_values(model, placed.reads, cohort.rendered[removal.rows])
    y = site_values(model, placed.reads, removal.rendered)
    before = scores(model, cohort.rendered[removal.rows], targets)
    moved = before - swapped(model, placed, targets, x, y, [everything, ()], "all")
    assert np.abs(moved[0] - true).max() < 1e-3 * np.abs(true).max()
    assert np.abs(moved[1]).max() < 1e-4 * np.abs(true).max()
    on_patches = before - swapped(model, placed, targets, x, y, [everything], "patch")[0]
    assert np.abs(on_patches - true).max() > 1e-3 * np.abs(true).max(), "CLS holds a part of it"


def test_effects_of_sets_are_those_of_the_hook(phantom_material):
    model, cohort, targets = phantom_material
    placed = complete(model, "vision.blocks.3.hook_resid_post")
    found = effect_of_sets(model, placed, cohort, targets, [(3, 100), ()], Zero(), "cls")
    batch = batch_of(model, cohort.rendered, targets)
    with torch.no_grad(), ablate(model, placed, (3, 100), tokens="cls"):
        by_hook = model.score(batch, targets).double().numpy()
    assert np.abs(found[0] - (scores(model, cohort.rendered, targets) - by_hook)).max() < 1e-3
    assert not found[1].any()


def test_val_is_a_share_of_the_patients():
    cohort = Cohort.of(Phantom.sample(60, seed=1, size=64), every=4)
    names = np.asarray(cohort.patients)
    held = set(names[cohort.split == "val"])
    assert held and not held & set(names[cohort.split == "train"])
    assert cohort.head(10).split.tolist() == cohort.split[:10].tolist()


@pytest.fixture(scope="module")
def asked_material():
    model = HookedVLM.from_pretrained("phantom-llava")
    cohort = Cohort.of(Phantom.sample(6, seed=3), split="test")
    return model, cohort, outputs()


def test_all_questions_in_one_pass_are_the_questions_one_by_one(asked_material):
    model, cohort, targets = asked_material
    together = scores(model, cohort.rendered, targets)
    with torch.no_grad():
        alone = [model.score(model.prepare(cohort.pixels(range(6)), [t]), [t])[:, 0] for t in targets]
    assert np.abs(together - torch.stack(alone, 1).double().numpy()).max() < 1e-4
    assert np.abs(together[:, 0] - together[:, 1]).max() > 0.1, "the questions differ"
    few = Questions.of(model, targets[:2])
    assert len(few.ids) < 2 * len(model.preprocess(cohort.pixels([0]), ["is there edema ?"]).input_ids[0])


def test_a_resumed_answer_is_the_answer(asked_material):
    model, cohort, targets = asked_material
    for layer in (1, 3):
        site = f"vision.blocks.{layer}.hook_resid_post"
        placed = complete(model, site)
        with torch.no_grad():
            found = resumer(model, placed.writes, targets)(site_values(model, placed.reads, cohort.rendered))
        assert np.abs(found.double().numpy() - scores(model, cohort.rendered, targets)).max() < 1e-4


@pytest.mark.parametrize("how", [Zero(), Resample(3)])
def test_effects_on_a_generative_model_are_those_of_the_hook(asked_material, how):
    model, cohort, targets = asked_material
    placed = complete(model, "vision.blocks.2.hook_resid_post")
    found = effect_of_sets(model, placed, cohort, targets[:2], [(), (3, 100)], how, "all")
    assert not found[0].any()
    clean = scores(model, cohort.rendered, targets[:2])
    for column, target in enumerate(targets[:2]):
        batch = model.prepare(cohort.pixels(range(6)), [target])
        with torch.no_grad(), intervene(model, [Edit(placed, (3, 100), how)]):
            by_hook = model.score(batch, [target])[:, 0].double().numpy()
        assert np.abs(found[1, :, column] - (clean[:, column] - by_hook)).max() < 1e-3
        assert np.abs(found[1, :, column]).max() > 1e-2


def attribute_world(entangled: bool, n: int = 300):
    """Two attributes, two outputs that read one direction each, and pairs that differ in both attributes."""
    rng = np.random.default_rng(4)
    has = rng.random((n, 2)) < 0.5
    base, source = has * 2.0 - 1, (~has) * 2.0 - 1
    pairs = Pairs(np.arange(n), np.zeros((n, 1, 1), np.uint8), np.ones(n, np.int64))
    after = source if entangled else np.stack([source[:, 0], base[:, 1]], 1)
    return pairs, has[:, 0], base, source, after


def judge_swap(pairs, present, base, source, after):
    columns, weights = {0: 0, 1: 1}, patient_weights(len(base))
    return causation(pairs, 0, columns, (base, source, after), np.zeros(2), present, weights)


def test_cause_and_isolation_tell_one_latent_from_nothing_and_from_everything():
    pairs, present, base, source, after = attribute_world(entangled=False)
    clean = judge_swap(pairs, present, base, source, after)
    assert (clean.cause, clean.isolation, clean.disentangle) == (1, 1, 1)
    assert (clean.said_cause, clean.said_isolation, clean.read) == (1, 1, len(base))
    both = judge_swap(*attribute_world(entangled=True))
    assert (both.cause, both.isolation, both.disentangle) == (1, 0, 0.5)
    nothing = judge_swap(pairs, present, base, source, base)
    assert (nothing.cause, nothing.isolation, nothing.disentangle) == (0, 1, 0.5)
    half = judge_swap(pairs, present, base, source, (base + source) / 2)
    assert (half.cause, half.isolation) == pytest.approx((0.5, 0.5))


def test_pairs_that_the_model_misreads_do_not_count_for_what_it_says():
    pairs, present, base, source, after = attribute_world(entangled=False)
    base[:100, 0] *= -1  # read wrongly
    found = judge_swap(pairs, present, base, source, after)
    assert found.pairs == len(base) and found.read == len(base) - 100 and found.said_cause == 1


def test_sources_differ_in_the_factor_and_one_other():
    cohort = Cohort.of(Phantom.sample(12, seed=5, size=64), split="test")
    factors = ["effusion", "drain", "portable"]
    for number, (name, pairs) in enumerate(factor_pairs(cohort, factors, 6, seed=1).items()):
        assert name == factors[number] and len(pairs.rows) == 6 and not (pairs.other == number).any()
        for row, other, image in zip(pairs.rows, pairs.other, pairs.rendered, strict=True):
            one = cohort.phantom[[int(row)]]
            flips = {f: [1 - int(one.factors[f].iloc[0])] for f in (name, factors[other])}
            assert np.array_equal(one.do(**flips).render()[0], image)
    sides = cohort.has("drain")[factor_pairs(cohort, factors, 4, seed=1)["drain"].rows]
    assert sides.tolist() == [True, False, True, False]


def test_a_swap_of_all_latents_has_full_cause_and_no_isolation(phantom_material):
    """On a running model, with a dictionary that has no error, swapping everything is the source image."""
    model, cohort, targets = phantom_material
    placed = complete(model, "vision.blocks.2.hook_resid_post")
    names = [t.name for t in targets]
    pairs = factor_pairs(cohort, names, 4, seed=0)["ecg_leads"]
    x, y = (
        site_values(model, placed.reads, cohort.rendered[pairs.rows]),
        site_values(model, placed.reads, pairs.rendered),
    )
    everything = tuple(range(placed.dictionary.W_dec.shape[0]))
    moved = swapped(model, placed, targets, x, y, [everything, ()], "all")
    base, source = scores(model, cohort.rendered[pairs.rows], targets), scores(model, pairs.rendered, targets)
    columns, own = {i: i for i in range(len(names))}, names.index("ecg_leads")
    present, weights = cohort.has("ecg_leads")[pairs.rows], patient_weights(len(cohort))
    whole, none = (causation(pairs, own, columns, (base, source, m), np.zeros(12), present, weights) for m in moved)
    assert (whole.cause, whole.isolation) == pytest.approx((1, 0), abs=1e-3)
    assert (none.cause, none.isolation) == pytest.approx((0, 1), abs=1e-3)


def test_yes_begins_midway_between_the_means():
    values = np.array([[0.0, 5.0], [2.0, 5.0], [10.0, 1.0]])
    has = np.array([[False, True], [False, True], [True, False]])
    assert midpoints(values, has).tolist() == [5.5, 3.0]


def test_an_interval_over_seeds_needs_two_and_holds_the_mean():
    assert np.isnan(seed_interval([0.5])[0]) and with_interval([0.5]) == "0.50"
    low, high = seed_interval([0.4, 0.5, 0.6])
    assert (low, high) == pytest.approx((0.5 - 4.303 * 0.1 / 3**0.5, 0.5 + 4.303 * 0.1 / 3**0.5), abs=1e-3)
    assert with_interval([]) == "not tested"


def test_sae_lens_trains_a_peer_on_its_own_data():
    """Rare, uncorrelated features: both trainers are far above random directions, and alike."""
    made = synthetic(24, 12, 3000, probability=0.06, seed=2)
    k = max(1, round(made.true_l0))
    theirs = trained_by_sae_lens(made.activations, 24, k, epochs=12, batch_size=250, lr=3e-3, seed=1)
    floor = mcc_floor(24, 24, 12, draws=5, seed=0)
    assert theirs.shape == (24, 12) and mcc(theirs, made.directions) > floor + 0.1
    again = trained_by_sae_lens(made.activations, 24, k, epochs=12, batch_size=250, lr=3e-3, seed=1)
    assert torch.equal(theirs, again)
