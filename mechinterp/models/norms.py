"""Norms whose scale can be read and edited: `output = normalise(x, scale)` with the scale as a value of its own.

The scale is what the input is divided by: sqrt(var + eps) for LayerNorm (Ba et al. 2016), sqrt(mean square + eps) for
RMSNorm (Zhang & Sennrich 2019). Holding it constant makes the norm linear.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechinterp.errors import ModelError

__all__ = ["check_norm", "normalise", "scale_of"]


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: a model run in float64 keeps its precision."""
    return x if x.dtype == torch.float64 else x.float()


def check_norm(norm: nn.Module, path: str) -> None:
    """Raise ModelError when the module is no norm that we know."""
    known = isinstance(norm, nn.LayerNorm) or type(norm).__name__.endswith("RMSNorm")
    if not known or not hasattr(norm, "weight"):
        raise ModelError(f"{type(norm).__name__} is no LayerNorm or RMSNorm with weights", where=path)


def scale_of(norm: Any, x: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest 1"]:
    """The scale of a norm at `x`, in float32 (float64 for a float64 model)."""
    x = _wide(x)
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
        return (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def normalise(norm: Any, x: Float[Tensor, "*rest d"], scale: Float[Tensor, "*rest #d"]) -> Float[Tensor, "*rest d"]:
    """What the norm gives for `x` when its scale is `scale`, in the dtype of `x`."""
    wide = _wide(x)
    if isinstance(norm, nn.LayerNorm):
        out = (wide - wide.mean(-1, keepdim=True)) / scale * _wide(norm.weight)
        return (out if norm.bias is None else out + _wide(norm.bias)).to(x.dtype)
    if type(norm).__name__.startswith("Gemma"):
        return (wide / scale * (1.0 + _wide(norm.weight))).to(x.dtype)
    return norm.weight * (wide / scale).to(x.dtype)
