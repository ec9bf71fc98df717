"""Image-level activations: the largest over an image's tokens, whatever the order and the chunks."""

from typing import Any

import numpy as np
import pytest
import torch
from store_fakes import RESID, FakeData, FakeModel

from mechinterp.activations import ActivationStore, extract
from mechinterp.errors import UsageError
from mechinterp.types import Placed
from saes import TopKConfig, evaluate, untrained
from saes.metrics import image_activations, image_table
from saes.metrics.images import Pool, image_errors, pooled_site

SITE = RESID[2]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    return extract(FakeModel(), FakeData(60), [SITE], tmp_path_factory.mktemp("acts") / "store", tokens="patch")


@pytest.fixture(scope="module")
def placed(store) -> Placed:
    mean = store.site(SITE)[store.rows(SITE, "train")].mean(0)
    return Placed.sae(untrained(TopKConfig(k=3, width=40), 16, seed=0, mean=mean), SITE)


@pytest.mark.parametrize("split", ["test", None])
def test_maximum_and_mean_over_tokens(store, placed, split, monkeypatch):
    index = store.index_of(SITE)
    reductions: dict[Pool, Any] = {"max": np.max, "min": np.min, "mean": np.mean}
    for pool, reduce in reductions.items():
        acts, images, patients = image_activations(placed, store, split, pool)
        raw = pooled_site(store, SITE, split, pool)
        assert acts.dtype == np.float32 and len(set(images)) == len(images) == len(acts) == len(raw)
        for i in (0, len(images) // 2, len(images) - 1):
            rows = np.flatnonzero(index["image"] == images[i])
            assert len(rows) == 16 and set(index["patient"].iloc[rows]) == {patients[i]}
            x = store.site(SITE)[rows]
            np.testing.assert_allclose(acts[i], reduce(placed.dictionary.encode(x).numpy(), axis=0), atol=1e-6)
            np.testing.assert_allclose(raw[i], reduce(x.numpy(), axis=0), atol=1e-6)
    table = image_table(store, SITE, split)
    assert table["image"].tolist() == images.tolist() and table["patient"].tolist() == patients.tolist()
    assert split is None or set(table["split"]) == {split}


def test_tokens_of_another_kind_stay_out(placed, tmp_path):
    """A dictionary of patch tokens gives the same from a store that holds the class token as well."""
    both = [extract(FakeModel(), FakeData(12), [SITE], tmp_path / kind, tokens=kind) for kind in ("patch", "all")]
    placed.dictionary.info["tokens"] = "patch"
    try:
        mine, mixed = (image_activations(placed, each, None)[0] for each in both)
    finally:
        del placed.dictionary.info["tokens"]
    assert len(both[1].rows(SITE)) > len(both[0].rows(SITE))
    np.testing.assert_array_equal(mine, mixed)


def test_an_image_may_be_cut_by_a_chunk(store, placed):
    """16 tokens an image, 7 rows a chunk."""
    whole = image_activations(placed, store, "val")[0]
    chunks = type(store.site(SITE)).chunks
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(store.site(SITE)), "chunks", lambda self, rows, size=0: chunks(self, rows, 7))
        patched.setattr("saes.metrics.images.CHUNK", 7)
        np.testing.assert_allclose(image_activations(placed, store, "val")[0], whole, atol=1e-6)


def test_errors_add_up_to_r2_and_l0(store, placed):
    error, spread, fired = image_errors(placed, store, "test")
    found = evaluate(placed, store, "test")
    assert 1 - error.sum() / spread.sum() == pytest.approx(found.r2, abs=1e-12)
    assert fired.sum() / found.rows == pytest.approx(found.l0)


def test_an_empty_split_is_told(store, placed):
    with pytest.raises(UsageError, match="no row in split 'nowhere'"):
        image_activations(placed, store, "nowhere")
    assert torch.isfinite(torch.from_numpy(image_activations(placed, store)[0])).all()


def test_every_metric_can_be_imported_from_the_package():
    import saes.metrics

    for name in saes.metrics.__all__:
        assert callable(getattr(saes.metrics, name)), name
    with pytest.raises(AttributeError, match="tea_leaves"):
        _ = saes.metrics.tea_leaves
