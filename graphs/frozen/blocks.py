"""From a transformer block and the cache of a true forward pass to its frozen parts. One builder for every family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from graphs.frozen.attention import FrozenAttention, Scores
from graphs.frozen.capture import Cache, tower_module
from graphs.frozen.norms import FrozenNorm
from graphs.frozen.parts import FrozenBlock, FrozenMLP
from mechinterp.errors import ModelError
from mechinterp.models.gates import activation_of, gate_of
from mechinterp.models.hooked import HookedVLM
from mechinterp.models.tables import Block
from mechinterp.models.wiring import find

__all__ = ["Rotary", "affine", "frozen_blocks", "frozen_norm", "heads_of"]


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary position embedding (Su et al. 2021), a rotation of every query and key: a linear map."""

    cos: Float[Tensor, "pos d_head"]
    sin: Float[Tensor, "pos d_head"]

    def __call__(self, x: Float[Tensor, "*rest pos d_head"]) -> Float[Tensor, "*rest pos d_head"]:
        """Turn queries or keys by their positions."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-second, first], dim=-1) * self.sin


def frozen_norm(norm: Any, scale: Float[Tensor, "pos 1"]) -> FrozenNorm:
    """A transformers norm at its true scale."""
    weight = norm.weight.detach()
    if isinstance(norm, nn.LayerNorm):
        shift = torch.zeros_like(weight) if norm.bias is None else norm.bias.detach()
        return FrozenNorm(weight, shift, scale, centres=True)
    gain = weight + 1.0 if type(norm).__name__.startswith("Gemma") else weight
    return FrozenNorm(gain, torch.zeros_like(weight), scale, centres=False)


def heads_of(projection: Any, d_head: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Weight `[head, d, d_head]` and bias `[head, d_head]` of a query, key or value projection.

    Grouped heads are repeated, each `groups` times in a row, as transformers repeats keys and values.
    """
    weight = projection.weight.detach().unflatten(0, (-1, d_head)).transpose(1, 2)
    bias = weight.new_zeros(len(weight), d_head)
    if projection.bias is not None:
        bias = projection.bias.detach().unflatten(0, (-1, d_head))
    if groups == 1:
        return weight, bias
    return weight.repeat_interleave(groups, dim=0), bias.repeat_interleave(groups, dim=0)


def frozen_blocks(model: HookedVLM, tower: str, cache: Cache) -> tuple[FrozenBlock, ...]:
    """Every block of a tower. Raises ModelError where a block has a part that no frozen part stands for."""
    table = model.table.towers[tower].block
    rotary: dict[str | None, Rotary | None] = {}
    found = []
    for layer, block in enumerate(model.blocks(tower)):
        at = _At(cache, f"{tower}.blocks.{layer}.")
        kind = getattr(find(block, table.attn), "layer_type", None)
        if kind not in rotary:
            rotary[kind] = _rotary(model, tower, kind, at["hook_resid_pre"])
        attention = _attention(block, table, at, rotary[kind])
        streams = (at[f"hook_{name}"] for name in ("resid_pre", "resid_mid"))
        found.append(
            FrozenBlock(
                tower,
                layer,
                attention,
                _mlp(block, table, at),
                *streams,
                mlp_in=at["ln2.hook_normalized"],
                mlp_out=at["hook_mlp_out"],
                resid_post=at["hook_resid_post"],
            )
        )
    return tuple(found)


@dataclass(frozen=True)
class _At:
    """The cache of one block."""

    cache: Cache
    prefix: str

    def __getitem__(self, point: str) -> Tensor:
        return self.cache[self.prefix + point]


def _rotary(model: HookedVLM, tower: str, kind: str | None, x: Float[Tensor, "pos d"]) -> Rotary | None:
    """The rotation that transformers gives to blocks of this kind, or None where the tower has none."""
    module = getattr(tower_module(model, tower), "rotary_emb", None)
    if module is None:
        return None
    positions = torch.arange(len(x), device=x.device)[None]
    # Gemma has a rotation for each kind of layer, and asks which
    kinds = (kind,) if kind is not None and hasattr(module, f"{kind}_inv_freq") else ()
    cos, sin = module(x[None], positions, *kinds)
    return Rotary(cos[0], sin[0])


