"""Nulls present one protocol and learn nothing they should not; the scorecard sets scores beside them."""

import json

import numpy as np
import pytest
import torch
from store_fakes import RESID, FakeData, FakeModel

from mechinterp.activations import extract
from mechinterp.errors import UsageError
from mechinterp.types import Dictionary, Placed, Site
from saes import SparseDictionary, TopK, r2
from saes.metrics.arms import Task, measure
from saes.metrics.images import image_activations, image_table
from saes.metrics.pairs import RenderedPairs, rendered_pairs
from saes.nulls.directions import DEFAULT, NonNegative, dictionary_nulls, ica, nmf, pca, random_directions, raw_neurons
from saes.nulls.models import randomised
from saes.nulls.probe import probe_bound, probe_inputs
from saes.scorecard import scorecard

SITE, D = RESID[2], 16


def sources(n, seed=0):
    """Sparse non-negative sources, mixed: `[n, 8]` and rows `[n, 16]`."""
    generator = torch.Generator().manual_seed(seed)
    s = torch.rand(n, 8, generator=generator) * (torch.rand(n, 8, generator=generator) < 0.2)
    mixing = torch.randn(8, D, generator=torch.Generator().manual_seed(99))
    return s, s @ mixing + 0.01 * torch.randn(n, D, generator=generator)


class Data(FakeData):
    """320 images; `planted` says on which a bright square lies."""

    def __init__(self):
        super().__init__(320)
        chance = np.random.default_rng(5)
        self.planted = (chance.random((320, 2)) < 0.4).astype(float)
        self._pixels *= 0.3
        self._pixels[self.planted[:, 0] > 0, 4:8, 8:12] += 0.7
        self._pixels[self.planted[:, 1] > 0, 12:16, 0:4] += np.linspace(0, 0.7, 16, dtype=np.float32).reshape(4, 4)


@pytest.fixture(scope="module")
def data():
    return Data()


@pytest.fixture(scope="module")
def store(data, tmp_path_factory):
    return extract(FakeModel(), data, [SITE], tmp_path_factory.mktemp("acts") / "store", tokens="patch")


@pytest.fixture(scope="module")
def placed(store, data):
    """A dictionary that holds the two planted directions (difference of means) among random ones."""
    index, x = store.index_of(SITE), store.site(SITE)[:]
    generator = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(24, D, generator=generator), dim=-1)
    for a, patch in enumerate((1 * 4 + 2, 3 * 4 + 0)):
        rows = np.flatnonzero(index["patch"] == patch)
        on = data.planted[[data.images.index(name) for name in index["image"][rows]], a] > 0
        step = x[rows][on].mean(0) - x[rows][~on].mean(0)
        W[a] = step / step.norm()
    return Placed.sae(SparseDictionary(W.T.contiguous(), W, torch.zeros(24), x.mean(0), TopK(4)), SITE)


def test_pca_is_the_best_linear_code():
    from sklearn.decomposition import PCA

    _, x = sources(500)
    for k in (1, 3, 8):
        lines = PCA(k).fit(x.double().numpy())
        rebuilt = torch.from_numpy(lines.inverse_transform(lines.transform(x.double().numpy())))
        # the k largest of each row do at least as well as the k first of all rows
        assert r2(x, pca(x, k).decode(pca(x, k).encode(x))) >= r2(x, rebuilt) - 1e-6
    whole = pca(x, D)
    assert r2(x, whole(x)) == pytest.approx(1, abs=1e-6)
    assert (whole.encode(x) > 0).sum(1).max() <= D


def test_ica_finds_independent_sources():
    s, x = sources(4000)
    acts = ica(x, k=2 * D).encode(x)
    best, best_pca = (
        np.abs(np.corrcoef(s.T.numpy(), z.T.numpy())[:8, 8:]).max(1) for z in (acts, pca(x, 2 * D).encode(x))
    )
    assert best.min() > 0.9 and best.min() > best_pca.min() + 0.05


@pytest.mark.parametrize("make", [lambda x: raw_neurons(x, 2 * D), lambda x: ica(x, 2 * D)], ids=["raw", "ica"])
def test_two_sided_lines_lose_nothing_when_all_are_kept(make):
    _, x = sources(1000)
    dictionary = make(x)
    assert r2(x, dictionary(x)) == pytest.approx(1, abs=1e-3) and (dictionary.encode(x) >= 0).all()


