"""Odds ratios of 2 x 2 tables, alone and across strata."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Num, Shaped
from scipy import stats

__all__ = ["OddsRatio", "mantel_haenszel", "odds_ratio"]


@dataclass(frozen=True)
class OddsRatio:
    """An odds ratio and its 95 % interval (images taken as independent)."""

    value: float
    ci95: tuple[float, float]


def odds_ratio(exposure: Num[np.ndarray, " n"], outcome: Num[np.ndarray, " n"], level: float = 0.95) -> OddsRatio:
    """Odds ratio with the Haldane-Anscombe correction (0.5 added to each cell) and its Woolf log interval.

    nan when one of the two never varies: there is no association to speak of.
    """
    a, b, c, d = _cells(exposure, outcome)
    if 0 in (a + b, c + d, a + c, b + d):
        return _NOTHING
    a, b, c, d = a + 0.5, b + 0.5, c + 0.5, d + 0.5
    return _interval(np.log(a * d / (b * c)), np.sqrt(1 / a + 1 / b + 1 / c + 1 / d), level)


def mantel_haenszel(
    exposure: Num[np.ndarray, " n"],
    outcome: Num[np.ndarray, " n"],
    strata: Shaped[np.ndarray, " n"],
    level: float = 0.95,
) -> OddsRatio:
    """Common odds ratio across strata with the Robins-Breslow-Greenland (1986) interval; nan when undefined."""
    cells = np.array([_cells(exposure[strata == s], outcome[strata == s]) for s in np.unique(strata)])
    a, b, c, d = cells.T
    n = cells.sum(1)
    r, s = a * d / n, b * c / n
    p, q = (a + d) / n, (b + c) / n
    big_r, big_s = r.sum(), s.sum()
    if big_r == 0 or big_s == 0:
        return _NOTHING
    variance = (p * r).sum() / (2 * big_r**2) + (p * s + q * r).sum() / (2 * big_r * big_s)
    variance += (q * s).sum() / (2 * big_s**2)
    return _interval(np.log(big_r / big_s), np.sqrt(variance), level)


_NOTHING = OddsRatio(float("nan"), (float("nan"), float("nan")))


def _cells(exposure: np.ndarray, outcome: np.ndarray) -> tuple[float, float, float, float]:
    """Exposed and ill, exposed and well, not exposed and ill, not exposed and well."""
    e, o = np.asarray(exposure) > 0.5, np.asarray(outcome) > 0.5
    return float((e & o).sum()), float((e & ~o).sum()), float((~e & o).sum()), float((~e & ~o).sum())


def _interval(log_ratio: float, error: float, level: float) -> OddsRatio:
    reach = stats.norm.ppf((1 + level) / 2) * error
    return OddsRatio(float(np.exp(log_ratio)), (float(np.exp(log_ratio - reach)), float(np.exp(log_ratio + reach))))
