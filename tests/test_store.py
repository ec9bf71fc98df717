"""The activation store: what is stored is what passed the site, in the documented order, and survives damage loudly."""

import json
import shutil
import sys
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file, save_file
from store_fakes import RESID, FakeData, FakeModel, hashes

from mechinterp.activations import ActivationStore, extract, layout, store_folder
from mechinterp.errors import DataError, MechInterpError, ModelError, NonFiniteError, StorageError, UsageError
from mechinterp.storage import write_manifest

extract_module = sys.modules["mechinterp.activations.extract"]
SITE, POOLED = RESID[1], "vision.hook_pooled"


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(layout, "SHARD_BYTES", 2**15)


@pytest.fixture
def made(tmp_path, small_shards):
    return extract(FakeModel(), FakeData(40), [SITE, POOLED], tmp_path / "store", batch_size=6)


def direct(model, data, site):
    """The site's values over all images in one forward, without the store."""
    seen = {}
    with model.hooks([(site, lambda value, hook: seen.setdefault(site, value))]):
        model.forward(model.preprocess(data.pixels(range(len(data)))))
    return seen[site]


def test_rows_are_the_values_at_the_site(made):
    model, data = FakeModel(), FakeData(40)
    value, index = direct(model, data, SITE), made.index_of(SITE)
    assert made.site(SITE).shape == (40 * 16, 16)
    image = index["image"].map({name: i for i, name in enumerate(data.images)}).to_numpy(int, copy=True)
    torch.testing.assert_close(made.site(SITE)[:], value[image, index["token"].to_numpy(copy=True)])
    assert list(index["patch"][:17]) == [*range(16), 0] and set(index["kind"]) == {"patch"}
    assert list(index["patient"]) == [data.patients[i] for i in image]
    assert list(index["split"]) == [data.split[i] for i in image]
    torch.testing.assert_close(made.site(POOLED)[:], direct(model, data, POOLED))
    assert set(made.index_of(POOLED)["kind"]) == {"pooled"}


@pytest.mark.parametrize(("tokens", "rows"), [("all", 17), ("patch", 16), ("cls", 1), ("pooled", 1)])
def test_token_choice(tmp_path, tokens, rows):
    store = extract(FakeModel(), FakeData(5), [SITE], tmp_path / "s", tokens=tokens, batch_size=2)
    value = direct(FakeModel(), FakeData(5), SITE)
    wanted = {"all": value, "patch": value[:, 1:], "cls": value[:, :1], "pooled": value[:, 1:].mean(1, keepdim=True)}
    torch.testing.assert_close(store.site(SITE)[:], wanted[tokens].flatten(0, 1))
    assert len(store.index) == 5 * rows
    assert list(store.index["kind"][:2].astype(str)) == (["cls", "patch"] if tokens == "all" else [tokens] * 2)


def test_heads_are_flattened_and_attention_refused(tmp_path):
    assert extract(FakeModel(), FakeData(3), ["vision.blocks.0.attn.hook_z"], tmp_path / "z").site(
        "vision.blocks.0.attn.hook_z"
    ).shape == (48, 16)
    with pytest.raises(UsageError, match="attention matrix"):
        extract(FakeModel(), FakeData(3), ["vision.blocks.0.attn.hook_pattern"], tmp_path / "p")


def test_any_way_of_asking_for_rows(made, monkeypatch):
    site, rows = made.site(SITE), np.random.default_rng(0).integers(0, 640, 200)
    whole = site[:]
    mask = np.zeros(640, bool)
    mask[rows] = True
    mapped = ActivationStore(made.folder).site(SITE)
    monkeypatch.setattr("mechinterp.activations.store.KEPT_IN_MEMORY", 0)
    for each in (site, mapped):
        assert torch.equal(each[rows], whole[rows]) and torch.equal(each[mask], whole[mask])
        assert torch.equal(each[-1], whole[-1]) and torch.equal(each[7:9], whole[7:9])
    assert len(made.site(SITE)._shards) > 1
    with pytest.raises(UsageError):
        site[np.array([640])]


def test_forward_stops_after_the_last_site(tmp_path):
    model = FakeModel()
    extract(model, FakeData(12), [RESID[0]], tmp_path / "s", batch_size=4)
    assert model.ran == 1 + 1 + 3  # two looks at the first image, three batches; one block each


def test_same_request_same_bytes_and_reopened(tmp_path, small_shards):
    one = extract(FakeModel(), FakeData(20), [SITE], tmp_path / "one", batch_size=6)
    two = extract(FakeModel(), FakeData(20), [SITE], tmp_path / "two", batch_size=6)
    assert hashes(one.folder) == hashes(two.folder) and one.sha256 == two.sha256
    idle = FakeModel()
    assert extract(idle, FakeData(20), [SITE], tmp_path / "one", batch_size=6).sha256 == one.sha256
    assert idle.ran == 0
    with pytest.raises(StorageError, match="differs in tokens, batch_size"):
        extract(FakeModel(), FakeData(20), [SITE], tmp_path / "one", tokens="all", batch_size=7)


