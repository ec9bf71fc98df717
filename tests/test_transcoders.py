"""Transcoders of every MLP: rows with a text for each image, rare tokens repeated, found beside a model or trained."""

import numpy as np
import pytest
import torch
from audit_toys import write_cohort
from store_fakes import RESID, FakeData, FakeModel
from tiny_models import tiny

import mechinterp.audit.dictionary as dictionary_module
from mechinterp.activations import extract
from mechinterp.audit.dictionary import mlps, train_transcoders, transcoders_of
from mechinterp.data import open_data
from mechinterp.errors import ModelError, UsageError
from mechinterp.models import HookedVLM
from mechinterp.models.bundles import bundled
from mechinterp.storage import MANIFEST
from mechinterp.types import Site
from saes import TranscoderConfig
from saes.engine.data import TrainingData

SAID = [
    "is there pneumonia ?",
    "write report of the left effusion",
    "is there drain ?",
    "describe the image",
    "a",
    "b c",
]


@pytest.mark.parametrize("family", ["llava", "clip", "siglip"])
def test_each_image_has_its_own_text_and_padding_changes_nothing(tmp_path, family):
    model, data = HookedVLM(*tiny(family)), FakeData(6)
    site = "text.blocks.1.hook_mlp_out"
    store = extract(model, data, [site], tmp_path / "s", tokens="all", batch_size=4, texts=SAID)
    index = store.index_of(site)
    for i, text in enumerate(SAID):
        alone = model.preprocess(data.pixels(range(i, i + 1)), [text])
        _, cache = model.run_with_cache(alone, names_filter=[site])
        rows = np.flatnonzero((index["image"] == data.images[i]).to_numpy())
        torch.testing.assert_close(store.site(site)[rows], cache[site][0], rtol=1e-4, atol=1e-5)


def test_texts_are_part_of_the_request_and_one_for_each_image(tmp_path):
    model, data = HookedVLM(*tiny("clip")), FakeData(6)
    site, vision = "text.blocks.1.hook_mlp_out", "vision.blocks.1.hook_mlp_out"
    key = {extract(model, data, [site], tmp_path / name, texts=said, tokens="all").request.key
           for name, said in (("a", SAID), ("b", SAID[::-1]))}  # fmt: skip
    assert len(key) == 2
    pictures = extract(model, data, [vision], tmp_path / "v", texts=SAID)
    assert pictures.request.texts is None and "texts" not in pictures.request.to_dict()
    with pytest.raises(UsageError, match="5 texts for 6 images"):
        extract(model, data, [site], tmp_path / "c", texts=SAID[:5])


def test_rare_tokens_are_repeated_until_they_are_the_share_asked_for(tmp_path):
    store = extract(FakeModel(), FakeData(60), [RESID[1]], tmp_path / "s", tokens="all")
    site, kinds = Site.parse(RESID[1]), store.index_of(RESID[1])["kind"].to_numpy()
    plain, shared = (TrainingData(store, site, site, "all", 64, 1, 0, share) for share in (0.0, 0.25))
    first, again, other = shared.order(0), shared.order(0), shared.order(1)
    assert (kinds[plain.order(0)] == "cls").mean() == pytest.approx(1 / 17)
    assert (kinds[first] == "cls").mean() == pytest.approx(0.25, abs=0.02)
    assert set(first) == set(plain.order(0)) == set(store.rows(site, "train"))
    assert (first == again).all() and not (first == other).all() and sorted(first) == sorted(other)
    assert shared.steps == len(first) // 64
    patches, counts = np.unique(first[kinds[first] == "patch"], return_counts=True)
    assert (counts == 1).all() and len(patches) == (kinds[plain.order(0)] == "patch").sum()


@pytest.mark.parametrize("share", [-0.1, 0.6, float("nan")])
def test_a_share_that_cannot_be_is_refused(share):
    with pytest.raises(UsageError, match="least_share"):
        TranscoderConfig(least_share=share)


def test_trained_for_every_block_once_and_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dictionary_module, "TRANSCODER_STEPS", 3)
    model, data = HookedVLM(*tiny("clip")), open_data(write_cohort(tmp_path / "data", 60))
    assert transcoders_of(model) == []
    made = train_transcoders(model, data, seed=0)
    assert [(str(one.reads), str(one.writes)) for one in made] == mlps(model, "vision") + mlps(model, "text")
    assert "takes about" in caplog.text and str(tmp_path) in caplog.text
    monkeypatch.setattr(dictionary_module, "extract", None)
    again = train_transcoders(model, data, seed=0)
    assert all(torch.equal(a.dictionary.W_dec, b.dictionary.W_dec) for a, b in zip(made, again, strict=True))
    assert {p.parent.parent for p in (tmp_path / "cache").rglob(MANIFEST)} >= {tmp_path / "cache" / "dictionaries"}


def test_a_model_without_mlps_to_read_is_told(tmp_path):
    model, data = HookedVLM(*tiny("vit")), open_data(write_cohort(tmp_path / "data", 20))
    model.sites = lambda pattern="*": ["vision.hook_pooled"]  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="no MLP"):
        train_transcoders(model, data, seed=0)


@pytest.mark.parametrize("name", bundled())
def test_every_mlp_of_a_bundled_model_has_a_transcoder_that_beats_its_untrained_twin(name):
    model = HookedVLM.from_pretrained(name)
    stored = transcoders_of(model)
    assert [(str(one.reads), str(one.writes)) for one in stored] == mlps(model, "vision") + mlps(model, "text")
    for one in stored:
        info = one.dictionary.info  # type: ignore[attr-defined]
        assert info["kind"] == "transcoder" and info["model"]["sha256"] == model.sha256
        assert info["metrics"]["r2"] > 0.85 > 0 > info["metrics_untrained"]["r2"]
