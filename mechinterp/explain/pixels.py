"""Explainers that look at pixels only: integrated gradients and occlusion, both from captum."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.explain.maps import finite, grid, scorer
from mechinterp.models import HookedVLM
from mechinterp.types import ImageTextBatch, Target

__all__ = ["integrated_gradients", "occlusion"]


def integrated_gradients(
    model: HookedVLM,
    batch: ImageTextBatch,
    target: Target,
    *,
    steps: int = 32,
    baseline: float | Float[Tensor, "1 channel height width"] = 0.0,
    chunk: int = 64,
) -> Float[Tensor, "batch height width"]:
    """Integrated gradients (Sundararajan et al. 2017, eq. 1) of the score, channels summed, signed.

    The sum over an image's pixels is its score minus that of the baseline, up to the error of `steps`
    Gauss-Legendre points.

    Args:
        model, batch, target: see Explainer.
        steps: points of the path integral.
        baseline: in preprocessed units; 0 is the preprocessor's mean grey.
        chunk: forward-backward passes held in memory at once.
    """
    from captum.attr import IntegratedGradients

    pixels = batch.pixel_values.detach()
    if isinstance(baseline, Tensor):
        baseline = baseline.to(pixels)
    relevance = torch.cat(
        [
            IntegratedGradients(scorer(model, batch, target)).attribute(
                pixels[row : row + 1],
                baselines=baseline,
                additional_forward_args=torch.tensor([row], device=pixels.device),
                n_steps=steps,
                internal_batch_size=chunk,
            )
            for row in range(len(batch))
        ]
    )
    return finite(relevance.sum(1), batch, "integrated_gradients")


@torch.no_grad()
def occlusion(
    model: HookedVLM,
    batch: ImageTextBatch,
    target: Target,
    *,
    patches: int = 1,
    fill: float = 0.0,
    chunk: int = 64,
) -> Float[Tensor, "batch height width"]:
    """Occlusion (Zeiler and Fergus 2014): the drop of the score when a square is filled, signed.

    Args:
        model, batch, target: see Explainer.
        patches: side of the square in patches of the model; it moves by one patch, and overlaps are averaged.
        fill: in preprocessed units; 0 is the preprocessor's mean grey.
        chunk: occluded images held in memory at once.
    """
    from captum.attr import Occlusion

    _, _, height, width = grid(model, batch)
    pixels = batch.pixel_values.detach()
    relevance = torch.cat(
        [
            Occlusion(scorer(model, batch, target)).attribute(
                pixels[row : row + 1],
                sliding_window_shapes=(pixels.shape[1], patches * height, patches * width),
                strides=(pixels.shape[1], height, width),
                baselines=fill,
                additional_forward_args=torch.tensor([row], device=pixels.device),
                perturbations_per_eval=chunk,
            )
            for row in range(len(batch))
        ]
    )
    return finite(relevance[:, 0], batch, "occlusion")
