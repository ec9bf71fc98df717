"""RBP: shrink what an attribution says of elements whose attribution moves under small perturbations.

After Tan et al. 2025 (arXiv:2504.08919): delta_j = mean_k |a_j(x_k) - a_j(x)| and a~_j = a_j / (1 + lambda delta_j),
with lambda 0.1, three perturbations, noise of 5 % of each feature. As written it depends on the scale of the
attribution (one in other units is shrunk by another amount), so by default both sides are first scaled to sum|a| = 1;
`as_written` keeps the published form. Perturbations that change the output by more than `tolerance` are left out, as
the method assumes that the prediction stays.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.explain.question import ElementExplainer, Question
from mechinterp.explain.shake import shaken
from mechinterp.explain.tabular import Function, TabularExplainer
from mechinterp.explain.tabular import shapley_by_size as _by_size

__all__ = ["rbp", "shapley_rbp", "shares", "with_rbp", "with_rbp_rows"]

STRENGTH, PERTURBATIONS, NOISE, LEAST = 0.1, 3, 0.05, 0.05


def rbp(
    attribution: Float[Tensor, "row element"],
    around: Float[Tensor, "row draw element"],
    strength: float = STRENGTH,
    kept: Bool[Tensor, "row draw"] | None = None,
    as_written: bool = False,
) -> Float[Tensor, "row element"]:
    """The shrunk attribution; scaled to sum|a| = 1 before shrinking unless `as_written`.

    Args:
        attribution: at x. A row of zeros stays one.
        around: at the perturbed inputs.
        strength: lambda.
        kept: which perturbations left the prediction as it was (default all); a row with none is not shrunk.
    """
    a, b = (attribution, around) if as_written else (shares(attribution), shares(around))
    moved = (b - a[:, None]).abs()
    weight = torch.ones_like(moved[..., 0]) if kept is None else kept.to(moved.dtype)
    delta = (moved * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp(min=1)
    return a / (1 + strength * delta)


def with_rbp(
    explain: ElementExplainer,
    strength: float = STRENGTH,
    perturbations: int = PERTURBATIONS,
    noise: float = NOISE,
    tolerance: float = float("inf"),
    as_written: bool = False,
    antithetic: bool = False,
) -> ElementExplainer:
    """An explainer of any Question made robust by RBP: x and its perturbed copies go through `explain` in one call.

    All parts of a question are perturbed together, so that patches and words cost no more than patches alone: 1 +
    `perturbations` explanations.

    Args:
        noise: share of each element's size (see `shaken`).
        tolerance: a perturbation that moves the output by more is left out.
        antithetic: perturbations in pairs of opposite sign; their number must be even.
    """

    def explained(question: Question, generator: torch.Generator) -> Float[Tensor, "row element"]:
        near = shaken(question, perturbations, noise, generator, antithetic)
        shape = (len(question), 1 + perturbations)
        found = explain(near, generator).view(*shape, question.count)
        if tolerance == float("inf"):
            return rbp(found[:, 0], found[:, 1:], strength, None, as_written)
        y = near.score().view(shape)
        kept = (y[:, 1:] - y[:, :1]).abs() <= tolerance
        return rbp(found[:, 0], found[:, 1:], strength, kept, as_written)

    return explained


def with_rbp_rows(
    explain: TabularExplainer,
    strength: float = STRENGTH,
    perturbations: int = PERTURBATIONS,
    noise: float = NOISE,
    tolerance: float = float("inf"),
    as_written: bool = False,
) -> TabularExplainer:
    """An explainer of rows, made robust by RBP: all its attributions in one call of `explain`.

    Args:
        noise: standard deviation beside max(|x|, 0.05).
        tolerance: a perturbation that moves the output by more is left out.
    """

    def explained(
        f: Function, x: Float[Tensor, "row column"], reference: Float[Tensor, " column"], generator: torch.Generator
    ) -> Float[Tensor, "row column"]:
        eps = torch.randn(len(x), perturbations, x.shape[1], generator=generator, dtype=x.dtype)
        near = x[:, None] + noise * x.abs().clamp(min=LEAST)[:, None] * eps
        both = torch.cat([x[:, None], near], dim=1)
        found = explain(f, both.flatten(0, 1), reference, generator).view(both.shape)
        with torch.no_grad():
            y = f(both.flatten(0, 1)).view(both.shape[:2])
        kept = (y[:, 1:] - y[:, :1]).abs() <= tolerance
        return rbp(found[:, 0], found[:, 1:], strength, kept, as_written)

    return explained


def shapley_rbp(strength: float = STRENGTH) -> TabularExplainer:
    """Shapley values shrunk by how much a column's contribution varies with the size of the coalition.

    delta_j is the mean absolute deviation of the size-wise contributions from Shapley's value, on attributions scaled
    to sum|a| = 1: a measure of instability that needs no perturbed inputs.
    """

    def explained(
        f: Function, x: Float[Tensor, "row column"], reference: Float[Tensor, " column"], generator: torch.Generator
    ) -> Float[Tensor, "row column"]:
        sizes = _by_size(f, x, reference, generator)
        value = sizes.mean(0)
        total = value.abs().sum(-1, keepdim=True)
        scale = torch.where(total > 0, total, torch.ones_like(total))
        delta = ((sizes - value) / scale).abs().mean(0)
        return value / scale / (1 + strength * delta)

    return explained


def shares(a: Float[Tensor, "*batch element"]) -> Float[Tensor, "*batch element"]:
    """The attribution scaled to sum|a| = 1; zeros stay zeros."""
    total = a.abs().sum(-1, keepdim=True)
    return torch.where(total > 0, a / torch.where(total > 0, total, 1.0), a)
