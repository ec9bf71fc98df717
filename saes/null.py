"""Dictionaries that have learnt nothing, to stand beside every claim about one that has."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saes.config import JumpReLUConfig, TrainConfig, TranscoderConfig
from saes.dictionary import SparseDictionary, TopK

__all__ = ["untrained"]


def untrained(
    config: TrainConfig,
    d_in: int,
    seed: int,
    mean: Float[Tensor, " d_in"] | None = None,
    k: int | None = None,
    mean_out: Float[Tensor, " d_out"] | None = None,
) -> SparseDictionary:
    """The twin of a trained dictionary: same width and k, random unit directions, tied encoder.

    Args:
        config: configuration of the trained dictionary. The twin is always a TopK one: the others have no threshold
            before they are trained.
        d_in: width of the site.
        seed: of the directions.
        mean: data mean, for `b_dec`; without it every row would fire the latents nearest to the mean. Default 0.
        k: latents per row. Default: the configuration's, or a JumpReLU's target, or a 32nd of the width.
        mean_out: for a transcoder, mean of what is written; its decoder has random directions of its own.
    """
    generator = torch.Generator().manual_seed(seed)

    def directions(d: int) -> Tensor:
        drawn = torch.randn(config.width, d, generator=generator)
        return drawn / drawn.norm(dim=-1, keepdim=True)

    if k is None:
        target = config.target_l0 if isinstance(config, JumpReLUConfig) else None
        k = int(getattr(config, "k", 0)) or max(1, round(target or config.width / 32))
    info = {"untrained": True, "seed": seed, "config": config.to_dict()}
    encoder = directions(d_in)
    at = torch.zeros(d_in) if mean is None else mean.detach().clone().float()
    if not isinstance(config, TranscoderConfig):
        bias = torch.zeros(config.width)
        return SparseDictionary(encoder.T.contiguous(), encoder, bias, at, TopK(k), info=info)
    b_dec = torch.zeros(d_in) if mean_out is None else mean_out.detach().clone().float()
    decoder = directions(len(b_dec))
    return SparseDictionary(encoder.T.contiguous(), decoder, -(encoder @ at), b_dec, TopK(k), centred=False, info=info)