def _attention(block: Any, table: Block, at: _At, rotary: Rotary | None) -> FrozenAttention:
    attn, out = find(block, table.attn), find(block, table.out_proj)
    if getattr(attn, "attn_logit_softcapping", None) is not None:
        raise ModelError("caps its attention scores, which no frozen part stands for", where=type(attn).__name__)
    d_head = attn.head_dim
    groups = int(getattr(attn, "num_key_value_groups", 1))
    (W_Q, b_Q), (W_K, b_K), (W_V, b_V) = (
        heads_of(find(attn, name), d_head, n) for name, n in (("q_proj", 1), ("k_proj", groups), ("v_proj", groups))
    )
    normed = at["ln1.hook_normalized"]
    q, q_norm = _turned(find(attn, "q_proj"), normed, d_head, 1, getattr(attn, "q_norm", None), rotary)
    k, k_norm = _turned(find(attn, "k_proj"), normed, d_head, groups, getattr(attn, "k_norm", None), rotary)
    scaling = float(attn.scaling if hasattr(attn, "scaling") else attn.scale)
    scores = Scores(q, k, scaling, W_Q, W_K, b_Q, b_K, rotary, q_norm, k_norm)
    W_O = out.weight.detach().unflatten(1, (-1, d_head)).permute(1, 2, 0)
    b_O = W_O.new_zeros(W_O.shape[-1]) if out.bias is None else out.bias.detach()
    norm = frozen_norm(find(block, table.ln1), at["ln1.hook_scale"])
    post = _post(block, table.ln1_post, table.attn_out, at, "ln1_post.hook_scale")
    return FrozenAttention(norm, at["attn.hook_pattern"], W_V, b_V, W_O, b_O, scores, post)


def _turned(
    projection: Any, normed: Float[Tensor, "pos d"], d_head: int, groups: int, norm: Any, rotary: Rotary | None
) -> tuple[Float[Tensor, "head pos d_head"], tuple[FrozenNorm, ...]]:
    """Queries or keys as they meet: projected, normed where the model does, and turned; and the norms."""
    x = projection(normed).unflatten(-1, (-1, d_head)).transpose(0, 1)
    norms: tuple[FrozenNorm, ...] = ()
    if norm is not None:
        scale = (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        norms = tuple(frozen_norm(norm, s) for s in scale for _ in range(groups))
        x = x / scale * norms[0].gain
    x = x if rotary is None else rotary(x)
    return (x if groups == 1 else x.repeat_interleave(groups, dim=0)), norms


def _post(block: Any, norm: str | None, out: str, at: _At, scale: str) -> FrozenNorm | None:
    """What stands between a part and the stream: a post-norm, a layer scale, or nothing."""
    if norm is not None:
        return frozen_norm(find(block, norm), at[scale])
    gain = getattr(find(block, out), "lambda1", None)
    return None if gain is None else FrozenNorm.diagonal(gain.detach(), len(at["hook_resid_mid"]))


def _mlp(block: Any, table: Block, at: _At) -> FrozenMLP:
    pre, out, inner = find(block, table.mlp_pre), find(block, table.mlp_post), find(block, "mlp")
    activation = activation_of(inner)
    z = at["mlp.hook_pre"]
    up = getattr(inner, "up_proj", None)
    if up is None:
        into, gate = pre, gate_of(activation, z)
    else:  # gated: the gate branch is held whole, the up branch stays linear
        into, gate = up, activation(z)
    norm = frozen_norm(find(block, table.ln2), at["ln2.hook_scale"])
    post = _post(block, table.ln2_post, table.mlp_out, at, "ln2_post.hook_scale")
    (W_in, b_in), (W_out, b_out) = (affine(module) for module in (into, out))
    return FrozenMLP(norm, W_in, b_in, gate, W_out, b_out, post)


def affine(module: Any) -> tuple[Tensor, Tensor]:
    """`W [d_in, d_out]` and `b` of a linear layer, so that it gives `x @ W + b`."""
    W = module.weight.detach().T
    return W, W.new_zeros(W.shape[1]) if module.bias is None else module.bias.detach()
