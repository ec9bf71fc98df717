"""Fidelity: known answers, agreement with sae-lens, and six libraries' "explained variance" of one tensor."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saes.metrics import dead, frequency, l0, r2
from saes.metrics.fidelity import (
    bias_share,
    c_dec,
    frequency_histogram,
    kl_score,
    loss_recovered,
    relative_reconstruction_bias,
    shrinkage,
)

pytestmark = pytest.mark.xdist_group("saes")  # one worker imports sae_lens


def random_case(seed):
    generator = torch.Generator().manual_seed(seed)
    n, d = int(torch.randint(3, 200, (1,), generator=generator)), int(torch.randint(1, 20, (1,), generator=generator))
    x = torch.randn(n, d, generator=generator) * 3 + 10 * torch.randn(d, generator=generator)
    return x, x + torch.randn(n, d, generator=generator) + torch.randn(d, generator=generator)


@pytest.mark.parametrize("seed", range(20))
def test_agreement_with_sae_lens(seed):
    from sae_lens.evals import ExplainedVarianceCalculator
    from sae_lens.synthetic.evals import DeadLatentsCalculator, L0Calculator, ShrinkageCalculator

    x, x_hat = random_case(seed)
    variance, length = ExplainedVarianceCalculator(), ShrinkageCalculator()
    cut = len(x) // 2
    for rows in (slice(0, cut), slice(cut, None)):
        variance.add_batch(sae_output=x_hat[rows], hidden_acts=x[rows])
        length.add_batch(x_hat[rows], x[rows])
    assert r2(x, x_hat) == pytest.approx(variance.compute(), abs=1e-4)
    assert shrinkage(x, x_hat) == pytest.approx(length.compute(), rel=1e-5)
    acts = (torch.randn(40, 30, generator=torch.Generator().manual_seed(seed)) - 1.5).relu()
    sparse, gone = L0Calculator(), DeadLatentsCalculator(30)
    sparse.add_batch(acts)
    gone.add_batch(acts)
    assert l0(acts) == pytest.approx(sparse.compute()) and dead(acts) * 30 == pytest.approx(gone.compute())


@pytest.mark.parametrize("seed", range(10))
def test_agreement_with_scikit_learn(seed):
    from sklearn.metrics import r2_score

    x, x_hat = random_case(seed)
    flat = r2_score(x.double().numpy(), x_hat.double().numpy(), multioutput="variance_weighted")
    assert r2(x, x_hat) == pytest.approx(flat, abs=1e-9)


# ------------------------------------------- what other libraries print under the name of explained variance
# Formulas as in the released sources: dictionary_learning 0.1.0 evaluation.py, sae_bench 0.6.0 evals/core/main.py,
# overcomplete 0.3.0 metrics.py, visaebench 0.1.0 metrics/reconstruction/fvu.py; MSAE as in reference notes.


def dictionary_learning(x, x_hat):
    """Variance of the residual: a constant offset is no error."""
    return 1 - (torch.var(x - x_hat, dim=0).sum() / torch.var(x, dim=0).sum()).item()


def sae_bench(x, x_hat):
    """Takes the square of the mean square of an entry for the squared norm of the mean."""
    squares, mean_square = x.pow(2).sum(-1).mean(), x.pow(2).mean(0).mean()
    return 1 - ((x - x_hat).pow(2).sum(-1).mean() / (squares - mean_square**2)).item()


def overcomplete(x, x_hat):
    """One mean for all dimensions: the spread of the dimensions' means counts as variance."""
    return 1 - (((x - x_hat) ** 2).mean() / ((x - x.mean()) ** 2).mean()).item()


def msae(x, x_hat):
    """Variance over the dimensions of one row, averaged over rows."""
    return (1 - torch.var(x - x_hat, dim=1) / torch.var(x, dim=1)).mean().item()


def visaebench(x, x_hat):
    """Sums over all dimensions, divides by rows: the square of a sum over d dimensions is taken off."""
    n = len(x)
    of_x = x.pow(2).sum() / n - (x.sum() / n) ** 2
    of_residual = (x - x_hat).pow(2).sum() / n - ((x - x_hat).sum() / n) ** 2
    return 1 - (of_residual / of_x).item()


def sae_lens(x, x_hat):
    from sae_lens.evals import ExplainedVarianceCalculator

    variance = ExplainedVarianceCalculator()
    variance.add_batch(sae_output=x_hat, hidden_acts=x)
    return variance.compute()


SIX = {
    sae_lens: 0.820,
    dictionary_learning: 0.910,
    sae_bench: 0.980,
    overcomplete: 0.983,
    msae: 0.992,
    visaebench: 1.94,
}


