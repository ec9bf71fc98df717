"""The dense encoder product, by the faster of the two BLAS libraries that are at hand.

torch brings Intel's MKL, NumPy its own OpenBLAS. On AMD processors OpenBLAS does this product in about nine tenths of
MKL's time (Zen 3, one thread, every size of `benchmarks/bench_sae.py`), so it is taken there. Two libraries with a pool
of threads each would be in each other's way: with more than one thread the product stays with torch.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["product"]


def product(
    x: Float[Tensor, "row d"], W: Float[Tensor, "latent d"], out: Float[Tensor, "row latent"]
) -> Float[Tensor, "row latent"]:
    """`x @ W.T`, written to `out`."""
    plain = x.device.type == "cpu" and x.dtype == W.dtype == torch.float32
    if plain and torch.get_num_threads() == 1 and _openblas_is_faster():
        with np.errstate(all="ignore"):  # what is not finite is found by its loss
            np.matmul(x.numpy(), W.numpy().T, out=out.numpy())
        return out
    return torch.mm(x, W.T, out=out)


@cache
def _openblas_is_faster() -> bool:
    """Whether the processor is AMD's and NumPy's OpenBLAS runs on one thread. The same in every run on a machine."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "AuthenticAMD" not in cpuinfo.read_text():
        return False
    from threadpoolctl import threadpool_info

    pools = [pool for pool in threadpool_info() if pool["internal_api"] == "openblas" and "numpy" in pool["filepath"]]
    return [pool["num_threads"] for pool in pools] == [1]