def test_random_directions_follow_the_data():
    _, x = sources(2000)
    x = x * torch.tensor([10.0] + [0.1] * (D - 1))
    found = random_directions(x, 64, 4, seed=1)
    assert found.W_dec.shape == (64, D) and found.W_enc[0].abs().min() > 0.5
    assert torch.equal(found.W_enc[:, :32], -found.W_enc[:, 32:])
    own = SparseDictionary(found.W_enc, found.W_enc.T.contiguous(), found.b_enc, found.b_dec, TopK(4))
    assert r2(x, found(x)) > max(r2(x, own(x)), 0.5)  # least squares beats the tied decoder
    assert torch.equal(found.W_dec, random_directions(x, 64, 4, seed=1).W_dec)
    assert not torch.equal(found.W_dec, random_directions(x, 64, 4, seed=2).W_dec)


def test_nmf_encodes_like_scipy_nnls():
    from scipy.optimize import nnls

    _, x = sources(200)
    made = nmf(x, 6)
    acts = made.encode(x[:20])
    for row, z in zip(x[:20], acts, strict=True):
        best = nnls(made.W_dec.T.double().numpy(), (row - made.b_dec).double().numpy())[1]
        mine = (row - made.decode(z)).double().norm().item()
        assert mine == pytest.approx(best, rel=5e-3, abs=1e-4)
    assert isinstance(made, NonNegative) and isinstance(made, Dictionary) and (acts >= 0).all()
    assert r2(x, made.decode(made.encode(x))) > 0.5


def test_nulls_are_placed_alike_and_as_sparse(placed, store):
    made = dictionary_nulls(placed, store, (*DEFAULT, "nmf"))
    assert set(made) == {"untrained", "random directions", "raw neurons", "pca", "ica", "nmf"}
    x = store.site(SITE)[:200]
    for name, null in made.items():
        assert isinstance(null.dictionary, Dictionary) and null.reads == null.writes == placed.reads
        acts = null.dictionary.encode(x)
        assert acts.shape[1] == null.dictionary.W_dec.shape[0] and (acts >= 0).all()
        assert null.dictionary.decode(acts).shape == x.shape
        assert name == "nmf" or (acts > 0).sum(1).max() <= 4
    again = dictionary_nulls(placed, store, ("ica", "random directions"))
    assert torch.equal(made["ica"].dictionary.W_enc, again["ica"].dictionary.W_enc)


def test_nulls_are_fitted_on_training_rows_only(placed, store, monkeypatch):
    made = dictionary_nulls(placed, store)
    gather, test_rows = type(store.site(SITE)).__getitem__, set(store.rows(SITE, "test").tolist())

    def watched(self, rows):
        assert not test_rows & set(np.asarray(rows).tolist())
        return gather(self, rows)

    monkeypatch.setattr(type(store.site(SITE)), "__getitem__", watched)
    assert torch.equal(dictionary_nulls(placed, store)["pca"].dictionary.W_enc, made["pca"].dictionary.W_enc)


def test_randomised_model_keeps_the_statistics_and_the_original():
    from tiny_models import tiny

    from mechinterp.models import HookedVLM

    model = HookedVLM(*tiny("clip"))
    before = model.sha256
    other = randomised(model, seed=1)
    assert model.sha256 == before != other.sha256
    assert other.sha256 == randomised(model, seed=1).sha256 != randomised(model, seed=2).sha256
    shuffled = randomised(model, seed=1, how="shuffled")
    for (name, old), new, moved in zip(
        model.hf.named_parameters(), other.hf.parameters(), shuffled.hf.parameters(), strict=True
    ):
        assert torch.equal(old.flatten().sort().values, moved.flatten().sort().values), name
        if old.numel() > 1000:
            assert not torch.equal(old, new)
            assert new.std().item() == pytest.approx(old.std().item(), rel=0.15)


# ----------------------------------------------------------------------------------------------------- scorecard


