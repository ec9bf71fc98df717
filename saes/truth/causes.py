"""Cause and isolation on a running model: do the scores follow the latents that are swapped, and only those?

RAVEL (Huang et al. 2024, arXiv:2402.17700) asks of a set of features F_A for attribute A: with the features' values of
a source in place of the base's, does the model say the source's A (cause), and still the base's other attributes
(isolation)? There the entities are cities and their texts; here base and source are two renderings of one patient
that differ, by do(), in the factor A and in one other factor B drawn at random. So an intervention that does nothing
has cause 0 and isolation 1, and one that swaps the whole image cause 1 and isolation 0: either way their mean is 0.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8

from mechinterp.metrics.statistics import Interval, percentile_interval
from saes.metrics.disentanglement import ravel
from saes.truth.cohort import Cohort

__all__ = ["Causation", "Pairs", "causation", "factor_pairs", "midpoints"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Base images (`rows` of a cohort) and their sources, which differ in one factor and in one other.

    Fields:
        rows: of the base images.
        rendered: the sources.
        other: the factor, by its number among those asked for, in which a source differs besides.
    """

    rows: Int64[np.ndarray, " pair"]
    rendered: UInt8[np.ndarray, "pair size size"]
    other: Int64[np.ndarray, " pair"]

    def of(self, which: Bool[np.ndarray, " pair"]) -> Pairs:
        """Some of the pairs."""
        return Pairs(self.rows[which], self.rendered[which], self.other[which])

    def head(self, n: int) -> Pairs:
        """The first pairs."""
        return self.of(np.arange(len(self.rows)) < n)


def factor_pairs(cohort: Cohort, factors: Sequence[str], n: int, seed: int) -> dict[str, Pairs]:
    """For each factor `n` bases, and sources with it and one other of `factors`, drawn at random, flipped.

    The bases are the cohort's first images with and without the factor in turn, as far as there are both.
    """
    rng, found = np.random.default_rng(seed), {}
    for number, name in enumerate(factors):
        sides = [np.flatnonzero(cohort.has(name) == side) for side in (True, False)]
        rows = _alternate(*sides)[:n]
        others = [i for i in range(len(factors)) if i != number]
        other = rng.choice(others, len(rows)) if others else np.full(len(rows), -1)
        phantom, values = cohort.phantom[rows], {}
        for i, factor in enumerate(factors):
            now = phantom.factors[factor].to_numpy()
            values[factor] = np.where((other == i) | (i == number), 1 - now, now).tolist()
        found[name] = Pairs(rows, phantom.do(**values).render(), other)
    return found


def _alternate(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """One of each in turn, then what is left of the longer."""
    both = min(len(one), len(two))
    return np.concatenate([np.stack([one[:both], two[:both]], 1).ravel(), one[both:], two[both:]])


def midpoints(
    scores: Float[np.ndarray, "image target"], has: Bool[np.ndarray, "image target"]
) -> Float[np.ndarray, " target"]:
    """The score from which on the model says yes: midway between the means of images with and without."""
    with_it = np.where(has, scores, 0).sum(0) / np.maximum(has.sum(0), 1)
    without = np.where(has, 0, scores).sum(0) / np.maximum((~has).sum(0), 1)
    return (with_it + without) / 2


@dataclass(frozen=True)
class Causation:
    """What one set of latents did to the pairs of one factor.

    Fields:
        pairs, read: pairs, and those of them where the model reads the factor rightly in base and source.
        cause: share of the way from the base's to the source's score on the factor's own output that swapping goes,
            `sum s (f(swapped) - f(base)) / sum |f(source) - f(base)|`, s the sign of the gap; 1: all the way.
        isolation: 1 minus the same share on the output of the other factor; 1: it stays.
        said_cause, said_isolation: RAVEL's own reading (`ravel`), of the model's yes or no, on pairs that were read.
    """

    pairs: int
    read: int
    cause: float
    cause_ci95: Interval
    isolation: float
    isolation_ci95: Interval
    said_cause: float
    said_isolation: float

    @property
    def disentangle(self) -> float:
        """`(cause + isolation) / 2`; 0.5 for an intervention that does nothing, or everything."""
        return (self.cause + self.isolation) / 2


def causation(
    pairs: Pairs,
    number: int,
    columns: Mapping[int, int],
    scores: tuple[Float[np.ndarray, "pair t"], Float[np.ndarray, "pair t"], Float[np.ndarray, "pair t"]],
    least: Float[np.ndarray, " t"],
    present: Bool[np.ndarray, " pair"],
    weights: Float[np.ndarray, "draw n"],
) -> Causation:
    """Cause and isolation of one intervention on the pairs of one factor.

    Args:
        pairs: of the factor.
        number: the factor's among those asked for; `columns` says which output is each factor's own.
        columns: see `number`.
        scores: of the base, the source, and the base after the swap.
        least: the score from which on each output says yes (`midpoints`).
        present: whether the base has the factor.
        weights: a patient bootstrap's, over the cohort.
    """
    base, source, after = scores
    own, rows = columns[number], np.arange(len(base))
    cause = _share(base[:, own], source[:, own], after[:, own], weights[:, pairs.rows])
    isolation: tuple[float, Interval] = (float("nan"), (float("nan"), float("nan")))
    if (pairs.other >= 0).all() and len(rows):
        theirs = np.array([columns[i] for i in pairs.other.tolist()])
        moved = _share(base[rows, theirs], source[rows, theirs], after[rows, theirs], weights[:, pairs.rows])
        isolation = (1 - moved[0], (1 - moved[1][1], 1 - moved[1][0]))
    said = [values > least for values in (after, base, source)]
    read = (said[1][:, own] == present) & (said[2][:, own] == ~present)
    found = ravel(*(values[read] for values in said), target=own)
    return Causation(len(rows), int(read.sum()), *cause, *isolation, found.cause, found.isolation)


def _share(
    base: Float[np.ndarray, " pair"],
    source: Float[np.ndarray, " pair"],
    after: Float[np.ndarray, " pair"],
    weights: Float[np.ndarray, "draw pair"],
) -> tuple[float, Interval]:
    """How far `after` lies on the way from base to source, gaps weighted by their size; with its interval."""
    gap = source - base
    way, size = np.sign(gap) * (after - base), np.abs(gap)
    if not size.sum() > 0:
        return float("nan"), (float("nan"), float("nan"))
    mass = weights @ size
    draws = np.divide(weights @ way, mass, out=np.full(len(mass), np.nan), where=mass > 0)
    return float(way.sum() / size.sum()), percentile_interval(draws)
