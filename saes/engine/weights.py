"""The weights of a dictionary in training: how they begin, and how they leave.

The encoder lies transposed, a row for each latent, so that its gradient is a sum of rows like the decoder's.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saes.config import GatedConfig, JumpReLUConfig, TrainConfig, TranscoderConfig

__all__ = ["Weights", "initial"]

Weights = dict[str, Tensor]
"""`enc [d_sae, d_in]`, `W_dec [d_sae, d_out]`, `b_enc [d_sae]` (a gated SAE's gate), `b_dec [d_out]`; for JumpReLU
`threshold [d_sae]`; for gated `r_mag [d_sae]`, `b_mag [d_sae]`; for a transcoder with a skip `W_skip [d_in, d_out]`."""

NORM = 0.1
"""Length of the decoder rows at the start, as in sae-lens (`decoder_init_norm`)."""


def initial(config: TrainConfig, d_in: int, b_dec: Float[Tensor, " d_out"], seed: int) -> Weights:
    """Weights at the start, as sae-lens draws them: decoder rows of random direction, the encoder its transpose.

    A transcoder's encoder is drawn on its own, as the two sides are different spaces; its skip starts at 0.
    """
    generator, d_out = torch.Generator().manual_seed(seed), len(b_dec)

    def directions(d: int) -> Tensor:
        drawn = torch.rand(config.width, d, generator=generator) * 2 - 1
        return NORM * drawn / drawn.norm(dim=-1, keepdim=True)

    W_dec = directions(d_out)
    paired = not isinstance(config, TranscoderConfig)
    zeros = torch.zeros(config.width)
    weights = {"enc": W_dec.clone() if paired else directions(d_in), "W_dec": W_dec}
    weights |= {"b_enc": zeros.clone(), "b_dec": b_dec.clone().float()}
    if isinstance(config, JumpReLUConfig):
        weights["threshold"] = torch.full_like(zeros, config.threshold)
    if isinstance(config, GatedConfig):
        weights |= {"r_mag": zeros.clone(), "b_mag": zeros.clone()}
    if isinstance(config, TranscoderConfig) and config.skip:
        weights["W_skip"] = torch.zeros(d_in, d_out)
    return weights
