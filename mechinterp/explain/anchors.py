"""Anchors: attributions that explain nothing, and one that is the effect of removal. They show what a score gives them.

`oracle` is occlusion with the question's own reference: exact for that removal, one element at a time. It is no upper
bound: judged by another removal, or by sets of elements, other methods and even `constant` can score higher.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import conv2d, pad

from mechinterp.errors import UsageError
from mechinterp.explain.coalitions import occlusion
from mechinterp.explain.question import Part, Question

__all__ = ["centre", "constant", "echo", "edges", "oracle", "random"]


def random(question: Question, generator: torch.Generator) -> Float[Tensor, "row element"]:
    """Normal noise, drawn anew at every call and for every row."""
    return torch.randn(len(question), question.count, generator=generator).to(question.parts[0].value)


def constant(question: Question, generator: torch.Generator) -> Float[Tensor, "row element"]:
    """1 everywhere."""
    return question.parts[0].value.new_ones(len(question), question.count)


def centre(question: Question, generator: torch.Generator) -> Float[Tensor, "row element"]:
    """1 at the centre of the grid, falling with the distance from it to 0 at the corners. Needs a grid of patches."""
    if question.shape is None:
        raise UsageError("elements that are no grid have no centre", where="centre", hint="ask about the image alone")
    down, across = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in question.shape)
    distance = (down.square()[:, None] + across.square()).sqrt().flatten()
    near = 1 - distance / distance.max().clamp(min=1)
    return near.to(question.parts[0].value).repeat(len(question), 1)


def edges(question: Question, generator: torch.Generator) -> Float[Tensor, "row element"]:
    """Mean Sobel magnitude of each patch; of a word or a column, the norm of its distance from the reference.

    Patches and words of one question are not on one scale.
    """
    found = question.parts[0].value.new_zeros(len(question), question.count)
    for part in question.parts:
        found += _sobel(part, question.count) if part.kind == "patch" else _distance(part, question.count)
    return found


def echo(question: Question, generator: torch.Generator) -> Float[Tensor, "row element"]:
    """Fixed coefficients (from 1 / count to 1) times the score: it repeats the output and knows nothing of elements."""
    score = question.score()
    return score[:, None] * torch.arange(1, question.count + 1, device=score.device).to(score.dtype) / question.count


def oracle(question: Question, generator: torch.Generator) -> Float[Tensor, "row element"]:
    """The effect of removing each element alone, with the question's own reference: occlusion, and no upper bound."""
    return occlusion(question, generator)


def _sobel(part: Part, count: int) -> Float[Tensor, "row element"]:
    """Mean over each patch of the gradient magnitude, channels averaged first, edges repeated."""
    if part.value.ndim < 3:
        raise UsageError(f"patches of shape {tuple(part.value.shape)} have no rows and columns", where="edges")
    image = part.value.flatten(1, -3).mean(1, keepdim=True) if part.value.ndim > 3 else part.value[:, None]
    kernel = image.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    slopes = conv2d(pad(image, (1, 1, 1, 1), mode="replicate"), torch.stack([kernel, kernel.T])[:, None])
    size = slopes.square().sum(1).sqrt()
    flat = Part("patch", size, size, part.owner)
    area = flat.gathered(torch.ones_like(size[:1]), count)
    return flat.gathered(size, count) / area.clamp(min=1)


def _distance(part: Part, count: int) -> Float[Tensor, "row element"]:
    return part.gathered((part.value - part.reference).square(), count).sqrt()
