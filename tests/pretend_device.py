"""An accelerator for machines without one: tensors that say they are elsewhere, and keep their values here.

Code that takes another path off the CPU takes it, with real values; an operation on tensors of two devices fails as it
would on a GPU. The device goes by the name of `meta`, the one name that every build of torch accepts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "meta"
MOVES = ("aten::_to_copy", "aten::copy_")


class _There(torch.Tensor):
    """A tensor on the device; `here` has its values."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor):
        strided = here.layout == torch.strided
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride() if strided else (here.shape[1], 1),  # a sparse matrix
            storage_offset=here.storage_offset() if strided else 0,
            dtype=here.dtype,
            device=DEVICE,
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class PretendDevice(TorchDispatchMode):
    """While it is active, whatever is made on the device has values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, _There)]
    moves = func.name().split(".")[0] in MOVES
    if there and not moves:
        for tensor in tensors:
            assert isinstance(tensor, _There) or tensor.dim() == 0, f"{func.name()} of tensors on two devices"
    asked = kwargs.get("device")
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        wrap = torch.device(asked).type == DEVICE
    else:
        wrap = isinstance(args[0], _There) if moves and isinstance(args[0], torch.Tensor) else bool(there)
    found = func(*_inner(args), **_inner(kwargs))
    return tree_map(lambda leaf: _There(leaf) if isinstance(leaf, torch.Tensor) else leaf, found) if wrap else found


def _inner(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.here if isinstance(leaf, _There) else leaf, tree)
