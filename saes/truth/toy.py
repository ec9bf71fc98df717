"""The toy model of superposition (Elhage et al. 2022, "Toy Models of Superposition"), trained here.

`h = W x`, `x_hat = ReLU(W^T h + b)`: `features` sparse inputs go through `hidden` < features dimensions. When features
are sparse the model stores more of them than it has dimensions, in directions that are not orthogonal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.types import Dictionary

__all__ = ["Toy", "ToyModel", "draw_features", "latent_responses", "matched_cosines", "polysemanticity", "train_toy"]

REPRESENTED = 0.5
"""Norm of its column of W from which on a feature counts as represented."""


@dataclass(frozen=True)
class Toy:
    """A toy model's setting.

    Args:
        features: number of inputs.
        hidden: dimensions they pass through.
        probability: that a feature is there; its value is then uniform on [0, 1]. `1 - S` of the paper.
        correlation: phi of the presence of features 0 and 1, 2 and 3, ...; the others are independent.
    """

    features: int = 40
    hidden: int = 12
    probability: float = 0.05
    correlation: float = 0.0


@dataclass(frozen=True)
class ToyModel:
    """What was learnt: `W [hidden, feature]`, `b [feature]`."""

    W: Float[Tensor, "hidden feature"]
    b: Float[Tensor, " feature"]

    @property
    def represented(self) -> Float[Tensor, "kept hidden"]:
        """Directions of the features that the model stores (norm of at least `REPRESENTED`)."""
        return self.W.T[self.W.norm(dim=0) >= REPRESENTED]

    @property
    def per_dimension(self) -> float:
        """Features per dimension, `||W||_F^2 / hidden` (ibid.); above 1: superposed."""
        return (self.W.square().sum() / self.W.shape[0]).item()

    @property
    def interference(self) -> Float[Tensor, " feature"]:
        """`sum_{j != i} (W_i . W_j / ||W_i||)^2`: what others write on feature i (ibid.); 0: nothing."""
        unit = self.W / self.W.norm(dim=0).clamp(min=1e-9)
        return (unit.T @ self.W).square().fill_diagonal_(0).sum(1)

    @torch.no_grad()
    def hidden(self, x: Float[Tensor, "row feature"]) -> Float[Tensor, "row hidden"]:
        """Activations of the hidden layer."""
        return x @ self.W.T


def draw_features(toy: Toy, rows: int, generator: torch.Generator) -> Float[Tensor, "row feature"]:
    """Inputs: a partner copies its pair's presence with probability `correlation`, else is drawn on its own."""
    there = torch.rand(rows, toy.features, generator=generator) < toy.probability
    copies = torch.rand(rows, toy.features // 2, generator=generator) < toy.correlation
    paired = 2 * (toy.features // 2)
    there[:, 1:paired:2] = torch.where(copies, there[:, 0:paired:2], there[:, 1:paired:2])
    return torch.rand(rows, toy.features, generator=generator) * there


def train_toy(toy: Toy, steps: int = 2000, batch: int = 1024, lr: float = 1e-2, seed: int = 0) -> ToyModel:
    """Train by Adam on the mean squared error, all features equally important; the rate decays to 0."""
    generator = torch.Generator().manual_seed(seed)
    W = (torch.randn(toy.hidden, toy.features, generator=generator) * (1 / toy.hidden) ** 0.5).requires_grad_()
    b = torch.zeros(toy.features, requires_grad=True)
    optimizer = torch.optim.Adam([W, b], lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        x = draw_features(toy, batch, generator)
        loss = (torch.relu(x @ W.T @ W + b) - x).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ToyModel(W.detach(), b.detach())


@torch.no_grad()
def polysemanticity(responses: Float[Tensor, "feature unit"]) -> Float[Tensor, " unit"]:
    """`1 - max_i r_i^2 / sum_i r_i^2` of each unit's responses to each feature alone; nan for one that never responds.

    0: one feature drives it; `1 - 1/n`: n features drive it alike.
    """
    energy = responses.double().square()
    total = energy.sum(0)
    return torch.where(total > 1e-12, 1 - energy.max(0).values / total.clamp(min=1e-12), torch.nan)


@torch.no_grad()
def latent_responses(dictionary: Dictionary, directions: Float[Tensor, "feature d"]) -> Float[Tensor, "feature latent"]:
    """What the latents do when one feature alone is there, at full strength."""
    return dictionary.encode(directions)


def matched_cosines(
    directions: Float[Tensor, "latent d"], truth: Float[Tensor, "feature d"]
) -> Float[np.ndarray, " feature"]:
    """|cos| of every true direction with its latent under the best one-to-one matching; their mean is the MCC.

    A feature that gets no latent (fewer latents than features) is nan.
    """
    from scipy.optimize import linear_sum_assignment

    unit = torch.nn.functional.normalize(directions.double(), dim=-1)
    cosine = (torch.nn.functional.normalize(truth.double(), dim=-1) @ unit.T).abs().numpy()
    rows, columns = linear_sum_assignment(cosine, maximize=True)
    out = np.full(len(truth), np.nan)
    out[rows] = cosine[rows, columns]
    return out
