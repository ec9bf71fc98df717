"""Explainers that read attention: rollout, flow and TransMM, over a Question about a vision-language model.

All three pass relevance from where the score is read down to the elements, through one matrix a block:

- the score is read at the class token (CLIP, ViT), at the probe of an attention-pooling head (SigLIP), at the last
  token of the prompt (generative models), or at the text token that a dual encoder pools (for words);
- a generative model's language blocks come first, then each image token stands for the patches that the projector
  makes it of, then the vision blocks.

In a dual encoder patches and words lie in two towers, each starting from 1, so they are not on one scale.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.explain.flow import flows
from mechinterp.explain.question import Question
from mechinterp.explain.reading import Path, Stage, paths

__all__ = ["attention_flow", "attention_rollout", "transmm"]

RESIDUAL = 0.5  # share of a token's own value, for the residual stream (Abnar and Zuidema 2020, section 3)


def attention_rollout(question: Question, generator: torch.Generator) -> Float[Tensor, "row element"]:
    """Attention rollout (Abnar and Zuidema 2020, eq. 1): products of `0.5 A + 0.5 I`, heads averaged; not negative.

    Raises UsageError for a question that is not about a model with attention.
    """
    return _passed(question, "attention_rollout", _mixing, gradients=False)


def transmm(question: Question, generator: torch.Generator) -> Float[Tensor, "row element"]:
    """TransMM (Chefer et al. 2021, arXiv:2103.15679, eqs. 5 and 6): `R <- R + mean_h((dy/dA * A)^+) R`; not negative.

    The self-attention rules, tower by tower; relevance leaves a generative model's language blocks at its image tokens.
    Raises UsageError for a question that is not about a model with attention.
    """
    return _passed(question, "transmm", _relevance, gradients=True)


def attention_flow(question: Question, generator: torch.Generator) -> Float[Tensor, "row element"]:
    """Attention flow (Abnar and Zuidema 2020, section 3): the largest flow from the readout to each element.

    Capacities are rollout's matrices. One maximum-flow problem for every row and element, exact to 1e-7. Where the
    narrowest cut lies above all elements (in a language model, say), they all get the same: a constant map.
    Raises UsageError for a question that is not about a model with attention.
    """
    found = []
    for piece in question.chunks():
        walks = paths(piece, "attention_flow", gradients=False)
        found.append(torch.cat([flows(path.start, list(path.matrices(_mixing)), path.at) for path in walks], dim=1))
    return torch.cat(found).to(question.parts[0].value)


def _passed(
    question: Question, where: str, matrix: Callable[[Stage], Tensor], gradients: bool
) -> Float[Tensor, "row element"]:
    """Relevance at the elements, passed from the readout through `matrix` of every stage."""
    found = []
    for piece in question.chunks():
        parts = [_down(path, matrix) for path in paths(piece, where, gradients)]
        found.append(torch.cat(parts, dim=1))
    return torch.cat(found)


def _down(path: Path, matrix: Callable[[Stage], Tensor]) -> Float[Tensor, "row element"]:
    relevance = path.start[:, None]
    for one in path.matrices(matrix):
        relevance = relevance @ one
    return relevance[:, 0, path.at]


def _mixing(stage: Stage) -> Float[Tensor, "row query key"]:
    mean = stage.pattern.mean(1)
    return RESIDUAL * mean + (1 - RESIDUAL) * torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)


def _relevance(stage: Stage) -> Float[Tensor, "row query key"]:
    assert stage.gradient is not None
    mean = (stage.pattern * stage.gradient).clamp(min=0).mean(1)
    return mean + torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
