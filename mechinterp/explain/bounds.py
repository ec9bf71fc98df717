"""Bounds: an attribution must stay within what an independent check of each element supports.

Our own mitigation, beside RBP. RBP asks whether an attribution is stable; an echo of the output is. Bounds ask whether
the element does anything:

1. A few random contexts are drawn: each keeps most elements of the input and removes at least two.
2. In each context every element is put in and taken out. The mean change of the score is the element's effect there,
   and the spread over contexts gives its standard error.
3. Attribution and effect are scaled to sum 1. A share outside |effect| +- `errors` standard errors goes to the nearer
   end of that interval; a share inside stays as the explainer has it, and so do signs.
4. The row goes back to its own units, as dividing by sum|a| would tie elements to each other and to the output.

The removal is of random sets of elements, never of one alone as F's is, and a Question's references for explainers may
differ from those F is scored with. Cost: contexts * (elements + 1) scores a row, once for all explainers that share a
Check. An explainer that knows nothing comes out as the check: what bounds add to it is not its own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.errors import UsageError
from mechinterp.explain.question import ElementExplainer, Question, Values
from mechinterp.explain.rbp import shares

__all__ = ["Check", "bounded", "capped", "with_bounds"]

CONTEXTS, KEPT, ERRORS = 8, 0.8, 2.0


class Check:
    """Effects of elements in random contexts, and their standard errors; the last question asked is remembered.

    Args:
        background: other inputs, one tensor `[input, ...]` for each part of the questions to come, from which removed
            elements are filled; None fills from the question's own references.
        contexts: random contexts, at least 2; the same for all rows of a call.
        kept: chance that a context keeps an element.
        seed: of the contexts.
    """

    def __init__(self, background: Values | None = None, contexts: int = CONTEXTS, kept: float = KEPT, seed: int = 0):
        if contexts < 2:
            raise UsageError(f"{contexts} contexts", where="Check", hint="a standard error needs at least 2")
        self.background, self.contexts, self.kept, self.seed = background, contexts, kept, seed
        self._last: tuple[Question, tuple[Tensor, Tensor]] | None = None

    def __call__(self, question: Question) -> tuple[Float[Tensor, "row element"], Float[Tensor, "row element"]]:
        """Mean effect of every element over contexts, and its standard error, in units of the score."""
        if self._last is None or self._last[0] is not question:
            self._last = (question, self._effects(question))
        return self._last[1]

    def _effects(self, question: Question) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        count = question.count
        alone = torch.eye(count, dtype=torch.bool)
        found = []
        for _ in range(self.contexts):
            context = self._context(count, generator)
            filled = question if self.background is None else self._filled(question, generator, self.background)
            # the context itself serves every element: one that it keeps is taken out, one that it lacks is put in
            value = filled.shared(torch.cat([context[None], context ^ alone]))
            change = value[:, :1] - value[:, 1:]
            found.append(torch.where(context, change, -change))
        effects = torch.stack(found)
        return effects.mean(0), effects.std(0) / self.contexts**0.5

    def _context(self, count: int, generator: torch.Generator) -> Bool[Tensor, " element"]:
        """Elements that are kept; at least two are not, so no effect is that of removing one element alone."""
        context = torch.rand(count, generator=generator) < self.kept
        fewest = min(2, count - 1)
        missing = fewest - int((~context).sum())
        if missing > 0:
            present = context.nonzero()[:, 0]
            context[present[torch.randperm(len(present), generator=generator)[:missing]]] = False
        return context

    def _filled(self, question: Question, generator: torch.Generator, background: Values) -> Question:
        """The question with one background input as its reference; what is no element stays."""
        other = int(torch.randint(len(background[0]), (1,), generator=generator))
        parts = tuple(
            part if part.kind == "still" else replace(part, reference=values[other].expand_as(part.value))
            for part, values in zip(question.parts, background, strict=True)
        )
        return replace(question, parts=parts)


def bounded(
    attribution: Float[Tensor, "row element"],
    effect: Float[Tensor, "row element"],
    error: Float[Tensor, "row element"],
    errors: float = ERRORS,
) -> Float[Tensor, "row element"]:
    """The attribution, in its own units, with each share of sum|a| within that of |effect| +- errors * error.

    A row whose check finds no effect at all is left as it is: there is nothing to hold it to. A share of 0 that must
    rise takes the sign of the effect.
    """
    total = effect.abs().sum(-1, keepdim=True)
    scale = torch.where(total > 0, total, 1.0)
    low, high = ((effect.abs() + sign * errors * error) / scale for sign in (-1, 1))
    share = shares(attribution)
    size = torch.minimum(torch.maximum(share.abs(), low.clamp(min=0)), high)
    sign = torch.where(share == 0, effect.sign(), share.sign())
    return torch.where(total > 0, size * sign * attribution.abs().sum(-1, keepdim=True), attribution)


def capped(
    attribution: Float[Tensor, "row element"],
    effect: Float[Tensor, "row element"],
    error: Float[Tensor, "row element"],
    errors: float = ERRORS,
) -> Float[Tensor, "row element"]:
    """As `bounded`, but shares are only ever cut: nothing is raised to |effect| - errors * error."""
    total = effect.abs().sum(-1, keepdim=True)
    limit = (effect.abs() + errors * error) / torch.where(total > 0, total, 1.0)
    share = shares(attribution)
    cut = torch.minimum(share.abs(), limit) * share.sign()
    return torch.where(total > 0, cut * attribution.abs().sum(-1, keepdim=True), attribution)


def with_bounds(explain: ElementExplainer, check: Check, errors: float = ERRORS) -> ElementExplainer:
    """An explainer whose attributions stay within what `check` supports (see the module)."""

    def explained(question: Question, generator: torch.Generator) -> Float[Tensor, "row element"]:
        return bounded(explain(question, generator), *check(question), errors)

    return explained