@pytest.fixture(scope="module")
def card(placed, store, data):
    chance = np.random.default_rng(0)
    labels = {"square": data.planted[:, 0], "ramp": data.planted[:, 1], "coin": (chance.random(320) < 0.5) * 1.0}
    rare = np.zeros(320)
    rare[0] = 1
    embeddings = np.column_stack([data.planted, chance.random((320, 3))]) + 0.1
    return scorecard(placed, store, labels | {"rare": rare}, embeddings=embeddings, draws=200)


def test_a_planted_direction_beats_its_nulls_and_a_coin_does_not(card):
    nulls = {"untrained", "random directions", "raw neurons", "pca", "ica", "permuted labels", "linear probe"}
    assert {score.null for score in card.scores if score.metric == "AUROC"} == nulls
    for null in ("permuted labels", "untrained"):
        found = card.find("AUROC", null, "square")
        assert found.value > 0.9 and found.difference == pytest.approx(found.value - found.null_value)
        assert found.ci95[0] <= found.difference <= found.ci95[1]
    assert card.find("AUROC", "permuted labels", "square").ci95[0] > 0
    assert card.find("F1", "permuted labels", "square").ci95[0] > 0
    coin = card.find("AUROC", "permuted labels", "coin")
    assert coin.ci95[0] < 0 < coin.ci95[1]
    assert card.find("AUROC", "linear probe", "square").null_value > 0.95
    assert card.find("R2", "pca").difference < 0  # nothing linear beats PCA at the same k


def test_the_mean_is_over_concepts(card):
    for metric in ("F1", "MATCHScore", "1-sparse probe AUROC"):
        parts = [card.find(metric, "untrained", name) for name in ("square", "ramp", "coin")]
        mean = card.find(metric, "untrained")
        assert mean.value == pytest.approx(np.mean([p.value for p in parts]))
        assert mean.difference == pytest.approx(np.mean([p.difference for p in parts]))
        width = mean.ci95[1] - mean.ci95[0]
        assert 0 < width < max(p.ci95[1] - p.ci95[0] for p in parts)


def test_what_was_not_tested_is_said(card):
    said = "\n".join(card.notes)
    assert "rare: NOT TESTED" in said and "TAPAScore: NOT TESTED" in said and "randomised encoder: NOT TESTED" in said
    assert "MS: NOT TESTED" not in said and not any(score.concept == "rare" for score in card.scores)


def test_forms_of_the_card(card):
    text, table = str(card), card.to_table()
    assert "MATCHScore" in text and "permuted labels" in text and "FDR" in text
    assert set(table["concept"]) == {"mean"} and {"low", "high", "difference"} <= set(table)
    plain = json.loads(json.dumps(card.to_dict(), allow_nan=False))
    assert len(plain["scores"]) == len(card.scores) == len(card.to_table(None)) and plain["images"] == 48
    assert card.discoveries["permuted labels"] <= 0.05 < card.discoveries["dictionary"]
    with pytest.raises(UsageError, match="beside"):
        card.find("AUROC", "tea leaves")


def test_rendered_pairs_differ_in_one_factor():
    from tiny_models import tiny

    from mechinterp.data.phantom import Phantom
    from mechinterp.models import HookedVLM

    model, phantom = HookedVLM(*tiny("clip")), Phantom.sample(5, seed=1, size=64)
    site = "vision.blocks.0.hook_resid_post"
    pairs = rendered_pairs(model, site, phantom, ["portable", "drain"], batch_size=2)
    without, present = pairs.activations["portable"]
    assert without.shape == present.shape and not torch.equal(without, present)
    batch = model.preprocess(phantom.do(portable=1).render().astype(np.float32) / 255)
    expected = model.run_with_cache(batch, names_filter=site)[1][site][:, model.patch_tokens(batch)]
    torch.testing.assert_close(present, expected, atol=1e-5, rtol=1e-5)
    twin = Placed.sae(raw_neurons(without.flatten(0, 1), k=3), site)
    off, on = pairs.encode(twin, "portable")
    np.testing.assert_allclose(on, twin.dictionary.encode(expected).amax(1), atol=1e-4)
    assert off.shape == on.shape == (5, 2 * without.shape[-1])
    with pytest.raises(UsageError, match="not a binary factor"):
        rendered_pairs(model, site, phantom, ["age"])
    with pytest.raises(UsageError, match="the pairs are of"):
        pairs.encode(Placed.sae(twin.dictionary, RESID[1]), "portable")


