"""What R is by chance: a closed form for independent noise, and a permutation floor for given data."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.special import gammaln

from mechinterp.errors import UsageError
from mechinterp.metrics.iq.scores import Measurement, movement

__all__ = ["expected_absolute_r", "permutation_floor"]


def expected_absolute_r(draws: int) -> float:
    """E|r| of `draws` independent normal pairs: Gamma((K - 1) / 2) / (sqrt(pi) Gamma(K / 2)); .637 at 3, .149 at 30."""
    if draws < 3:
        raise UsageError(f"{draws} draws", where="expected_absolute_r", hint="a correlation needs at least 3")
    return float(np.exp(gammaln((draws - 1) / 2) - gammaln(draws / 2)) / np.sqrt(np.pi))


def permutation_floor(measured: Measurement, shuffles: int = 100, seed: int = 0) -> Float[np.ndarray, "shuffle sample"]:
    """R with the outputs shuffled against the attributions within each sample: what no reliance at all would give."""
    rng = np.random.default_rng(seed)
    change = measured.attributions - measured.attribution[:, None]
    dy = measured.outputs - measured.output[:, None]
    floor = np.empty((shuffles, len(dy)))
    for i in range(shuffles):
        r = np.abs(movement(change, rng.permuted(dy, axis=1), measured.attributions, measured.eps))
        defined = np.isfinite(r)
        count = defined.sum(1)
        floor[i] = np.divide(np.where(defined, r, 0).sum(1), count, out=np.full(len(dy), np.nan), where=count > 0)
    return floor
