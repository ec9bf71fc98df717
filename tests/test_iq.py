"""IQ on functions whose answers are known: closed forms, the anchors, and the weaknesses that the metric has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechinterp.errors import UsageError
from mechinterp.explain import anchors, tabular
from mechinterp.explain.rbp import rbp, shapley_rbp, shares, with_rbp_rows
from mechinterp.explain.tabular import EXPLAINERS
from mechinterp.explain.tabular_questions import about_rows
from mechinterp.metrics.iq import Measurement, expected_absolute_r, iq, permutation_floor, psc
from mechinterp.metrics.iq.ask import measure_question
from mechinterp.metrics.iq.measure import measure_rows
from mechinterp.metrics.iq.scores import inversion

WEIGHTS = torch.tensor([2, -1, 0.5, 0, 0, 0], dtype=torch.float64)
ZERO = torch.zeros(6, dtype=torch.float64)


def linear(x):
    return x @ WEIGHTS


def product(x):
    """x1 sin(x2), and four columns without effect."""
    return x[:, 0] * torch.sin(x[:, 1])


def rows(n=200, seed=0):
    return torch.rand(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4 - 2


@pytest.fixture(scope="module")
def scored():
    return {
        f.__name__: {name: iq(m) for name, m in measure_rows(f, EXPLAINERS, rows(), ZERO).items()}
        for f in (linear, product)
    }


def test_gradient_times_input_of_a_linear_function_has_the_closed_form():
    x, draws = rows(50), 4000
    measured = measure_rows(linear, {"gxi": tabular.gradient_times_input}, x, ZERO, draws=draws)["gxi"]
    spread = (WEIGHTS.abs() * x.abs().clamp(min=0.05)).numpy()
    expected = (spread / np.sqrt((spread**2).sum(1, keepdims=True)))[:, :3].mean(1)
    assert np.allclose(iq(measured).R, expected, atol=4 / np.sqrt(draws))


@pytest.mark.parametrize("name", ["shapley", "occlusion", "kernel_shap"])
def test_exact_explanations_of_a_product_are_as_reliant_as_an_echo(scored, name):
    exact, echo = scored["product"][name], scored["product"]["echo"]
    assert np.allclose(exact.R, 1) and np.allclose(exact.F_dist, 1) and np.allclose(exact.coverage, 1 / 3)
    assert np.allclose(echo.R, 1) and np.allclose(echo.R_null, 1)
    # what raw R cannot tell apart, the companions do
    assert np.allclose(exact.R_null, 0) and np.allclose(exact.R_excess, 0, atol=1e-6)
    assert np.allclose(echo.R_excess, 2 / 3, atol=1e-9)


def test_reliance_that_the_true_effects_have_too_is_no_excess_whatever_its_sign():
    """R_excess holds |r| of attributions beside |r| of effects: an effect that moves against the output counts too."""
    y = np.random.default_rng(0).normal(size=(1, 12))
    up, still = y[..., None], np.zeros((1, 12, 1))
    a, e = np.concatenate([up, up, up], 2), np.concatenate([-up, up, still], 2)
    found = iq(Measurement(np.zeros((1, 3)), np.zeros(1), a, y, np.ones((1, 3)), e))
    assert found.R[0] == pytest.approx(1) and found.R_excess[0] == pytest.approx(1 / 3)


def test_inversion_ties_the_best_with_the_worst():
    ends = np.array([1.0, 0.0])
    for p, value in ((1, 0.5), (2, 0.5**0.5), (4, 0.5**0.25)):
        assert np.allclose(inversion(ends, ends, p), value)
    with pytest.raises(UsageError, match="p is 0"):
        inversion(ends, ends, 0)


def test_faithfulness_is_at_worst_0_and_blind_to_the_sign_only_as_a_distance():
    e = np.array([[1.0, -2.0, 3.0, 0.0]])
    draws = np.random.default_rng(0).normal(size=(1, 8, 4))
    found = iq(Measurement(-e, e.sum(1), draws, draws.sum(2), e))
    assert found.F_corr[0] == 0 and found.F_dist[0] == pytest.approx(1)
    assert iq(Measurement(e, e.sum(1), draws, draws.sum(2), e)).F_corr[0] == pytest.approx(1)


def test_the_rule_for_undefined_correlations_decides_who_wins(scored):
    exact, random = (scored["product"][name] for name in ("shapley", "random"))
    skip, zero = exact.IS[2] - random.IS[2], exact.IS_zero[2] - random.IS_zero[2]
    assert skip.mean() == pytest.approx(0.221, abs=0.015)  # noise wins
    assert zero.mean() == pytest.approx(-0.252, abs=0.015)  # the exact explanation wins


def test_random_attributions_lie_at_the_floor(scored):
    for of in scored.values():
        assert of["random"].R.mean() == pytest.approx(expected_absolute_r(30), abs=0.01)
        assert of["lime"].R_null.mean() == pytest.approx(expected_absolute_r(30), abs=0.02)  # only sampling noise
    both = measure_rows(product, {"random": tabular.random, "echo": tabular.echo}, rows(60), ZERO)
    measured = both["random"]
    floor = permutation_floor(measured, shuffles=40)
    # of an echo, whose R is 1, the floor is no higher: shuffling takes all reliance away
    assert permutation_floor(both["echo"], shuffles=40).mean() == pytest.approx(expected_absolute_r(30), abs=0.02)
    assert floor.mean() == pytest.approx(expected_absolute_r(30), abs=0.01)
    assert iq(measured).R.mean() == pytest.approx(floor.mean(), abs=0.02)


@pytest.mark.parametrize(("draws", "value"), [(3, 0.637), (5, 0.424), (10, 0.273), (30, 0.149), (100, 0.080)])
def test_the_floor_is_the_mean_of_absolute_correlations(draws, value):
    assert expected_absolute_r(draws) == pytest.approx(value, abs=6e-4)
    a, b = np.random.default_rng(0).normal(size=(2, 20_000, draws))
    r = [(v - v.mean(1, keepdims=True)) / v.std(1, keepdims=True) for v in (a, b)]
    assert np.abs((r[0] * r[1]).mean(1)).mean() == pytest.approx(value, abs=6e-3)


def test_a_constant_attribution_gets_a_status_and_no_number(scored):
    for found in (scored["product"]["constant"], scored["linear"]["gradient"]):
        assert set(found.status) == {"const_attr"}
        assert np.isnan(found.R).all() and np.isnan(found.IS[2]).all() and (found.coverage == 0).all()
        assert (found.R_zero == 0).all()


@pytest.fixture(scope="module")
def measured():
    return measure_rows(product, {"lime": tabular.lime}, rows(4), ZERO, draws=8)["lime"]


@given(factor=st.floats(1e-3, 1e6), flip=st.booleans())
def test_scaling_attributions_changes_no_score(measured, factor, flip):
    factor = -factor if flip else factor
    scaled = Measurement(
        factor * measured.attribution,
        measured.output,
        factor * measured.attributions,
        measured.outputs,
        measured.effect,
        measured.effects,
    )
    for name in ("R", "R_zero", "F_dist", "R_null", "R_excess"):
        assert np.allclose(getattr(iq(scaled), name), getattr(iq(measured), name), rtol=1e-6), name
    if not flip:  # correlations below 0 are clipped to 0
        assert np.allclose(iq(scaled).F_corr, iq(measured).F_corr, rtol=1e-6) and iq(measured).F_corr.any()
    assert np.allclose(psc(scaled), psc(measured))


def test_every_degenerate_sample_says_what_is_wrong():
    rng = np.random.default_rng(0)
    a, y = rng.normal(size=(4, 8, 3)), rng.normal(size=(4, 8))
    a[1] = 2.5
    y[2] = 7.0
    a[3, 0, 0] = np.nan
    first, out, effect = a[:, 0].copy(), y[:, 0].copy(), rng.normal(size=(4, 3))
    found = iq(Measurement(first, out, a, y, effect))
    assert found.status == ("ok", "const_attr", "const_output", "nonfinite")
    assert np.isfinite(found.R[0]) and np.isnan(found.R[1:]).all() and np.isnan(found.F_dist[3])
    assert np.isfinite(found.F_dist[:3]).all()  # it needs no perturbation
    assert np.isfinite(found.IS[2][0]) and np.isnan(found.IS[2][1:]).all()
    few = iq(Measurement(first, out, a[:, :2], y[:, :2], effect))
    assert few.status[0] == "too_few" and np.isnan(few.R[0])
    with pytest.raises(UsageError, match="effect has shape"):  # as without shape checks, which only tests have
        fields = {"attribution": first, "output": out, "attributions": a, "outputs": y, "effects": None}
        Measurement.__post_init__(SimpleNamespace(**fields, effect=effect[:, :2]))


def fields_of(n: int = 3, draws: int = 12, elements: int = 4) -> dict[str, Any]:
    """Fields of a Measurement without any degenerate sample; the last element has no effect."""
    rng = np.random.default_rng(5)
    shapes = {
        "attribution": (n, elements),
        "output": (n,),
        "attributions": (n, draws, elements),
        "outputs": (n, draws),
        "effect": (n, elements),
        "effects": (n, draws, elements),
    }
    fields = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    fields["effect"][:, -1] = 0.0
    return fields


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_effect_that_is_not_finite_takes_its_sample_out_and_no_other(bad):
    """A broken effect at a perturbed input gives a status and no number; it must not count as a true effect of 0."""
    fields = fields_of()
    whole = iq(Measurement(**fields))
    fields["effects"][1, 4, 2] = bad
    found = iq(Measurement(**fields))
    assert whole.status == ("ok",) * 3 and found.status == ("ok", "nonfinite", "ok")
    for name, column in found.columns.items():
        assert np.isnan(column[1]), name
        assert np.array_equal(column[[0, 2]], whole.columns[name][[0, 2]]) and np.isfinite(column[[0, 2]]).all(), name


def test_without_effects_or_attributions_there_are_no_shares_to_compare():
    """Where all effects, or all attributions, are 0, F and IS are undefined and a status says so; R is as it was."""
    fields = fields_of()
    whole = iq(Measurement(**fields))
    fields["effect"][1], fields["attribution"][2] = 0.0, 0.0
    found = iq(Measurement(**fields))
    assert found.status == ("ok", "no_effect", "zero_attr")
    assert np.isnan(found.F_dist[1:]).all() and np.isnan(found.F_corr[1:]).all() and np.isnan(found.IS[2][1:]).all()
    assert found.R[1] == whole.R[1] and np.isfinite(found.R[2]) and (found.coverage == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [6, 196])
def test_a_map_that_is_fixed_but_for_rounding_is_constant_in_every_type(dtype, columns):
    """An echo scaled to sum|a| = 1 never moves: const_attr, and no R, in single precision as in double."""
    x = rows(10)[:, :1].expand(-1, columns).to(dtype) + 30
    shares_of_echo = {"echo": lambda *asked: shares(tabular.echo(*asked))}
    found = iq(measure_rows(lambda x: x.sum(1), shares_of_echo, x, x.new_zeros(columns))["echo"])
    assert set(found.status) == {"const_attr"} and np.isnan(found.R).all() and (found.coverage == 0).all()


def test_questions_say_to_which_type_their_scores_are_rounded():
    """The same fixed map, through a Question in single precision."""
    x = rows(10).float() + 30
    question = about_rows(lambda x: x.sum(1), x, x.new_zeros(6))
    found = measure_question(
        question, {"echo": lambda question, generator: shares(anchors.echo(question, generator))}, draws=8
    )["echo"]
    assert found.eps == torch.finfo(torch.float32).eps and set(iq(found).status) == {"const_attr"}
    assert np.isnan(permutation_floor(found, 3)).all() and np.isnan(psc(found)).all()


def test_an_output_that_is_fixed_but_for_rounding_is_constant():
    """Scores that differ by their last bit in single precision are const_output there, and move in double."""
    fields = fields_of()
    fields["output"], fields["outputs"] = np.full(3, 8.0), 8.0 + 1e-6 * np.sign(fields["outputs"])
    assert set(iq(Measurement(**fields, eps=float(np.finfo(np.float32).eps))).status) == {"const_output"}
    assert set(iq(Measurement(**fields)).status) == {"ok"}


@given(
    variation=st.floats(1.0001e-4, 1e-2),
    size=st.floats(1e-6, 1e6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_no_map_that_varies_by_more_than_one_part_in_ten_thousand_is_called_constant(variation, size, dtype):
    """Whatever its size, and whatever type it was computed in."""
    fields = fields_of()
    wave = np.where(np.arange(12) % 2, 1.0, -1.0)
    fields["attribution"], fields["attributions"] = np.full((3, 4), size), np.full((3, 12, 4), size)
    fields["attribution"][:, 0], fields["attributions"][..., 0] = size / 2, size * (0.5 + variation * wave)
    found = iq(Measurement(**fields, eps=torch.finfo(dtype).eps))
    assert found.status == ("ok",) * 3 and np.allclose(found.coverage, 1 / 4)


def test_prediction_saliency_correlation_has_the_sign_of_the_co_movement():
    """1 where the map moves with the size of the output's change, -1 where it moves least when that moves most."""
    moved = np.array([0.05, 0.1, 0.2, 0.3])
    a = np.stack([0.5 + moved, 0.5 - moved], axis=1)[None]
    first, effect, signs = np.array([[0.5, 0.5]]), np.array([[1.0, 2.0]]), np.array([1, -1, 1, -1])
    for dy, expected in ((4 * moved, 1), (1 - moved, -1)):
        assert psc(Measurement(first, np.array([2.0]), a, 2 + (signs * dy)[None], effect)) == pytest.approx(expected)


