"""Which entries of the encoder product can be large, by a product in bf16; the exact values of those few in fp32.

Where a processor has bf16 instructions, a bf16 product takes half the time of an fp32 one and its entries half the
memory. Here it is made of rows and latents that carry their own rounding errors along as further columns, so that each
entry is at least what the exact one is:

    x_n w_j + b_j  <=  x'_n w'_j + |x_n - x'_n| |w_j| + |x'_n| |w_j - w'_j| + b'_j      (' : in bf16; Cauchy-Schwarz)

What an exact choice takes is therefore among the entries that reach its bound, and hardly more reach it: the errors are
thousandths of `|x_n| |w_j|`. So the choice is that of the fp32 product, and no value of bf16 is used further.

Entries are compared as the 16-bit integers that they are written as, which have the order of the numbers wherever one
of the two is positive.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int16
from torch import Tensor

from saes.engine.team import team

__all__ = ["ROUNDED", "Screen", "bits_below", "from_bits"]

ROUNDED = 2.0**-8 * (1 + 2.0**-6)
"""Rounding to bf16 moves a number by less than this share of itself."""

SUMMED = 2.0**-22
"""What adding up in fp32, here and in the exact product, loses with each number at most, beside the sum of all."""

PART = 1024
"""Rows that are rounded at one time."""


class Screen:
    """Upper bounds of the entries of `(x @ W.T + b) * gain`, as a bf16 product `rows @ latents.T`.

    Args:
        x, W, b, gain: rows, latents, biases and what they are multiplied by (not negative), fp32.

    Attributes:
        rows, latents: in bf16, with three more columns each.
        slack: by how much the upper bounds of each row exceed the exact entries at most, before rounding.

    Raises FloatingPointError where a row or a latent is not finite.
    """

    def __init__(
        self,
        x: Float[Tensor, "row d"],
        W: Float[Tensor, "latent d"],
        b: Float[Tensor, " latent"],
        gain: Float[Tensor, " latent"],
    ):
        d = W.shape[1]
        self.rows, of_rows, error_of_rows = _rounded(x, None)
        self.latents, of_latents, error_of_latents = _rounded(W, gain)
        a, e = _up(error_of_rows), _up(of_rows * (1 + ROUNDED))
        w, c = _up(of_latents), _up(error_of_latents + d * SUMMED * of_latents)
        b = b * gain
        bias = _up(b)
        torch.stack([torch.ones_like(a), a, e], dim=1, out=self.rows[:, d:])
        torch.stack([bias, w, c], dim=1, out=self.latents[:, d:])
        above = a.float() * w.max().float() + e.float() * c.max().float()
        self.slack = 2 * above + (bias.float() - b).max()
        if not bool(torch.isfinite(self.slack).all()):
            raise FloatingPointError("a row or an encoder weight is not a number")


def _rounded(
    x: Float[Tensor, "row d"], gain: Float[Tensor, " row"] | None
) -> tuple[Tensor, Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Rows times their gain in bf16, with room for three columns more; their lengths, and those of what rounding took.

    Part by part, so that all passes but the first find a part in the cache.
    """
    rows, d = x.shape
    out = torch.empty(rows, d + 3, dtype=torch.bfloat16)
    length, error = x.new_empty(rows), x.new_empty(rows)

    def round_part(here: slice) -> None:
        part = x[here] if gain is None else x[here] * gain[here, None]
        out[here, :d] = part
        torch.linalg.vector_norm(part, dim=1, out=length[here])
        torch.linalg.vector_norm(part - out[here, :d], dim=1, out=error[here])

    with team() as workers:
        workers.each(round_part, x, PART)
    return out, length, error


def _up(x: Float[Tensor, " n"]) -> Tensor:
    """In bf16, and not less."""
    return (x + ROUNDED * x.abs()).bfloat16()


def bits_below(bound: Float[np.ndarray, "*n"]) -> Int16[np.ndarray, "*n"]:
    """The bits of the largest bf16 number that an entry may have been rounded to whose upper bound reached `bound`.

    Where that is not positive: less than all bits, which every entry reaches.
    """
    low = np.asarray(bound * (1 - ROUNDED), np.float32)
    bits = (low.view(np.int32) >> 16).astype(np.int16)
    return np.where(low > 0, bits, np.int16(-(2**15)))


def from_bits(bits: Int16[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """The numbers that bits of bf16 stand for."""
    return (bits.astype(np.int32) << 16).view(np.float32)
