"""A simulated reader with an AI beside it, as a surface over what is not known about readers.

The reader has a signal of own skill, the AI gives a yes or no with an explanation. Where they disagree, the reader
takes the AI's answer with probability

    1 / (1 + exp(-(trust + persuasion * conviction - detection * oddness)))

*conviction* is how convincing the explanation looks, *oddness* how visibly wrong it is (both in [0, 1], measured on the
maps); `persuasion` and `detection` are unknown, so the result is a surface over both and never one number. An
explanation that convinces while the AI is wrong lowers the team's accuracy wherever persuasion outweighs detection.

This is a model with assumed parameters. It says under which assumptions an explanation would help or harm; it says
nothing about what clinicians do: no person was asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import expit
from scipy.stats import norm

from mechinterp.errors import UsageError

__all__ = ["Advice", "Surface", "conviction", "read"]

GRID = (0.0, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Advice:
    """What the reader is shown of each case.

    Args:
        truth: whether the finding is there.
        probability: of the AI that it is; above 1/2 it says yes.
        conviction: of the explanation, in [0, 1].
        oddness: of the explanation, in [0, 1].
    """

    truth: Bool[np.ndarray, " case"]
    probability: Float[np.ndarray, " case"]
    conviction: Float[np.ndarray, " case"]
    oddness: Float[np.ndarray, " case"]

    def __post_init__(self):
        for name in ("probability", "conviction", "oddness"):
            value = getattr(self, name)
            if value.shape != self.truth.shape or not ((value >= 0) & (value <= 1)).all():
                raise UsageError("needs a number in [0, 1] for each case", where=name)


@dataclass(frozen=True)
class Surface:
    """The team over `[persuasion, detection]`; expectations over the reader's signal and acceptance.

    Args:
        persuasion, detection: the grid.
        accuracy: share of cases that the team calls right.
        over_reliance: how often wrong advice is taken where the reader alone was right.
        under_reliance: how often right advice is turned down where the reader alone was wrong.
        brier: mean squared error of the team's probability.
        calibration_error: expected calibration error of that probability, ten equal bins.
        alone: accuracy of the reader alone.
        ai: accuracy of the AI alone.
        unexplained: accuracy of the team where the explanation moves nobody (persuasion and detection 0).
    """

    persuasion: Float[np.ndarray, " p"]
    detection: Float[np.ndarray, " d"]
    accuracy: Float[np.ndarray, "p d"]
    over_reliance: Float[np.ndarray, "p d"]
    under_reliance: Float[np.ndarray, "p d"]
    brier: Float[np.ndarray, "p d"]
    calibration_error: Float[np.ndarray, "p d"]
    alone: float
    ai: float
    unexplained: float

    @property
    def gain(self) -> Float[np.ndarray, "p d"]:
        """Points of accuracy beyond the team without an explanation."""
        return 100 * (self.accuracy - self.unexplained)


def read(
    advice: Advice,
    skill: float = 1.5,
    trust: float = 0.0,
    persuasion: tuple[float, ...] = GRID,
    detection: tuple[float, ...] = GRID,
    draws: int = 200,
    seed: int = 0,
) -> Surface:
    """The surface for one set of explanations.

    Args:
        skill: of the reader alone, d' of an equal-variance signal: 1.5 is right in 77 % of cases.
        trust: log odds of taking the AI's answer against one's own without an explanation.
        draws: of the reader's signal per case; the same for every point of the grid and, with one seed, for every set
            of explanations, so that surfaces differ only by the explanations.

    Raises UsageError without cases of both kinds.
    """
    if advice.truth.all() or not advice.truth.any():
        raise UsageError("needs cases with and without the finding", where="truth")
    y = np.where(advice.truth, 1.0, -1.0)[:, None]
    signal = y * skill / 2 + np.random.default_rng(seed).standard_normal((len(y), draws))
    own, ai = signal > 0, (advice.probability > 0.5)[:, None]
    truth = advice.truth[:, None]
    disagree, ai_right = own != ai, ai == truth
    own_p = expit(skill * signal)  # the posterior of the signal at even odds
    shape = (len(persuasion), len(detection))
    found = {n: np.empty(shape) for n in ("accuracy", "over_reliance", "under_reliance", "brier", "calibration_error")}
    for at in np.ndindex(shape):
        taken = expit(trust + persuasion[at[0]] * advice.conviction - detection[at[1]] * advice.oddness)[:, None]
        taken = np.broadcast_to(taken, own.shape)
        right = np.where(disagree, np.where(ai_right, taken, 1 - taken), ai_right)
        found["accuracy"][at] = right.mean()
        found["over_reliance"][at] = _mean(taken, disagree & ~ai_right)
        found["under_reliance"][at] = _mean(1 - taken, disagree & ai_right)
        ai_p = np.broadcast_to(advice.probability[:, None], own.shape)
        squared = [(p - truth) ** 2 for p in (ai_p, own_p)]
        # agreeing, the team reports the mean of both; disagreeing, the probability of whose answer it takes
        together = (ai_p + own_p) / 2
        mixed = taken * squared[0] + (1 - taken) * squared[1]
        found["brier"][at] = np.where(disagree, mixed, (together - truth) ** 2).mean()
        found["calibration_error"][at] = _calibration(ai_p, own_p, together, disagree, taken, truth)
    plain = float(np.where(disagree, np.where(ai_right, expit(trust), 1 - expit(trust)), ai_right).mean())
    return Surface(
        np.asarray(persuasion, float),
        np.asarray(detection, float),
        **found,
        alone=float(norm.cdf(skill / 2)),
        ai=float(ai_right.mean()),
        unexplained=plain,
    )


def conviction(maps: Float[np.ndarray, "case patch"]) -> Float[np.ndarray, " case"]:
    """How focused a map is: 1 - entropy of its absolute shares over log of their number; flat 0, one spot 1.

    A stand-in for how convincing a map looks: an assumption, not a measurement of people.
    """
    size = np.abs(maps)
    total = size.sum(1, keepdims=True)
    share = np.divide(size, total, out=np.full(size.shape, 1 / size.shape[1]), where=total > 0)
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(1)
    return np.clip(1 - entropy / np.log(size.shape[1]), 0, 1)


def _mean(values: np.ndarray, where: np.ndarray) -> float:
    return float(values[where].mean()) if where.any() else float("nan")


def _calibration(
    ai: np.ndarray,
    own: np.ndarray,
    together: np.ndarray,
    disagree: np.ndarray,
    taken: np.ndarray,
    truth: np.ndarray,
    bins: int = 10,
) -> float:
    """Sum over bins of their share times |mean probability - share of findings|, each outcome by its probability."""
    said = np.concatenate([together[~disagree], ai[disagree], own[disagree]])
    weight = np.concatenate([np.ones((~disagree).sum()), taken[disagree], 1 - taken[disagree]])
    there = np.broadcast_to(truth, disagree.shape)
    outcome = np.concatenate([there[~disagree], there[disagree], there[disagree]]).astype(float)
    at = np.minimum((said * bins).astype(int), bins - 1)
    gap = np.bincount(at, weight * (said - outcome), minlength=bins)
    return float(np.abs(gap).sum() / weight.sum())