def one_tensor(n=20_000, d=64):
    """Unit noise around means that differ by dimension; half of the error is a constant offset of 0.3."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(d, generator=generator, dtype=torch.float64)
    means = 0.267 + 3.1 * (means - means.mean()) / means.std()
    x = means + torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, x + 0.3 + 0.3 * torch.randn(n, d, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("library", SIX, ids=lambda library: library.__name__)
def test_six_meanings_of_explained_variance(library):
    x, x_hat = one_tensor()
    digits = 0.01 if SIX[library] > 1 else 0.001
    assert library(x, x_hat) == pytest.approx(SIX[library], abs=digits)
    assert r2(x, x_hat) == pytest.approx(0.820, abs=0.001)


@pytest.mark.parametrize("library", SIX, ids=lambda library: library.__name__)
def test_they_agree_where_the_data_are_centred_and_the_error_has_no_offset(library):
    """So that the table is about definitions, not about slips in copying them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5000, 200, generator=generator, dtype=torch.float64)
    x, noise = x - x.mean(0), torch.randn(5000, 200, generator=generator, dtype=torch.float64) * 0.4
    x_hat = x + noise - noise.mean(0)
    assert library(x, x_hat) == pytest.approx(r2(x, x_hat), abs=0.006)


def test_the_offset_that_variance_of_the_residual_hides():
    x, x_hat = one_tensor()
    assert bias_share(x, x_hat) == pytest.approx(0.5, abs=0.01)
    hidden = bias_share(x, x_hat) * (1 - r2(x, x_hat))
    assert dictionary_learning(x, x_hat) == pytest.approx(r2(x, x_hat) + hidden, abs=1e-6)
    assert math.isnan(bias_share(x, x))


@given(st.integers(0, 10**6), st.floats(0.1, 3))
@settings(max_examples=30, deadline=None)
def test_properties_of_r2_and_of_the_biases(seed, scale):
    x, _ = random_case(seed)
    x = x.double()
    assert r2(x, x) == pytest.approx(1.0)
    assert r2(x, x.mean(0).expand_as(x)) == pytest.approx(0.0, abs=1e-12)
    assert shrinkage(x, scale * x) == pytest.approx(scale)
    assert relative_reconstruction_bias(x, scale * x) == pytest.approx(scale)
    moved = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 5
    noisy = x + 0.1
    assert r2(x + moved, noisy + moved) == pytest.approx(r2(x, noisy), abs=1e-6)


def test_relative_reconstruction_bias_by_hand():
    x, x_hat = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.5, 1.0], [0.0, 1.0]])
    assert relative_reconstruction_bias(x, x_hat) == pytest.approx((1.25 + 1.0) / (0.5 + 2.0))


def test_loss_recovered():
    assert loss_recovered(clean=2.0, reconstructed=2.5, ablated=4.0) == pytest.approx(0.75)
    assert loss_recovered(2.0, 2.0, 4.0) == 1 and loss_recovered(2.0, 4.0, 4.0) == 0
    # the case that a library reports as 135.8 %: ablation costs a thousandth of the loss
    assert math.isnan(loss_recovered(clean=6.762, reconstructed=6.75985, ablated=6.768))
    assert math.isnan(loss_recovered(1.0, 1.0, 1.0)) and math.isnan(loss_recovered(0.0, 0.0, 0.0))
    assert math.isnan(loss_recovered(float("nan"), 1.0, 2.0))
    assert kl_score(0.1, 0.4) == pytest.approx(0.75) and math.isnan(kl_score(0.0, 0.0))


def test_frequency_histogram():
    rows = 1000
    acts = torch.zeros(rows, 5)
    for latent, count in enumerate((0, 1, 10, 100, rows)):
        acts[:count, latent] = 1
    found = frequency_histogram(frequency(acts), rows, bins=3)
    assert (found.dead, found.rows, found.counts.tolist()) == (1, rows, [1, 1, 2])
    assert found.edges.tolist() == pytest.approx([-3, -2, -1, 0])
    many = torch.rand(500, generator=torch.Generator().manual_seed(0)) * (torch.arange(500) > 20)
    found = frequency_histogram(many, rows)
    alive = many[many > 0].double().log10().clamp(min=-3).numpy()
    assert found.dead == int((many == 0).sum())
    assert found.counts.tolist() == np.histogram(alive, found.edges.numpy())[0].tolist()


def test_c_dec_by_hand():
    assert c_dec(torch.eye(5)) == pytest.approx(0.0)
    assert c_dec(torch.ones(4, 3)) == pytest.approx(1.0)
    line = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 0.0], [0.0, 3.0]])  # |cos|: 1, 0, 0; the zero row is left out
    assert c_dec(line) == pytest.approx(1 / 3)
    many = torch.randn(1500, 8, generator=torch.Generator().manual_seed(0))
    cosine = torch.nn.functional.normalize(many.double(), dim=1)
    cosine = (cosine @ cosine.T).abs().numpy()
    assert c_dec(many) == pytest.approx(cosine[np.triu_indices(1500, 1)].mean())
