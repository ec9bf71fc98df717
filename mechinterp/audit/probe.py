"""A regularised logistic regression: the linear probe, and the metadata-only baseline."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Num

__all__ = ["logistic_scores"]


def logistic_scores(
    train: Num[np.ndarray, "n d"], labels: Num[np.ndarray, " n"], test: Num[np.ndarray, "m d"], *, penalty: float = 10.0
) -> Float[np.ndarray, " m"]:
    """Fit on `train`, return the log odds of `test`.

    Columns are standardised by the training rows; missing values become the training mean. Newton's method (IRLS)
    on the log loss plus penalty / 2 * |w|^2, the intercept free; equal to scikit-learn's C = 1 / penalty.
    """
    train, test = np.asarray(train, dtype=np.float64), np.asarray(test, dtype=np.float64)
    known = np.isfinite(train)
    mean = np.divide(np.where(known, train, 0).sum(0), known.sum(0), out=np.zeros(train.shape[1]), where=known.any(0))
    train, test = (np.where(np.isfinite(x), x, mean) - mean for x in (train, test))
    scale = train.std(0)
    keep = scale > 1e-12
    x = np.c_[np.ones(len(train)), train[:, keep] / scale[keep]]
    y = np.asarray(labels, dtype=np.float64)
    ridge = np.full(x.shape[1], penalty)
    ridge[0] = 1e-9
    w = np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
        gradient = x.T @ (p - y) + ridge * w
        hessian = (x * (p * (1 - p) + 1e-9)[:, None]).T @ x + np.diag(ridge)
        step = np.linalg.solve(hessian, gradient)
        w -= step
        if np.abs(step).max() < 1e-9:
            break
    return np.c_[np.ones(len(test)), test[:, keep] / scale[keep]] @ w
