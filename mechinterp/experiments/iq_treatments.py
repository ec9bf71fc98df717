"""Treatments of attributions that iq-shapley-rbp compares: forms of our own mitigation, and controls.

The controls ask what a change of IS is worth: scaling to shares alone, noise alone, RBP's shrinkage dealt to the wrong
elements, and the check without the explainer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.explain.bounds import Check, bounded, capped
from mechinterp.explain.question import ElementExplainer, Question, Values
from mechinterp.explain.rbp import NOISE, PERTURBATIONS, shares
from mechinterp.explain.shake import shaken

__all__ = ["FROM_ROWS", "Treatment", "check_alone", "forms", "jittered", "shares_only", "shuffled_rbp"]

FROM_ROWS = "filled from rows"
Treatment = Callable[[ElementExplainer], ElementExplainer]
Attribution = Float[Tensor, "row element"]


def shares_only(explain: ElementExplainer) -> ElementExplainer:
    """Control: scaled to sum|a| = 1 and nothing else, as RBP's default does before it shrinks."""
    return lambda question, generator: shares(explain(question, generator))


def jittered(explain: ElementExplainer, size: float = 0.1) -> ElementExplainer:
    """Control: every attribution times 1 + size * N(0, 1). It carries no information whatever."""

    def explained(question: Question, generator: torch.Generator) -> Attribution:
        found = explain(question, generator)
        return found * (1 + size * torch.randn(found.shape, generator=generator, dtype=found.dtype))

    return explained


def shuffled_rbp(explain: ElementExplainer, strength: float) -> ElementExplainer:
    """Control: RBP as written, each row's instabilities dealt to its elements at random."""

    def explained(question: Question, generator: torch.Generator) -> Attribution:
        found = _around(explain, question, PERTURBATIONS, generator)
        a = found[:, 0]
        delta = (found[:, 1:] - a[:, None]).abs().mean(1)
        order = torch.rand(delta.shape, generator=generator).argsort(1)
        return a / (1 + strength * delta.gather(1, order))

    return explained


def check_alone(check: Check) -> ElementExplainer:
    """Control: the effects in random contexts as an attribution of their own."""
    return lambda question, generator: check(question)[0]


def forms(background: Values, seed: int) -> dict[str, Treatment]:
    """Candidates for our own mitigation. Contexts of a check remove a fifth of the elements, or half.

    Args:
        background: other rows, from which the checks "filled from rows" fill; the others fill from the reference.
        seed: of the contexts.
    """
    near, wild, rows = Check(seed=seed), Check(kept=0.5, seed=seed), Check(background, seed=seed)

    def held(how: Callable[..., Attribution], check: Check, explain: ElementExplainer) -> ElementExplainer:
        return lambda question, generator: how(explain(question, generator), *check(question))

    return {
        "bounds, 2 errors": partial(held, bounded, near),
        "bounds, 1 error": partial(held, partial(bounded, errors=1.0), near),
        "bounds, 2 errors, half removed": partial(held, bounded, wild),
        f"bounds, 2 errors, {FROM_ROWS}": partial(held, bounded, rows),
        "cut only, 2 errors": partial(held, capped, near),
        f"cut only, 1 error, {FROM_ROWS}": partial(held, partial(capped, errors=1.0), rows),
        "mean with the check": partial(held, _mean, near),
        "output projected out": projected,
        "mean over perturbations": averaged,
    }


def projected(explain: ElementExplainer, draws: int = 8) -> ElementExplainer:
    """The attribution less what a local regression on the output predicts: a - slope * (y - y at the reference)."""

    def explained(question: Question, generator: torch.Generator) -> Attribution:
        near = shaken(question, draws, NOISE, generator)
        found = explain(near, generator).view(len(question), 1 + draws, question.count)
        y = near.score().view(len(question), 1 + draws)
        centred = y - y.mean(1, keepdim=True)
        moved = found - found.mean(1, keepdim=True)
        power = centred.square().sum(1, keepdim=True).clamp(min=1e-30)
        slope = (centred[..., None] * moved).sum(1) / power
        empty = question.shared(torch.zeros(1, question.count, dtype=torch.bool))
        return found[:, 0] - slope * (y[:, :1] - empty)

    return explained


def averaged(explain: ElementExplainer, draws: int = 8) -> ElementExplainer:
    """Mean attribution over perturbed inputs (as SmoothGrad, Smilkov et al. 2017)."""
    return lambda question, generator: _around(explain, question, draws, generator).mean(1)


def _mean(attribution: Attribution, effect: Attribution, error: Attribution) -> Attribution:
    """Halfway between the shares of attribution and check, in the attribution's units."""
    size = (shares(attribution).abs() + shares(effect).abs()) / 2
    return size * attribution.sign() * attribution.abs().sum(1, keepdim=True)


def _around(
    explain: ElementExplainer, question: Question, draws: int, generator: torch.Generator
) -> Float[Tensor, "row copy element"]:
    near = shaken(question, draws, NOISE, generator)
    return explain(near, generator).view(len(question), 1 + draws, question.count)
