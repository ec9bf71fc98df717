"""Curves of the score while elements are removed or put back in the order of an attribution.

RISE (Petsiuk et al. 2018, section 4.3): *deletion* removes the highest elements first, a faithful map makes the score
fall at once (low area is good); *insertion* puts them back onto the reference (high area is good). ERASER (DeYoung et
al. 2020, section 4.2): *comprehensiveness* is the fall when the top share is removed (high is good), *sufficiency* the
fall when only it is kept (low is good).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import UsageError
from mechinterp.explain.question import Question
from mechinterp.metrics.iq.scores import DOUBLE, still_below
from mechinterp.metrics.scored import Scored, ScoreStatus, broken_rows, numpy_of

__all__ = ["Curves", "best_and_worst", "comprehensiveness", "insertion_deletion", "naopc", "ranked", "sufficiency"]

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)  # ERASER's bins


@dataclass(frozen=True)
class Curves:
    """Scores along both curves of each row, in the units of the score.

    Args:
        share: of the elements that were removed (or put back) at each step, from 0 to 1.
        deletion: from the score of the input to that of the reference.
        insertion: from the score of the reference to that of the input.
        attribution: the order's origin; a constant one gives no order, so every summary of it has a status.
        eps: to which scores and attribution are rounded.
    """

    share: Float[np.ndarray, " step"]
    deletion: Float[np.ndarray, "row step"]
    insertion: Float[np.ndarray, "row step"]
    attribution: Float[np.ndarray, "row element"]
    eps: float = DOUBLE

    @property
    def deletion_auc(self) -> Scored:
        """Area under the deletion curve, scaled so that the input is 1 and the reference 0. Low is good."""
        return self._area(self.deletion, scaled=True)

    @property
    def insertion_auc(self) -> Scored:
        """Area under the insertion curve on the same scale. High is good."""
        return self._area(self.insertion, scaled=True)

    @property
    def aopc(self) -> Scored:
        """Mean fall along the deletion curve in units of the score (Samek et al. 2017, eq. 12). High is good.

        It needs no division by the gap between input and reference, so no row with a small gap dominates a mean.
        """
        area = self._area(self.deletion, scaled=False)
        return Scored(self.deletion[:, 0] - area.value, area.status)

    @property
    def gain(self) -> Scored:
        """Insertion minus deletion, in units of the score. High is good; 0 in expectation for a random order when the
        score is a sum over the elements."""
        inserted, deleted = (self._area(curve, scaled=False) for curve in (self.insertion, self.deletion))
        return inserted.minus(deleted)

    def _area(self, curve: np.ndarray, scaled: bool) -> Scored:
        broken = broken_rows(self.attribution, np.concatenate([self.deletion, self.insertion], 1), self.eps)
        full, empty = self.deletion[:, :1], self.deletion[:, -1:]
        if scaled:
            gap = full - empty
            size = np.abs(self.deletion).max(1, keepdims=True)
            broken["const_output"] = broken["const_output"] | (np.abs(gap) <= still_below(self.eps) * size)[:, 0]
            curve = np.divide(curve - empty, gap, out=np.full(curve.shape, np.nan), where=gap != 0)
        return Scored.of(np.trapezoid(curve, self.share, axis=1), broken)


def ranked(attribution: Float[Tensor, "row element"], seed: int = 0) -> Int[Tensor, "row element"]:
    """Rank of every element, 0 for the highest (signed) attribution.

    Equal values are ranked by one seeded permutation of the elements, the same for all maps: neither the first nor the
    last corner of an image profits from a map with many zeros.
    """
    shuffle = torch.randperm(attribution.shape[1], generator=torch.Generator().manual_seed(seed))
    order = shuffle[attribution.detach().cpu()[:, shuffle].argsort(dim=1, descending=True, stable=True)]
    return order.argsort(dim=1)


def insertion_deletion(
    question: Question, attribution: Float[Tensor, "row element"], steps: int | None = None, seed: int = 0
) -> Curves:
    """Both curves of every row, all rows and steps through the model together.

    Args:
        attribution: of `question`'s rows; ranked as it is, signed.
        steps: points after the first, spread evenly (default: one for each element).
        seed: of the order among equal values.

    Raises UsageError when the attribution is not one of this question.
    """
    _check(question, attribution)
    rank = ranked(attribution, seed)
    count = question.count
    removed = np.unique(np.linspace(0, count, (count if steps is None else min(steps, count)) + 1).round().astype(int))
    cut = torch.from_numpy(removed)
    deletion = _kept(question, rank[:, None] >= cut[:, None])
    insertion = _kept(question, rank[:, None] < cut[:, None])
    return Curves(removed / count, deletion, insertion, numpy_of(attribution), question.eps)


def comprehensiveness(
    question: Question,
    attribution: Float[Tensor, "row element"],
    shares: Sequence[float] = SHARES,
    seed: int = 0,
) -> Scored:
    """Mean over `shares` of score(x) - score(x without the top share) (ERASER, eq. 1, as AOPC). High is good.

    At least one element counts as the top. ERASER divides by the number of bins plus one, we by their number.
    """
    return _eraser(question, attribution, shares, seed, kept=False)


def sufficiency(
    question: Question,
    attribution: Float[Tensor, "row element"],
    shares: Sequence[float] = SHARES,
    seed: int = 0,
) -> Scored:
    """Mean over `shares` of score(x) - score(only the top share of x) (ERASER, eq. 2, as AOPC). Low is good."""
    return _eraser(question, attribution, shares, seed, kept=True)


def best_and_worst(question: Question, width: int = 1) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """AOPC of the best and the worst order of each row, for `naopc`, by beam search (Edin et al. 2025, section 3).

    Exact for a score that is a sum over elements; otherwise bounds from inside, the tighter the larger `width`. Takes
    width * elements^2 model calls a row: for a few rows.
    """
    full = numpy_of(question.score())
    found = {}
    for sign in (1.0, -1.0):
        best = [_beam(question[i : i + 1], sign, width) for i in range(len(question))]
        found[sign] = full - np.array(best)
    return found[1.0], found[-1.0]


def naopc(curves: Curves, best: Float[np.ndarray, " row"], worst: Float[np.ndarray, " row"]) -> Scored:
    """AOPC scaled to 0 for the worst order of that row and 1 for the best (Edin et al. 2025, eq. 5).

    The range of AOPC differs between models and rows; this one can be compared. May leave [0, 1] where the beam search
    missed the best or worst order. Needs curves with a step for each element.
    """
    if len(curves.share) != curves.attribution.shape[1] + 1:
        raise UsageError("the curves skip steps", where="naopc", hint="insertion_deletion(..., steps=None)")
    aopc, span = curves.aopc, best - worst
    none = span <= still_below(curves.eps) * np.abs(curves.deletion).max(1)
    value = np.divide(aopc.value - worst, span, out=np.full(len(span), np.nan), where=~none)
    status: tuple[ScoreStatus, ...] = tuple(
        "const_output" if n and s == "ok" else s for n, s in zip(none, aopc.status, strict=True)
    )
    return Scored(value, status)


def _beam(question: Question, sign: float, width: int) -> float:
    """Least (sign 1) or greatest (-1) trapezoid mean of one row's deletion curve."""
    count = question.count
    kept = torch.ones(1, count, dtype=torch.bool)
    ends = question.mixed(torch.stack([kept[0], ~kept[0]]), torch.zeros(2, dtype=torch.int64))
    total = torch.zeros(1, dtype=torch.float64)
    for _ in range(count - 1):
        beam, element = kept.nonzero(as_tuple=True)
        tried = kept[beam].clone()
        tried[torch.arange(len(tried)), element] = False
        score = question.mixed(tried, torch.zeros(len(tried), dtype=torch.int64)).double()
        sums = total[beam] + score
        order = (sign * sums).argsort()
        # two orders of the same removals go on alike: the better one is enough
        fresh = np.unique(tried[order].numpy(), axis=0, return_index=True)[1]
        order = order[torch.from_numpy(np.sort(fresh)[:width])]
        kept, total = tried[order], sums[order]
    area = total[0] + (ends.double()[0] + ends.double()[1]) / 2
    return float(area / count)


def _eraser(question: Question, attribution: Tensor, shares: Sequence[float], seed: int, kept: bool) -> Scored:
    _check(question, attribution)
    if not shares or not all(0 < share <= 1 for share in shares):
        raise UsageError(f"shares {tuple(shares)}", where="shares", hint="numbers above 0, at most 1")
    top = torch.tensor([max(1, round(share * question.count)) for share in shares])
    inside = ranked(attribution, seed)[:, None] < top[:, None]
    score = _kept(question, inside if kept else ~inside)
    full = numpy_of(question.score())[:, None]
    broken = broken_rows(numpy_of(attribution), np.concatenate([score, full], 1), question.eps)
    return Scored.of((full - score).mean(1), broken)


def _kept(question: Question, member: Bool[Tensor, "row step element"]) -> Float[np.ndarray, "row step"]:
    rows = torch.arange(len(question)).repeat_interleave(member.shape[1])
    return numpy_of(question.mixed(member.flatten(0, 1), rows)).reshape(member.shape[:2])


def _check(question: Question, attribution: Tensor) -> None:
    wanted = (len(question), question.count)
    if tuple(attribution.shape) != wanted:
        raise UsageError(f"{tuple(attribution.shape)} for a question of {wanted}", where="attribution")
