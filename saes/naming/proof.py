"""Detection AUROC within strata, with its patient-bootstrap draws."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Shaped

from mechinterp.metrics.statistics import stratified_auroc_columns, weighted_auroc

__all__ = ["auroc_draws"]


def auroc_draws(
    scores: Float[np.ndarray, " n"],
    truth: Float[np.ndarray, " n"],
    strata: Shaped[np.ndarray, " n"],
    weights: Float[np.ndarray, "draw n"],
) -> tuple[float, Float[np.ndarray, " draw"]]:
    """AUROC over pairs inside one stratum, as `stratified_auroc_columns`, and the same under each row of weights."""
    if not len(scores):
        return float("nan"), np.full(len(weights), np.nan)
    area, _ = stratified_auroc_columns(scores[:, None], truth, strata)
    total, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for stratum in np.unique(strata):
        rows = strata == stratum
        mine, positive = weights[:, rows], truth[rows] > 0.5
        n_pairs = mine[:, positive].sum(1) * mine[:, ~positive].sum(1)
        total += np.nan_to_num(weighted_auroc(scores[rows], truth[rows], mine)) * n_pairs
        pairs += n_pairs
    return float(area[0]), np.divide(total, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)
