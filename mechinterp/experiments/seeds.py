"""What a number is worth when everything is trained again from another seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechinterp.metrics.statistics import Interval

__all__ = ["seed_interval", "with_interval"]


def seed_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of the mean over seeds; nan with fewer than two. Wide with three seeds, as it should be."""
    from scipy.stats import t

    kept = np.asarray([v for v in values if np.isfinite(v)], np.float64)
    if len(kept) < 2:
        return (float("nan"), float("nan"))
    half = float(t.ppf((1 + level) / 2, len(kept) - 1) * kept.std(ddof=1) / len(kept) ** 0.5)
    return (float(kept.mean()) - half, float(kept.mean()) + half)


def with_interval(values: Sequence[float]) -> str:
    """`mean [low, high]` over seeds; without an interval where one seed says nothing about others."""
    kept = [v for v in values if np.isfinite(v)]
    if not kept:
        return "not tested"
    low, high = seed_interval(kept)
    return f"{np.mean(kept):.2f}" + (f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) else "")
