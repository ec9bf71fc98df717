"""Interventions: what is written into the model, where, and that it is all undone."""

from __future__ import annotations

import pytest
import torch
from tiny_models import WIDTH, tiny

from mechinterp.errors import ModelError, UsageError
from mechinterp.interventions import (
    Edit,
    Inject,
    Mean,
    Patch,
    Resample,
    Scale,
    Steer,
    Zero,
    ablate,
    inject,
    intervene,
    patch,
    steer,
    token_mask,
)
from mechinterp.interventions.edits import donors
from mechinterp.models import HookedVLM
from mechinterp.types import Placed, Site, Target
from saes.dictionary import ReLU, SparseDictionary, TopK

SITE = "vision.blocks.1.hook_resid_post"
TARGETS = [Target("pneumonia", "a chest x-ray with pneumonia", "a chest x-ray without pneumonia")]


def dictionary(width: int = 64, k: int = 4, seed: int = 0) -> SparseDictionary:
    """A TopK dictionary of random unit directions: a poor one, so that its error term is large."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(width, WIDTH, generator=generator), dim=1)
    return SparseDictionary(rows.T.clone(), rows.clone(), torch.zeros(width), torch.zeros(WIDTH), TopK(k))


def complete() -> SparseDictionary:
    """A dictionary without error: one feature for each sign of each dimension."""
    eye = torch.eye(WIDTH)
    rows = torch.cat([eye, -eye])
    return SparseDictionary(rows.T.clone(), rows, torch.zeros(2 * WIDTH), torch.zeros(WIDTH), ReLU())


@pytest.fixture(scope="module")
def clip() -> HookedVLM:
    return HookedVLM(*tiny("clip"))


@pytest.fixture(scope="module")
def batch(clip):
    return clip.prepare(torch.rand(4, 32, 32, generator=torch.Generator().manual_seed(1)), TARGETS)


def value_at(model, batch, site):
    with torch.no_grad():
        return model.run_with_cache(batch, names_filter=site)[1][site]


def written(model, batch, edit, site=SITE):
    """What the edit adds at the site."""
    clean = value_at(model, batch, site)
    with intervene(model, [edit]):
        return value_at(model, batch, site) - clean


HOWS = {
    "zero": (Zero(), lambda a: torch.zeros_like(a)),
    "mean": (Mean(torch.full((64,), 0.5)), lambda a: torch.full_like(a, 0.5)),
    "resample": (Resample(3), lambda a: a[donors(4, 3)]),
    "scale": (Scale(2.5), lambda a: 2.5 * a),
    "steer": (Steer(1.5), lambda a: a + 1.5),
    "patch": (Patch(torch.full((4, 17, 64), 0.25)), lambda a: torch.full_like(a, 0.25)),
    "inject": (Inject(2.0), lambda a: torch.full_like(a, 2.0)),
}


@pytest.mark.parametrize("name", HOWS)
def test_adds_the_decoded_change_and_keeps_the_error_term(clip, batch, name):
    how, wanted = HOWS[name]
    d = dictionary()
    old = d.encode(value_at(clip, batch, SITE))
    features = tuple(old[:, 2].sum(0).topk(3).indices.tolist())
    change = torch.zeros_like(old)
    change[..., features] = wanted(old[..., features]) - old[..., features]
    got = written(clip, batch, Edit(Placed.sae(d, SITE), features, how))
    assert change.abs().max() > 0.1
    torch.testing.assert_close(got, change @ d.W_dec, atol=1e-5, rtol=0)


def test_an_edit_that_changes_no_activation_changes_nothing(clip, batch):
    """The reconstruction never replaces the activations, however bad the dictionary is."""
    edit = Edit(Placed.sae(dictionary(k=1), SITE), tuple(range(64)), Scale(1.0))
    assert written(clip, batch, edit).abs().max() == 0


@pytest.mark.parametrize(("tokens", "positions"), [("cls", [0]), ("patch", range(1, 17)), ([3, 5], [3, 5])])
def test_only_the_chosen_tokens_change(clip, batch, tokens, positions):
    got = written(clip, batch, Edit(Placed.sae(dictionary(), SITE), (7,), Steer(1.0), tokens))
    moved = got.abs().amax((0, 2)) > 1e-4
    assert moved.nonzero()[:, 0].tolist() == list(positions)


def test_patching_all_of_a_complete_dictionary_gives_the_other_run(clip, batch):
    """The known answer of activation patching: everything after the site is the donor's."""
    d, other = complete(), batch[torch.tensor([2, 3, 0, 1])]
    activations = d.encode(value_at(clip, other, SITE))
    with torch.no_grad(), patch(clip, Placed.sae(d, SITE), range(2 * WIDTH), activations):
        got = clip.score(batch, TARGETS)
    with torch.no_grad():
        torch.testing.assert_close(got, clip.score(other, TARGETS), atol=1e-5, rtol=0)
        assert (got - clip.score(batch, TARGETS)).abs().max() > 1e-2


