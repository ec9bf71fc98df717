"""Dictionaries that nobody trained as such: random directions, raw neurons, PCA, ICA, NMF. Each is encoded alike.

All but NMF are a set of straight lines through the data mean. A line has two sides, and a latent cannot be negative,
so each gives two latents: `relu` of the projection and of its negative. Of these a row keeps its k largest, with k the
number that the dictionary under test keeps, so that no null wins by firing more. The untrained twin of a dictionary
(random encoder, tied decoder, one-sided) is `saes.null.untrained`.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, assert_never

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechinterp.activations import ActivationStore
from mechinterp.errors import UsageError
from mechinterp.types import Placed, Site
from saes.config import TopKConfig
from saes.dictionary import SparseDictionary, TopK
from saes.null import untrained

__all__ = [
    "NonNegative",
    "NullName",
    "dictionary_nulls",
    "ica",
    "nmf",
    "pca",
    "random_directions",
    "raw_neurons",
    "sparsity",
]

NullName = Literal["untrained", "random directions", "raw neurons", "pca", "ica", "nmf"]
DEFAULT: tuple[NullName, ...] = ("untrained", "random directions", "raw neurons", "pca", "ica")


def _two_sided(
    read: Float[Tensor, "d line"],
    write: Float[Tensor, "line d"],
    mean: Float[Tensor, " d"],
    k: int,
    info: dict[str, Any],
) -> SparseDictionary:
    """Two latents for each line; the k largest of a row are kept."""
    W_enc = torch.cat([read, -read], 1).contiguous()
    W_dec = torch.cat([write, -write], 0).contiguous()
    keep = min(k, W_enc.shape[1])
    return SparseDictionary(W_enc, W_dec, torch.zeros(W_enc.shape[1]), mean, TopK(keep), info=info)


@torch.no_grad()
def random_directions(x: Float[Tensor, "row d"], width: int, k: int, seed: int = 0) -> SparseDictionary:
    """Unit directions drawn from a Gaussian with the data's covariance, `width / 2` lines, and a fitted decoder.

    A harder null than the untrained twin, whose directions know nothing of the data: these look where it varies, and
    the decoder is the least-squares one for their codes on `x` (a frozen encoder, as in arXiv:2602.14111). So its R2
    says what the decoder can make of codes that nobody learnt.
    """
    generator = torch.Generator().manual_seed(seed)
    mean = x.mean(0)
    noise = torch.randn(width // 2, len(x), generator=generator)
    lines = torch.nn.functional.normalize(noise @ (x - mean), dim=-1)
    made = _two_sided(lines.T, lines, mean, k, {"null": "random directions", "seed": seed})
    codes = made.encode(x)
    gram = codes.T @ codes
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram))  # latents that never fire get a zero row
    made.W_dec.copy_(torch.linalg.solve(gram + ridge, codes.T @ (x - mean)))
    return made


def raw_neurons(x: Float[Tensor, "row d"], k: int) -> SparseDictionary:
    """The site's own coordinates, above and below their mean, divided by their standard deviation: 2 d latents."""
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-8)
    return _two_sided(torch.diag(1 / scale), torch.diag(scale), mean, k, {"null": "raw neurons"})


def pca(x: Float[Tensor, "row d"], k: int) -> SparseDictionary:
    """Principal components, both sides: 2 d latents, unscaled, so that the k largest are the best k for R2."""
    mean = x.mean(0)
    centred = (x - mean).double()
    lines = torch.linalg.eigh(centred.T @ centred)[1].flip(1).T.float()
    return _two_sided(lines.T, lines, mean, k, {"null": "pca"})


def ica(x: Float[Tensor, "row d"], k: int, seed: int = 0, steps: int = 200) -> SparseDictionary:
    """Independent components (scikit-learn's FastICA), both sides: 2 d latents of unit variance before they are cut.

    One that has not converged after `steps` is used as it is, and says so in `info`.
    """
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fitted = FastICA(whiten="unit-variance", max_iter=steps, random_state=seed).fit(x.double().numpy())
    converged = not any(issubclass(w.category, ConvergenceWarning) for w in said)
    read, write = torch.from_numpy(fitted.components_.T).float(), torch.from_numpy(np.transpose(fitted.mixing_)).float()
    return _two_sided(read, write, x.mean(0), k, {"null": "ica", "seed": seed, "converged": converged})


