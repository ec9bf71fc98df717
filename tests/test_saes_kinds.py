"""Every kind: trained, kept in sae-lens's layout, resumed to the byte; transcoders, token kinds, and sweeps."""

import json
import re

import numpy as np
import pytest
import torch
from store_fakes import RESID, FakeData, FakeModel, hashes

import saes.engine.data as data_module
from mechinterp.activations import extract
from mechinterp.errors import NonFiniteError, StorageError, UsageError
from saes.checkpoint import CHECKPOINT, read_state
from saes.config import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    TopKConfig,
    TranscoderConfig,
)
from saes.folder import load_sae
from saes.metrics import evaluate
from saes.sweep import SWEEP, SweepRow, pick, train_sweep
from saes.tokens import rows_for
from saes.train import train_sae, train_transcoder
from saes.transcoder import export_transcoder

READS, WRITES = RESID[1], RESID[2]
SMALL = {"width": 48, "epochs": 8, "batch_size": 128, "dead_after": 30, "checkpoint_every": 20, "lr": 3e-3}
SAES = [
    TopKConfig(k=4, **SMALL),
    BatchTopKConfig(k=4, **SMALL),
    MatryoshkaConfig(k=4, **SMALL),
    JumpReLUConfig(**SMALL, target_l0=4),
    GatedConfig(**SMALL, l1_coefficient=2.0),
]
TRANSCODERS = [
    TranscoderConfig(k=4, **SMALL),
    TranscoderConfig(k=4, **SMALL, skip=True),
    TranscoderConfig(k=4, **SMALL, sparsity="batchtopk"),
    TranscoderConfig(k=4, **SMALL, sparsity="batchtopk", skip=True),
]

pytestmark = pytest.mark.xdist_group("saes")  # one worker imports sae_lens


def name(config):
    return "-".join([config.kind, *([config.sparsity, "skip"[: 4 * config.skip]] if config in TRANSCODERS else [])])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("acts") / "store"
    return extract(FakeModel(), FakeData(120), [READS, WRITES], folder, tokens="all")


def train(config, store, out, **options):
    if isinstance(config, TranscoderConfig):
        return train_transcoder(store, READS, WRITES, config, out, **options)
    return train_sae(store, WRITES, config, out, **options)


