"""A sparse dictionary in plain torch: what training makes and every other room uses. Equal to sae-lens's to 1e-6."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, assert_never

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Activation", "Gated", "JumpReLU", "ReLU", "SparseDictionary", "TopK"]


@dataclass(frozen=True)
class TopK:
    """Keep the k largest pre-activations of each row, if positive (arXiv:2406.04093, equation 1)."""

    k: int


@dataclass(frozen=True)
class JumpReLU:
    """Keep pre-activations above the latent's `threshold` parameter (arXiv:2407.14435, equation 6)."""


@dataclass(frozen=True)
class ReLU:
    """Keep positive pre-activations."""


@dataclass(frozen=True)
class Gated:
    """Where the gate `u + b_enc` is positive, the magnitude `relu(exp(r_mag) u + b_mag)` (arXiv:2404.16014, eq. 3, 7).

    `u` is the product with the encoder; `b_enc` holds the gate's bias, which sae-lens calls `b_gate`.
    """


Activation = TopK | JumpReLU | ReLU | Gated


class SparseDictionary(nn.Module):
    """`encode(x) = activation((x - b_dec) @ W_enc + b_enc)`, `decode(z) = z @ W_dec + b_dec`.

    A transcoder does not subtract `b_dec`, may have `d_out != d_in`, and with a skip
    `forward(x) = decode(encode(x)) + x @ W_skip`. `decode` is of the latents alone.

    Args:
        W_enc: `[d_in, d_sae]`; W_dec: `[d_sae, d_out]`; b_enc: `[d_sae]`; b_dec: `[d_out]`.
        activation: what makes the latents sparse.
        threshold: `[d_sae]`, for JumpReLU.
        centred: whether `b_dec` is subtracted before encoding.
        info: what is known of its making (site, metrics, seed, ...; `mechinterp.json`).
        W_skip: `[d_in, d_out]`, of a transcoder with a linear path beside the latents.
        r_mag, b_mag: `[d_sae]`, for Gated.
    """

    W_skip: nn.Parameter | None
    r_mag: nn.Parameter | None
    b_mag: nn.Parameter | None

    def __init__(
        self,
        W_enc: Float[Tensor, "d_in d_sae"],
        W_dec: Float[Tensor, "d_sae d_out"],
        b_enc: Float[Tensor, " d_sae"],
        b_dec: Float[Tensor, " d_out"],
        activation: Activation,
        threshold: Float[Tensor, " d_sae"] | None = None,
        centred: bool = True,
        info: dict[str, Any] | None = None,
        W_skip: Float[Tensor, "d_in d_out"] | None = None,
        r_mag: Float[Tensor, " d_sae"] | None = None,
        b_mag: Float[Tensor, " d_sae"] | None = None,
    ):
        super().__init__()
        self.W_enc = nn.Parameter(W_enc, requires_grad=False)
        self.W_dec = nn.Parameter(W_dec, requires_grad=False)
        self.b_enc = nn.Parameter(b_enc, requires_grad=False)
        self.b_dec = nn.Parameter(b_dec, requires_grad=False)
        none = torch.zeros_like(b_enc) if threshold is None else threshold
        self.threshold = nn.Parameter(none, requires_grad=False)
        self.activation = activation
        self.centred = centred
        self.info = info or {}
        for name, value in (("W_skip", W_skip), ("r_mag", r_mag), ("b_mag", b_mag)):
            self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))

    @property
    def d_in(self) -> int:
        """Width of the site that is read."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of the site that is written."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    def pre_activations(self, x: Float[Tensor, "*row d_in"]) -> Float[Tensor, "*row d_sae"]:
        """What the activation function is applied to; the gate's path for Gated."""
        x = x.to(self.W_enc.dtype)
        return (x - self.b_dec if self.centred else x) @ self.W_enc + self.b_enc

    def encode(self, x: Float[Tensor, "*row d_in"]) -> Float[Tensor, "*row d_sae"]:
        """Latent activations; non-negative."""
        pre = self.pre_activations(x)
        match self.activation:
            case TopK(k):
                values, indices = pre.topk(k, dim=-1, sorted=False)
                return torch.zeros_like(pre).scatter_(-1, indices, values.relu())
            case JumpReLU():
                return pre.relu() * (pre > self.threshold)
            case ReLU():
                return pre.relu()
            case Gated():
                assert self.r_mag is not None and self.b_mag is not None
                return ((pre - self.b_enc) * self.r_mag.exp() + self.b_mag).relu() * (pre > 0)
            case _:
                assert_never(self.activation)

    def decode(self, feature_acts: Float[Tensor, "*row d_sae"]) -> Float[Tensor, "*row d_out"]:
        """What the latents say, and `b_dec`; without the skip."""
        return feature_acts @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*row d_in"]) -> Float[Tensor, "*row d_out"]:
        """`decode(encode(x))`, plus the skip where there is one."""
        found = self.decode(self.encode(x))
        return found if self.W_skip is None else found + x.to(found.dtype) @ self.W_skip
