"""Effect sweeps: equal to one full forward per feature, on every family, and nothing more is computed than must be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_interventions import HOWS, TARGETS, dictionary
from tiny_models import WIDTH, tiny

from mechinterp.errors import NonFiniteError, UsageError
from mechinterp.interventions import (
    Activity,
    Edit,
    Mean,
    Steer,
    Zero,
    activity,
    effects,
    intervene,
    matched_random_sets,
    set_effect,
    set_effects,
    steer,
)
from mechinterp.interventions.sparse_tail import SparseTail
from mechinterp.interventions.sweep import Sweep
from mechinterp.interventions.tails import Rerun, Resumed
from mechinterp.models import HookedVLM
from mechinterp.types import Placed, Site, Target
from saes.dictionary import SparseDictionary

MORE = [*TARGETS, Target("effusion", "a chest x-ray with effusion", None)]
RESID = "vision.blocks.{}.hook_resid_post"


@pytest.fixture(scope="module")
def models() -> dict[str, HookedVLM]:
    return {family: HookedVLM(*tiny(family)) for family in ("clip", "siglip", "vit", "llava", "gemma3")}


def targets_of(model: HookedVLM) -> list[Target]:
    """Two targets where a family can score two at once."""
    return MORE if model.family in ("clip", "siglip", "vit") else TARGETS


def images(model: HookedVLM, n: int = 4):
    pixels = torch.rand(n, 32, 32, generator=torch.Generator().manual_seed(1))
    return model.prepare(pixels, targets_of(model), ids=[f"image-{i}" for i in range(n)])


@torch.no_grad()
def one_forward_each(model, placed, batch, sets, how, tokens):
    """The reference: a full forward pass for every set, with a hook."""
    targets = targets_of(model)
    clean = model.score(batch, targets)
    found = []
    for members in sets:
        with intervene(model, [Edit(placed, tuple(members), how, tokens)]):
            found.append(model.score(batch, targets) - clean)
    return torch.stack(found)


def check(model, placed, how=None, tokens="all"):
    how, batch = how or Zero(), images(model)
    features = range(0, 64, 9 if model.family in ("llava", "gemma3") else 4)
    got = effects(model, placed, batch, targets_of(model), features, how, tokens, image_batch=3, pair_batch=7)
    expected = one_forward_each(model, placed, batch, [[f] for f in features], how, tokens)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(got.dense(), expected, atol=1e-5, rtol=0)
    return got, expected


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("family", ["clip", "siglip", "vit", "llava", "gemma3"])
def test_equal_to_one_full_forward_per_feature(models, family, layer):
    model = models[family]
    if layer < model.n_layers("vision"):
        check(model, Placed.sae(dictionary(), RESID.format(layer)))


@pytest.mark.parametrize("name", HOWS)
@pytest.mark.parametrize("tokens", ["patch", "cls", [0, 4, 5]])
def test_equal_for_every_edit_and_token_choice(models, name, tokens):
    check(models["clip"], Placed.sae(dictionary(), RESID.format(1)), HOWS[name][0], tokens)


@pytest.mark.parametrize(
    ("family", "reads", "writes"),
    [
        ("clip", "vision.blocks.1.ln2.hook_normalized", "vision.blocks.1.hook_mlp_out"),
        ("vit", "vision.blocks.0.ln2.hook_normalized", "vision.blocks.0.hook_mlp_out"),
        ("clip", "vision.blocks.1.hook_resid_pre", "vision.blocks.1.hook_resid_pre"),
        ("clip", "vision.blocks.1.hook_resid_mid", "vision.blocks.1.hook_resid_mid"),
        ("clip", "vision.blocks.2.hook_attn_out", "vision.blocks.2.hook_attn_out"),
        ("clip", "vision.hook_embed", "vision.hook_embed"),
        ("clip", "vision.hook_pooled", "vision.hook_pooled"),
        ("llava", "text.blocks.1.hook_resid_post", "text.blocks.1.hook_resid_post"),
        ("llava", "text.blocks.1.ln2.hook_normalized", "text.blocks.1.hook_mlp_out"),
    ],
)
def test_equal_for_transcoders_and_sites_that_no_pass_resumes_from(models, family, reads, writes):
    check(models[family], Placed(dictionary(), Site.parse(reads), Site.parse(writes)))


def test_sets_are_edited_together(models):
    model, placed = models["clip"], Placed.sae(dictionary(), RESID.format(0))
    sets = [[1], [5, 9, 40], [2, 3], list(range(10, 30))]
    got = set_effects(model, placed, images(model), MORE, sets)
    expected = one_forward_each(model, placed, images(model), sets, Zero(), "all")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(set_effect(model, placed, images(model), MORE, sets[1]), got[1], atol=1e-5, rtol=0)
    alone = effects(model, placed, images(model), MORE, [5, 9, 40]).dense().sum(0)
    assert (alone - got[1]).abs().max() > 1e-4  # together is not the sum of each


def tail_of(model, site):
    return Sweep(model, Placed.sae(dictionary(), site), images(model), targets_of(model), Zero(), "all").tail


def test_the_fast_tail_is_used_where_it_is_exact(models):
    for family, readout in (("clip", True), ("vit", True), ("siglip", False), ("llava", False), ("gemma3", False)):
        tail = tail_of(models[family], RESID.format(0))
        assert isinstance(tail, SparseTail), family
        assert tail.class_token_only is readout, family
    assert isinstance(tail_of(models["clip"], RESID.format(2)), Resumed)
    assert isinstance(tail_of(models["clip"], "vision.blocks.2.hook_attn_out"), Rerun)


def test_a_block_built_in_another_way_is_not_finished_wrongly():
    """A third branch in a block, which the faster tails do not know of: the next one takes over."""
    for block, tail in ((1, Resumed), (2, Rerun)):
        hf, processor = tiny("clip")
        hf.vision_model.encoder.layers[block].register_forward_hook(lambda module, args, out: out + args[0].tanh())
        model = HookedVLM(hf, processor)
        assert isinstance(tail_of(model, RESID.format(0)), tail)
        check(model, Placed.sae(dictionary(), RESID.format(0)))


def test_a_sweep_inside_another_intervention_sees_it(models):
    """Downstream of the swept site stands another edit: it is part of the model that is swept."""
    model = models["clip"]
    with steer(model, Placed.sae(dictionary(), RESID.format(1)), [9], 20.0):
        _, steered = check(model, Placed.sae(dictionary(), RESID.format(0)))
    _, plain = check(model, Placed.sae(dictionary(), RESID.format(0)))
    assert (steered - plain).abs().max() > 1e-2


def test_only_pairs_in_which_the_feature_fires_are_computed(models, monkeypatch):
    model, placed = models["clip"], Placed.sae(dictionary(), RESID.format(1))
    batch = images(model)
    with torch.no_grad():
        acts = placed.dictionary.encode(
            model.run_with_cache(batch, names_filter=str(placed.reads))[1][str(placed.reads)]
        )
    fires = (acts[:, 1:] > 0).any(1)
    computed = []
    scores = SparseTail.scores
    monkeypatch.setattr(
        SparseTail, "scores", lambda self, images, change: computed.append(len(images)) or scores(self, images, change)
    )
    found = effects(model, placed, batch, MORE, tokens="patch")
    assert sum(computed) == int(fires.sum()) == len(found.row) < fires.numel()
    assert torch.equal(found.n_images(), fires.sum(0))
    assert (found.dense()[~fires.T] == 0).all()


def test_later_blocks_see_the_class_token_alone(models, monkeypatch):
    """With one block left, its MLP runs on one token a pair, not on seventeen."""
    model = models["clip"]
    rows = []
    mlp = model.blocks("vision")[2].mlp
    handle = mlp.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[:2].numel()))
    sweep = Sweep(model, Placed.sae(dictionary(), RESID.format(1)), images(model), MORE, Zero(), "all")
    rows.clear()
    sets = torch.arange(64)[:, None]
    pairs = sum(len(part.sets) for part in sweep.run(sets, torch.ones_like(sets, dtype=torch.bool)))
    handle.remove()
    assert sum(rows) == pairs + 4  # and the clean pass of four images


def test_the_views_of_the_result_agree(models):
    model, placed = models["clip"], Placed.sae(dictionary(), RESID.format(1))
    found = effects(model, placed, images(model), MORE, features=[40, 3, 7, 11])
    dense = found.dense()
    assert dense.shape == (4, 4, 2) and found.targets == ("pneumonia", "effusion")
    assert torch.equal(found.effect, dense)
    assert torch.equal(found.of(7), dense[2])
    torch.testing.assert_close(found.mean(), dense.mean(1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.mean_abs(), dense.abs().mean(1), atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(found.clean, model.score(images(model), MORE), atol=1e-5, rtol=0)
    with pytest.raises(UsageError, match="not swept"):
        found.of(5)


def test_the_same_bytes_twice_and_chunks_move_results_by_rounding_only(models):
    model, placed = models["clip"], Placed.sae(dictionary(), RESID.format(0))
    first, again = (effects(model, placed, images(model), MORE, how=HOWS["resample"][0]) for _ in range(2))
    assert torch.equal(first.value, again.value) and torch.equal(first.row, again.row)
    small = effects(model, placed, images(model), MORE, how=HOWS["resample"][0], image_batch=1, pair_batch=2)
    torch.testing.assert_close(small.dense(), first.dense(), atol=1e-5, rtol=0)


def test_a_feature_that_never_fires_has_no_effect_and_no_entries(models):
    d = dictionary()
    d.b_enc.data[:8] = -100
    found = effects(models["clip"], Placed.sae(d, RESID.format(1)), images(models["clip"]), MORE, features=range(8))
    assert len(found.row) == 0 and not found.dense().any()


def test_what_is_not_finite_stops_the_sweep_and_names_the_images(models):
    model = models["clip"]
    batch = images(model)
    pixels = batch.pixel_values.clone()
    pixels[2, 0, 3, 3] = torch.nan
    with pytest.raises(NonFiniteError, match="image-2") as caught:
        effects(model, Placed.sae(dictionary(), RESID.format(1)), replace(batch, pixel_values=pixels), MORE)
    assert caught.value.images == ["image-2"]
    with pytest.raises(NonFiniteError) as caught:
        effects(model, Placed.sae(dictionary(), RESID.format(1)), batch, MORE, [0], Steer(float("inf")))
    assert caught.value.images == [f"image-{i}" for i in range(4)]


def test_a_decoder_that_is_not_linear_is_refused(models):
    class Rescaled(SparseDictionary):
        def decode(self, feature_acts):
            return super().decode(feature_acts) * (1 + feature_acts.sum(-1, keepdim=True))

    d = dictionary()
    bent = Rescaled(d.W_enc, d.W_dec, d.b_enc, d.b_dec, d.activation)
    with pytest.raises(UsageError, match="linear"):
        effects(models["clip"], Placed.sae(bent, RESID.format(1)), images(models["clip"]), MORE)


def test_nothing_to_sweep_is_refused(models):
    model, placed = models["clip"], Placed.sae(dictionary(), RESID.format(1))
    with pytest.raises(UsageError, match="no feature sets"):
        set_effects(model, placed, images(model), MORE, [])
    with pytest.raises(UsageError, match="at least one image"):
        effects(model, placed, images(model)[0:0], MORE)


# ------------------------------------------------------------------------------------------------ matched random sets


def planted_activity(seed: int = 0) -> Activity:
    """Features whose frequency and strength span three orders of magnitude; 50 of 600 are dead."""
    generator = torch.Generator().manual_seed(seed)
    frequency = 10 ** (-3 * torch.rand(600, generator=generator))
    strength = 10 ** (2 * torch.rand(600, generator=generator) - 1)
    frequency[:50] = strength[:50] = 0
    norm = 0.5 + torch.rand(600, generator=generator)
    return Activity(frequency, strength * frequency, strength / norm, norm)


def test_activity_is_what_a_direct_count_says(models):
    model, placed = models["clip"], Placed.sae(dictionary(), RESID.format(1))
    batch = images(model)
    found = activity(model, placed, batch, "patch", image_batch=3)
    with torch.no_grad():
        value = model.run_with_cache(batch, names_filter=str(placed.reads))[1][str(placed.reads)]
        acts = placed.dictionary.encode(value)[:, 1:]
    fires = acts > 0
    torch.testing.assert_close(found.frequency, fires.any(1).float().mean(0))
    torch.testing.assert_close(found.mean, acts.mean((0, 1)))
    torch.testing.assert_close(found.mean_active, acts.sum((0, 1)) / fires.sum((0, 1)).clamp(min=1))
    torch.testing.assert_close(found.strength, found.mean_active, atol=1e-5, rtol=1e-5)  # unit decoder rows
    sometimes = int(((found.frequency > 0) & (found.frequency < 1)).nonzero()[0])
    mean = effects(model, placed, batch, MORE, [sometimes], Mean(found.mean))
    assert len(mean.row) == 4  # mean ablation moves images in which the feature does not fire, too


def test_random_sets_are_matched_feature_by_feature():
    stats = planted_activity()
    features = [100, 200, 300, 400]
    sets = torch.tensor(matched_random_sets(stats, features, n=100, seed=1))
    assert sets.shape == (100, 4)

    def distance(trait):
        wanted = trait[features].log().sort().values
        return float((trait[sets].log().sort(1).values - wanted).abs().mean())

    anyone = torch.stack([torch.randperm(550, generator=torch.Generator().manual_seed(i))[:4] + 50 for i in range(100)])
    for trait in (stats.frequency, stats.strength):
        loose = float((trait[anyone].log().sort(1).values - trait[features].log().sort().values).abs().mean())
        assert distance(trait) < loose / 3


def test_random_sets_are_distinct_alive_seeded_and_leave_out_what_they_must():
    stats = planted_activity()
    exclude = set(range(120, 320))
    sets = matched_random_sets(stats, [100, 110], n=150, seed=1, exclude=exclude)
    assert len({tuple(sorted(s)) for s in sets}) == 150 and all(len(set(s)) == 2 for s in sets)
    used = {f for members in sets for f in members}
    assert not used & (exclude | {100, 110} | set(range(50)))
    assert sets == matched_random_sets(stats, [100, 110], n=150, seed=1, exclude=exclude)
    assert sets != matched_random_sets(stats, [100, 110], n=150, seed=2, exclude=exclude)
    singles = matched_random_sets(stats, [100], n=100)
    assert len(set(singles)) == 100


def test_too_few_live_features_to_match_is_said():
    stats = planted_activity()
    with pytest.raises(UsageError, match="matched sets"):
        matched_random_sets(stats, [100], n=100, exclude=range(130, 600))
    with pytest.raises(UsageError, match="cannot draw"):
        matched_random_sets(stats, [100], n=10, exclude=range(50, 600))
    assert len(matched_random_sets(stats, [3], n=20)) == 20  # a set that never fires is matched to the quietest


def test_width_is_what_these_tests_assume():
    assert WIDTH == 32
