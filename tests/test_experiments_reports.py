"""Claims of the experiments come out true and false where they should, from planted measurements."""

from __future__ import annotations

import numpy as np
import pytest

from mechinterp.experiments.confounding_report import Dose, _claims, merge_dose
from mechinterp.experiments.fidelity_parts import Reading
from mechinterp.experiments.fidelity_report import _claims as fidelity_claims
from mechinterp.experiments.fidelity_report import _found, median
from saes.truth.causes import Causation
from saes.truth.fidelity import fidelity
from saes.truth.merging import Separation
from saes.truth.readings import Overlap

NAN = (float("nan"), float("nan"))


def dose(rho: float, naive: float, balanced: float | None, seed: int = 0, width: int = 32) -> Dose:
    def found(value: float) -> Separation:
        return Separation(0.0, (0.9, 0.9), (0.5, 0.5), value, NAN)

    how = {"naive": found(naive), "balanced": None if balanced is None else found(balanced), "oracle": found(0.3)}
    return Dose("m", rho, "topk", width, seed, 100, how, dict.fromkeys(how, "pneumothorax"))


def planted(gain: float) -> list[Dose]:
    """Three seeds that merge at 0.9; balancing adds `gain`."""
    naive = {0.0: 0.3, 0.6: 0.1, 0.9: -0.2, 1.0: -0.3}
    return [
        dose(rho, value + s / 100, None if rho == 1 else value + gain + s / 100, s)
        for rho, value in naive.items()
        for s in range(3)
    ]


def test_latents_merge_at_the_dose_from_which_they_stay_merged():
    assert merge_dose(planted(0.5), "naive") == 0.9
    assert np.isnan(merge_dose(planted(0.5), "balanced")), "never, up to the largest that can be balanced"
    back = [dose(0.0, 0.2, 0.2), dose(0.5, -0.1, 0.1), dose(0.9, 0.1, 0.1), dose(1.0, -0.1, None)]
    assert merge_dose(back, "naive") == 1.0, "apart again at 0.9, so not merged from 0.5 on"


def test_confounding_claims_can_fail():
    def held(doses: list[Dose]) -> list[bool]:
        return [claim.holds for claim in _claims("m", doses, "pneumothorax")]

    assert held(planted(0.5)) == [True, True, True, True]
    assert held(planted(0.0)) == [True, False, True, True], "balancing that gains nothing is no gain"
    apart = [dose(rho, 0.3, None if rho == 1 else 0.9, s) for rho in (0.0, 0.9, 1.0) for s in range(2)]
    assert not held(apart)[0], "latents that stay apart at rho = 1"
    wide = [dose(d.rho, d.separable("naive") + 0.4, 0.5, d.seed, 128) for d in planted(0.5)]
    assert not _claims("m", planted(0.5) + wide, "pneumothorax")[-1].holds, "width that helps"
    same = [dose(d.rho, d.separable("naive"), d.separable("balanced"), d.seed, 128) for d in planted(0.5) if d.rho < 1]
    assert _claims("m", planted(0.5) + same, "pneumothorax")[-1].holds


def reading(factor: str, noise: float, cause: float, f1: float = 0.9, probe: float = 0.99) -> Reading:
    rng = np.random.default_rng(len(factor))
    present = np.arange(60) % 2 == 0
    true = np.where(present, 1 + rng.random(60), 0.0)
    weights = rng.integers(0, 3, (50, 60)).astype(float)
    nothing = fidelity(true, rng.normal(size=60), present, weights)
    effect = {
        "zero": [fidelity(true, true + noise * rng.normal(size=60), present, weights)],
        "random": [nothing, nothing],
        "untrained": [nothing],
    }
    swap = {
        "matched": [Causation(20, 18, cause, NAN, 1.0, NAN, cause, 1.0)],
        "random": [Causation(20, 18, 0.0, NAN, 1.0, NAN, 0.0, 1.0)],
    }
    return Reading(
        *("m", "block 3 cls topk 64", "vision.blocks.3.hook_resid_post", "topk", 6.0, factor, 60, (1,)),
        f1={"trained": f1, "untrained": 0.4},
        f1_zero={"trained": f1, "untrained": 0.4},
        gain_ci95=NAN,
        probe=probe,
        shape=Overlap(factor == "a", (), ("b",) if factor == "a" else ()),
        effect=effect,
        swap=swap,
        own=0,
        present=present,
        true=true[:, None],
        ablated=true[:, None],
    )


@pytest.mark.parametrize(("noise", "cause", "f1", "expected"), [(0, 0.9, 0.9, True), (30, 0.05, 0.5, False)])
def test_fidelity_claims_follow_the_measurements(noise, cause, f1, expected):
    mine = [reading(factor, noise, cause, f1) for factor in ("a", "bb", "ccc")]
    claims = fidelity_claims("m", [(("m", "d"), mine)])
    assert [claim.holds for claim in claims] == [expected] * 4
    assert median(mine, "swap matched", "disentangle") == pytest.approx((1 + cause) / 2)
    assert np.isnan(median(mine, "mean", "r2")), "an ablation that was not done is not tested, not 0"


def test_factors_a_probe_cannot_read_are_not_asked_for():
    mine = [reading("a", 0, 0.9), reading("bb", 0, 0.9, f1=0.45, probe=0.8)]
    _, _, l0, readable, matched, split, merged, absorbed, *_ = _found(("m", "d"), mine)
    assert (l0, readable, matched, split, merged, absorbed) == ("6.0", "1 of 2", 1, 1, 0, 1)
    assert fidelity_claims("m", [(("m", "d"), mine)])[0].holds, "1 of 1 readable factors"
