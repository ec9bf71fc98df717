"""The random order of training: a function of (seed, epoch, step) and nothing else, so that resuming is exact."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

__all__ = ["permutation"]


def permutation(n: int, seed: int, epoch: int) -> Int64[np.ndarray, " n"]:
    """Order of `n` rows in one epoch (`format.md`, Random order). Same arguments, same order."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(n)
