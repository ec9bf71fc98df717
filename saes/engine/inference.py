"""From the weights of training to the ones that are kept: scales and decoder norms folded in, in sae-lens's layout."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, assert_never

import torch
from jaxtyping import Float
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
from saes.engine.trainer import Trainer

__all__ = ["architecture", "inference", "layout_version"]


def layout_version() -> str:
    """The sae-lens release whose layout is written."""
    return version("sae-lens")


def inference(
    trainer: Trainer, scale: float, mean: Float[Tensor, " d_in"] | None = None, scale_out: float | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights for rows as they are stored.

    Decoder rows leave with unit norm, so a latent's activation is the length of what it adds to the row.

    Args:
        trainer: after its last step.
        scale: what the rows that are read were multiplied by.
        mean: for a transcoder, what was subtracted from them before.
        scale_out: for a transcoder, what the rows that are written were multiplied by.
    """
    trained = {name: tensor.cpu().double() for name, tensor in trainer.weights.items()}
    scale_out = scale if scale_out is None else scale_out
    W_enc, W_dec = trained["enc"].T * scale, trained["W_dec"] / scale_out
    b_enc, b_dec = trained["b_enc"], trained["b_dec"] / scale_out
    norm = W_dec.norm(dim=-1).clamp(min=1e-8)
    if mean is not None:
        b_enc = b_enc - mean.double() @ W_enc
    weights = {"W_enc": W_enc * norm, "W_dec": W_dec / norm[:, None], "b_enc": b_enc * norm}
    if "W_skip" in trained:
        skip = trained["W_skip"] * (scale / scale_out)
        b_dec = b_dec if mean is None else b_dec - mean.double() @ skip
        weights["W_skip"] = skip.T  # [d_out, d_in], as sae-lens has it
    weights["b_dec"] = b_dec
    if trainer.by_batch:
        weights["threshold"] = torch.full_like(norm, trainer.threshold / scale_out)
    if "threshold" in trained:
        weights["threshold"] = trained["threshold"].clamp(min=0) * norm
    if "r_mag" in trained:
        weights |= {"b_gate": weights.pop("b_enc"), "b_mag": trained["b_mag"] * norm, "r_mag": trained["r_mag"]}
    return _cfg(trainer.config, weights), {name: tensor.float().contiguous() for name, tensor in weights.items()}


def architecture(config: TrainConfig) -> str:
    """What cfg.json calls the result; the last two are ours, as sae-lens has no TopK transcoder."""
    match config:
        case TopKConfig():
            return "topk"
        case BatchTopKConfig() | MatryoshkaConfig() | JumpReLUConfig():
            return "jumprelu"
        case GatedConfig():
            return "gated"
        case TranscoderConfig():
            sparsity = {"topk": "topk", "batchtopk": "jumprelu"}[config.sparsity]
            return f"{sparsity}_{'skip_' if config.skip else ''}transcoder"
        case _:
            assert_never(config)


def _cfg(config: TrainConfig, weights: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of sae-lens's inference configuration."""
    name = architecture(config)
    cfg: dict[str, Any] = {
        "architecture": name,
        "d_in": weights["W_enc"].shape[0],
        "d_sae": weights["W_enc"].shape[1],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not isinstance(config, TranscoderConfig),
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": layout_version(),
            "training_architecture": config.kind,
            "training_architecture_details": config.to_dict(),
        },
    }
    if name.startswith("topk"):
        cfg |= {"k": getattr(config, "k", None), "rescale_acts_by_decoder_norm": False}
    if isinstance(config, TranscoderConfig):
        cfg["d_out"] = weights["W_dec"].shape[1]
    return cfg
