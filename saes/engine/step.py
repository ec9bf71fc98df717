"""Loss and gradients of one batch, by hand, for every kind.

All squared errors are sums over the dimensions and means over the rows, as in sae-lens. `x` is what is read, `y` what
is to be written; for an SAE they are the same. An SAE subtracts `b_dec` from what it reads, a transcoder nothing.
Decoder norms are left free, as sae-lens does: the top-k kinds choose by `pre-activation * ||W_dec_j||` (there
`rescale_acts_by_decoder_norm`), which leaves the pre-activation itself as the decoder's weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saes.config import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    TopKConfig,
    TrainConfig,
    TranscoderConfig,
)
from saes.engine.codes import SparseCodes
from saes.engine.dead import auxiliary
from saes.engine.gates import gated, jumprelu
from saes.engine.select import Encoder
from saes.engine.team import around, own_threads
from saes.engine.weights import Weights

__all__ = ["Step", "gradients"]


@dataclass
class Step:
    """What one batch gives.

    `fired` says which latents were active, `smallest` is the smallest activation that a batch top-k kept (0: none).
    """

    loss: float
    gradients: dict[str, Tensor]
    fired: Bool[Tensor, " latent"]
    smallest: float = 0.0


def gradients(
    config: TrainConfig,
    weights: Weights,
    x: Float[Tensor, "row d_in"],
    y: Float[Tensor, "row d_out"],
    dead: Bool[Tensor, " latent"],
    warm: float,
    encoder: Encoder,
) -> Step:
    """Loss and gradients of a batch.

    Args:
        config: of the run.
        weights: where the loss is taken.
        x, y: what is read and what is to be written.
        dead: latents that have long not fired; the top-k kinds have an auxiliary loss for them.
        warm: factor in [0, 1] of the sparsity penalty of JumpReLU and gated SAEs.
        encoder: buffers that are kept between steps.
    """
    match config:
        case JumpReLUConfig():
            return Step(*jumprelu(config, weights, x, warm, encoder))
        case GatedConfig():
            return Step(*gated(config, weights, x, warm, encoder))
        case TopKConfig() | BatchTopKConfig() | MatryoshkaConfig() | TranscoderConfig():
            return _top(config, weights, x, y, dead, encoder)
        case _:
            assert_never(config)


def _top(
    config: TopKConfig | BatchTopKConfig | MatryoshkaConfig | TranscoderConfig,
    weights: Weights,
    x: Float[Tensor, "row d_in"],
    y: Float[Tensor, "row d_out"],
    dead: Bool[Tensor, " latent"],
    encoder: Encoder,
) -> Step:
    """The kinds that keep the largest: TopK, BatchTopK, Matryoshka and the transcoders."""
    W_dec, norm, rate = weights["W_dec"], weights["W_dec"].norm(dim=-1), 2 / len(x)
    transcodes = isinstance(config, TranscoderConfig)
    read = x if transcodes else x - weights["b_dec"]
    by_row = isinstance(config, TopKConfig) or (transcodes and config.sparsity == "topk")
    choose = encoder.row_topk if by_row else encoder.batch_topk
    codes, scaled = choose(read, weights["enc"], weights["b_enc"], norm, config.k)
    value = scaled / codes.take(norm)
    if isinstance(config, MatryoshkaConfig):
        parts, flow = _nested(config.levels, codes, value, weights, y)
    else:
        parts, flow = codes, codes.decode(value, W_dec).add_(weights["b_dec"]).sub_(y)
        if "W_skip" in weights:
            around().each(lambda part: flow[part].addmm_(read[part], weights["W_skip"]), flow)
        flow = flow[:, None]
    loss, last = flow.norm(dim=-1).square().sum().item() / len(x), flow[:, -1]
    _back(flow)
    to_bias = flow[:, 0].sum(0) * rate
    flow = flow.view(-1, y.shape[1])
    into = parts.pair(flow, W_dec) * rate
    result = {"W_dec": parts.gather(value * rate, flow, encoder.kept("W_dec", W_dec))}
    result |= {"enc": codes.gather(into, read, encoder.kept("enc", weights["enc"])), "b_enc": codes.total(into)}
    if "W_skip" in weights:
        result["W_skip"] = torch.cat(around().each(lambda part: read.T[part] @ flow, read.T)) * rate
    fired = torch.bincount(codes.latent, minlength=config.width) > 0
    if bool(dead.any()):
        with own_threads():
            loss += auxiliary(weights, read, last, dead, result)
    result["b_dec"] = to_bias if transcodes else to_bias - result["b_enc"] @ weights["enc"]
    return Step(loss, result, fired, float(scaled.min()) if len(scaled) else 0.0)


def _nested(
    levels: tuple[int, ...], codes: SparseCodes, value: Tensor, weights: Weights, y: Float[Tensor, "row d"]
) -> tuple[SparseCodes, Float[Tensor, "row level d"]]:
    """Codes by level, and the error of each nested dictionary."""
    parts = codes.split(levels)
    errors = parts.decode(value, weights["W_dec"]).view(len(y), len(levels), -1)
    errors[:, 0] += weights["b_dec"] - y
    for level in range(1, len(levels)):
        errors[:, level] += errors[:, level - 1]
    return parts, errors


def _back(errors: Float[Tensor, "row level d"]) -> None:
    """Turn the errors of nested dictionaries into what flows back into the latents of each level, in place.

    A latent of level l is part of the dictionaries l, l + 1, ..., so the sum of their errors reaches it. The last
    level stays as it is.
    """
    for level in reversed(range(errors.shape[1] - 1)):
        errors[:, level] += errors[:, level + 1]
