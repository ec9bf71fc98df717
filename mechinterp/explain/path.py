"""Where to put the points of a path integral: integrated gradients of many near copies of one input, with few points.

Gauss-Legendre points are the best for a function of which only smoothness is known. Along the path from reference to
input a score is not any function: at some places it turns sharply (a norm's denominator passes its least, an attention
pattern flips), and it is the poles beside the path, at those places, that decide how many points are needed. So:

1. The score of the first row is taken at `PILOT` places of its path (no gradients).
2. AAA (Nakatsukasa, Sete and Trefethen 2018) fits a rational function to them and gives its poles and residues.
3. Points are crowded around a pole c + ie by the map c + e sinh(u) (Tee and Trefethen 2006). Of the maps for each pole,
   some wider and some narrower, and plain Gauss-Legendre, the one is taken that best integrates what was fitted.

Copies that differ by a few per cent turn at the same places, so they share the points.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Complex, Float

from mechinterp.explain.question import Question

__all__ = ["Poles", "Rule", "crowded", "gauss_legendre", "path_rules", "poles_of", "rule_for"]

Rule = tuple[Float[np.ndarray, " point"], Float[np.ndarray, " point"]]
"""Points in (0, 1) and their weights."""

PILOT = 33
FIT = 1e-5  # relative; scores are float32
NEAREST = 0.02  # poles nearer to the path are artefacts of rounding
FARTHEST = 3.0  # Bernstein ellipse of poles too far to matter
LEAST = 1e-4  # of the range of the scores: residues below it are artefacts too
WIDTHS = (0.7, 1.0, 1.5, 2.2, 3.3)


@dataclass(frozen=True, eq=False)
class Poles:
    """Poles above the path and their residues; each has its mirror image below, as scores are real."""

    at: Complex[np.ndarray, " pole"]
    residue: Complex[np.ndarray, " pole"]


@lru_cache
def gauss_legendre(steps: int) -> Rule:
    """The points that are best for polynomials."""
    at, weight = np.polynomial.legendre.leggauss(steps)
    return (1 + at) / 2, weight / 2


def crowded(steps: int, centre: float, width: float) -> Rule:
    """Gauss-Legendre points mapped by `centre + width sinh(u)`: the denser around `centre`, the smaller `width`."""
    at, weight = gauss_legendre(steps)
    low, high = np.arcsinh(-centre / width), np.arcsinh((1 - centre) / width)
    u = low + (high - low) * at
    return centre + width * np.sinh(u), weight * (high - low) * width * np.cosh(u)


def poles_of(places: Float[np.ndarray, " place"], scores: Float[np.ndarray, " place"]) -> Poles:
    """Poles of the rational function through `scores` at `places` of [0, 1], without those that cannot matter."""
    from scipy.interpolate import AAA

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that rounding keeps it from its tolerance
        fitted = AAA(places, scores, rtol=FIT)
    at, residue = fitted.poles(), fitted.residues()
    around = 2 * at - 1
    root = np.sqrt(around**2 - 1)
    ellipse = np.maximum(np.abs(around + root), np.abs(around - root))
    matters = (at.imag > NEAREST) & (ellipse < FARTHEST) & (np.abs(residue) > LEAST * np.ptp(scores))
    return Poles(at[matters], residue[matters])


def rule_for(steps: int, poles: Poles) -> Rule:
    """The points that integrate the derivative of the fitted score best; without poles those of Gauss-Legendre."""
    rules = [gauss_legendre(steps)]
    for pole in poles.at:
        rules += [crowded(steps, float(np.clip(pole.real, 0, 1)), float(share * pole.imag)) for share in WIDTHS]
    exact = poles.residue * (1 / (1 - poles.at) - 1 / (0 - poles.at))

    def wrong(rule: Rule) -> float:
        at, weight = rule
        slope = -poles.residue / (at[:, None] - poles.at) ** 2
        return float(np.abs(weight @ slope - exact).sum())

    return min(rules, key=wrong)


@torch.no_grad()
def path_rules(question: Question, steps: Sequence[int]) -> tuple[Rule, ...]:
    """Points for the paths of all rows, a rule for each of `steps`, from `PILOT` scores along that of the first."""
    places = (1 - np.cos(np.pi * np.arange(PILOT) / (PILOT - 1))) / 2
    scores = []
    for some in torch.from_numpy(places).split(question.chunk):
        values = []
        for part in question.parts:
            value, reference = part.value[:1], part.reference[:1]
            share = some.to(value).view(-1, *(1,) * (value.ndim - 1))
            values.append(reference + share * (value - reference))
        scores.append(question.function(tuple(values)))
    poles = poles_of(places, torch.cat(scores).double().cpu().numpy())
    return tuple(rule_for(one, poles) for one in steps)
