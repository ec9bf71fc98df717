"""Explainers of a function of a row of numbers: `EXPLAINERS[name](f, x, reference, generator) -> [row, column]`.

`f` maps `[row, column]` to `[row]`, differentiably. Rows are explained one by one in meaning and together in time. The
anchors (random, constant, echo) are no explanations: they show what a score gives to them.
"""

from __future__ import annotations

from collections.abc import Callable
from math import factorial

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import UsageError

__all__ = [
    "EXPLAINERS",
    "Function",
    "TabularExplainer",
    "constant",
    "echo",
    "effects",
    "gradient_times_input",
    "gradients",
    "integrated_gradients",
    "kernel_shap",
    "lime",
    "lime_times_input",
    "occlusion",
    "random",
    "shapley",
    "shapley_by_size",
]

Function = Callable[[Float[Tensor, "row column"]], Float[Tensor, " row"]]
TabularExplainer = Callable[
    [Function, Float[Tensor, "row column"], Float[Tensor, " column"], torch.Generator], Float[Tensor, "row column"]
]
MOST_COLUMNS = 12


def gradients(
    f: Function, x: Float[Tensor, "row column"], reference: Float[Tensor, " column"], generator: torch.Generator
) -> Float[Tensor, "row column"]:
    """The gradient of f at x."""
    at = x.detach().clone().requires_grad_()
    return torch.autograd.grad(f(at).sum(), at)[0]


def gradient_times_input(
    f: Function, x: Float[Tensor, "row column"], reference: Float[Tensor, " column"], generator: torch.Generator
) -> Float[Tensor, "row column"]:
    """Gradient times distance from the reference (Shrikumar et al. 2017)."""
    return gradients(f, x, reference, generator) * (x - reference)


def integrated_gradients(
    f: Function,
    x: Float[Tensor, "row column"],
    reference: Float[Tensor, " column"],
    generator: torch.Generator,
    steps: int = 32,
) -> Float[Tensor, "row column"]:
    """Integrated gradients from the reference (Sundararajan et al. 2017, eq. 1), midpoint rule."""
    where = (torch.arange(steps, dtype=x.dtype) + 0.5) / steps
    path = reference + where[:, None, None] * (x - reference)
    mean = gradients(f, path.flatten(0, 1), reference, generator).unflatten(0, (steps, -1)).mean(0)
    return mean * (x - reference)


@torch.no_grad()
def occlusion(
    f: Function, x: Float[Tensor, "row column"], reference: Float[Tensor, " column"], generator: torch.Generator
) -> Float[Tensor, "row column"]:
    """f(x) minus f(x with one column at its reference): the effect of that column."""
    return effects(f, x, reference)


@torch.no_grad()
def effects(
    f: Function, x: Float[Tensor, "*batch column"], reference: Float[Tensor, " column"]
) -> Float[Tensor, "*batch column"]:
    """What setting each column to its reference takes from f; any leading axes."""
    d = x.shape[-1]
    rows = x.reshape(-1, d)
    changed = rows[:, None].expand(-1, d, -1).clone()
    index = torch.arange(d)
    changed[:, index, index] = reference
    return (f(rows)[:, None] - f(changed.reshape(-1, d)).view(-1, d)).view(x.shape)


