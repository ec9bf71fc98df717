"""sae-lens's synthetic activations (`sae_lens.synthetic`): true directions and correlated firing made by others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Synthetic", "sae_lens_mcc", "synthetic"]


@dataclass(frozen=True)
class Synthetic:
    """True directions and activations made from them; `true_l0` features fire per row."""

    directions: Float[Tensor, "feature d"]
    activations: Float[Tensor, "row d"]
    true_l0: float


def synthetic(
    features: int, d: int, rows: int, probability: float = 0.05, correlation: float = 0.0, seed: int = 0
) -> Synthetic:
    """Draw from a sae-lens FeatureDictionary and ActivationGenerator.

    Args:
        features: number of true directions, made as orthogonal as `d` dimensions allow.
        d: width of the activations.
        rows: how many.
        probability: that a feature fires; its size is then Gaussian around 1 with sd 0.2, cut at 0.
        correlation: of the Gaussian copula of features 0 and 1, 2 and 3, ...; the others are independent.
        seed: of directions and rows.
    """
    from sae_lens.synthetic import ActivationGenerator, FeatureDictionary

    matrix = torch.eye(features)
    for first in range(0, features - 1, 2):
        matrix[first, first + 1] = matrix[first + 1, first] = correlation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dictionary = FeatureDictionary(features, d, seed=seed)
        chances = torch.full((features,), probability)
        generator = ActivationGenerator(features, chances, 0.2, 1.0, correlation_matrix=matrix if correlation else None)
        fired = generator.sample(rows)
        with torch.no_grad():
            made = dictionary(fired)
    return Synthetic(dictionary.feature_vectors.detach(), made, (fired > 0).float().sum(1).mean().item())


def sae_lens_mcc(directions: Float[Tensor, "latent d"], truth: Float[Tensor, "feature d"]) -> float:
    """sae-lens's own mean correlation coefficient, to check ours against."""
    from sae_lens.synthetic import mean_correlation_coefficient

    return mean_correlation_coefficient(directions, truth)
