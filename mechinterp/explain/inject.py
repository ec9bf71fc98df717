"""A spurious element: set one element to follow the output, at test time only, and see who attributes to it.

x_spur = psi * M(x) + eps (arXiv:2504.08919). The element must have meant nothing in training; where setting it moves
the output after all, attributing to it is right, and the gate drops the row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.errors import UsageError
from mechinterp.explain.question import Part, Question

__all__ = ["GATE", "Injected", "Scale", "injected", "scale_of"]

GATE = 0.05  # of the standard deviation of the output


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of the output over the rows that set the scale of an injection."""

    mean: float
    sd: float


@dataclass(frozen=True)
class Injected:
    """The question with the element set, and how far that moved the output of each row."""

    question: Question
    moved: Float[Tensor, " row"]
    sd: float

    @property
    def kept(self) -> Bool[Tensor, " row"]:
        """Rows whose output stayed within GATE standard deviations."""
        return self.moved.abs() <= GATE * self.sd


def scale_of(question: Question) -> Scale:
    """Mean and spread of the output over the rows of a question. Raises UsageError where it does not vary."""
    score = question.score()
    if len(score) < 2 or not float(score.std()) > 0:
        raise UsageError("the output does not vary over the rows", where="scale_of", hint="give several inputs")
    return Scale(float(score.mean()), float(score.std()))


def injected(
    question: Question, slots: tuple[int, ...], psi: float, scale: Scale, seed: int = 0, noise: float = 0.1
) -> Injected:
    """Set the elements `slots` to psi * z + noise * N(0, 1), with z the standardised output of each row.

    A column becomes that number; a patch an even field of it, in the units of the preprocessed pixels; a word has that
    many of its own lengths added along a fixed direction (unit vector of equal components with alternating signs). The
    same noise serves all slots, which may lie in different parts (a patch and a word). psi 0 changes nothing.

    Raises UsageError for slots that the question has not.
    """
    if not slots or not all(0 <= slot < question.count for slot in slots):
        hint = "numbers of elements, from 0; without one nothing is injected"
        raise UsageError(f"slots {slots} of {question.count} elements", where="injected", hint=hint)
    before = question.score()
    if psi == 0:
        return Injected(question, torch.zeros_like(before), scale.sd)
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(len(question), generator=generator, dtype=before.dtype)
    follow = psi * (before - scale.mean) / scale.sd + noise * eps
    values = tuple(_set(part, slots, follow, question.count) for part in question.parts)
    changed = question.at(values)
    return Injected(changed, changed.score() - before, scale.sd)


def _set(part: Part, slots: tuple[int, ...], follow: Float[Tensor, " row"], count: int) -> Tensor:
    """The part's values with its slots set."""
    if part.kind == "still" or not any(bool((part.owner == slot).any()) for slot in slots):
        return part.value
    chosen = torch.zeros(1, count, dtype=part.value.dtype)
    chosen[:, list(slots)] = 1
    where = part.spread(chosen, rest=0.0)
    level = follow.to(part.value.dtype).view(-1, *(1,) * (part.value.ndim - 1))
    if part.kind != "word":
        return torch.where(where > 0, level, part.value)
    d = part.value.shape[-1]
    direction = (1 - 2 * (torch.arange(d) % 2)).to(part.value) / d**0.5
    length = part.value.norm(dim=-1, keepdim=True)
    return part.value + where * level * length * direction