@torch.no_grad()
def _coalitions(f: Function, x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Every subset of columns `[subset, column]`, and f with the others at their reference `[subset, row]`."""
    d = x.shape[1]
    if d > MOST_COLUMNS:
        raise UsageError(f"{d} columns", where="shapley", hint=f"exact enumeration takes at most {MOST_COLUMNS}")
    member = (torch.arange(2**d)[:, None] >> torch.arange(d)) & 1 == 1
    mixed = torch.where(member[:, None], x, reference)
    return member, f(mixed.flatten(0, 1)).view(len(member), len(x))


def shapley_by_size(
    f: Function, x: Float[Tensor, "row column"], reference: Float[Tensor, " column"], generator: torch.Generator
) -> Float[Tensor, "size row column"]:
    """Mean marginal contribution of each column to coalitions of each size, exactly; their mean is Shapley's value."""
    member, value = _coalitions(f, x, reference)
    d = x.shape[1]
    sizes = member.sum(1)
    found = x.new_zeros(d, len(x), d)
    for j in range(d):
        without = (~member[:, j]).nonzero()[:, 0]
        gain = value[without + 2**j] - value[without]
        found[:, :, j].index_add_(0, sizes[without], gain)
        ways = [factorial(d - 1) / factorial(s) / factorial(d - 1 - s) for s in range(d)]
        found[:, :, j] /= torch.tensor(ways, dtype=x.dtype)[:, None]
    return found


def shapley(
    f: Function, x: Float[Tensor, "row column"], reference: Float[Tensor, " column"], generator: torch.Generator
) -> Float[Tensor, "row column"]:
    """Shapley values (Shapley 1953) of f against the reference, by enumerating all subsets: exact."""
    return shapley_by_size(f, x, reference, generator).mean(0)


@torch.no_grad()
def kernel_shap(
    f: Function,
    x: Float[Tensor, "row column"],
    reference: Float[Tensor, " column"],
    generator: torch.Generator,
    samples: int = 32,
) -> Float[Tensor, "row column"]:
    """KernelSHAP (Lundberg and Lee 2017, theorem 2) from `samples` coalitions and their complements, sum constrained.

    One draw of coalitions serves all rows of the call. Sizes are drawn with the kernel's probability, so the weighted
    regression becomes a plain one.
    """
    d = x.shape[1]
    size = torch.arange(1, d, dtype=x.dtype)
    drawn = torch.multinomial(1 / (size * (d - size)), samples, replacement=True, generator=generator) + 1
    rank = torch.rand(samples, d, generator=generator).argsort(1).argsort(1)
    member = rank < drawn[:, None]
    member = torch.cat([member, ~member])
    mixed = torch.where(member[:, None], x, reference)
    value = f(mixed.flatten(0, 1)).view(len(member), len(x))
    empty = f(reference[None])[0]
    total = f(x) - empty
    # the last column is eliminated: phi_d = total - sum of the others
    z = member.to(x.dtype)
    design, answer = z[:, :-1] - z[:, -1:], value - empty - z[:, -1:] * total
    ridge = 1e-9 * torch.eye(d - 1, dtype=x.dtype)
    phi = torch.linalg.solve(design.T @ design + ridge, design.T @ answer).T
    return torch.cat([phi, (total - phi.sum(1))[:, None]], dim=1)


@torch.no_grad()
def lime(
    f: Function,
    x: Float[Tensor, "row column"],
    reference: Float[Tensor, " column"],
    generator: torch.Generator,
    samples: int = 200,
    spread: float = 0.3,
    ridge: float = 1e-3,
) -> Float[Tensor, "row column"]:
    """Coefficients of a ridge surrogate around x (Ribeiro et al. 2016), an own draw of `samples` for every row.

    Samples are normal with standard deviation `spread`; the kernel is exp(-distance^2 / (2 d spread^2)). Ridge, as
    the lasso that is often used gives all zeros on small outputs.
    """
    rows, d = x.shape
    step = spread * torch.randn(rows, samples, d, generator=generator, dtype=x.dtype)
    value = f((x[:, None] + step).flatten(0, 1)).view(rows, samples)
    weight = torch.exp(-step.square().sum(-1) / (2 * d * spread**2))
    weight = weight / weight.sum(1, keepdim=True)
    centred = step - (weight[..., None] * step).sum(1, keepdim=True)
    answer = value - (weight * value).sum(1, keepdim=True)
    left = torch.einsum("rs,rsi,rsj->rij", weight, centred, centred) + ridge * spread**2 * torch.eye(d, dtype=x.dtype)
    return torch.linalg.solve(left, torch.einsum("rs,rsi,rs->ri", weight, centred, answer))


def lime_times_input(
    f: Function, x: Float[Tensor, "row column"], reference: Float[Tensor, " column"], generator: torch.Generator
) -> Float[Tensor, "row column"]:
    """LIME's coefficients times distance from the reference: contributions, in the units of the other methods."""
    return lime(f, x, reference, generator) * (x - reference)


def random(
    f: Function, x: Float[Tensor, "row column"], reference: Float[Tensor, " column"], generator: torch.Generator
) -> Float[Tensor, "row column"]:
    """Anchor: normal noise, drawn anew at every call."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype)


def constant(
    f: Function, x: Float[Tensor, "row column"], reference: Float[Tensor, " column"], generator: torch.Generator
) -> Float[Tensor, "row column"]:
    """Anchor: 1 everywhere."""
    return torch.ones_like(x)


@torch.no_grad()
def echo(
    f: Function, x: Float[Tensor, "row column"], reference: Float[Tensor, " column"], generator: torch.Generator
) -> Float[Tensor, "row column"]:
    """Anchor: fixed coefficients (1 to d) times the output; it says nothing about columns, only repeats the score."""
    return f(x)[:, None] * torch.arange(1, x.shape[1] + 1, dtype=x.dtype)


EXPLAINERS: dict[str, TabularExplainer] = {
    "gradient": gradients,
    "gradient_times_input": gradient_times_input,
    "integrated_gradients": integrated_gradients,
    "occlusion": occlusion,
    "shapley": shapley,
    "kernel_shap": kernel_shap,
    "lime": lime,
    "random": random,
    "constant": constant,
    "echo": echo,
    "lime_times_input": lime_times_input,
}
