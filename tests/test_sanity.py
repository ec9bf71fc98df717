"""Sanity checks: similarities, randomised weights that come back, and verdicts that can go both ways."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import tiny

from mechinterp.data.phantom import Phantom
from mechinterp.data.phantom.language import prompts
from mechinterp.errors import UsageError
from mechinterp.explain.anchors import edges
from mechinterp.explain.ask import about_image, about_words
from mechinterp.explain.gradients import gradient_times_input
from mechinterp.metrics.sanity import (
    SIMILARITIES,
    Maps,
    baseline,
    judge,
    label_randomisation,
    nonsense,
    overall,
    prompt_randomisation,
    randomising,
    reproducibility,
    stages,
    weight_randomisation,
)
from mechinterp.models import HookedVLM
from mechinterp.types import Target

FINDING, OTHER = (Target(name, *prompts(name)) for name in ("effusion", "nodule"))
QUICK = ("spearman", "ssim")


@pytest.fixture(scope="module")
def model() -> HookedVLM:
    return HookedVLM.from_pretrained("phantom-clip")


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return Phantom.sample(10, seed=4)


@pytest.fixture(scope="module")
def ask(phantom):
    pixels = phantom.render() / 255.0
    return lambda model, target: about_image(model, model.prepare(pixels, [target]), target)


@pytest.fixture(scope="module")
def gradient(ask, phantom) -> Maps:
    return Maps(ask, gradient_times_input, FINDING, tuple(phantom.patients))


@pytest.fixture(scope="module")
def edge(ask, phantom) -> Maps:
    return Maps(ask, edges, FINDING, tuple(phantom.patients))


@pytest.mark.parametrize("name", list(SIMILARITIES))
def test_a_map_is_like_itself_and_noise_like_nothing(name):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 100, 8, 8))
    alike = SIMILARITIES[name]
    assert np.allclose(alike(a, a), 1) and np.allclose(alike(a, 3 * a), 1), "the scale of a map says nothing"
    assert np.allclose(alike(a, b), alike(b, a)) and (alike(a, b) < 0.9).all()
    if name != "hog":  # every map has edges in every cell, so two histograms share their mean
        assert abs(alike(a, b).mean()) < 0.1
    close = alike(a, a + 0.3 * b)
    assert alike(a, b).mean() < close.mean() < 1
    a[0], b[1] = 2.0, 0.0
    assert np.isnan(alike(a, b)[:2]).all() and np.isfinite(alike(a, b)[2:]).all(), "constant maps rank nothing"


def test_a_turned_sign_is_another_map_unless_one_asks_where_only():
    a = np.random.default_rng(0).standard_normal((5, 8, 8))
    assert np.allclose(SIMILARITIES["spearman"](a, -a), -1)
    assert np.allclose(SIMILARITIES["spearman_abs"](a, -a), 1)


def test_ssim_by_its_formula_in_one_window():
    rng = np.random.default_rng(3)
    a, b = rng.random((2, 1, 7, 7))
    x, y = ((m - m.min()) / np.ptp(m) for m in (a, b))
    cov = np.cov(x.ravel(), y.ravel())
    top = (2 * x.mean() * y.mean() + 1e-4) * (2 * cov[0, 1] + 9e-4)
    bottom = (x.mean() ** 2 + y.mean() ** 2 + 1e-4) * (cov[0, 0] + cov[1, 1] + 9e-4)
    assert np.isclose(SIMILARITIES["ssim"](a, b)[0], top / bottom)


@pytest.mark.parametrize("family", ["clip", "siglip", "llava", "gemma3", "vit"])
def test_stages_hold_every_weight_of_a_tower_once_and_come_back(family):
    model = HookedVLM(*tiny(family))
    before = model.sha256
    for tower in model.towers:
        steps = stages(model, tower)
        named = [name for step in steps for name in step.parameters]
        assert len(named) == len(set(named))
        assert [s.name for s in steps][:2] == ["head", f"block {model.n_layers(tower) - 1}"]
        if (family, tower) != ("gemma3", "text"):  # its token table is its head: one matrix, in the first stage
            assert steps[-1].name == "embeddings", [s.name for s in steps]
        owned = {id(p) for block in model.blocks(tower) for p in block.parameters()}
        assert owned <= {id(p) for n, p in model.hf.named_parameters() if n in named}
        with pytest.raises(ZeroDivisionError), randomising(model, seed=1) as weights:
            changed = set()
            for step in steps:
                weights.randomise(step)
                assert model.sha256 not in changed, f"{step.name} changed nothing"
                changed.add(model.sha256)
            1 / 0  # noqa: B018
        assert model.sha256 == before
    everything = {name for tower in model.towers for s in stages(model, tower) for name in s.parameters}
    scalars = {n for n, p in model.hf.named_parameters() if p.numel() == 1}
    assert everything | scalars == {n for n, _ in model.hf.named_parameters()}


def test_a_text_tower_is_read_anew_after_its_weights_changed(model, phantom):
    batch = model.prepare(phantom[:2].render() / 255.0, [FINDING])
    with torch.no_grad():
        before = model.score(batch, [FINDING])
        with randomising(model) as weights:
            weights.randomise(stages(model, "text")[0])
            assert not torch.allclose(model.score(batch, [FINDING]), before)
        assert torch.equal(model.score(batch, [FINDING]), before)


def test_a_gradient_follows_the_weights_and_an_edge_detector_does_not(model, gradient, edge):
    before = model.sha256
    follows = weight_randomisation(gradient, model, similarities=QUICK)
    ignores = weight_randomisation(edge, model, similarities=QUICK)
    assert model.sha256 == before
    assert [c.verdict for c in follows] == ["pass", "pass"], follows
    assert [c.verdict for c in ignores] == ["fail", "fail"], ignores
    assert np.isclose(ignores[0].value, 1) and all(np.isclose(v, 1) for _, v in ignores[0].stages)
    assert [name for name, _ in follows[0].stages] == [s.name for s in stages(model)]
    assert overall(follows).verdict == "pass" and overall(ignores).verdict == "fail"
    apart = weight_randomisation(gradient, model, cascade=False, similarities=("spearman",))[0]
    assert apart.test.endswith("one at a time") and apart.stages[0] == follows[0].stages[0]
    assert apart.stages[-1] != follows[0].stages[-1], "the other stages are as trained"


@pytest.mark.parametrize("end_only", [False, True])
def test_a_cascade_keeps_what_it_has_randomised_and_one_at_a_time_does_not(model, ask, phantom, end_only):
    """Seen from the explainer: the weights that differ from the trained ones, stage after stage."""
    trained = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    seen: list[set[str]] = []

    def explain(question, generator):
        changed = {name for name, p in model.hf.named_parameters() if not torch.equal(p, trained[name])}
        seen.append(changed)
        return edges(question, generator)

    maps = Maps(ask, explain, FINDING, tuple(phantom.patients))
    named = [{n for n in stage.parameters if trained[n].unique().numel() > 1} for stage in stages(model)]
    for cascade in (True, False):
        seen.clear()
        weight_randomisation(maps, model, cascade=cascade, similarities=("spearman",), end_only=end_only)
        upto = [set().union(*named[: i + 1]) for i in range(len(named))]
        wanted = upto if cascade else named
        assert seen == [set(), *(wanted[-1:] if cascade and end_only else wanted)]


def test_words_follow_the_text_tower(model, phantom):
    pixels = phantom.render() / 255.0
    maps = Maps(
        lambda m, t: about_words(m, m.prepare(pixels, [t]), t), gradient_times_input, FINDING, tuple(phantom.patients)
    )
    check = weight_randomisation(maps, model, "text", similarities=("spearman",))[0]
    assert check.value < 0.9 and np.isfinite(check.baseline)


def test_nonsense_has_the_length_of_what_it_replaces(model, gradient, edge):
    made = [nonsense(model, FINDING, seed) for seed in range(2)]
    assert made[0] != made[1] and made[0].name == FINDING.name
    for text, old in ((made[0].positive, FINDING.positive), (made[0].negative, FINDING.negative)):
        assert len(model.tokenizer(text)["input_ids"]) == len(model.tokenizer(old)["input_ids"])
        assert not set(text.split()) & set(old.split())
    llava = HookedVLM(*tiny("llava"))
    asked = nonsense(llava, Target("effusion", "", question="is there effusion ?")).asked()
    assert len(asked.split()) == 4 and "effusion" not in asked
    with pytest.raises(UsageError, match="reads no prompt"):
        nonsense(HookedVLM(*tiny("vit")), FINDING)
    assert {c.verdict for c in prompt_randomisation(edge, model, made, similarities=QUICK)} == {"fail"}
    other = prompt_randomisation(gradient, model, [OTHER], "prompt, other finding", similarities=QUICK)
    assert other[0].test == "prompt, other finding" and other[0].value < 0.5
    with pytest.raises(UsageError, match="no other prompt"):
        prompt_randomisation(gradient, model, [])


def test_two_models(model, gradient, edge, ask):
    """The model itself is the most repeatable twin; to labels permuted it must not be alike."""
    assert {c.verdict for c in reproducibility(gradient, model, model, similarities=QUICK)} == {"pass"}
    assert {c.verdict for c in label_randomisation(gradient, model, model, similarities=QUICK)} == {"fail"}
    with randomising(model, seed=2) as weights:
        for stage in stages(model):
            weights.randomise(stage)
        noise = gradient.of(model)
    values = SIMILARITIES["spearman"](gradient.of(model), noise)
    assert judge("x", "spearman", values, 0.18, gradient.patients, "above").verdict == "fail"


def test_what_cannot_be_told_is_not_tested():
    values, patients = np.array([0.1, 0.3, 0.2, 0.4, 0.1, 0.3]), tuple("abcdef")
    undecided = judge("x", "ssim", values, 0.25, patients, "below")
    assert undecided.verdict == "not tested" and "interval holds" in undecided.reason
    assert judge("x", "ssim", values, 0.6, patients, "below").verdict == "pass"
    assert judge("x", "ssim", values, 0.6, patients, "above").verdict == "fail"
    assert judge("x", "ssim", values, 0.6, tuple("aaabbb"), "below").verdict == "not tested", "two patients"
    assert judge("x", "ssim", np.where(values > 0.1, np.nan, values), 0.6, patients, "below").verdict == "not tested"
    assert judge("x", "ssim", values, float("nan"), patients, "below").verdict == "not tested"
    with pytest.raises(UsageError, match="ssim"):
        overall([undecided], ("ssim", "hog"))


def test_the_baseline_pairs_different_patients():
    maps = np.repeat(np.random.default_rng(0).standard_normal((3, 8, 8)), 4, 0)
    patients = [p for p in "abc" for _ in range(4)]
    assert abs(baseline(maps, patients, "spearman")) < 0.4, "images of one patient are never paired"
    assert np.isnan(baseline(maps[:4], patients[:4], "spearman"))


def test_the_baseline_hardly_depends_on_the_pairs_that_were_drawn():
    """Of unrelated maps of 64 patches one pair has sd 1 / sqrt(63) = .126; a baseline, of 50, a seventh of it."""
    maps = np.random.default_rng(1).standard_normal((20, 8, 8))
    patients = [str(i) for i in range(20)]
    drawn = [baseline(maps, patients, "spearman", seed=seed) for seed in range(40)]
    assert 0.005 < np.std(drawn) < 0.03
    exact = baseline(maps, patients, "spearman", pairs=None)
    assert exact == baseline(maps, patients, "spearman", pairs=None, seed=7), "all pairs leave nothing to draw"
    assert exact == pytest.approx(np.mean(drawn), abs=0.01)