@pytest.fixture(scope="module", params=[*SAES, *TRANSCODERS], ids=name)
def trained(request, store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dictionary") / "it"
    return train(request.param, store, folder), folder, request.param


def test_it_learns_and_says_what_it_is(trained, store):
    placed, _, config = trained
    info, found = placed.dictionary.info, evaluate(placed, store, "val")
    assert found.r2 > 0.4 and found.r2 > info["metrics_untrained"]["r2"] + 0.2
    assert info["metrics"] == found.to_dict()
    assert 2 < found.l0 < 16
    assert info["config"] == config.to_dict() | ({"levels": list(config.levels)} if "matry" in config.kind else {})
    transcodes = isinstance(config, TranscoderConfig)
    assert info["kind"] == ("transcoder" if transcodes else "sae")
    assert (str(placed.reads), str(placed.writes)) == (READS if transcodes else WRITES, WRITES)
    assert info["token_kinds"] == {"cls": 120, "patch": 1920}
    norms = placed.dictionary.W_dec.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_sae_lens_opens_it_and_gives_the_same(trained, store):
    from sae_lens import SAE

    placed, folder, _ = trained
    architecture = json.loads((folder / "cfg.json").read_text())["architecture"]
    if architecture.startswith("topk_"):
        with pytest.raises(KeyError):
            SAE.load_from_disk(folder)
        return
    theirs, x = SAE.load_from_disk(folder), store.site(str(placed.reads))[:500]
    torch.testing.assert_close(placed.dictionary.encode(x), theirs.encode(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(placed.dictionary(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert theirs.cfg.metadata.hook_name == str(placed.reads)


def test_topk_transcoder_is_exported_to_sae_lens(store, tmp_path):
    from sae_lens import SAE

    train_transcoder(store, READS, WRITES, TRANSCODERS[1], tmp_path / "own")
    placed = export_transcoder(tmp_path / "own", tmp_path / "theirs", store)
    theirs, x = SAE.load_from_disk(tmp_path / "theirs"), store.site(READS)[:500]
    torch.testing.assert_close(placed.dictionary(x), theirs(x), rtol=1e-5, atol=1e-6)
    info = placed.dictionary.info
    assert abs(info["metrics"]["l0"] - 4) < 0.5 and abs(info["metrics"]["r2"] - info["metrics_topk"]["r2"]) < 0.1
    with pytest.raises(UsageError, match="no TopK transcoder"):
        export_transcoder(tmp_path / "theirs", tmp_path / "again", store)


def test_a_skip_carries_what_is_linear(store, tmp_path):
    """With a skip, one latent of a transcoder explains more than without."""
    scores = []
    for skip in (False, True):
        config = TranscoderConfig(**{**SMALL, "width": 8}, k=1, skip=skip)
        placed = train_transcoder(store, READS, WRITES, config, tmp_path / str(skip))
        scores.append(evaluate(placed, store, "test").r2)
    assert scores[1] > scores[0] + 0.2
    skipless = placed.dictionary.decode(placed.dictionary.encode(store.site(READS)[:9]))
    assert not torch.allclose(skipless, placed.dictionary(store.site(READS)[:9]))


class Stop(Exception):
    pass


def test_resume_ends_in_the_same_bytes(trained, store, tmp_path, monkeypatch):
    _, folder, config = trained
    batches = data_module.TrainingData.batches

    def stopping(self, start):
        for number, batch in enumerate(batches(self, start), start):
            if number == stop:
                raise Stop
            yield batch

    monkeypatch.setattr(data_module.TrainingData, "batches", stopping)
    for stop in (0, 47):
        with pytest.raises(Stop):
            train(config, store, tmp_path / "part")
        assert read_state(tmp_path / "part" / CHECKPOINT)[1]["numbers"]["n_training_steps"] == stop // 20 * 20
    stop = -1
    train(config, store, tmp_path / "part")
    assert hashes(tmp_path / "part") == hashes(folder)


@pytest.mark.parametrize("config", [*SAES[1:], TRANSCODERS[1]], ids=name)
def test_nan_stops_at_that_step_naming_the_images(config, store, tmp_path, monkeypatch):
    gather, served = type(store.site(WRITES)).__getitem__, 0

    def poisoned(self, rows):
        nonlocal served
        x = gather(self, rows).clone()
        served += len(rows) == 128 and str(self.site) == WRITES
        if served == 34 and str(self.site) == WRITES:
            x[3, 1] = float("nan")
        return x

    site = READS if isinstance(config, TranscoderConfig) else WRITES
    row = store.order(site, seed=0, epoch=33 // 11)[(33 % 11) * 128 + 3]
    image = store.index_of(site)["image"][row]
    monkeypatch.setattr(type(store.site(WRITES)), "__getitem__", poisoned)
    with pytest.raises(NonFiniteError, match=image) as caught:
        train(config, store, tmp_path / "sae")
    assert caught.value.images == [image]
    tensors, state = read_state(tmp_path / "sae" / CHECKPOINT)
    assert state["numbers"]["n_training_steps"] == 20
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_tokens_are_not_mixed_by_accident(store, tmp_path):
    config = TopKConfig(k=4, **SMALL)
    patch = train_sae(store, WRITES, config, tmp_path / "patch", tokens="patch")
    info = patch.dictionary.info
    assert (info["tokens"], info["token_kinds"]) == ("patch", {"patch": 1920})
    kinds = store.index_of(WRITES)["kind"].to_numpy()
    assert set(kinds[rows_for(patch, store, "val")]) == {"patch"} and len(rows_for(patch, store, "val")) == 18 * 16
    only = extract(FakeModel(), FakeData(120), [WRITES], tmp_path / "only", tokens="patch")
    alike = train_sae(only, WRITES, config, tmp_path / "alike")
    assert alike.dictionary.info["tokens"] == "patch" and len(rows_for(patch, only)) == len(rows_for(alike, only))
    cls = extract(FakeModel(), FakeData(120), [WRITES], tmp_path / "cls", tokens="cls")
    with pytest.raises(UsageError, match="holds cls tokens, the dictionary reads patch"):
        rows_for(patch, cls)
    with pytest.raises(UsageError, match="holds no patch token"):
        train_sae(cls, WRITES, config, tmp_path / "no", tokens="patch")
    with pytest.raises(UsageError, match="holds no text token"):
        train_sae(store, WRITES, config, tmp_path / "no", tokens="text")
    with pytest.raises(StorageError, match="another run"):
        train_sae(store, WRITES, config, tmp_path / "patch")


def test_transcoder_needs_rows_that_belong_together(tmp_path):
    sites = [READS, "vision.hook_pooled"]
    mixed = extract(FakeModel(), FakeData(20), sites, tmp_path / "store", tokens="all")
    with pytest.raises(UsageError, match="different rows"):
        train_transcoder(mixed, *sites, TRANSCODERS[0], tmp_path / "no")
    with pytest.raises(UsageError, match="a transcoder has two"):
        train_transcoder(mixed, READS, READS, TRANSCODERS[0], tmp_path / "no")


SHORT = {**SMALL, "epochs": 3, "checkpoint_every": 10}
SWEPT = [TopKConfig(k=4, **SHORT), BatchTopKConfig(k=4, **{**SHORT, "epochs": 2})]
SWEPT.append(GatedConfig(**{**SHORT, "batch_size": 200}))


def test_sweep_gives_the_bytes_of_each_alone(store, tmp_path, monkeypatch):
    sweep = train_sweep(store, WRITES, SWEPT, tmp_path / "whole")
    for row, config in zip(sweep.rows, SWEPT, strict=True):
        train_sae(store, WRITES, config, tmp_path / "alone" / row.name)
        assert hashes(tmp_path / "alone" / row.name) == hashes(tmp_path / "whole" / row.name)
    batches = data_module.TrainingData.batches

    def stopping(self, start):
        for number, batch in enumerate(batches(self, start), start):
            if number == stop:
                raise Stop
            yield batch

    monkeypatch.setattr(data_module.TrainingData, "batches", stopping)
    stop = 25
    with pytest.raises(Stop):
        train_sweep(store, WRITES, SWEPT, tmp_path / "part")
    stop = -1
    again = train_sweep(store, WRITES, SWEPT, tmp_path / "part")
    assert hashes(tmp_path / "part") == hashes(tmp_path / "whole") and again.rows == sweep.rows
    written = json.loads((tmp_path / "whole" / SWEEP).read_text())
    assert [row["name"] for row in written["rows"]] == [row.name for row in sweep.rows]
    assert written["picked"] == sweep.picked
    assert re.search(rf"^\*\s+{sweep.picked}\s+48", sweep.table(), re.MULTILINE)
    units = torch.nn.functional.normalize(sweep.placed[sweep.rows[0].name].dictionary.W_dec, dim=-1)
    cosines = (units @ units.T).abs()[~torch.eye(48, dtype=bool)]
    assert sweep.rows[0].c_dec == pytest.approx(cosines.mean().item(), abs=1e-5)
    with pytest.raises(UsageError, match="the same"):
        train_sweep(store, WRITES, [SWEPT[0], SWEPT[0]], tmp_path / "same")


def test_pick():
    def row(width, l0, r2, c_dec, dead=0.0):
        return SweepRow(f"{width}-{l0}", "topk", width, float(l0), r2, 0.1, dead, c_dec)

    rows = [row(64, 4, 0.7, 0.2), row(64, 8, 0.8, 0.1), row(128, 4, 0.9, 0.2), row(128, 8, 0.899, 0.3)]
    assert pick(rows) == "128-4"
    assert pick([*rows, row(256, 4, 0.905, 0.1)]) == "128-4"  # no better than a narrower one
    assert pick([*rows, row(256, 4, 0.95, 0.1)]) == "256-4"
    assert pick([*rows, row(256, 4, 0.95, 0.1, dead=0.4)]) == "128-4"
    assert pick([row(64, 4, 0.05, 0.1), row(64, 8, 0.8, 0.2)]) == "64-8"  # no better than chance


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (MatryoshkaConfig, {"levels": (64, 32, 1024)}),
        (MatryoshkaConfig, {"levels": (64,)}),
        (JumpReLUConfig, {"target_l0": 0}),
        (JumpReLUConfig, {"bandwidth": 0.0}),
        (GatedConfig, {"l1_coefficient": -1.0}),
        (TranscoderConfig, {"k": 2000}),
    ],
)
def test_wrong_configuration(kind, wrong):
    with pytest.raises(UsageError):
        kind(**wrong)


def test_kinds_load_again(trained):
    placed, folder, _ = trained
    again = load_sae(folder)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(20, 16)).astype(np.float32))
    assert torch.equal(placed.dictionary(x), again.dictionary(x))
    assert again.dictionary.W_skip is None or again.dictionary.W_skip.shape == (16, 16)
