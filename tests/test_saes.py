"""Dictionaries: trained by sae-lens on our order, saved in its layout, equal in plain torch, exact on resume."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from store_fakes import RESID, FakeData, FakeModel, hashes

import saes.engine.data as data_module
from mechinterp.activations import extract
from mechinterp.errors import MechInterpError, NonFiniteError, StorageError, UsageError
from mechinterp.storage import write_manifest
from mechinterp.types import Dictionary
from saes import (
    BatchTopKConfig,
    SparseDictionary,
    TopKConfig,
    dead,
    evaluate,
    frequency,
    l0,
    load_sae,
    r2,
    train_sae,
    untrained,
)
from saes.checkpoint import CHECKPOINT, read_state
from saes.folder import read_dictionary

SITE = RESID[2]
SMALL = {"k": 4, "width": 48, "epochs": 8, "batch_size": 128, "dead_after": 30, "checkpoint_every": 20}
CONFIGS = [TopKConfig(**SMALL), BatchTopKConfig(**SMALL)]

pytestmark = pytest.mark.xdist_group("saes")  # one worker imports sae_lens


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return extract(FakeModel(), FakeData(160), [SITE], tmp_path_factory.mktemp("acts") / "store", tokens="patch")


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda config: config.kind)
def trained(request, store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sae") / request.param.kind
    return train_sae(store, SITE, request.param, folder), folder, request.param


def test_sae_lens_opens_it_and_gives_the_same(trained, store):
    from sae_lens import SAE

    placed, folder, config = trained
    theirs, ours, x = SAE.load_from_disk(folder), placed.dictionary, store.site(SITE)[:700]
    assert theirs.cfg.architecture() == {"topk": "topk", "batchtopk": "jumprelu"}[config.kind]
    torch.testing.assert_close(ours.encode(x), theirs.encode(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.decode(ours.encode(x)), theirs(x), rtol=1e-6, atol=1e-6)
    batched = x.reshape(7, 100, -1)
    torch.testing.assert_close(ours(batched), theirs(batched), rtol=1e-6, atol=1e-6)
    assert isinstance(ours, Dictionary) and isinstance(theirs, Dictionary)
    assert theirs.cfg.metadata.hook_name == SITE == str(placed.reads) == str(placed.writes)


def test_reads_what_sae_lens_saves_itself(tmp_path, store):
    """Also where the decoder norms are not folded, and for a plain ReLU SAE."""
    from sae_lens import SAE, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

    x = store.site(SITE)[:300]
    for theirs in (
        TopKSAE(TopKSAEConfig(d_in=16, d_sae=40, k=5, rescale_acts_by_decoder_norm=True)),
        TopKSAE(TopKSAEConfig(d_in=16, d_sae=40, k=5, apply_b_dec_to_input=False)),
        StandardSAE(StandardSAEConfig(d_in=16, d_sae=40)),
    ):
        with torch.no_grad():
            theirs.W_dec.mul_(torch.rand(40, 1) + 0.5)
            theirs.b_dec.normal_()
        theirs.save_model(tmp_path)
        ours, again = read_dictionary(tmp_path), SAE.load_from_disk(tmp_path)
        torch.testing.assert_close(ours.encode(x), again.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(x), again(x), rtol=1e-5, atol=1e-5)


def test_it_learns(trained, store):
    placed, folder, config = trained
    found, info = evaluate(placed, store, "val"), placed.dictionary.info
    assert found.r2 > 0.4 and found.r2 > info["metrics_untrained"]["r2"] + 0.2
    assert abs(found.l0 - config.k) < (1e-9 if config.kind == "topk" else 1.0)
    assert info["metrics"] == found.to_dict() and found.rows == 24 * 16
    norms = placed.dictionary.W_dec.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    assert (info["site"], info["tokens"], info["store"], info["seed"]) == (SITE, "patch", store.sha256, 0)
    assert not (folder / CHECKPOINT).exists()


def test_loading_does_not_import_sae_lens(store, tmp_path):
    train_sae(store, SITE, TopKConfig(**{**SMALL, "epochs": 1}), tmp_path)
    code = (
        "import sys; from saes import load_sae; load_sae(sys.argv[1]); "
        "assert not {'sae_lens', 'transformer_lens', 'transformers', 'wandb'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_same_seed_same_bytes_other_seed_other_weights(trained, store, tmp_path):
    _, folder, config = trained
    train_sae(store, SITE, config, tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(folder)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    other = train_sae(store, SITE, config, tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(other.dictionary.W_enc, load_sae(folder).dictionary.W_enc)


class Stop(Exception):
    pass


def stop_at(monkeypatch, step):
    """Make training raise Stop at a global step."""
    order = data_module.TrainingData.batches

    def batches(self, start):
        for number, batch in enumerate(order(self, start), start):
            if number == step:
                raise Stop
            yield batch

    monkeypatch.setattr(data_module.TrainingData, "batches", batches)


@pytest.mark.parametrize("step", [0, 20, 21, 47])  # warm-up ends at 5 of 112 steps, decay begins at 90
def test_resume_ends_in_the_same_bytes(trained, store, tmp_path, step):
    _, folder, config = trained
    for stop in (step, 95):
        with pytest.MonkeyPatch.context() as patched:
            stop_at(patched, stop)
            with pytest.raises(Stop):
                train_sae(store, SITE, config, tmp_path / "part")
        state = read_state(tmp_path / "part" / CHECKPOINT)[1]
        assert state["numbers"]["n_training_steps"] == stop // 20 * 20
    train_sae(store, SITE, config, tmp_path / "part")
    assert hashes(tmp_path / "part") == hashes(folder)


def test_nan_stops_at_that_step_naming_the_images(store, tmp_path, monkeypatch):
    activations, gather = store.site(SITE), type(store.site(SITE)).__getitem__
    bad_row = store.order(SITE, seed=0, epoch=2)[5 * 128 + 3]  # epoch 2, step 5 of 14: global step 33
    image = store.index_of(SITE)["image"][bad_row]
    served = 0

    def poisoned(self, rows):
        nonlocal served
        served += len(rows) == 128
        x = gather(self, rows).clone()
        if served == 34:
            x[3] = float("nan")
        return x

    monkeypatch.setattr(type(activations), "__getitem__", poisoned)
    with pytest.raises(NonFiniteError, match=image) as caught:
        train_sae(store, SITE, CONFIGS[0], tmp_path / "sae")
    assert caught.value.images == [image] and served == 34
    tensors, state = read_state(tmp_path / "sae" / CHECKPOINT)
    assert state["numbers"]["n_training_steps"] == 20
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert {path.name for path in (tmp_path / "sae").iterdir()} == {CHECKPOINT}


def test_metrics_by_hand():
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 6.0]])
    x_hat = torch.tensor([[1.0, 1.0], [3.0, 0.0], [2.0, 4.0]])
    assert r2(x, x_hat) == pytest.approx(1 - 5 / 26)  # mean (2, 2); squares 5 + 5 + 16
    acts = torch.tensor([[0.0, 2.0, 0.0], [0.0, 1.0, 3.0], [0.0, 0.0, 0.0]])
    assert l0(acts) == pytest.approx(1.0) and dead(acts) == pytest.approx(1 / 3)
    assert frequency(acts).tolist() == pytest.approx([0, 2 / 3, 1 / 3])


def test_evaluate_equals_the_formulas(trained, store):
    placed, _, _ = trained
    x = store.site(SITE)[store.rows(SITE, "test")]
    acts, found = placed.dictionary.encode(x), evaluate(placed, store, "test")
    assert found.r2 == pytest.approx(r2(x, placed.dictionary.decode(acts)), abs=1e-9)
    assert (found.l0, found.dead) == (pytest.approx(l0(acts)), pytest.approx(dead(acts)))
    assert torch.allclose(found.frequency, frequency(acts))


def test_untrained_twin(store):
    x = store.site(SITE)[:500]
    twin = untrained(CONFIGS[1], 16, seed=3, mean=x.mean(0))
    assert twin.W_enc.shape == (16, 48) and l0(twin.encode(x)) == pytest.approx(4, abs=0.01)
    assert torch.equal(twin.W_dec, untrained(CONFIGS[0], 16, seed=3).W_dec)
    assert not torch.equal(twin.W_dec, untrained(CONFIGS[0], 16, seed=4).W_dec)


def test_another_run_is_refused(trained, store, tmp_path):
    _, folder, config = trained
    with pytest.raises(StorageError, match="another run"):
        train_sae(store, SITE, config, folder, seed=7)
    (tmp_path / "thesis.txt").write_text("keep")
    with pytest.raises(StorageError, match="not empty"):
        train_sae(store, SITE, config, tmp_path)
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, 30)
        with pytest.raises(Stop):
            train_sae(store, SITE, config, tmp_path / "part")
    with pytest.raises(StorageError, match="checkpoint of another run"):
        train_sae(store, SITE, config, tmp_path / "part", seed=7)
    path = tmp_path / "part" / CHECKPOINT
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(StorageError, match="not a whole safetensors"):
        train_sae(store, SITE, config, tmp_path / "part")


@pytest.mark.parametrize("wrong", [{"k": 0}, {"k": 99, "width": 48}, {"lr": 2.0}, {"epochs": 0}])
def test_wrong_configuration(wrong):
    with pytest.raises(UsageError):
        TopKConfig(**wrong)


def test_split_smaller_than_a_batch(tmp_path):
    data = FakeData(10)
    store = extract(FakeModel(), data, [SITE], tmp_path / "store", tokens="pooled")
    placed = train_sae(store, SITE, TopKConfig(k=2, width=8, epochs=3), tmp_path / "sae")
    assert placed.dictionary.info["steps"] == 3
    data.split = np.where(data.split == "train", "test", data.split)
    other = extract(FakeModel(), data, [SITE], tmp_path / "none", tokens="pooled")
    with pytest.raises(UsageError, match="training split"):
        train_sae(other, SITE, CONFIGS[0], tmp_path / "no")


def test_every_flipped_byte_is_noticed(trained, tmp_path):
    folder = tmp_path / "sae"
    shutil.copytree(trained[1], folder)
    chance, files = np.random.default_rng(0), sorted(folder.iterdir())
    load_sae(folder)
    for _ in range(60):
        path = files[chance.integers(len(files))]
        good = path.read_bytes()
        place = chance.integers(len(good))
        path.write_bytes(good[:place] + bytes([good[place] ^ (1 << chance.integers(8))]) + good[place + 1 :])
        with pytest.raises(MechInterpError):
            load_sae(folder)
        path.write_bytes(good)


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "gated"},
        {"architecture": None},
        {"normalize_activations": "layer_norm"},
        {"k": "many"},
        {"d_in": None, "architecture": []},
    ],
)
def test_dictionaries_that_cannot_be_read_are_told(store, tmp_path, change):
    train_sae(store, SITE, TopKConfig(**{**SMALL, "epochs": 1}), tmp_path / "sae")
    path = tmp_path / "sae" / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    write_manifest(tmp_path / "sae", {})
    with pytest.raises(StorageError):
        load_sae(tmp_path / "sae")
    with pytest.raises(StorageError, match="no such folder"):
        load_sae(tmp_path / "nowhere")


def test_dictionary_is_differentiable_in_its_input(trained):
    x = torch.randn(5, 16, requires_grad=True)
    dictionary = trained[0].dictionary
    assert isinstance(dictionary, SparseDictionary)
    dictionary(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
