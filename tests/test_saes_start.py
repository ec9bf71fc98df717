"""Where training starts: rows as long as makes a first reconstruction best, and what that does to a short run."""

from __future__ import annotations

import pytest
import torch

from saes.config import TopKConfig
from saes.engine.trainer import Trainer
from saes.engine.weights import initial


@pytest.mark.parametrize(("k", "width", "d"), [(16, 1024, 64), (32, 2048, 128), (8, 8, 32)])
def test_the_fitted_start_is_about_where_the_first_error_of_a_random_row_is_least(k, width, d):
    """Least squares on drawn rows finds the decoder's length that the formula gives, to a tenth."""
    weights = initial(TopKConfig(k=k, width=width), d, torch.zeros(d), seed=5)
    x = torch.randn(400, d, generator=torch.Generator().manual_seed(6))
    pre = x @ weights["enc"].T
    kept = torch.zeros_like(pre).scatter(-1, (top := pre.topk(k)).indices, top.values)
    made = kept @ weights["W_dec"]
    assert float((x * made).sum() / made.square().sum()) == pytest.approx(1, abs=0.1)
    assert weights["enc"].norm(dim=-1).allclose(torch.ones(width))
    old = initial(TopKConfig(k=k, width=width, start="sae-lens"), d, torch.zeros(d), seed=5)
    assert old["enc"].equal(old["W_dec"]) and old["W_dec"].norm(dim=-1).allclose(torch.full((width,), 0.1))


def test_a_short_run_from_the_fitted_start_reconstructs_better_with_fewer_dead_latents():
    generator = torch.Generator().manual_seed(7)
    features = torch.nn.functional.normalize(torch.randn(256, 64, generator=generator), dim=-1)

    def rows():
        fires = torch.rand(512, 256, generator=generator) < 0.03
        return (fires * torch.rand(512, 256, generator=generator)) @ features * 8

    batches, unseen = [rows() for _ in range(80)], rows()
    r2, dead = {}, {}
    for start in ("fitted", "sae-lens"):
        trainer = Trainer(TopKConfig(k=8, width=512, start=start), 64, batches[0].mean(0), len(batches), seed=0)
        for batch in batches:
            trainer.step(batch)
        w = trainer.weights
        pre = (unseen - w["b_dec"]) @ w["enc"].T + w["b_enc"]
        acts = torch.zeros_like(pre).scatter(-1, (top := pre.topk(8)).indices, top.values)
        error = unseen - acts @ w["W_dec"] - w["b_dec"]
        r2[start] = 1 - float(error.square().sum() / (unseen - unseen.mean(0)).square().sum())
        dead[start] = float((acts > 0).any(0).logical_not().float().mean())
    assert r2["fitted"] > r2["sae-lens"] + 0.02, r2
    assert dead["fitted"] < dead["sae-lens"], dead
