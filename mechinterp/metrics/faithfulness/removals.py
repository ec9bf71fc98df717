"""Scores from removing sets of elements: the removals are made once, and every method is scored on the same ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.errors import UsageError
from mechinterp.explain.question import Question
from mechinterp.metrics.faithfulness.curves import ranked
from mechinterp.metrics.iq.scores import DOUBLE, still_below
from mechinterp.metrics.scored import Scored, broken_rows, flat, numpy_of

__all__ = ["Removals", "faithfulness_correlation", "infidelity", "random_subsets", "removals", "saco"]

LEAST_DRAWS = 3
GROUPS = 10


@dataclass(frozen=True)
class Removals:
    """What was removed, the same for all rows, and the fall of each row's score.

    Args:
        removed: which elements each draw sets to their reference.
        drop: score(x) - score(x without them).
        size: of score(x), in whose rounding a fall may be lost; None: not known.
        eps: to which scores and attributions are rounded.
    """

    removed: Bool[np.ndarray, "draw element"]
    drop: Float[np.ndarray, "row draw"]
    size: Float[np.ndarray, " row"] | None = None
    eps: float = DOUBLE


def random_subsets(
    count: int, draws: int, generator: torch.Generator, size: int | None = None
) -> Bool[Tensor, "draw element"]:
    """Random sets of elements; each of `size` elements, or of a size drawn evenly from 1 to count - 1.

    Raises UsageError for a size that leaves nothing to choose.
    """
    if count < 2 or (size is not None and not 0 < size < count):
        raise UsageError(f"{size} of {count} elements", where="size", hint="at least 1, and fewer than all")
    rank = torch.rand(draws, count, generator=generator).argsort(1).argsort(1)
    sizes = torch.full((draws,), size) if size is not None else torch.randint(1, count, (draws,), generator=generator)
    return rank < sizes[:, None]


def removals(question: Question, removed: Bool[Tensor, "draw element"]) -> Removals:
    """Remove the same sets from every row."""
    score = numpy_of(question.score())
    drop = score[:, None] - numpy_of(question.shared(~removed))
    return Removals(removed.numpy(), drop, np.abs(score), question.eps)


def faithfulness_correlation(attribution: Float[Tensor, "row element"], seen: Removals) -> Scored:
    """Pearson over draws of the summed attribution of the removed elements with the fall (Bhatt et al. 2020, def. 2).

    High is good. Bhatt et al. take sets of one size: `random_subsets(..., size=...)`. With sets of many sizes the
    correlation also rewards a map for a right total, as more elements make a larger fall.
    """
    a = numpy_of(attribution)
    said = a @ seen.removed.T
    broken = broken_rows(a, seen.drop, seen.eps, seen.size)
    broken["too_few"] = np.full(len(a), len(seen.removed) < LEAST_DRAWS)
    broken["const_attr"] = broken["const_attr"] | flat(said, seen.eps)
    with np.errstate(invalid="ignore", divide="ignore"):
        x, y = said - said.mean(1, keepdims=True), seen.drop - seen.drop.mean(1, keepdims=True)
        r = (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))
    return Scored.of(np.clip(r, -1, 1), broken)


def infidelity(attribution: Float[Tensor, "row element"], seen: Removals, scaled: bool = False) -> Scored:
    """Mean over draws of (summed attribution of the removed - fall)^2 (Yeh et al. 2019, eq. 1). Low is good.

    The perturbation I of the paper is the mask of removed elements here, because attributions of elements are in units
    of the score (they hold the input, as a gradient times input does).

    `scaled` multiplies each row's attribution by the factor that makes its infidelity least, so that maps in other
    units can be compared (captum's `normalize`).
    """
    a = numpy_of(attribution)
    said = a @ seen.removed.T
    broken = broken_rows(a, seen.drop, seen.eps, seen.size)
    if scaled:
        size = (said**2).sum(1)
        factor = np.divide((said * seen.drop).sum(1), size, out=np.zeros(len(a)), where=size > 0)
        said = said * factor[:, None]
    return Scored.of(((said - seen.drop) ** 2).mean(1), {k: broken[k] for k in ("nonfinite", "const_attr")})


def saco(question: Question, attribution: Float[Tensor, "row element"], groups: int = GROUPS, seed: int = 0) -> Scored:
    """Salience-guided faithfulness coefficient (Wu et al. 2024, algorithm 1), in [-1, 1]. High is good.

    Elements fall into `groups` equal groups by rank, each is removed alone, and every pair counts the difference of the
    groups' summed salience: for the map when the more salient group moves the score at least as much, against it
    otherwise. Fewer elements than groups: one group for each. 0 is what a random order gives on average.
    """
    a = numpy_of(attribution)
    group = ranked(attribution, seed) * min(groups, question.count) // question.count
    member = torch.nn.functional.one_hot(group, min(groups, question.count)).bool()  # [row, element, group]
    rows = torch.arange(len(question)).repeat_interleave(member.shape[2])
    left = numpy_of(question.mixed(~member.transpose(1, 2).flatten(0, 1), rows)).reshape(len(question), -1)
    score = numpy_of(question.score())
    fall = score[:, None] - left
    salience = (a[:, :, None] * member.numpy()).sum(1)
    i, j = np.triu_indices(member.shape[2], 1)
    weight = salience[:, i] - salience[:, j]
    signed = np.where(fall[:, i] >= fall[:, j], weight, -weight)
    total = np.abs(weight).sum(1)
    broken = broken_rows(a, fall, question.eps, np.abs(score))
    broken["const_attr"] = broken["const_attr"] | (total <= still_below(question.eps) * np.abs(a).sum(1))
    value = np.divide(signed.sum(1), total, out=np.full(len(a), np.nan), where=total > 0)
    return Scored.of(value, broken)
