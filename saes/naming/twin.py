"""The dictionary that has learnt nothing, of the same width and sparsity: what a name must be better than."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.types import Dictionary
from saes.dictionary import SparseDictionary, TopK

__all__ = ["random_twin"]


def random_twin(dictionary: Dictionary, rows: Float[Tensor, "row d_in"], seed: int) -> SparseDictionary:
    """Random unit directions around the mean of `rows`, as many of them on at once as `dictionary` has on average.

    Works for any dictionary, also one whose training configuration is not known.
    """
    rows = rows.to(dictionary.W_enc.dtype)
    active = (dictionary.encode(rows) > 0).float().sum(-1).mean()
    d_in, width = dictionary.W_enc.shape
    directions = torch.randn(width, d_in, generator=torch.Generator().manual_seed(seed))
    directions = directions / directions.norm(dim=-1, keepdim=True)
    k = int(active.round().clamp(1, width))
    return SparseDictionary(
        directions.T.contiguous(), directions, torch.zeros(width), rows.mean(0).float().cpu(), TopK(k)
    )
