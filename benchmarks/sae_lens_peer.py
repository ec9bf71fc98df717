"""sae-lens's trainer at the start, on the schedule and with the loss of one of ours; for benchmarks and tests."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from saes.config import BatchTopKConfig, GatedConfig, JumpReLUConfig, MatryoshkaConfig, TopKConfig, TranscoderConfig
from saes.engine.trainer import Trainer


def sae_lens_trainer(ours: Trainer, autocast: bool = False, rescaled: bool = True) -> Any:
    """An `SAETrainer` with the weights that `ours` has now. After each `step(batch)`, add 1 to `n_training_steps`.

    Args:
        ours: of an SAE; sae-lens cannot train transcoders.
        autocast: its bf16 mode.
        rescaled: False for its other choice of the largest, which leaves decoder norms out. It is faster, and not what
            ours does. TopK then also takes its sparse activations, the faster ones, which fail where it rescales.
    """
    if isinstance(ours.config, TranscoderConfig):
        raise TypeError("sae-lens has no trainer of transcoders")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer
    config, steps, rows = ours.config, ours.steps, ours.config.batch_size
    sae = _sae(ours, rescaled)
    with torch.no_grad():
        sae.W_dec.copy_(ours.weights["W_dec"])
        sae.W_enc.copy_(ours.weights["enc"].T)
        sae.b_dec.copy_(ours.weights["b_dec"])
    settings = SAETrainerConfig(
        total_training_samples=steps * rows,
        train_batch_size_samples=rows,
        lr=config.lr,
        lr_end=config.lr,
        lr_warm_up_steps=steps // 20 if steps // 20 > 1 else 0,
        lr_decay_steps=steps // 5,
        dead_feature_window=config.dead_after,
        autocast=autocast,
        device=str(ours.weights["b_dec"].device),
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(settings, sae, iter(()))


def _sae(ours: Trainer, rescaled: bool) -> Any:
    import sae_lens

    config, warm_up = ours.config, ours.steps // 20
    width, d = ours.weights["enc"].shape
    device = str(ours.weights["b_dec"].device)
    shape = {"d_in": d, "d_sae": width, "normalize_activations": "none", "device": device}
    taught = {"k": getattr(config, "k", None), "topk_threshold_lr": ours._threshold_rate()}
    if not rescaled:
        shape["rescale_acts_by_decoder_norm"] = False
    match config:
        case TopKConfig():
            settings = sae_lens.TopKTrainingSAEConfig(k=config.k, use_sparse_activations=not rescaled, **shape)
            return sae_lens.TopKTrainingSAE(settings)
        case BatchTopKConfig():
            return sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(**taught, **shape))
        case MatryoshkaConfig():
            nested = {"matryoshka_widths": list(config.levels), **taught, **shape}
            return sae_lens.MatryoshkaBatchTopKTrainingSAE(sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(**nested))
        case JumpReLUConfig():
            settings = sae_lens.JumpReLUTrainingSAEConfig(
                l0_coefficient=config.l0_coefficient,
                l0_warm_up_steps=warm_up,
                jumprelu_bandwidth=config.bandwidth,
                jumprelu_init_threshold=config.threshold,
                **shape,
            )
            return sae_lens.JumpReLUTrainingSAE(settings)
        case _:
            assert isinstance(config, GatedConfig)
            settings = sae_lens.GatedTrainingSAEConfig(
                l1_coefficient=config.l1_coefficient, l1_warm_up_steps=warm_up, **shape
            )
            return sae_lens.GatedTrainingSAE(settings)
