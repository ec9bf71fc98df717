"""A norm whose denominator is held: a linear map."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

__all__ = ["FrozenNorm"]


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """`gain * C(x) / scale + shift`: C takes off the mean (LayerNorm) or does nothing (RMSNorm).

    `scale` is a constant for each position. A layer scale is a norm of scale 1 that does not centre (`diagonal`).
    """

    gain: Float[Tensor, " d"]
    shift: Float[Tensor, " d"]
    scale: Float[Tensor, "pos 1"]
    centres: bool

    @classmethod
    def diagonal(cls, gain: Float[Tensor, " d"], n_pos: int) -> FrozenNorm:
        """Multiplication by a vector."""
        return cls(gain, gain.new_zeros(gain.shape), gain.new_ones(n_pos, 1), centres=False)

    def linear(self, x: Float[Tensor, "*rest pos d"]) -> Float[Tensor, "*rest pos d"]:
        """Without `shift`."""
        x = x - x.mean(-1, keepdim=True) if self.centres else x
        return x / self.scale * self.gain

    def apply(self, x: Float[Tensor, "*rest pos d"]) -> Float[Tensor, "*rest pos d"]:
        """What the norm gives, `shift` included."""
        return self.linear(x) + self.shift

    def adjoint(self, g: Float[Tensor, "pos target d"]) -> Float[Tensor, "pos target d"]:
        """The transpose of `linear`."""
        g = g * self.gain / self.scale[:, None]
        return g - g.mean(-1, keepdim=True) if self.centres else g
