"""What passes inside the model while a Question is scored: values at hook points, as part of the autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import UsageError
from mechinterp.explain.question import Question, Source
from mechinterp.models.embedded import words_of

__all__ = ["Hook", "places_of", "reader", "seen_inside", "source_of"]

Hook = tuple[str, Callable[[Tensor, Any], Tensor | None]]


def source_of(question: Question, method: str) -> Source:
    """The model behind the question. Raises UsageError where there is none."""
    if question.source is None:
        raise UsageError("needs the model that the question is about", where=method, hint="a function has no inside")
    return question.source


def places_of(question: Question, method: str) -> list[tuple[str, Int[Tensor, " element"]]]:
    """For each part with elements, its tower and the token positions of its elements there, in the elements' order.

    Raises UsageError where elements are neither patches nor words of a model.
    """
    source = source_of(question, method)
    found = []
    for kind in question.kinds:
        match kind:
            case "patch":
                tokens = source.model.patch_tokens()
                found.append(("vision", torch.arange(tokens.start, tokens.stop)))
            case "word":
                found.append(("text", words_of(source.model, source.target).positions.cpu()))
            case "still":
                continue
            case "column":
                raise UsageError("explains patches and words, not columns", where=method)
    return found


def reader(kept: dict[str, Tensor], copied: bool = False) -> Callable[[Tensor, Any], Tensor]:
    """A hook that keeps what passes, under the name of its point.

    Where a pass visits a point again (the negative prompt of a contrast), the first visit counts. `copied`: pass a copy
    on, as attention patterns need, since one that is only read is not part of the graph of the score.
    """

    def keep(value: Tensor, hook: Any) -> Tensor:
        if hook.name in kept:
            return value
        kept[hook.name] = value.clone() if copied else value
        return kept[hook.name]

    return keep


def seen_inside(question: Question, hooks: Sequence[Hook], graph: bool = True) -> Float[Tensor, " row"]:
    """Scores of all rows at once with hooks on the model; with `graph`, differentiable in what passes the hooks."""
    model = source_of(question, "seen_inside").model
    leaves = tuple(part.value.detach().requires_grad_(graph) for part in question.parts)
    with torch.set_grad_enabled(graph), model.hooks(fwd_hooks=list(hooks)):
        return question.function(leaves)
