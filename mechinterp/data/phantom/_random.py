"""Counter-based random numbers: a value depends on (seed, stream, index) only, never on what was drawn before it.

SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators") as a hash of the index. It is
vectorised over indices, so a batch gives the same numbers however it is cut.
"""

from __future__ import annotations

import zlib

import numpy as np
from jaxtyping import Float64, Integer

__all__ = ["normal", "uniform"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = (z + _GOLDEN).astype(np.uint64)
        z = (z ^ (z >> np.uint64(30))) * _MIX1
        z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))


def uniform(seed: int, stream: str, index: Integer[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Numbers in [0, 1), one per index, of the named stream."""
    key = _mix(np.array([seed % 2**64], np.uint64) ^ np.uint64(zlib.crc32(stream.encode()) << 20))
    bits = _mix(_mix(np.asarray(index).astype(np.uint64)) ^ key)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(seed: int, stream: str, index: Integer[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Roughly standard normal numbers within +-3: the centred, scaled sum of four uniforms (bounded tails)."""
    total = sum(uniform(seed, f"{stream}/{part}", index) for part in range(4))
    return (np.asarray(total) - 2.0) * 3.0**0.5
