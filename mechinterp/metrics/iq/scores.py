"""R, F and IS of `iq-reading-1`, with the companions R_null and R_excess, from plain arrays.

Everything is per sample: an input x, its attribution a [element], the output y, the same at K perturbed inputs, and the
effect e [element] of each element (y minus the output with the element at its reference). With da = a(x_k) - a(x) and
dy = y(x_k) - y(x):

- R  = mean_j |Pearson_k(da_j, dy)|: reliance on the output. High is bad.
- F_corr = Pearson_j(a, e), clipped to [0, 1]; F_dist = 1 - 0.5 sum_j | |a_j| / sum|a| - |e_j| / sum|e| |.
- IS = ((R^p + (1 - F)^p) / 2)^(1 / p) (arXiv:2504.08919, with p left open there; 2 is the default here). Low is good.
- R_null = mean |r_j| over elements without effect: output that leaks onto what does nothing.
- R_excess = mean_j max(0, |corr(da_j, dy)| - |corr(de_j, dy)|): beyond what the true effects do themselves.

Never read IS without R and F: (1, 1), an exact explanation that is proportional to the output, and (0, 0), noise, give
the same IS. Where an attribution does not move, its correlation is undefined; whether it is skipped or counted as 0
decides rankings, so both are returned (`R`, `R_zero`). R has a floor by chance (`mechinterp.metrics.iq.null`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from mechinterp.errors import UsageError

__all__ = ["READING", "IQScores", "Measurement", "Status", "inversion", "iq", "movement", "psc"]

READING = "iq-reading-1"
Status = Literal["ok", "const_attr", "const_output", "too_few", "nonfinite", "zero_attr", "no_effect"]
LEAST_DRAWS = 3
CONSTANT = 1e-9  # of the largest absolute value: a smaller spread is rounding, in double precision
ULPS, CAP = 16, 1e-4  # maps that are fixed but for rounding spread by less than one; a real map by more than the cap
DOUBLE = float(np.finfo(np.float64).eps)


def still_below(eps: float) -> float:
    """The share of the largest absolute value below which a spread is rounding, where numbers are rounded to `eps`.

    1e-9 in float64, 2e-6 in float32; never above 1e-4, so that half precision makes no real map a constant one.
    """
    return min(max(CONSTANT, ULPS * eps), CAP)


@dataclass(frozen=True)
class Measurement:
    """What was seen of one explainer on some samples. Attributions and effects must be of the same elements.

    Args:
        attribution: `[sample, element]` at x.
        output: `[sample]` at x: the score that was explained, of the class chosen on x.
        attributions: `[sample, draw, element]` at the perturbed inputs.
        outputs: `[sample, draw]` there.
        effect: `[sample, element]`, output minus output with the element at its reference.
        effects: `[sample, draw, element]`, the same at the perturbed inputs; None: R_excess is nan.
        tolerance: an effect below this share of the sample's largest absolute effect counts as none, for R_null.
        eps: to which the numbers were rounded when they were computed, whatever they are kept in, such as
            `torch.finfo(torch.float32).eps`. It decides what is constant (`still_below`).
    """

    attribution: Float[np.ndarray, "sample element"]
    output: Float[np.ndarray, " sample"]
    attributions: Float[np.ndarray, "sample draw element"]
    outputs: Float[np.ndarray, "sample draw"]
    effect: Float[np.ndarray, "sample element"]
    effects: Float[np.ndarray, "sample draw element"] | None = None
    tolerance: float = 1e-6
    eps: float = DOUBLE

    def __post_init__(self):
        samples, draws, elements = self.attributions.shape
        wanted = {
            "attribution": (samples, elements),
            "output": (samples,),
            "outputs": (samples, draws),
            "effect": (samples, elements),
            "effects": (samples, draws, elements),
        }
        for name, shape in wanted.items():
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise UsageError(f"{name} has shape {value.shape}, not {shape}", where="Measurement")


@dataclass(frozen=True)
class IQScores:
    """Scores of each sample; nan, with a status, where a score is undefined.

    "nonfinite" (any array, the effects at the perturbed inputs too) has no score. "too_few", "const_output" and
    "const_attr" (no element's attribution moves) have F, which needs no perturbation, and no R. "zero_attr" and
    "no_effect" (the attribution, or every effect, is 0 at x: there are no shares to compare) have R, no F. Only "ok"
    has IS; "const_attr" has `IS_zero`, whose R is 0 by convention.

    `R` skips elements whose attribution never moves, `R_zero` counts them as 0; `coverage` is the share of elements
    that move. `IS[p]` uses R and F_dist, `IS_zero[p]` R_zero and F_dist.
    """

    status: tuple[Status, ...]
    R: Float[np.ndarray, " sample"]
    R_zero: Float[np.ndarray, " sample"]
    coverage: Float[np.ndarray, " sample"]
    F_corr: Float[np.ndarray, " sample"]
    F_dist: Float[np.ndarray, " sample"]
    IS: dict[int, Float[np.ndarray, " sample"]]
    IS_zero: dict[int, Float[np.ndarray, " sample"]]
    R_null: Float[np.ndarray, " sample"]
    R_excess: Float[np.ndarray, " sample"]

    @property
    def columns(self) -> dict[str, Float[np.ndarray, " sample"]]:
        """Every score by the name that tables use."""
        found = {n: getattr(self, n) for n in ("R", "R_zero", "coverage", "F_corr", "F_dist", "R_null", "R_excess")}
        return (
            found | {f"IS_p{p}": v for p, v in self.IS.items()} | {f"IS_zero_p{p}": v for p, v in self.IS_zero.items()}
        )


def iq(measured: Measurement, powers: tuple[int, ...] = (1, 2, 4)) -> IQScores:
    """Scores of every sample (see the module). `powers` are the p of IS."""
    dy = measured.outputs - measured.output[:, None]
    r = movement(measured.attributions - measured.attribution[:, None], dy, measured.attributions, measured.eps)
    status = _status(measured, r)
    broken = np.isin(status, ["nonfinite", "too_few", "const_output"])
    defined = np.isfinite(r)
    coverage = np.where(broken, np.nan, defined.mean(1))
    R_zero = np.where(broken, np.nan, np.nan_to_num(np.abs(r)).mean(1))
    R = np.where(broken, np.nan, _mean(np.abs(r), defined))
    F_corr, F_dist = _alignment(measured.attribution, measured.effect, still_below(measured.eps))
    unreadable = np.asarray(status) == "nonfinite"
    F_corr, F_dist = np.where(unreadable, np.nan, F_corr), np.where(unreadable, np.nan, F_dist)
    R_null, R_excess = _companions(measured, r, dy)
    return IQScores(
        status,
        R,
        R_zero,
        coverage,
        F_corr,
        F_dist,
        {p: inversion(R, F_dist, p) for p in powers},
        {p: inversion(R_zero, F_dist, p) for p in powers},
        np.where(broken, np.nan, R_null),
        np.where(broken, np.nan, R_excess),
    )


def inversion(
    R: Float[np.ndarray, " sample"], F: Float[np.ndarray, " sample"], p: int = 2
) -> Float[np.ndarray, " sample"]:
    """IS(R, F) = ((R^p + (1 - F)^p) / 2)^(1 / p), arXiv:2504.08919. Raises UsageError for p below 1."""
    if p < 1:
        raise UsageError(f"p is {p}", where="inversion", hint="a power mean needs p of at least 1 here")
    return ((R**p + (1 - F) ** p) / 2) ** (1 / p)


def movement(
    change: Float[np.ndarray, "sample draw element"],
    dy: Float[np.ndarray, "sample draw"],
    values: Float[np.ndarray, "sample draw element"] | None = None,
    eps: float = DOUBLE,
) -> Float[np.ndarray, "sample element"]:
    """Pearson correlation over draws of each element's change with the output's; nan where either does not move.

    "Does not move" is a spread below `still_below(eps)` of the largest absolute value (of `values`, if given): the
    correlation of nearly constant numbers is rounding.
    """
    least = still_below(eps)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        a = change - change.mean(1, keepdims=True)
        y = dy - dy.mean(1, keepdims=True)
        size = np.abs(change if values is None else values).max((1, 2), initial=0.0)
        spread_a, spread_y = np.sqrt((a**2).mean(1)), np.sqrt((y**2).mean(1))
        fixed = spread_y <= CONSTANT * np.abs(dy).max(1, initial=0.0)
        still = (spread_a <= least * size[:, None]) | fixed[:, None]
        r = np.einsum("ske,sk->se", a, y) / len(dy[0]) / (spread_a * spread_y[:, None])
    return np.where(still, np.nan, np.clip(r, -1, 1))


def psc(measured: Measurement) -> Float[np.ndarray, " sample"]:
    """Prediction-saliency correlation: over draws, |dy| against how far the map moved. Here high counts as good.

    The quantity of Zhang et al. (Radiology: AI; PMC10831523), whose exact formula we have not read: ours is the
    Pearson correlation of |y(x_k) - y(x)| with the L1 distance of maps scaled to sum|a| = 1. It reads nearly the same
    co-movement as R with the opposite arrow, so both are shown.
    """

    def scaled(a: np.ndarray) -> np.ndarray:
        total = np.abs(a).sum(-1, keepdims=True)
        return np.divide(a, total, out=np.zeros_like(a), where=total > 0)

    moved = np.abs(scaled(measured.attributions) - scaled(measured.attribution)[:, None]).sum(-1)
    dy = np.abs(measured.outputs - measured.output[:, None])
    return movement(moved[..., None], dy, np.ones_like(moved)[..., None], measured.eps)[:, 0]  # maps are of size 1


def _status(measured: Measurement, r: np.ndarray) -> tuple[Status, ...]:
    arrays = (measured.attribution, measured.attributions, measured.output, measured.outputs, measured.effect)
    arrays += () if measured.effects is None else (measured.effects,)
    finite = np.all([np.isfinite(a).reshape(len(a), -1).all(1) for a in arrays], axis=0)
    dy = measured.outputs - measured.output[:, None]
    with np.errstate(invalid="ignore"):
        fixed = dy.std(1) <= still_below(measured.eps) * np.abs(measured.outputs).max(1, initial=0.0)
    found: list[Status] = []
    for i in range(len(r)):
        if not finite[i]:
            found.append("nonfinite")
        elif measured.outputs.shape[1] < LEAST_DRAWS:
            found.append("too_few")
        elif fixed[i] or np.std(dy[i]) <= CONSTANT * np.abs(dy[i]).max():
            found.append("const_output")
        elif not np.isfinite(r[i]).any():
            found.append("const_attr")
        elif not measured.attribution[i].any():
            found.append("zero_attr")
        elif not measured.effect[i].any():
            found.append("no_effect")
        else:
            found.append("ok")
    return tuple(found)


def _mean(values: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Mean over the kept elements of each sample; nan where none is."""
    count = keep.sum(1)
    total = np.where(keep, values, 0.0).sum(1)
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _alignment(a: np.ndarray, e: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """F_corr and F_dist of each sample; nan for a constant attribution or effect, or one that is all 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ac, ec = a - a.mean(1, keepdims=True), e - e.mean(1, keepdims=True)
        norms = np.sqrt((ac**2).sum(1) * (ec**2).sum(1))
        flat = (np.sqrt((ac**2).mean(1)) <= least * np.abs(a).max(1)) | (
            np.sqrt((ec**2).mean(1)) <= least * np.abs(e).max(1)
        )
        corr = np.where(flat, np.nan, np.clip((ac * ec).sum(1) / norms, 0, 1))
        share_a, share_e = (np.abs(v) / np.abs(v).sum(1, keepdims=True) for v in (a, e))
        dist = 1 - 0.5 * np.abs(share_a - share_e).sum(1)
    return corr, dist


def _companions(measured: Measurement, r: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R_null and R_excess; an undefined correlation counts as 0 in both."""
    size = np.nan_to_num(np.abs(r))
    largest = np.abs(measured.effect).max(1, keepdims=True)
    R_null = _mean(size, np.abs(measured.effect) <= measured.tolerance * largest)
    if measured.effects is None:
        return R_null, np.full(len(r), np.nan)
    own = movement(measured.effects - measured.effect[:, None], dy, measured.effects, measured.eps)
    return R_null, np.maximum(0.0, size - np.nan_to_num(np.abs(own))).mean(1)