def test_folder_is_named_after_the_request(tmp_path):
    ask = (FakeModel(), FakeData(20), [SITE, POOLED])
    assert store_folder(tmp_path, *ask) == store_folder(tmp_path, *ask[:2], [POOLED, SITE])
    others = [store_folder(tmp_path, FakeModel(1), *ask[1:]), store_folder(tmp_path, ask[0], FakeData(21), ask[2])]
    others += [store_folder(tmp_path, *ask, tokens="all"), store_folder(tmp_path, *ask, seed=1)]
    assert len({store_folder(tmp_path, *ask), *others}) == 5


def test_finished_shards_are_kept_on_resume(tmp_path, small_shards):
    whole = extract(FakeModel(), FakeData(40), [SITE, POOLED], tmp_path / "whole", batch_size=6)
    part = tmp_path / "part"
    shutil.copytree(whole.folder, part)
    (part / "manifest.json").unlink()
    (part / "sites" / SITE / "00001.safetensors").unlink()
    (part / "sites" / SITE / ".00001.safetensors.xyz.partial").write_bytes(b"half")
    model = FakeModel()
    extract(model, FakeData(40), [SITE, POOLED], part, batch_size=6)
    assert hashes(part) == hashes(whole.folder)
    assert whole.layout.shards == 2 and model.ran == 3 * len(whole.layout.shard_batches(1, whole.request))