def test_the_permutation_floor_deals_out_the_outputs_that_were_seen():
    """One draw moves the output and one the attribution: of 10 draws |r| is 1 where they meet, else 1 / 9."""
    once = np.eye(10)[0]
    a, dy = np.tile(once[None, :, None], (200, 1, 1)), np.tile(np.eye(10)[3], (200, 1))
    floor = permutation_floor(Measurement(np.zeros((200, 1)), np.zeros(200), a, dy, np.ones((200, 1))), 20)
    assert np.allclose(np.minimum(abs(floor - 1), abs(floor - 1 / 9)), 0)
    assert floor.mean() == pytest.approx(2 / 10, abs=0.02) and (np.ptp(floor, axis=0) > 0.5).any()


def test_prediction_saliency_correlation_likes_what_reliance_dislikes(scored):
    measured = measure_rows(product, EXPLAINERS, rows(40), ZERO)
    assert np.isnan(psc(measured["constant"])).all()
    # an echo's map has a fixed shape: scaled maps never move
    assert np.isnan(psc(measured["echo"])).all() and np.nanmean(np.abs(psc(measured["random"]))) < 0.25


def test_shapley_values_add_up_and_kernel_shap_finds_them():
    x, g = rows(20), torch.Generator().manual_seed(0)

    def f(r):
        return r[:, 0] * torch.sin(r[:, 1]) + r[:, 2] ** 2 * r[:, 3] + r[:, 4]

    exact = tabular.shapley(f, x, ZERO, g)
    assert torch.allclose(exact.sum(1), f(x) - f(ZERO[None]))
    assert torch.allclose(tabular.integrated_gradients(f, x, ZERO, g, steps=400).sum(1), f(x), atol=1e-4)
    sampled = tabular.kernel_shap(f, x, ZERO, g, samples=3000)
    assert (sampled - exact).abs().max() < 0.15 and torch.allclose(sampled.sum(1), f(x))
    with pytest.raises(UsageError, match="13 columns"):
        tabular.shapley(lambda r: r.sum(1), torch.zeros(1, 13, dtype=torch.float64), torch.zeros(13).double(), g)


