"""Counter-based random numbers: a value depends on (seed, stream, index) only, never on what was drawn before it.

SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators") as a hash of the index. It is
vectorised over indices, so a batch gives the same numbers however it is cut.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float64, Integer

__all__ = ["normal", "uniform", "uniform_one"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ALL = 2**64 - 1
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(z: np.ndarray) -> np.ndarray:
    z = z + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))


@lru_cache(maxsize=4096)
def _key(seed: int, stream: str) -> np.ndarray:
    return _mix(np.array([seed % 2**64], np.uint64) ^ np.uint64(zlib.crc32(stream.encode()) << 20))


def uniform(seed: int, stream: str, index: Integer[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Numbers in [0, 1), one per index, of the named stream."""
    bits = _mix(_mix(np.asarray(index).astype(np.uint64)) ^ _key(seed, stream))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix_int(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _ALL
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _ALL
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _ALL
    return z ^ (z >> 31)


def uniform_one(seed: int, stream: str, index: int) -> float:
    """The number that `uniform` gives for one index, without the cost of an array."""
    key = _mix_int(seed % 2**64 ^ zlib.crc32(stream.encode()) << 20)
    return (_mix_int(_mix_int(index) ^ key) >> 11) * 2.0**-53


def normal(seed: int, streams: Sequence[str], index: Integer[np.ndarray, " n"]) -> Float64[np.ndarray, "stream n"]:
    """Roughly standard normal numbers within +-3.5: the centred, scaled sum of four uniforms (bounded tails)."""
    keys = np.stack([_key(seed, f"{stream}/{part}") for part in range(4) for stream in streams])
    bits = _mix(_mix(np.asarray(index).astype(np.uint64)) ^ keys) >> np.uint64(11)
    parts = (bits.astype(np.float64) * 2.0**-53).reshape(4, len(streams), -1)
    return (parts[0] + parts[1] + parts[2] + parts[3] - 2.0) * 3.0**0.5
