"""Attention whose pattern can be read and edited, and that is plain SDPA, bit for bit, while nobody edits it.

The function is registered with transformers under one name, with the *mask* function of sdpa under the same name:
without the second registration transformers silently drops the causal mask. The pattern is recomputed as
softmax(scale q k^T + mask) in float32 (in float64 for a float64 model; Vaswani et al. 2017, equation 1), only where
someone looks at it; the output of SDPA is replaced by pattern @ v only where a hook changed it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

__all__ = ["IMPLEMENTATION", "attention_pattern", "register", "watch"]

IMPLEMENTATION = "mechinterp_sdpa"
_WATCHED: dict[nn.Module, Callable[[Tensor], tuple[Tensor, bool]]] = {}


def register() -> None:
    """Make the implementation known to transformers (idempotent)."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


class watch:
    """While held, `module` (an attention module of a transformers model) shows its pattern to `look`.

    `look` maps a pattern `[batch, head, query, key]` to the pattern to use and whether it was changed.
    """

    def __init__(self, module: nn.Module, look: Callable[[Tensor], tuple[Tensor, bool]]):
        self.module, self.config = module, module.config
        self.before = self.config._attn_implementation  # type: ignore[union-attr]
        _WATCHED[module] = look
        self.config._attn_implementation = IMPLEMENTATION  # type: ignore[union-attr]

    def remove(self) -> None:
        """Undo it."""
        _WATCHED.pop(self.module, None)
        if self.before != IMPLEMENTATION:  # the first watcher of a tower is the one that restores its shared config
            self.config._attn_implementation = self.before  # type: ignore[union-attr]


def attention_pattern(
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch head key d_head"],
    mask: Float[Tensor, "#batch #head query key"] | Bool[Tensor, "#batch #head query key"] | None,
    scaling: float | None,
    causal: bool,
) -> Float[Tensor, "batch head query key"]:
    """The attention pattern in the dtype of `query`; 0 where masked, and a row with no allowed key is 0."""
    scores = query @ key.transpose(-1, -2)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    hidden = scores <= torch.finfo(query.dtype).min / 2  # an additive mask writes the dtype's lowest number
    pattern = torch.softmax(scores.masked_fill(hidden.all(-1, keepdim=True), 0.0), dim=-1)
    return pattern.masked_fill(hidden, 0.0).to(query.dtype)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA as transformers calls it; then the pattern, if the module is watched."""
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
    )
    look = _WATCHED.get(module)
    if look is None:
        return output, None
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and attention_mask is None and query.shape[2] > 1
    if causal:  # as sdpa does: with a longer cache, the mask stands at the upper left
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
    pattern, changed = look(attention_pattern(query, key, mask, scaling, causal))
    if changed:
        output = (pattern.to(value.dtype) @ value).transpose(1, 2).contiguous()
    return output, None
