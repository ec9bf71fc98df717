"""How often latents come back in dictionaries of other seeds: kept with the dictionary, read by audit and gallery."""

import numpy as np
import pytest
import torch

from mechinterp.audit.catalogue import feature_row
from mechinterp.audit.causal import Trial
from mechinterp.audit.drivers import Place
from mechinterp.audit.evidence import Evidence
from mechinterp.audit.features import Selectivity
from mechinterp.audit.untested import untested
from mechinterp.data import ImageData
from mechinterp.errors import UsageError
from mechinterp.interventions import Activity
from mechinterp.storage import verify_folder
from saes import load_sae
from saes.folder import save_sae
from saes.gallery.facts import stability
from saes.stability import keep_stability, seed_stability

SITE, D = "vision.blocks.0.hook_resid_post", 64


def dictionary(folder, directions, seed, **other):
    """A stored TopK dictionary with these decoder rows (numbers of unit vectors)."""
    W_dec = torch.eye(D)[directions]
    weights = {"W_enc": W_dec.T.contiguous(), "W_dec": W_dec, "b_enc": torch.zeros(len(W_dec)), "b_dec": torch.zeros(D)}
    info = {"reads": SITE, "writes": SITE, "config": {"k": 2}, "tokens": "patch", "model": {}, "data": {}, "seed": seed}
    save_sae(folder, {"architecture": "topk", "k": 2}, weights, info | other)
    return load_sae(folder)


def test_the_share_of_seeds_that_have_a_latent_is_kept_with_it(tmp_path):
    first = dictionary(tmp_path / "0", [0, 1, 2, 3], 0)
    assert seed_stability(first.dictionary) is None and stability(first, ()) is None
    sisters = [dictionary(tmp_path / "1", [9, 0, 1, 8], 1), dictionary(tmp_path / "2", [2, 0, 7, 6], 2)]
    kept = keep_stability(tmp_path / "0", sisters)
    again = load_sae(tmp_path / "0")
    assert verify_folder(tmp_path / "0") == [] and kept["seeds"] == [0, 1, 2]
    np.testing.assert_allclose(seed_stability(again.dictionary), [1, 0.5, 0.5, 0])
    np.testing.assert_allclose(stability(again, ()), [1, 0.5, 0.5, 0])
    np.testing.assert_allclose(stability(again, sisters), [1, 0.5, 0.5, 0])
    assert kept["chance"] < 0.1 and torch.equal(again.dictionary.W_dec, first.dictionary.W_dec)


@pytest.mark.parametrize(
    ("seeds", "other", "told"),
    [((1,), {}, "seeds"), ((1, 1), {}, "different"), ((1, 2), {"tokens": "cls"}, "tokens"), ((1, 0), {}, "different")],
)
def test_sisters_differ_in_their_seed_alone(tmp_path, seeds, other, told):
    dictionary(tmp_path / "mine", [0, 1], 0)
    sisters = [dictionary(tmp_path / f"{i}", [0, 1], seed, **other) for i, seed in enumerate(seeds)]
    with pytest.raises(UsageError, match=told):
        keep_stability(tmp_path / "mine", sisters)
    assert seed_stability(load_sae(tmp_path / "mine").dictionary) is None


def bare(cls, **fields):
    """An object of a class that has these fields alone."""
    made = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def row_of(placed):
    """The audit's row of latent 1 of a dictionary."""
    n = 40
    labels, test = np.arange(n) % 2.0, np.arange(n) >= n // 2
    strength, fires = np.stack([labels, labels], 1), bare(Activity, frequency=torch.tensor([0.5, 0.5]))
    evidence = bare(Evidence, labels=labels, test=test, strongest=strength, average=0 * strength, activity=fires)
    chosen = bare(Selectivity, names=("finding",), by_mean=np.zeros((1, 2), bool), deviation=np.ones((1, 2)))
    trial = bare(Trial, placed=placed, features=())
    return feature_row(1, trial, evidence, chosen, (), bare(Place, words="somewhere"), 0)


def test_the_audit_gives_it_for_each_feature_and_says_when_there_is_none(tmp_path):
    kept = {"stability": {"per_latent": [0.0, 0.5]}}
    known = row_of(dictionary(tmp_path / "known", [0, 1], 0, **kept))
    unknown = row_of(dictionary(tmp_path / "unknown", [0, 1], 0))
    assert known["seed_stability"] == 0.5 and unknown["seed_stability"] is None
    data = bare(ImageData, attributes=(), skipped={}, may_show=np.ones(1, bool))
    told = {}
    for row in (known, unknown):
        record = {"shortcuts": [], "graph": {}, "features": [row], "performance": [None, {"auroc": 0.5}], "truth": {}}
        told[row["seed_stability"]] = "seed stability" in str(untested(record, data, None))
    assert told == {0.5: False, None: True}
