"""The bf16 product of upper bounds: it never hides an entry that an exact choice would take."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saes.engine import select
from saes.engine.product import _product
from saes.engine.screen import ROUNDED, Screen, bits_below, from_bits
from saes.engine.select import Encoder

SCALES = [0.0, 1e-6, 1e-3, 1.0, 40.0]


def problem(seed, rows, width, d, scale):
    """Rows and latents of very different lengths, some of them zero or alike but for the last bits."""
    torch.manual_seed(seed)
    x = torch.randn(rows, d) * torch.tensor(SCALES)[torch.randint(len(SCALES), (rows, 1))] * scale
    W = torch.randn(width, d) * torch.tensor(SCALES)[torch.randint(len(SCALES), (width, 1))]
    W[width // 2 :] = W[: width - width // 2] * (1 + 1e-4 * torch.rand(width - width // 2, 1))
    return x, W, torch.randn(width) * scale, torch.rand(width) * 3


@given(
    st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 40), st.integers(1, 70), st.sampled_from([1e-3, 1.0, 1e3])
)
@settings(max_examples=150, deadline=None)
def test_every_entry_is_below_its_bound_and_not_far(seed, rows, width, d, scale):
    x, W, b, gain = problem(seed, rows, width, d, scale)
    screen = Screen(x, W, b, gain)
    upper = _product(screen.rows, screen.latents, torch.empty(rows, width, dtype=torch.bfloat16))
    exact = (x.double() @ W.double().T + b.double()) * gain.double()
    tiny = 1e-30
    assert (upper.double() + upper.double().abs() * ROUNDED + tiny >= exact).all()
    assert (upper.double() - upper.double().abs() * ROUNDED - screen.slack[:, None].double() <= exact + tiny).all()
    for_each = bits_below(exact.float().numpy())
    assert (upper.view(torch.int16).numpy() >= for_each).all()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**90), max_value=2.0**90))
@settings(max_examples=300, deadline=None)
def test_bits_keep_the_order(value):
    value = np.asarray(value, np.float32)
    rounded = torch.tensor([float(value)]).bfloat16()
    bits = rounded.view(torch.int16).numpy()
    assert from_bits(bits)[0] == rounded.float().item()
    assert bits[0] >= bits_below(value)
    if value > 1e-30:  # and little that is smaller passes
        assert torch.tensor([0.97 * float(value)]).bfloat16().view(torch.int16).item() < bits_below(value)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_choice_is_the_same_with_it(seed, threads, monkeypatch):
    """Half of the latents differ from the other half by less than bf16 can tell."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    monkeypatch.setattr("saes.engine.product.ROWS", 16)
    monkeypatch.setattr("saes.engine.product.BYTES", 2**14)
    x, W, b, gain = problem(seed, 60, 300, 20, 1.0)
    x[x.norm(dim=1) == 0] = 1.0
    found = {}
    for on in (True, False):
        monkeypatch.setattr("saes.engine.select.multiplies_bf16", lambda on=on: on)
        encoder = Encoder()
        found[on] = [encoder.row_topk(x, W, b, gain, 7), encoder.batch_topk(x, W, b, gain, 7)]
        found[on].append(encoder.batch_topk(x * 0.5, W, b, gain, 7))  # its guess was too high
    torch.set_num_threads(before)
    for (codes, value), (wanted, exact) in zip(found[True], found[False], strict=True):
        assert torch.equal(codes.row, wanted.row) and torch.equal(codes.latent, wanted.latent)
        torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-6)


def test_rows_with_few_positive_entries_are_chosen_exactly(monkeypatch):
    monkeypatch.setattr("saes.engine.select.multiplies_bf16", lambda: True)
    torch.manual_seed(0)
    x, W, b, gain = torch.randn(20, 6), torch.randn(100, 6), torch.full((100,), -4.0), torch.ones(100)
    value = Encoder().row_topk(x, W, b, gain, 9)[1]
    best = torch.addmm(b, x, W.T).topk(9, dim=1)
    assert 0 < len(value) < 20 * 9
    assert len(value) == int((best.values > 0).sum())
    torch.testing.assert_close(value.sort().values, best.values[best.values > 0].sort().values)


def test_hardly_more_than_the_chosen_are_multiplied_again(monkeypatch):
    """What makes it worth while: the bound is tight where rows and latents are of one length."""
    asked = []
    exact = select._exact
    monkeypatch.setattr("saes.engine.select.multiplies_bf16", lambda: True)
    monkeypatch.setattr("saes.engine.select._exact", lambda *a: asked.append(len(a[-1])) or exact(*a))
    torch.manual_seed(0)
    x, W = torch.randn(64, 128), torch.nn.functional.normalize(torch.randn(2048, 128), dim=1)
    codes, _ = Encoder().row_topk(x, W, torch.zeros(2048), torch.ones(2048), 32)
    assert len(codes.row) == 64 * 32 < sum(asked) < 1.6 * 64 * 32


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(value, monkeypatch):
    monkeypatch.setattr("saes.engine.select.multiplies_bf16", lambda: True)
    x, W = torch.ones(6, 2), torch.ones(300, 2)
    x[4, 1] = value
    for choose in (Encoder().row_topk, Encoder().batch_topk):
        with pytest.raises(FloatingPointError, match="not a number"):
            choose(x, W, torch.zeros(300), torch.ones(300), 5)


def test_what_the_last_batch_left_changes_no_bit(monkeypatch):
    """A run that goes on from a checkpoint has no guess; the run that wrote it may have had one of zero."""
    monkeypatch.setattr("saes.engine.select.multiplies_bf16", lambda: True)
    torch.manual_seed(0)
    W, b, gain = torch.randn(100, 24), torch.zeros(100), torch.rand(100)
    x, before = torch.randn(50, 24), Encoder()
    before.batch_topk(-x.abs(), W.abs(), b, gain, 4)  # nothing is positive
    assert before._guess == 0
    (codes, value), (again, wanted) = (e.batch_topk(x, W, b, gain, 4) for e in (before, Encoder()))
    assert torch.equal(value, wanted) and torch.equal(codes.latent, again.latent) and torch.equal(codes.row, again.row)
    few = torch.full_like(b, -12.0)  # fewer positive entries than wanted: the guess has to come down to zero
    (_, value), (_, wanted) = (Encoder().batch_topk(x, W, few, gain, 30), before.batch_topk(x, W, few, gain, 30))
    assert torch.equal(value, wanted) and 0 < len(value) < 50 * 30


def test_threads_leave_the_filters_of_warnings_alone(monkeypatch):
    monkeypatch.setattr("saes.engine.select.multiplies_bf16", lambda: True)
    monkeypatch.setattr("saes.engine.product.ROWS", 8)
    monkeypatch.setattr("saes.engine.product.BYTES", 2**14)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    encoder, filters = Encoder(), list(warnings.filters)
    monkeypatch.setattr("saes.engine.codes.warnings", None)  # nobody may open them in a step
    torch.manual_seed(0)
    x, W = torch.randn(200, 12), torch.randn(100, 12)
    for _ in range(5):
        encoder.row_topk(x, W, torch.zeros(100), torch.ones(100), 4)
    torch.set_num_threads(before)
    assert warnings.filters == filters