def test_rbp_shrinks_what_moves_and_depends_on_units_only_as_written():
    a = torch.tensor([[1.0, 1.0, 2.0]], dtype=torch.float64)
    around = a[:, None] + torch.tensor([[[0.5, 0, 0], [-0.5, 0, 0]]], dtype=torch.float64)
    written = rbp(a, around, strength=0.1, as_written=True)
    assert torch.allclose(written, torch.tensor([[1 / 1.05, 1.0, 2.0]], dtype=torch.float64))
    assert not torch.allclose(rbp(100 * a, 100 * around, as_written=True) / 100, written)
    assert torch.allclose(rbp(100 * a, 100 * around), rbp(a, around))
    none = torch.zeros(1, 2, dtype=torch.bool)  # every perturbation changed the prediction
    assert torch.allclose(rbp(a, around, kept=none, as_written=True), a)
    assert torch.equal(rbp(torch.zeros(1, 3), torch.zeros(1, 2, 3)), torch.zeros(1, 3))


def test_rbp_cannot_reorder_what_moves_alike_and_leaves_a_still_explainer_alone():
    g = torch.Generator().manual_seed(0)
    still = with_rbp_rows(tabular.gradients)(linear, rows(5), ZERO, g)
    assert torch.allclose(still, (WEIGHTS / WEIGHTS.abs().sum()).expand(5, -1))
    exact, shrunk = (e(product, rows(5), ZERO, g) for e in (tabular.shapley, shapley_rbp(strength=1.0)))
    share = exact / exact.abs().sum(1, keepdim=True)
    assert (shrunk.abs() <= share.abs() + 1e-12).all() and (shrunk[:, :2].abs() < share[:, :2].abs()).all()
