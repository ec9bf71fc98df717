"""Intervention fidelity: does ablating a factor's latents do to the output what removing the factor does?

For image n, factor a and output b: `t_nab = f_b(I_n) - f_b(I_n under do(a = 0))`, everything else in the image held;
`d_nab = f_b(x_n) - f_b(x_n with the latents matched to a ablated)`, the dictionary's error term kept. Where the factor
is absent, t is exactly 0, so d must be 0 there too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from mechinterp.metrics.statistics import Interval, percentile_interval

__all__ = ["Fidelity", "Leakage", "fidelity", "leakage", "regression"]


def regression(
    true: Float[np.ndarray, " n"],
    ablated: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, "draw n"] | None = None,
) -> tuple[Float[np.ndarray, " draw"], Float[np.ndarray, " draw"]]:
    """Slope and R2 of the least-squares line of `ablated` on `true`, one of each for a row of weights (default: ones).

    `slope = cov(t, d) / var(t)`: how much of the true effect the ablation has (1: all of it).
    `R2 = cov(t, d)^2 / (var(t) var(d))`. An ablation that never does anything has slope 0 and R2 0; nan where the true
    effect never varies.
    """
    table = np.ones((1, len(true))) if weights is None else np.asarray(weights, np.float64)
    t, d = np.asarray(true, np.float64), np.asarray(ablated, np.float64)
    mass = table.sum(1)
    mean_t, mean_d = table @ t / mass, table @ d / mass
    var_t = np.maximum(table @ t**2 / mass - mean_t**2, 0.0)
    var_d = np.maximum(table @ d**2 / mass - mean_d**2, 0.0)
    covariance = table @ (t * d) / mass - mean_t * mean_d
    moves = var_t > 1e-12 * max(float((t**2).mean()), 1e-30)
    slope = np.divide(covariance, var_t, out=np.full(len(table), np.nan), where=moves)
    both = moves & (var_d > 1e-12 * max(float((d**2).mean()), 1e-30))
    r2 = np.where(moves, 0.0, np.nan)
    r2[both] = covariance[both] ** 2 / (var_t[both] * var_d[both])
    return slope, r2


@dataclass(frozen=True)
class Fidelity:
    """Agreement of one factor's ablation with its removal, on the factor's own output.

    Fields:
        n, present: test images, and those in which the factor is.
        slope, r2: over all images (`regression`); absent images count with a true effect of 0.
        r2_identity: `1 - sum (t - d)^2 / sum (t - mean t)^2`: agreement without any line fitted; may be negative.
        slope_present, r2_present: over the images with the factor only, the stricter reading.
        share: mean ablation effect over mean true effect, images with the factor.
        sign: share of the images with the factor in which both effects have one sign.
    """

    n: int
    present: int
    slope: float
    slope_ci95: Interval
    r2: float
    r2_ci95: Interval
    r2_identity: float
    slope_present: float
    r2_present: float
    r2_present_ci95: Interval
    share: float
    sign: float


def fidelity(
    true: Float[np.ndarray, " n"],
    ablated: Float[np.ndarray, " n"],
    present: Bool[np.ndarray, " n"],
    weights: Float[np.ndarray, "draw n"],
) -> Fidelity:
    """Compare the effects of ablation with the true ones.

    Args:
        true: `t`, 0 where the factor is absent.
        ablated: `d`.
        present: where the factor is.
        weights: a patient bootstrap's (`PatientBootstrap.weights`).
    """
    slope, r2 = regression(true, ablated)
    draws = regression(true, ablated, weights)
    slope_in, r2_in = regression(true[present], ablated[present])
    draws_in = regression(true[present], ablated[present], weights[:, present] + 1e-12)
    spread = float(((true - true.mean()) ** 2).sum())
    mean_true = float(true[present].mean()) if present.any() else float("nan")
    return Fidelity(
        n=len(true),
        present=int(present.sum()),
        slope=float(slope[0]),
        slope_ci95=percentile_interval(draws[0]),
        r2=float(r2[0]),
        r2_ci95=percentile_interval(draws[1]),
        r2_identity=float(1 - ((true - ablated) ** 2).sum() / spread) if spread > 0 else float("nan"),
        slope_present=float(slope_in[0]),
        r2_present=float(r2_in[0]),
        r2_present_ci95=percentile_interval(draws_in[1]),
        share=float(ablated[present].mean() / mean_true) if mean_true else float("nan"),
        sign=float((np.sign(ablated[present]) == np.sign(true[present])).mean()) if present.any() else float("nan"),
    )


@dataclass(frozen=True)
class Leakage:
    """Mean effects of every factor on every output, over the images with the factor, in whatever unit they came in.

    Fields:
        true, ablated: `[factor, output]`.
        slope, r2: `regression` over all entries; one dot a factor and output.
        off_true, off_ablated: mean absolute effect on other outputs over that on the own output, mean over factors.
    """

    true: Float[np.ndarray, "factor output"]
    ablated: Float[np.ndarray, "factor output"]
    slope: float
    r2: float
    off_true: float
    off_ablated: float


def leakage(
    true: Float[np.ndarray, "factor output"],
    ablated: Float[np.ndarray, "factor output"],
    own: Bool[np.ndarray, "factor output"],
) -> Leakage:
    """Put two matrices of mean effects side by side; `own` marks each factor's own output."""
    slope, r2 = regression(true.ravel(), ablated.ravel())
    return Leakage(true, ablated, float(slope[0]), float(r2[0]), _off(true, own), _off(ablated, own))


def _off(effects: Float[np.ndarray, "factor output"], own: Bool[np.ndarray, "factor output"]) -> float:
    """Off-target over on-target size; nan where no factor has its own output or nothing moves."""
    named = own.any(1)
    size = np.abs(effects[named])
    target = (size * own[named]).sum(1)
    other = (size * ~own[named]).sum(1) / np.maximum((~own[named]).sum(1), 1)
    kept = target > 0
    return float((other[kept] / target[kept]).mean()) if kept.any() else float("nan")
