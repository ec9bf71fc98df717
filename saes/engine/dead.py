"""The auxiliary loss that brings back latents which no longer fire (Gao et al. 2024, arXiv:2406.04093, A.2)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saes.engine.weights import Weights

__all__ = ["auxiliary"]


def auxiliary(
    weights: Weights,
    read: Float[Tensor, "row d_in"],
    error: Float[Tensor, "row d_out"],
    dead: Bool[Tensor, " latent"],
    result: dict[str, Tensor],
) -> float:
    """Let the `k_aux` strongest dead latents of each row predict the error of the living ones, as sae-lens does.

    `k_aux` is half the width of the rows, or the number of dead latents where that is less; the loss is then scaled
    down by as much. Adds the gradients of `W_dec`, `enc` and `b_enc` to `result`; returns the loss.

    Args:
        weights: of the dictionary.
        read: rows as the encoder sees them.
        error: reconstruction minus row.
        dead: which latents are dead; at least one.
        result: gradients so far.
    """
    which = dead.nonzero()[:, 0]
    wanted = read.shape[1] // 2
    scale, count = min(len(which) / wanted, 1.0) if wanted else 1.0, min(wanted, len(which))
    if count == 0:
        return 0.0
    enc, W_dec = weights["enc"][which], weights["W_dec"][which]
    value = torch.addmm(weights["b_enc"][which], read, enc.T)
    if count < len(which):
        kept = (value * W_dec.norm(dim=-1)).topk(count, dim=1, sorted=False).indices
        value = torch.zeros_like(value).scatter_(1, kept, value.gather(1, kept))
        mask = torch.zeros_like(value, dtype=torch.bool).scatter_(1, kept, True)
    else:
        mask = None
    miss = torch.addmm(error, value, W_dec)  # the residual is minus the error
    loss = scale * miss.square().sum().item() / len(read)
    flow = miss * (2 * scale / len(read))
    into = flow @ W_dec.T
    if mask is not None:
        into *= mask
    result["W_dec"][which] += value.T @ flow
    result["enc"][which] += into.T @ read
    result["b_enc"][which] += into.sum(0)
    return loss
