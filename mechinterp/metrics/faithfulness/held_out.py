"""Which removals may judge which explanation: never the kind that it was built from.

An occlusion map *is* the fall of the score when one patch is filled grey. Scored by filling patches grey it wins by
construction; scored by blurring them, or by putting in patches of other images, it can lose. The same holds for a map
made by ablating latents, scored by ablating latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, assert_never

import torch

from mechinterp.errors import UsageError
from mechinterp.explain.methods import BuiltFrom
from mechinterp.explain.question import Question

__all__ = ["Removal", "Verdict", "check_held_out", "held_out", "judged_by", "refilled", "scored_by"]

Space = Literal["input", "latent"]
Verdict = Literal["held out", "circular"]
Refill = Literal["mean", "resample"]


@dataclass(frozen=True)
class Removal:
    """A kind of intervention: what takes the place of what is removed, and whether that is in the input or in latents.

    `fill` names it: "grey", "blur" (pixels), "neutral" (words), "mean", "resample" (`refilled`), "zero" ...; words and
    patches of one question may have a fill each, joined by "+".
    """

    fill: str
    space: Space = "input"

    def shares(self, other: Removal) -> bool:
        """Whether any fill of one is a fill of the other, in the same space."""
        return self.space == other.space and bool(set(self.fill.split("+")) & set(other.fill.split("+")))

    def __str__(self) -> str:
        return f"{self.fill} in {'latents' if self.space == 'latent' else 'the input'}"


def held_out(built_from: BuiltFrom, built_with: Removal | None, by: Removal) -> Verdict:
    """Whether `by` may score a method that was built from that kind of thing, with that fill.

    - single_fill, subset_fill: not by the same fill, one element at a time or many; any other fill may.
    - latent, graph: not by interventions on latents; removals in the input may.
    - gradient, attention, activation, none: made without removing anything, so any removal may.

    Args:
        built_from: `Method.built_from`.
        built_with: the fill of the question that the method answered; needed for the two kinds that used it.
        by: the removal that would judge it.

    Raises UsageError when a method built from removals does not say with which fill.
    """
    match built_from:
        case "single_fill" | "subset_fill":
            if built_with is None:
                raise UsageError(f"{built_from} with which fill?", where="built_with")
            return "circular" if built_with.shares(by) else "held out"
        case "latent" | "graph":
            return "circular" if by.space == "latent" else "held out"
        case "gradient" | "attention" | "activation" | "none":
            return "held out"
        case _:
            assert_never(built_from)


def judged_by(built_from: BuiltFrom, question: Question, judge: Question) -> Verdict:
    """Whether removals of `judge` may score a method of that kind that answered `question`, by the fills they name.

    Raises UsageError where one of them does not say what it removes to.
    """
    for name, asked in (("question", question), ("judge", judge)):
        if not asked.fill:
            hint = "Question(..., fill=...): the name of its references"
            raise UsageError("does not say what removed elements become", where=name, hint=hint)
    return held_out(built_from, Removal(question.fill), Removal(judge.fill))


def scored_by(built_from: BuiltFrom, built_with: Removal | None, available: Sequence[Removal]) -> tuple[Removal, ...]:
    """The removals among `available` that may score the method. Raises UsageError when there is none."""
    found = tuple(by for by in available if held_out(built_from, built_with, by) == "held out")
    if not found:
        raise UsageError(
            f"no removal is held out from {built_from}",
            where=" and ".join(map(str, available)) or "available",
            hint="add one with another fill, such as blur or refilled(question, 'resample')",
        )
    return found


def check_held_out(name: str, built_from: BuiltFrom, built_with: Removal | None, by: Removal) -> None:
    """Raise UsageError when scoring the method `name` by `by` would be circular."""
    if held_out(built_from, built_with, by) == "circular":
        raise UsageError(
            f"built from {built_from.replace('_', ' ')} ({built_with or 'latents'}) and scored by {by}: circular",
            where=name,
            hint="score it with another fill, or in the input for a method of latents",
        )


def refilled(question: Question, fill: Refill, generator: torch.Generator | None = None) -> Question:
    """The question with another reference, made of its own rows: removed elements look like those of other rows.

    "mean": the mean over the rows, position by position. "resample": the values of another row (a cyclic shift of a
    seeded order, so that no row gets its own). "still" parts keep theirs.

    Raises UsageError with fewer than two rows: nothing could be put in that is not the row itself.
    """
    if len(question) < 2:
        raise UsageError("one row has no other rows", where="refilled", hint="ask about several images at once")
    order = torch.randperm(len(question), generator=generator or torch.Generator().manual_seed(0))
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    parts = []
    for part in question.parts:
        if part.kind == "still":
            parts.append(part)
            continue
        match fill:
            case "mean":
                reference = part.value.mean(0, keepdim=True).expand_as(part.value).clone()
            case "resample":
                reference = part.value[other]
            case _:
                assert_never(fill)
        parts.append(replace(part, reference=reference))
    return replace(question, parts=tuple(parts), fill=fill)
