"""Explainers that follow the gradient of the score between reference and input, over any Question.

Each has a form that gives relevance at every position of the inputs (`*_values`: pixels, coordinates of a word vector)
and one that sums it over elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.explain.patches import in_patches
from mechinterp.explain.path import Rule, gauss_legendre, path_rules
from mechinterp.explain.question import Question, Values

__all__ = [
    "gradient_shap",
    "gradient_shap_values",
    "gradient_times_input",
    "gradient_times_input_values",
    "integrated_gradients",
    "integrated_gradients_of_copies",
    "integrated_gradients_values",
    "mirrored",
    "noisy_references",
    "pieces",
]

STEPS, SAMPLES = 16, 8
PASSES, HELD = 48, 8  # of copies: passes at once, whose activations stay in the cache, and how many times as many wait
NOISE = 0.1  # of GradientSHAP's references, beside the spread of input minus reference


def gradient_times_input(question: Question, generator: torch.Generator) -> Float[Tensor, "row element"]:
    """Gradient times distance from the reference (Shrikumar et al. 2017, section 2), summed over each element."""
    return _by_element(in_patches(question), 1, gradient_times_input_values)


def integrated_gradients(
    question: Question, generator: torch.Generator, steps: int = STEPS
) -> Float[Tensor, "row element"]:
    """Integrated gradients (Sundararajan et al. 2017, eq. 1) from the reference, summed over each element.

    A row sums to its score minus that of its reference, up to the error of `steps` Gauss-Legendre points. Costs `steps`
    forward and backward passes a row.
    """
    return _by_element(in_patches(question), steps, lambda piece: integrated_gradients_values(piece, steps))


def integrated_gradients_of_copies(
    question: Question, generator: torch.Generator, steps: int = STEPS
) -> Float[Tensor, "row element"]:
    """Integrated gradients where all rows are near copies of the first, as R and RBP ask for them.

    The points are put where the score of the first row turns (`explain.path`), for 33 forward passes in all. What
    these points miss of the first row's mean gradient is found with twice as many and added to every copy's, since near
    copies err alike (a control variate). `benchmarks.path_points` measures what is left. Rows that are no copies get
    points and a correction that are not made for them: take `integrated_gradients`.
    """
    question = in_patches(question)
    question = replace(question, chunk=min(question.chunk, PASSES))
    rule, fine = path_rules(question, (steps, 2 * steps))
    coarse = zip(*(_slopes(piece, rule) for piece in pieces(question, -(-steps // HELD))), strict=True)
    relevance = []
    for parts, exact, part in zip(coarse, _slopes(question[:1], fine), question.parts, strict=True):
        slope = torch.cat(parts)
        relevance.append((slope + (exact - slope[:1])) * (part.value - part.reference))
    return question.gathered(tuple(relevance)).detach()


def gradient_shap(
    question: Question, generator: torch.Generator, samples: int = SAMPLES
) -> Float[Tensor, "row element"]:
    """GradientSHAP, that is expected gradients (Erion et al. 2021, eq. 3), from noisy references, over each element.

    `samples` points in pairs that mirror each other: (alpha, noise) and (1 - alpha, -noise); an odd number is raised by
    one. Draws are shared by all rows.
    """
    alpha, noise = mirrored(question, samples, generator)
    return _by_element(
        question, len(alpha), lambda piece: gradient_shap_values(piece, alpha, noisy_references(piece, noise))
    )


def mirrored(question: Question, samples: int, generator: torch.Generator) -> tuple[Tensor, Values]:
    """Draws of `gradient_shap`: places on the path `[sample]`, and normal noise `[sample, ...]` for each part."""
    half = -(-samples // 2)
    device = question.parts[0].value.device
    alpha = torch.rand(half, generator=generator).to(device)
    noise = [torch.randn(half, *part.value.shape[1:], generator=generator).to(device) for part in question.parts]
    return torch.cat([alpha, 1 - alpha]), tuple(torch.cat([one, -one]) for one in noise)


def gradient_times_input_values(question: Question) -> Values:
    """Gradient times distance from the reference at every position of every part."""
    gradients, _ = question.gradients(question.values)
    return tuple(g * (p.value - p.reference) for g, p in zip(gradients, question.parts, strict=True))


def integrated_gradients_values(question: Question, steps: int = STEPS) -> Values:
    """Integrated gradients at every position of every part; memory `row * steps` inputs."""
    return _integrated(question, gauss_legendre(steps))


def gradient_shap_values(question: Question, alpha: Float[Tensor, " sample"], references: Values) -> Values:
    """Mean over samples of gradient(r + alpha (x - r)) times (x - r), at every position.

    Args:
        alpha: place on the path of each sample.
        references: for each part `[row, sample, ...]`.
    """
    weighted, away = _weighted(question, alpha, torch.full_like(alpha, 1 / len(alpha)), references)
    return tuple((slope * distance).sum(1) for slope, distance in zip(weighted, away, strict=True))


def noisy_references(question: Question, noise: Values) -> Values:
    """References `[row, sample, ...]` with noise `[sample, ...]` of 0.1 standard deviations of input minus reference.

    The deviation is taken over the positions of a row, so a part that equals its reference gets no noise.
    """
    found = []
    for part, one in zip(question.parts, noise, strict=True):
        away = (part.value - part.reference).flatten(1)
        size = NOISE * away.std(1, correction=0).view(-1, *(1,) * one.ndim)
        found.append(part.reference[:, None] + size * one.to(away.dtype))
    return tuple(found)


def _integrated(question: Question, rule: Rule) -> Values:
    slopes = _slopes(question, rule)
    return tuple(slope * (part.value - part.reference) for slope, part in zip(slopes, question.parts, strict=True))


def _slopes(question: Question, rule: Rule) -> Values:
    """Mean gradient between reference and input, by the points and weights of a rule."""
    alpha, weight = (torch.from_numpy(one) for one in rule)
    weighted, _ = _weighted(question, alpha, weight, tuple(part.reference[:, None] for part in question.parts))
    return tuple(one.sum(1) for one in weighted)


def _weighted(
    question: Question, alpha: Float[Tensor, " point"], weight: Float[Tensor, " point"], references: Values
) -> tuple[Values, Values]:
    """Weight times gradient at `r + alpha (x - r)`, `[row, point, ...]`, and x - r, for r `[row, 1 or point, ...]`."""
    away, points = [], []
    for part, reference in zip(question.parts, references, strict=True):
        shape = (1, -1, *(1,) * (part.value.ndim - 1))
        distance = part.value[:, None] - reference
        away.append(distance)
        points.append((reference + alpha.to(distance).view(shape) * distance).flatten(0, 1))
    gradients, _ = question.gradients(tuple(points))
    weighted = []
    for gradient in gradients:
        by_point = gradient.unflatten(0, (len(question), len(alpha)))
        weighted.append(by_point * weight.to(gradient).view(1, -1, *(1,) * (by_point.ndim - 2)))
    return tuple(weighted), tuple(away)


def _by_element(
    question: Question, points: int, relevance: Callable[[Question], Values]
) -> Float[Tensor, "row element"]:
    """Relevance summed over elements, a few rows at a time so that rows times points stay within the chunk."""
    return torch.cat([piece.gathered(relevance(piece)).detach() for piece in pieces(question, points)])


def pieces(question: Question, points: int) -> Iterator[Question]:
    """The question in pieces such that rows times `points` stay within its chunk, a row at least."""
    step = max(1, question.chunk // points)
    for start in range(0, len(question), step):
        yield question[start : start + step]
