"""Gates: an activation function as multiplication, `phi(z) = gate(z) * z` with the gate held.

The gate is the ratio, not the derivative: with it the sum over what comes in is exactly what comes out. It is smooth at
zero for all of these functions but ReLU, whose gate is 1 above zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mechinterp.errors import ModelError

__all__ = ["activation_of", "gate_of"]


def _tanh_gelu(z: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z.pow(3))))


_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.special.ndtr,  # Phi(z), the normal distribution function
    "gelu_tanh": _tanh_gelu,
    "quick_gelu": lambda z: torch.sigmoid(1.702 * z),
    "silu": torch.sigmoid,
    "relu": lambda z: (z > 0).to(z.dtype),
}
_CLASSES = {
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "ReLU": "relu",
}
"""Activation modules of torch and transformers, by the name of their class."""
_NAMES = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "relu": "relu",
}
"""Activations by the names that configs use."""


def gate_of(activation: Any, z: Tensor) -> Tensor:
    """`phi(z) / z` of an activation module (by its class) or name. Raises ModelError for one that is not known."""
    known, name = (_NAMES, activation) if isinstance(activation, str) else (_CLASSES, type(activation).__name__)
    if name == "GELU" and getattr(activation, "approximate", "none") == "tanh":
        return _tanh_gelu(z)
    if name not in known:
        raise ModelError(f"no gate is known for the activation {name}", hint=f"known: {', '.join(sorted(known))}")
    return _GATES[known[name]](z)


def activation_of(mlp: Any) -> Any:
    """The activation module of a transformers MLP. Raises ModelError where there is none under a name that is known."""
    found = getattr(mlp, "activation_fn", None) or getattr(mlp, "act_fn", None)
    if found is None:
        raise ModelError("has no activation under a name that is known", where=type(mlp).__name__)
    return found