def test_rendered_pairs_after_the_projector_hold_every_patch():
    from tiny_models import tiny

    from mechinterp.data.phantom import Phantom
    from mechinterp.models import HookedVLM

    model, phantom = HookedVLM(*tiny("llava")), Phantom.sample(2, seed=1, size=64)
    before, after = (
        rendered_pairs(model, site, phantom, ["drain"]).activations["drain"][1]
        for site in ("vision.blocks.0.hook_resid_post", "projector.hook_out")
    )
    assert after.shape[:2] == before.shape[:2]  # the class token is gone already


def test_tapa_score_on_the_card(placed, store, data):
    """Pairs made by hand: images without the square, and the same with what the square adds to its patch."""
    index, x = store.index_of(SITE), store.site(SITE)[:].view(320, 16, D)
    assert index["image"].nunique() == 320
    off, on = (data.planted[:, 0] == value for value in (0, 1))
    absent = x[torch.from_numpy(np.flatnonzero(off)[:40])]
    present = absent.clone()
    present[:, 6] = x[torch.from_numpy(np.flatnonzero(on)[:40]), 6]
    pairs = RenderedPairs(placed.reads, {"square": (absent, present)}, np.arange(40).astype(str))
    labels = {"square": data.planted[:, 0], "ramp": data.planted[:, 1]}
    card = scorecard(placed, store, labels, nulls=("untrained",), pairs=pairs, draws=100)
    found = card.find("TAPAScore", "untrained", "square")
    assert found.value > 1.5 and np.isnan(card.find("TAPAScore", "untrained", "ramp").value)
    assert card.find("TAPAScore", "untrained").value == found.value  # the mean is over concepts that have pairs


def test_an_arm_compared_with_itself_differs_by_nothing(placed, store, data):
    labels = {"square": data.planted[:, 0]}
    same = scorecard(placed, store, labels, nulls=(), others={"itself": (placed, store)}, draws=50)
    for score in same.scores:
        if score.null == "itself":
            assert score.concept in ("mean", "square")
            assert score.difference == 0 and score.ci95 == (0.0, 0.0)
    transcoder = Placed(placed.dictionary, placed.reads, Site.parse("vision.blocks.2.hook_mlp_out"))
    other = scorecard(transcoder, store, labels, nulls=("pca",), draws=50)
    assert any(note.startswith("R2: NOT TESTED") for note in other.notes)
    assert not any(score.metric == "R2" for score in other.scores)
    assert other.find("F1", "pca").value == same.find("F1", "itself").value
    with pytest.raises(UsageError, match="no concept"):
        scorecard(placed, store, {"none": np.zeros(320)})
    with pytest.raises(UsageError, match="3 labels for 320 images"):
        scorecard(placed, store, {"short": np.zeros(3)})


def test_scores_of_test_images_ignore_test_labels_when_choosing(placed, store, data):
    table = image_table(store, SITE)
    acts = image_activations(placed, store, None)[0]
    split = table["split"].to_numpy(str)
    task = Task.of(data.planted, split, table["patient"].to_numpy(str), draws=20, seed=0)
    flipped = task.with_labels(np.where((split == "test")[:, None], 1 - data.planted, data.planted))
    straight, reverse = measure(acts, task), measure(acts, flipped)
    assert [m.latents for m in straight[1]] == [m.latents for m in reverse[1]]
    np.testing.assert_allclose(straight[0]["AUROC"].value, 1 - reverse[0]["AUROC"].value)
    np.testing.assert_allclose(straight[0]["AUROC"].draws, 1 - reverse[0]["AUROC"].draws)


def test_probe_bound_speaks_the_protocol(store, data):
    x = probe_inputs(store, SITE)
    split = image_table(store, SITE)["split"].to_numpy(str)
    bound = probe_bound(x, np.column_stack([data.planted, np.zeros(320)]), split)
    found = bound.encode(x)
    assert x.shape == (320, 3 * D) and found.shape == (320, 3) and np.isnan(found[:, 2]).all()
    assert ((found[:, :2] >= 0) & (found[:, :2] <= 1)).all()
