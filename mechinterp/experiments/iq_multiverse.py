"""IS under every combination of the settings that the paper leaves open, and which pairs of explainers turn around."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mechinterp.metrics.statistics import percentile_interval, smallest_detectable_effect

__all__ = ["Cell", "Multiverse", "Shrinkage", "flips", "interval", "mean_of", "rows_needed"]

Cell = tuple
"""One value of every setting."""


@dataclass(frozen=True)
class Multiverse:
    """IS of every explainer and row in every cell of a grid of settings.

    Args:
        names: explainers.
        grid: values of every setting, in the order of a cell.
        default: the cell that the other experiments use.
        cells: `[cell, explainer] -> IS by row`.
        weights: of the bootstrap, `[draw, row]`.
    """

    names: tuple[str, ...]
    grid: dict[str, tuple]
    default: Cell
    cells: dict[tuple[Cell, str], np.ndarray]
    weights: np.ndarray

    def mean(self, cell: Cell) -> np.ndarray:
        """Mean IS of every explainer over rows where it is defined."""
        return np.array([mean_of(self.cells[cell, n]) for n in self.names])

    def signs(self, cell: Cell) -> np.ndarray:
        """For every pair (i, j): -1 where i has the lower IS beyond chance, 1 where j has, else 0."""
        i, j = np.triu_indices(len(self.names), 1)
        values = np.stack([self.cells[cell, n] for n in self.names], axis=1)
        change = values[:, i] - values[:, j]
        use = np.isfinite(change)
        mass = self.weights @ use
        draws = np.divide(self.weights @ np.where(use, change, 0.0), mass, out=np.zeros_like(mass), where=mass > 0)
        low, high = np.quantile(draws, [0.025, 0.975], axis=0)
        found = np.zeros((len(self.names),) * 2, int)
        found[i, j] = np.where(use.sum(0) < 5, 0, np.where(low > 0, 1, np.where(high < 0, -1, 0)))
        return found

    def along(self, setting: str) -> list[Cell]:
        """The cells that differ from the default in one setting only, the default among them."""
        at = list(self.grid).index(setting)
        return [(*self.default[:at], value, *self.default[at + 1 :]) for value in self.grid[setting]]


@dataclass(frozen=True)
class Shrinkage:
    """IS by row under RBP: `[explainer, form, perturbations, noise]`; forms plain and shares only have 0 of them."""

    counts: tuple[int, ...]
    noises: tuple[float, ...]
    treated: dict[tuple[str, str, int, float], np.ndarray]
    weights: np.ndarray


def interval(change: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over the rows where it is defined."""
    use = np.isfinite(change)
    if use.sum() < 5:
        return (float("nan"), float("nan"))
    mass = weights @ use
    draws = np.divide(weights @ np.where(use, change, 0.0), mass, out=np.full(len(mass), np.nan), where=mass > 0)
    return percentile_interval(draws)


def rows_needed(difference: float, sd: float) -> int:
    """Rows to see a paired difference with 80 % power, two-sided 5 %: the n at which it is just detectable."""
    return round((smallest_detectable_effect(sd) / difference) ** 2)


def flips(signs: Iterable[np.ndarray]) -> np.ndarray:
    """Pairs that are ordered one way beyond chance somewhere, and the other way beyond chance elsewhere."""
    found = np.stack(list(signs))
    return (found == 1).any(0) & (found == -1).any(0)


def mean_of(values: np.ndarray) -> float:
    """Mean over the rows where it is defined; nan without any."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
