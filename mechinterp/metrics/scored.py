"""A score of every row with a status: what is undefined is nan and says why, never a silent 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.errors import UsageError
from mechinterp.metrics.iq.scores import DOUBLE, still_below
from mechinterp.metrics.statistics import Interval, PatientBootstrap, percentile_interval

__all__ = ["ScoreStatus", "Scored", "broken_rows", "flat", "numpy_of"]

ScoreStatus = Literal[
    "ok",
    "const_attr",  # the map ranks no element above another
    "const_output",  # removing things does not move the score
    "too_few",  # fewer elements or draws than the score needs
    "nonfinite",
    "no_mass",  # nothing of the map is positive
    "no_region",  # the mask is empty, or everywhere
]


@dataclass(frozen=True)
class Scored:
    """One number for every row, nan exactly where `status` is not "ok"."""

    value: Float[np.ndarray, " row"]
    status: tuple[ScoreStatus, ...]

    @classmethod
    def of(cls, value: Float[np.ndarray, " row"], broken: Mapping[ScoreStatus, np.ndarray]) -> Scored:
        """Values with the conditions `[row]` under which they mean nothing; the first that holds names the status.

        What is not finite and has no named reason is "nonfinite".
        """
        status: list[ScoreStatus] = ["ok" if finite else "nonfinite" for finite in np.isfinite(value)]
        for reason, where in reversed(list(broken.items())):
            for i in np.flatnonzero(where):
                status[i] = reason
        return cls(np.where([s == "ok" for s in status], value, np.nan), tuple(status))

    def __len__(self) -> int:
        return len(self.value)

    @property
    def coverage(self) -> float:
        """Share of rows with a value."""
        return float(np.isfinite(self.value).mean()) if len(self) else float("nan")

    @property
    def mean(self) -> float:
        """Mean over the rows that have a value; nan without any."""
        kept = self.value[np.isfinite(self.value)]
        return float(kept.mean()) if len(kept) else float("nan")

    def interval(self, patients: Sequence[str], draws: int = 2000, seed: int = 0) -> Interval:
        """95 % interval of `mean`, by resampling patients. Raises UsageError when `patients` has another length."""
        if len(patients) != len(self):
            raise UsageError(f"{len(patients)} patients for {len(self)} rows", where="patients")
        kept = np.isfinite(self.value)
        if len({p for p, k in zip(patients, kept, strict=True) if k}) < 2:
            return (float("nan"), float("nan"))
        boot = PatientBootstrap.of([p for p, k in zip(patients, kept, strict=True) if k], draws=draws, seed=seed)
        return percentile_interval(boot.mean(self.value[kept]))

    def minus(self, other: Scored) -> Scored:
        """The paired difference; a row undefined in either is undefined here, with the first reason."""
        status: tuple[ScoreStatus, ...] = tuple(
            a if a != "ok" else b for a, b in zip(self.status, other.status, strict=True)
        )
        return Scored(self.value - other.value, status)


def flat(
    values: Float[np.ndarray, "row n"], eps: float = DOUBLE, size: Float[np.ndarray, " row"] | None = None
) -> Bool[np.ndarray, " row"]:
    """Whether a row has no spread beyond rounding; False where it is not finite, which has its own status.

    Args:
        eps: to which the numbers were rounded when they were computed (`Question.eps`), see `still_below`.
        size: of the numbers that `values` are differences of, where these are larger.
    """
    with np.errstate(invalid="ignore"):
        largest = np.maximum(np.abs(values).max(1, initial=0.0), 0.0 if size is None else size)
        return np.asarray(np.ptp(values, axis=1) <= still_below(eps) * largest)


def broken_rows(
    attribution: Float[np.ndarray, "row element"],
    outputs: Float[np.ndarray, "row n"],
    eps: float = DOUBLE,
    size: Float[np.ndarray, " row"] | None = None,
) -> dict[ScoreStatus, np.ndarray]:
    """The conditions `[row]` that most scores share: not finite, a constant map, an output that nothing moves.

    `eps` is that of both arrays, `size` that of the scores where `outputs` are differences of them (see `flat`).
    """
    finite = np.logical_and(np.isfinite(attribution).all(1), np.isfinite(outputs).all(1))
    return {
        "nonfinite": np.logical_not(finite),
        "const_attr": flat(attribution, eps),
        "const_output": flat(outputs, eps, size),
    }


def numpy_of(value: Tensor | np.ndarray) -> np.ndarray:
    """Double precision on the CPU, without gradient."""
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value, np.float64)
