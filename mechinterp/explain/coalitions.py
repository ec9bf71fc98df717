"""Explainers that remove elements and look at the score: occlusion, KernelSHAP, LIME and RISE, over any Question.

Which elements are kept is drawn once a call and shared by all rows, so copies of one input that differ a little are
asked the same. What is drawn (`*_members`) is separate from what is concluded (`*_solve`).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.explain.patches import in_patches
from mechinterp.explain.question import Question

__all__ = [
    "kernel_shap",
    "kernel_shap_members",
    "kernel_shap_solve",
    "lime",
    "lime_solve",
    "occlusion",
    "rise",
    "rise_masks",
    "rise_solve",
]

SAMPLES = 96
KEPT = 0.5  # chance that LIME or RISE keeps an element
WIDTH = 0.25  # of LIME's kernel, in cosine distance


@torch.no_grad()
def occlusion(question: Question, generator: torch.Generator) -> Float[Tensor, "row element"]:
    """What the score loses when one element goes to its reference (Zeiler and Fergus 2014), in units of the score."""
    question = in_patches(question)
    alone = ~torch.eye(question.count, dtype=torch.bool, device=_device(question))
    return question.score()[:, None] - question.shared(alone)


@torch.no_grad()
def kernel_shap(question: Question, generator: torch.Generator, samples: int = SAMPLES) -> Float[Tensor, "row element"]:
    """KernelSHAP (Lundberg and Lee 2017, theorem 2) from `samples` coalitions and their complements, sum constrained.

    Costs `2 * samples + 2` scores a row. The attributions of a row sum to its score minus that of its reference. With
    fewer samples than elements the answer of least spread is taken.
    """
    question = in_patches(question)
    device = _device(question)
    ends = torch.tensor([[False], [True]], device=device).expand(2, question.count)
    if question.count == 1:
        empty, full = question.shared(ends).unbind(1)
        return (full - empty)[:, None]
    member = torch.cat([ends, kernel_shap_members(question.count, samples, generator).to(device)])
    value = question.shared(member)
    return kernel_shap_solve(member[2:], value[:, 2:], value[:, 0], value[:, 1])


def kernel_shap_members(count: int, samples: int, generator: torch.Generator) -> Bool[Tensor, "coalition {count}"]:
    """`samples` coalitions and their complements; sizes have the kernel's probability, so the regression is plain."""
    size = torch.arange(1, count, dtype=torch.float64)
    drawn = torch.multinomial(1 / (size * (count - size)), samples, replacement=True, generator=generator) + 1
    rank = torch.rand(samples, count, generator=generator).argsort(1).argsort(1)
    member = rank < drawn[:, None]
    return torch.cat([member, ~member])


def kernel_shap_solve(
    member: Bool[Tensor, "coalition element"],
    value: Float[Tensor, "row coalition"],
    empty: Float[Tensor, " row"],
    full: Float[Tensor, " row"],
) -> Float[Tensor, "row element"]:
    """Least squares for `value - empty = member @ phi`, given that phi sums to `full - empty`; all equations weigh 1.

    Solved around equal shares and without choosing an element to eliminate, so that elements stay exchangeable; the
    tiny ridge decides only what the equations leave open.
    """
    z, count = member.double(), member.shape[1]
    share = ((full - empty).double() / count)[:, None]
    centred = z - z.mean(1, keepdim=True)  # the part of an equation that is about differences between elements
    answer = (value - empty[:, None]).double() - share * z.sum(1)
    gram = centred.T @ centred
    ridge = 1e-10 * gram.diagonal().mean().clamp(min=1e-12)
    # ones take up the direction in which a centred equation says nothing; the answer has no part in it
    left = gram + ridge * torch.eye(count, dtype=z.dtype, device=z.device) + torch.ones_like(gram)
    found = torch.linalg.solve(left, centred.T @ answer.T).T
    found = found - found.mean(1, keepdim=True)
    return (share + found).to(value.dtype)


@torch.no_grad()
def lime(
    question: Question, generator: torch.Generator, samples: int = SAMPLES, ridge: float = 1.0
) -> Float[Tensor, "row element"]:
    """LIME (Ribeiro et al. 2016, section 3.4): coefficients of a local surrogate over kept and removed elements.

    Elements are kept with chance 0.5, the first sample keeps all. Ridge regression as the authors' code has it for
    images (alpha 1); the lasso of other libraries gives all zeros where scores are small.
    """
    question = in_patches(question)
    member = torch.rand(samples, question.count, generator=generator) < KEPT
    member[0] = True
    member = member.to(_device(question))
    return lime_solve(member, question.shared(member), ridge)


def lime_solve(
    member: Bool[Tensor, "coalition element"], value: Float[Tensor, "row coalition"], ridge: float = 1.0
) -> Float[Tensor, "row element"]:
    """Ridge with intercept; a sample weighs `sqrt(exp(-d^2 / 0.25^2))`, d its cosine distance from keeping all."""
    z = member.double()
    distance = 1 - z.mean(1).sqrt()
    weight = torch.exp(-distance.square() / WIDTH**2).sqrt()
    weight_sum = weight.sum()
    centred = z - weight @ z / weight_sum
    answer = value.double() - (value.double() @ weight / weight_sum)[:, None]
    left = centred.T @ (weight[:, None] * centred)
    left = left + ridge * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    return torch.linalg.solve(left, centred.T @ (weight[:, None] * answer.T)).T.to(value.dtype)


@torch.no_grad()
def rise(question: Question, generator: torch.Generator, samples: int = SAMPLES) -> Float[Tensor, "row element"]:
    """RISE (Petsiuk et al. 2018, eq. 6) with smooth random masks on a patch grid, else with independent elements.

    Centred: scores and masks count from their means over the samples, so an element that does not matter tends to 0
    and not to the mean score.
    """
    question = in_patches(question)
    mask = rise_masks(question.count, question.shape, samples, generator).to(_device(question))
    return rise_solve(mask, question.shared(mask))


def rise_masks(
    count: int, shape: tuple[int, int] | None, samples: int, generator: torch.Generator
) -> Float[Tensor, "sample {count}"]:
    """Weights in [0, 1]: a grid of half the size, kept with chance 0.5, enlarged bilinearly and shifted at random."""
    if shape is None:
        return (torch.rand(samples, count, generator=generator) < KEPT).float()
    rows, columns = shape
    coarse = (-(-rows // 2), -(-columns // 2))
    kept = (torch.rand(samples, 1, coarse[0] + 1, coarse[1] + 1, generator=generator) < KEPT).float()
    large = torch.nn.functional.interpolate(kept, scale_factor=2.0, mode="bilinear", align_corners=False)[:, 0]
    down, across = torch.randint(0, 3, (2, samples), generator=generator)
    at = (down[:, None, None] + torch.arange(rows)[:, None], across[:, None, None] + torch.arange(columns))
    return large[torch.arange(samples)[:, None, None], at[0], at[1]].flatten(1)


def rise_solve(
    mask: Float[Tensor, "sample element"], value: Float[Tensor, "row sample"]
) -> Float[Tensor, "row element"]:
    """Covariance of the score with an element's weight, over the variance of that weight; 0 where it never varied."""
    weight = mask.double()
    weight = weight - weight.mean(0)
    spread = weight.square().sum(0)
    centred = value.double() - value.double().mean(1, keepdim=True)
    found = centred @ weight / torch.where(spread > 0, spread, 1.0)
    return found.to(value.dtype)


def _device(question: Question) -> torch.device:
    return question.parts[0].value.device
