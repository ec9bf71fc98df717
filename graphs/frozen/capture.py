"""The true forward pass, kept: one example, every value that a frozen part is made of."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mechinterp.errors import UsageError
from mechinterp.models.hooked import HookedVLM
from mechinterp.models.norms import normalise, scale_of
from mechinterp.models.scoring import weights_hash
from mechinterp.models.wiring import find

__all__ = ["Cache", "in_dtype", "recording", "sha256_of", "tower_module"]

Cache = dict[str, Tensor]
"""Activations by hook name, without the batch axis."""

_BLOCK = (
    "hook_resid_pre",
    "ln1.hook_scale",
    "ln1.hook_normalized",
    "attn.hook_pattern",
    "ln1_post.hook_scale",
    "hook_resid_mid",
    "ln2.hook_scale",
    "ln2.hook_normalized",
    "mlp.hook_pre",
    "ln2_post.hook_scale",
    "hook_mlp_out",
    "hook_resid_post",
)
_TOWER = ("ln_final.hook_scale", "ln_final.hook_normalized", "hook_pooled")
_Seen = list[tuple[weakref.ref[Tensor], int]]
_HASHES: weakref.WeakKeyDictionary[nn.Module, tuple[_Seen, str]] = weakref.WeakKeyDictionary()


@contextmanager
def recording(model: HookedVLM, towers: Iterable[str]) -> Iterator[Cache]:
    """While held, runs of the model fill the cache with all that frozen parts of these towers need (last run wins)."""
    names = [f"{t}.blocks.{layer}.{point}" for t in towers for layer in range(model.n_layers(t)) for point in _BLOCK]
    names += [f"{t}.{point}" for t in towers for point in _TOWER]
    cache: Cache = {}

    def keep(value: Tensor, hook: Any) -> None:
        cache[hook.name] = value.detach()[0]

    with model.hooks(fwd_hooks=[(name, keep) for name in names if name in model.hook_dict]), torch.no_grad():
        yield cache


def in_dtype(model: HookedVLM, dtype: torch.dtype) -> HookedVLM:
    """The model in this precision: itself where it is so already, else a copy.

    In the float64 copy RMSNorms compute in float64 too; transformers computes them in float32 whatever the model is.
    """
    if model.hf.training:
        raise UsageError("the model is in training mode", hint="call model.hf.eval() first")
    if model.hf.dtype == dtype:
        return model
    hf = copy.deepcopy(model.hf).to(dtype)
    if dtype == torch.float64:
        for norm in (m for m in hf.modules() if type(m).__name__.endswith("RMSNorm")):
            norm.forward = lambda x, norm=norm: normalise(norm, x, scale_of(norm, x))
    return HookedVLM(hf, model.processor, name=model.label)


def tower_module(model: HookedVLM, tower: str) -> Any:
    """The transformers module that has the embeddings and outer norms of a tower."""
    if model.family == "dinov2":
        return model.hf
    module = find(model.hf, model.table.towers[tower].module)
    return getattr(module, "vision_model", module)


def sha256_of(module: nn.Module) -> str:
    """Hash of a model's weights (`HookedVLM.sha256` of `model.hf`), kept until a weight is written to or replaced."""
    weights = list(module.parameters())
    seen, found = _HASHES.get(module, ([], ""))
    # by identity, not by address: memory that a weight has left goes to the next one
    if len(seen) != len(weights) or any(
        ref() is not w or version != w._version for (ref, version), w in zip(seen, weights, strict=True)
    ):
        found = weights_hash(module)
        _HASHES[module] = ([(weakref.ref(w), w._version) for w in weights], found)
    return found
