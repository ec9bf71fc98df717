"""sae-lens's synthetic activations (`sae_lens.synthetic`): true directions and correlated firing made by others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Synthetic", "sae_lens_mcc", "synthetic", "trained_by_sae_lens"]


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


def trained_by_sae_lens(
    rows: Float[Tensor, "row d"], width: int, k: int, epochs: int, batch_size: int, lr: float, seed: int = 0
) -> Float[Tensor, "latent d"]:
    """Decoder of a TopK SAE that sae-lens's own `SAETrainer` trains, from its own start: a peer of ours on its data.

    Rows are scaled to a mean norm of sqrt(d), as ours are in training, so that one learning rate serves both; warm-up
    over the first 5 % of the steps, decay over the last 20 %. Directions do not depend on the scale.
    """
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    d, per_epoch = rows.shape[1], max(1, len(rows) // batch_size)
    x = rows * (d**0.5 / rows.norm(dim=1).mean())
    steps, generator = per_epoch * epochs, torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(d_in=d, d_sae=width, k=k))
    settings = SAETrainerConfig(
        total_training_samples=steps * batch_size,
        train_batch_size_samples=batch_size,
        lr=lr,
        lr_end=lr,
        lr_warm_up_steps=max(1, steps // 20),
        lr_decay_steps=steps // 5,
        dead_feature_window=100,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(settings, sae, iter(()))
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for step in range(per_epoch):
            trainer.step(x[order[step * batch_size : (step + 1) * batch_size]])
            trainer.n_training_steps += 1
    return sae.W_dec.detach()


def sae_lens_mcc(directions: Float[Tensor, "latent d"], truth: Float[Tensor, "feature d"]) -> float:
    """sae-lens's own mean correlation coefficient, to check ours against."""
    from sae_lens.synthetic import mean_correlation_coefficient

    return mean_correlation_coefficient(directions, truth)
