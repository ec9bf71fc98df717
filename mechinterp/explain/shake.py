"""Small perturbations of a question's inputs, element by element."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import UsageError
from mechinterp.explain.question import Part, Question

__all__ = ["shaken"]

FLOOR = 0.05


def shaken(
    question: Question, draws: int, noise: float, generator: torch.Generator, antithetic: bool = False
) -> Question:
    """Every row followed by `draws` perturbed copies: each element's values times 1 + noise * N(0, 1).

    One normal number for an element, so a patch changes its contrast and a word its length. An element smaller (root
    mean square) than the floor is first scaled up to it, or filled with it if it is all zero. The floor is 0.05 for
    columns, and 0.05 of the whole input's root mean square for patches and words. All parts are perturbed at once.

    Args:
        antithetic: the second half of the draws is the first with the opposite sign; needs an even number.

    Raises UsageError for an odd number of antithetic draws.
    """
    rows = len(question)
    if antithetic and draws % 2:
        raise UsageError(f"{draws} draws", where="antithetic", hint="pairs need an even number")
    dtype = question.parts[-1].value.dtype
    drawn = draws // 2 if antithetic else draws
    eps = torch.randn(rows, drawn, question.count, generator=generator, dtype=dtype)
    eps = torch.cat([eps, -eps], dim=1) if antithetic else eps
    eps = torch.cat([eps.new_zeros(rows, 1, question.count), eps], dim=1).flatten(0, 1)
    again = question.repeated(1 + draws)
    still = torch.arange(len(again)) % (1 + draws) == 0
    values = []
    for part, copied in zip(question.parts, again.parts, strict=True):
        if part.kind == "still":
            values.append(copied.value)
            continue
        step = _direction(part, question.count).repeat_interleave(1 + draws, 0)
        moved = copied.value + noise * part.spread(eps, rest=0.0) * step
        values.append(torch.where(still.view(-1, *(1,) * (moved.ndim - 1)), copied.value, moved))
    return again.at(tuple(values))


def _direction(part: Part, count: int) -> Float[Tensor, "row *shape"]:
    """The values, those of small elements scaled up to the floor."""
    value = part.value.detach()
    size = part.gathered(torch.ones_like(value[:1]), count).clamp(min=1)
    rms = (part.gathered(value.square(), count) / size).sqrt()
    floor = FLOOR if part.kind == "column" else FLOOR * float(value.square().mean().sqrt())
    empty = rms == 0
    scale = rms.clamp(min=floor) / rms.masked_fill(empty, 1.0)
    return torch.where(part.spread(empty.to(value)) > 0, torch.full_like(value, floor), value * part.spread(scale))
