"""How much of the influence begins at each output: the halves of one score are one output.

A similarity stands in a graph as two readouts, an image half and a text half, each of which sums to the score `s` by
itself (a contrast has a text half for each caption). The score is their weighted sum, so it is also *one* row,

    s = sum_h w_h (sum_s W[h, s] + constant_h),   with w_h = 1/2,

and influence (Ameisen et al. 2025, "Circuit Tracing") of that row shares it out over all its in-edges at once,
`w_h |W[h, s]| / sum_{h, s} w_h |W[h, s]|`. That is what the halves' own rows give when influence begins at each of them
in proportion to `w_h sum_s |W[h, s]|`. With equal beginnings instead, a caption whose edges hardly move the score has
as much influence in all as the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from graphs.frozen.parts import Readout

__all__ = ["output_shares"]


def output_shares(readouts: Sequence[Readout], mass: Float[Tensor, " output"]) -> Float[Tensor, " output"]:
    """The share of each readout, non-negative, summing to 1.

    Args:
        readouts: an output by itself counts with its |weight|. Those that share a name in `part_of` count 1 together,
            each in proportion to its |weight| times its mass.
        mass: sum of the absolute in-edges of each readout.

    Where everything is 0, all are equal.
    """
    shares = torch.tensor([abs(readout.weight) for readout in readouts], dtype=mass.dtype, device=mass.device)
    for score in dict.fromkeys(readout.part_of for readout in readouts if readout.part_of):
        rows = torch.tensor([i for i, readout in enumerate(readouts) if readout.part_of == score])
        parts = shares[rows] * mass[rows]
        shares[rows] = parts / parts.sum() if parts.sum() > 0 else 1 / len(rows)
    return shares / shares.sum() if shares.sum() > 0 else torch.full_like(shares, 1 / len(shares))
