"""The weights of a dictionary in training: how they begin, and how they leave.

The encoder lies transposed, a row for each latent, so that its gradient is a sum of rows like the decoder's.
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from saes.config import GatedConfig, JumpReLUConfig, TrainConfig, TranscoderConfig

__all__ = ["Weights", "fitted_norm", "initial"]

Weights = dict[str, Tensor]
"""`enc [d_sae, d_in]`, `W_dec [d_sae, d_out]`, `b_enc [d_sae]` (a gated SAE's gate), `b_dec [d_out]`; for JumpReLU
`threshold [d_sae]`; for gated `r_mag [d_sae]`, `b_mag [d_sae]`; for a transcoder with a skip `W_skip [d_in, d_out]`."""

NORM = 0.1
"""Length of the rows at the start where it is not fitted, as in sae-lens (`decoder_init_norm`)."""


def fitted_norm(k: int, width: int, d: int) -> float:
    """Length of decoder rows at which the first reconstruction of a random row has the least squared error.

    Encoder rows are unit vectors u_i, decoder rows c u_i. A row x projects on them like draws from N(0, |x|^2 / d), of
    which the `k` largest of `width` are kept. With S the expected sum of their squares over |x|^2 (a truncated normal's
    second moment), the reconstruction has c S |x|^2 along x and about c^2 (S^2 + S) |x|^2 in length squared, as what is
    across x adds up like noise; the error is least at c = 1 / (1 + S). Ours; within a tenth of least squares on draws.
    """
    share = k / width
    if share >= 1:
        return 1 / (1 + k / d)
    normal = NormalDist()
    cut = normal.inv_cdf(1 - share)
    return 1 / (1 + k / d * (1 + cut * normal.pdf(cut) / share))


def initial(config: TrainConfig, d_in: int, b_dec: Float[Tensor, " d_out"], seed: int) -> Weights:
    """Weights at the start: decoder rows of random direction, drawn as sae-lens does, the encoder's the same ones.

    How long they are: `start` of the configuration. A transcoder's encoder is drawn on its own, as the two sides are
    different spaces; its skip starts at 0.
    """
    generator, d_out = torch.Generator().manual_seed(seed), len(b_dec)

    def directions(d: int) -> Tensor:
        drawn = torch.rand(config.width, d, generator=generator) * 2 - 1
        return drawn / drawn.norm(dim=-1, keepdim=True)

    fits = getattr(config, "start", "sae-lens") == "fitted"
    W_dec = directions(d_out)
    enc = directions(d_in) if isinstance(config, TranscoderConfig) else W_dec.clone()
    W_dec *= fitted_norm(getattr(config, "k", 0), config.width, d_out) if fits else NORM
    enc *= 1.0 if fits else NORM
    zeros = torch.zeros(config.width)
    weights = {"enc": enc, "W_dec": W_dec}
    weights |= {"b_enc": zeros.clone(), "b_dec": b_dec.clone().float()}
    if isinstance(config, JumpReLUConfig):
        weights["threshold"] = torch.full_like(zeros, config.threshold)
    if isinstance(config, GatedConfig):
        weights |= {"r_mag": zeros.clone(), "b_mag": zeros.clone()}
    if isinstance(config, TranscoderConfig) and config.skip:
        weights["W_skip"] = torch.zeros(d_in, d_out)
    return weights
