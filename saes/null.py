"""Dictionaries that have learnt nothing, to stand beside every claim about one that has."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saes.config import SAEConfig
from saes.dictionary import SparseDictionary, TopK

__all__ = ["untrained"]


def untrained(config: SAEConfig, d_in: int, seed: int, mean: Float[Tensor, " d_in"] | None = None) -> SparseDictionary:
    """The twin of a trained dictionary: same width and k, random unit directions, tied encoder.

    Args:
        config: configuration of the trained dictionary. A BatchTopK twin is a TopK one, as it has no threshold yet.
        d_in: width of the site.
        seed: of the directions.
        mean: data mean, for `b_dec`; without it every row would fire the latents nearest to the mean. Default 0.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.randn(config.width, d_in, generator=generator)
    decoder = decoder / decoder.norm(dim=-1, keepdim=True)
    b_dec = torch.zeros(d_in) if mean is None else mean.detach().clone().float()
    info = {"untrained": True, "seed": seed, "config": config.to_dict()}
    return SparseDictionary(
        decoder.T.contiguous(), decoder, torch.zeros(config.width), b_dec, TopK(config.k), info=info
    )