class NonNegative(nn.Module):
    """Non-negative factors: `z = argmin_{z >= 0} ||(x - floor) - z W_dec||^2`, `decode(z) = z W_dec + floor`.

    The minimum is found by accelerated projected gradient (Beck and Teboulle 2009) with a fixed number of steps.
    `W_enc` is the pseudo-inverse of the decoder: what a linear encoder would be; `encode` does not use it.
    """

    def __init__(self, W_dec: Float[Tensor, "latent d"], floor: Float[Tensor, " d"], steps: int = 200):
        super().__init__()
        self.W_dec = nn.Parameter(W_dec, requires_grad=False)
        self.W_enc = nn.Parameter(torch.linalg.pinv(W_dec), requires_grad=False)
        self.b_enc = nn.Parameter(torch.zeros(len(W_dec)), requires_grad=False)
        self.b_dec = nn.Parameter(floor, requires_grad=False)
        self.steps = steps

    def encode(self, x: Float[Tensor, "*row d"]) -> Float[Tensor, "*row latent"]:
        """Non-negative coefficients."""
        gram = self.W_dec @ self.W_dec.T
        rate = 1 / torch.linalg.matrix_norm(gram, 2)
        pull = (x - self.b_dec) @ self.W_dec.T
        z = ahead = (pull * rate).relu()
        pace = 1.0
        for _ in range(self.steps):
            new = (ahead - rate * (ahead @ gram - pull)).relu()
            faster = (1 + (1 + 4 * pace**2) ** 0.5) / 2
            ahead = new + (pace - 1) / faster * (new - z)
            z, pace = new, faster
        return z

    def decode(self, feature_acts: Float[Tensor, "*row latent"]) -> Float[Tensor, "*row d"]:
        """Reconstruction from coefficients."""
        return feature_acts @ self.W_dec + self.b_dec


def nmf(x: Float[Tensor, "row d"], factors: int, seed: int = 0, steps: int = 200) -> NonNegative:
    """Non-negative matrix factorisation (scikit-learn) of the rows above their smallest value in each coordinate.

    Not sparse by count: NMF chooses how many of its factors a row uses.
    """
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    floor = x.min(0).values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = NMF(factors, init="nndsvda", max_iter=steps, random_state=seed)  # type: ignore[arg-type]
        fitted.fit((x - floor).double().numpy())
    return NonNegative(torch.from_numpy(fitted.components_).float(), floor)


@torch.no_grad()
def sparsity(placed: Placed, x: Float[Tensor, "row d"]) -> int:
    """Latents that the dictionary keeps on a row, to the nearest whole number, at least 1: the k of its nulls."""
    return max(1, round(float((placed.dictionary.encode(x) > 0).double().sum(1).mean())))


def dictionary_nulls(
    placed: Placed,
    store: ActivationStore,
    names: tuple[NullName, ...] = DEFAULT,
    seed: int = 0,
    rows: int = 16384,
) -> dict[str, Placed]:
    """The nulls of a dictionary: same site, same number of latents a row, fitted on training rows only.

    Args:
        placed: the dictionary under test.
        store: holds its site.
        names: which; "nmf" is not among the default, as it is slow.
        seed: of everything random.
        rows: training rows, drawn at random, that means, covariances and components are fitted on.
    """
    order = store.order(placed.reads, seed=seed, split="train")
    if len(order) == 0:
        raise UsageError("has no row in the training split", where=str(store.folder))
    x = store.site(placed.reads)[order[:rows]]
    k, width = sparsity(placed, x[:4096]), placed.dictionary.W_dec.shape[0]
    return {name: _at(placed.reads, _make(name, x, width, k, seed)) for name in names}


def _at(site: Site, dictionary: Any) -> Placed:
    return Placed.sae(dictionary, site)


def _make(name: NullName, x: Tensor, width: int, k: int, seed: int) -> SparseDictionary | NonNegative:
    match name:
        case "untrained":
            # another seed than training's, whose twin would share its initial directions
            return untrained(TopKConfig(k=min(k, width), width=width), x.shape[1], seed + 1, x.mean(0))
        case "random directions":
            return random_directions(x, width, k, seed)
        case "raw neurons":
            return raw_neurons(x, k)
        case "pca":
            return pca(x, k)
        case "ica":
            return ica(x, k, seed)
        case "nmf":
            return nmf(x, min(x.shape[1], 64), seed)
        case _:
            assert_never(name)