def test_a_transcoder_reads_before_it_writes(clip, batch):
    d = dictionary(seed=2)
    placed = Placed(d, Site.parse("vision.blocks.1.ln2.hook_normalized"), Site.parse("vision.blocks.1.hook_mlp_out"))
    old = d.encode(value_at(clip, batch, str(placed.reads)))
    feature = int(old.sum((0, 1)).argmax())
    got = written(clip, batch, Edit(placed, (feature,)), str(placed.writes))
    torch.testing.assert_close(got, -old[..., feature, None] * d.W_dec[feature], atol=1e-5, rtol=0)
    swapped = Placed(d, placed.writes, placed.reads)
    with pytest.raises(UsageError, match="runs before"), intervene(clip, [Edit(swapped, (0,))]):
        clip.score(batch, TARGETS)


def test_a_transcoder_sees_what_was_changed_upstream(clip, batch):
    d = dictionary(seed=2)
    reads, writes = "vision.blocks.1.ln2.hook_normalized", "vision.blocks.1.hook_mlp_out"
    upstream = Edit(Placed.sae(dictionary(), "vision.blocks.0.hook_resid_post"), (3,), Steer(5.0))
    edit = Edit(Placed(d, Site.parse(reads), Site.parse(writes)), tuple(range(64)))
    with intervene(clip, [upstream]):
        expected = value_at(clip, batch, writes) - d.encode(value_at(clip, batch, reads)) @ d.W_dec
    with intervene(clip, [upstream, edit]):
        torch.testing.assert_close(value_at(clip, batch, writes), expected, atol=1e-5, rtol=0)


def test_edits_of_one_dictionary_do_not_see_each_other(clip, batch):
    placed = Placed.sae(dictionary(), SITE)
    edits = [Edit(placed, (1, 2)), Edit(placed, (5,), Steer(9.0)), Edit(placed, (6,), Inject(1.0), "cls")]
    found = []
    for order in (edits, edits[::-1]):
        with torch.no_grad(), intervene(clip, order):
            found.append(value_at(clip, batch, SITE))
    apart = sum(written(clip, batch, edit) for edit in edits)
    assert torch.equal(*found)
    torch.testing.assert_close(found[0] - value_at(clip, batch, SITE), apart, atol=1e-5, rtol=0)


def test_everything_is_undone_also_after_an_error(clip, batch):
    with torch.no_grad():
        clean = clip.score(batch, TARGETS)
        with pytest.raises(RuntimeError, match="mine"), steer(clip, Placed.sae(dictionary(), SITE), [0], 5.0):
            assert (clip.score(batch, TARGETS) - clean).abs().max() > 1e-3
            raise RuntimeError("mine")
        assert torch.equal(clip.score(batch, TARGETS), clean)
    assert not clip.hooked()


def test_pooled_and_text_sites_take_edits_too():
    model = HookedVLM(*tiny("llava"))
    batch = model.prepare(torch.rand(2, 32, 32, generator=torch.Generator().manual_seed(1)), TARGETS)
    placed = Placed.sae(dictionary(), "text.blocks.1.hook_resid_post")
    with torch.no_grad():
        clean, report = model.score(batch, TARGETS), model.generate_report(batch, 4)
        with steer(model, placed, [3], 50.0):
            assert (model.score(batch, TARGETS) - clean).abs().max() > 1e-2
            assert model.generate_report(batch, 4) != report
        assert model.generate_report(batch, 4) == report


def test_a_pooled_site_is_one_token(clip, batch):
    d = dictionary()
    site = "vision.hook_pooled"
    old = d.encode(value_at(clip, batch, site))
    with inject(clip, Placed.sae(d, site), [4], 3.0):
        got = value_at(clip, batch, site)
    expected = value_at(clip, batch, site) + (3.0 - old[:, 4:5]) * d.W_dec[4]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_resampling_gives_every_image_another_one():
    for n in (2, 3, 10):
        for seed in range(5):
            found = donors(n, seed)
            assert sorted(found.tolist()) == list(range(n))
            assert (found != torch.arange(n)).all()
    assert torch.equal(donors(50, 1), donors(50, 1))
    assert not torch.equal(donors(50, 1), donors(50, 2))
    with pytest.raises(UsageError, match="two images"):
        donors(1, 0)


@pytest.mark.parametrize("features", [(), (64,), (-1,), (3, 3)])
def test_features_that_cannot_be(features):
    with pytest.raises(UsageError):
        Edit(Placed.sae(dictionary(), SITE), features)


def test_choices_that_cannot_be_are_named(clip, batch):
    placed = Placed.sae(dictionary(), SITE)
    with pytest.raises(UsageError, match="no token 17"):
        token_mask(clip, placed.reads, 17, [17])
    with pytest.raises(UsageError, match="do not exist"):
        token_mask(clip, Site.parse("text.blocks.0.hook_resid_post"), 17, "patch")
    with pytest.raises(UsageError, match="no class token"):
        token_mask(HookedVLM(*tiny("siglip")), placed.reads, 16, "cls")
    with pytest.raises(UsageError, match="nothing"), intervene(clip, []):
        pass
    with pytest.raises(UsageError, match="the other run"), patch(clip, placed, [0], torch.zeros(1, 17, 64)):
        clip.score(batch, TARGETS)
    with pytest.raises(ModelError), ablate(clip, Placed.sae(dictionary(), "vision.blocks.9.hook_resid_post"), [0]):
        pass