def test_order_is_a_function_of_seed_epoch_and_step(made):
    train = np.flatnonzero(made.index_of(SITE)["split"] == "train")
    order = made.order(SITE, seed=3, epoch=2)
    assert sorted(order) == list(train) and list(order) != list(train)
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([3, 2])))
    assert list(order) == list(train[generator.permutation(len(train))])  # as format.md says
    whole = dict(made.batches(SITE, 50, seed=3, epoch=2))
    late = dict(made.batches(SITE, 50, seed=3, epoch=2, start_step=4))
    assert list(whole) == list(range(len(train) // 50)) and list(late) == list(whole)[4:]
    assert all(torch.equal(late[step], whole[step]) for step in late)
    assert torch.equal(whole[1], made.site(SITE)[order[50:100]])
    assert not torch.equal(whole[0], next(made.batches(SITE, 50, seed=4, epoch=2))[1])
    assert not torch.equal(whole[0], next(made.batches(SITE, 50, seed=3, epoch=3))[1])


def test_not_finite_names_the_images(tmp_path, small_shards):
    data = FakeData(40)
    data._pixels[29, 3, 3] = np.nan
    with pytest.raises(NonFiniteError, match="image029") as caught:
        extract(FakeModel(), data, [SITE], tmp_path / "s", batch_size=6)
    assert caught.value.images == ["image029.png"]
    assert not (tmp_path / "s" / "manifest.json").exists()
    with pytest.raises(StorageError, match="not finished"):
        ActivationStore(tmp_path / "s")


def test_wrong_use_is_told(tmp_path):
    model, data = FakeModel(), FakeData(4)
    with pytest.raises(ModelError, match=r"vision\.blocks\.9.*it has vision\.blocks\.0"):
        extract(model, data, ["vision.blocks.9.hook_resid_post"], tmp_path / "s")
    with pytest.raises(UsageError, match="tokens"):
        extract(model, data, [SITE], tmp_path / "s", tokens="text")
    with pytest.raises(UsageError):
        extract(model, data, [], tmp_path / "s")
    with pytest.raises(DataError):
        extract(model, FakeData(0), [SITE], tmp_path / "s")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("keep")
    with pytest.raises(StorageError, match="not empty"):
        extract(model, data, [SITE], tmp_path / "full")
    store = extract(model, data, [SITE], tmp_path / "s")
    with pytest.raises(UsageError, match="stored: "):
        store.site(RESID[0])
    with pytest.raises(StorageError, match="not an activation store"):
        ActivationStore(tmp_path / "full")


def test_index_of_several_kinds_must_be_asked_by_site(made):
    with pytest.raises(UsageError, match="index_of"):
        _ = made.index
    parquet = pd.read_parquet(made.folder / "sites" / SITE / "index.parquet")
    assert list(parquet.columns) == ["image", "patient", "split", "token", "patch", "kind"]


def test_every_flipped_byte_is_noticed(made):
    chance = np.random.default_rng(0)
    files = [path for path in sorted(made.folder.rglob("*")) if path.is_file()]
    for _ in range(60):
        path = files[chance.integers(len(files))]
        good = path.read_bytes()
        place = chance.integers(len(good))
        path.write_bytes(good[:place] + bytes([good[place] ^ (1 << chance.integers(8))]) + good[place + 1 :])
        with pytest.raises(StorageError):
            ActivationStore(made.folder)
        path.write_bytes(good)
    assert ActivationStore(made.folder).verify() == []


@pytest.mark.parametrize("keep", [0, 5, 100, -20])
def test_damaged_shard_of_a_large_store_is_told(made, monkeypatch, keep):
    """Above the hashing limit a store is opened by sizes; the shard's own header must then be checked."""
    monkeypatch.setattr("mechinterp.activations.store.HASHED_ON_OPENING", 0)
    path = made.folder / "sites" / SITE / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StorageError, match="00001"):
        ActivationStore(made.folder)
    write_manifest(made.folder, {})
    with pytest.raises(StorageError, match=r"00001.*damaged"):
        ActivationStore(made.folder).site(SITE)


@pytest.mark.parametrize(
    "change",
    [{"schema_version": 2}, {"format": "x"}, {"request": {}}, {"layout": None}, {"request": {"sites": ["../../x"]}}],
)
def test_foreign_config_is_told(made, change):
    path = made.folder / "config.json"
    config = json.loads(path.read_text())
    nested = {
        name: {**config[name], **value} if value and name == "request" else value for name, value in change.items()
    }
    path.write_text(json.dumps(config | nested))
    write_manifest(made.folder, {})
    with pytest.raises(MechInterpError):
        ActivationStore(made.folder).site(SITE)


def test_shards_are_plain_safetensors(made):
    path = made.folder / "sites" / SITE / "00000.safetensors"
    tensors = load_file(path)
    assert set(tensors) == {"activations", "image", "token", "patch", "kind"}
    save_file(
        {**tensors, "activations": tensors["activations"][:, :3]}, made.folder / "sites" / SITE / "00000.safetensors"
    )
    write_manifest(made.folder, {})
    with pytest.raises(StorageError, match="shape"):
        ActivationStore(made.folder).site(SITE)


def test_disk_and_loader_work_beside_the_model(tmp_path, monkeypatch, small_shards):
    """Batch n+1 is loaded, and the last shard written, while batch n is in the model: each waits for the other."""
    data, model, batches = FakeData(60), FakeModel(), 60 // 5
    pixels, forward, write = data.pixels, model.forward, extract_module.write_shard
    loads, forwards = [threading.Event() for _ in range(batches + 1)], [threading.Event() for _ in range(batches + 2)]
    loads[batches].set()
    counts = {"load": -1, "forward": -3}  # the layout asks for one image first, and looks at it twice

    def load(rows):
        if len(rows) > 1:
            counts["load"] += 1
            loads[counts["load"]].set()
        return pixels(rows)

    def run(batch):
        counts["forward"] += 1
        if counts["forward"] >= 0:
            forwards[counts["forward"]].set()
            assert loads[counts["forward"] + 1].wait(20), "the next batch was not loading"
        return forward(batch)

    def slow_write(path, rows):
        if path.name == "00000.safetensors":
            following = int(rows.image[-1]) // 5 + 1
            assert forwards[following].wait(20), "the model waited for the disk"
        write(path, rows)

    monkeypatch.setattr(data, "pixels", load)
    monkeypatch.setattr(model, "forward", run)
    monkeypatch.setattr(extract_module, "write_shard", slow_write)
    store = extract(model, data, [SITE], tmp_path / "s", batch_size=5)
    assert store.layout.shards > 1 and counts == {"load": batches - 1, "forward": batches - 1}


@pytest.mark.parametrize("family", ["clip", "llava", "gemma3", "vit"])
def test_real_models(tmp_path, family):
    """Rows equal what run_with_cache sees, at vision, projector and language sites."""
    from tiny_models import tiny

    from mechinterp.models import HookedVLM
    from mechinterp.types import Target

    model, data = HookedVLM(*tiny(family)), FakeData(7)
    target = Target("pneumonia", "a chest x-ray with pneumonia", "a chest x-ray without pneumonia")
    vision = "vision.blocks.1.hook_resid_post"
    sites = [vision, *model.sites("projector.hook_out")]
    store = extract(model, data, sites, tmp_path / "vision", batch_size=3)
    batch = model.prepare(data.pixels(range(7)), [target], ids=data.images)
    _, cache = model.run_with_cache(batch, names_filter=[vision])
    patches = cache[vision][:, model.patch_tokens(batch)]
    torch.testing.assert_close(store.site(vision)[:], patches.flatten(0, 1), rtol=1e-5, atol=1e-6)
    assert store.index_of(vision)["patch"].max() + 1 == np.prod(model.grid_shape)
    if family in ("llava", "gemma3"):
        site = "text.blocks.1.hook_resid_post"
        text = extract(model, data, [site], tmp_path / "text", tokens="all", batch_size=3, target=target)
        _, cache = model.run_with_cache(batch, names_filter=[site])
        torch.testing.assert_close(text.site(site)[:], cache[site].flatten(0, 1), rtol=1e-4, atol=1e-5)
        image = batch.input_ids == model.hf.config.image_token_id
        assert (text.index["kind"] == "patch").sum() == image.sum() > 0
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
