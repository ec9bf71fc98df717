"""The fast tail: finish a vision tower's forward pass from an edit of a few tokens, computing only what it can change.

In the blocks after the site, for an edit of the tokens C of an image:

1. The first block's queries, keys and values change at C only; elsewhere the image's clean ones, computed once, stand.
2. Between the first block and the last, every token changes.
3. A tower that reads out its class token needs the last block's attention output, norm and MLP at that token only.

When the site is just before the last block, 1 and 3 together leave a few key and value rows and one token.
Exact up to the order of floating-point sums. A sweep proves it on its own model and images before it uses it (see
`sweep.Sweep`), so a tower that is built in another way is never finished wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mechinterp.interventions.tails import Change, Resumed
from mechinterp.models.tables import Block
from mechinterp.models.wiring import find
from mechinterp.types import Site

__all__ = ["SparseTail"]


@dataclass(frozen=True)
class _Block:
    """The modules of one pre-norm vision block; the scales are identities except in DINOv2."""

    norm1: nn.Module
    attention: Any
    out_proj: nn.Module
    scale1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    scale2: nn.Module

    @classmethod
    def of(cls, layer: Any, at: Block) -> _Block:
        """Resolve the family's table in one layer. Raises ModelError where there is no such module."""
        out_proj = find(layer, at.out_proj)
        scale1, scale2 = (
            nn.Identity() if path in (at.out_proj, "mlp") else find(layer, path) for path in (at.attn_out, at.mlp_out)
        )
        return cls(find(layer, at.ln1), find(layer, at.attn), out_proj, scale1, find(layer, at.ln2), layer.mlp, scale2)

    def qkv(
        self, x: Float[Tensor, "... d"], n_queries: int | None = None
    ) -> tuple[Float[Tensor, "... inner"], Float[Tensor, "... inner"], Float[Tensor, "... inner"]]:
        """Queries (of the first `n_queries` tokens), keys and values of a normalised input."""
        asking = x if n_queries is None else x[..., :n_queries, :]
        return self.attention.q_proj(asking), self.attention.k_proj(x), self.attention.v_proj(x)

    def heads(self, x: Float[Tensor, "pair token inner"]) -> Float[Tensor, "pair head token d_head"]:
        """Split the last dimension into heads."""
        return x.unflatten(-1, (-1, self.attention.head_dim)).transpose(1, 2)

    def finish(
        self,
        resid: Float[Tensor, "pair query d"],
        q: Float[Tensor, "pair query inner"],
        k: Float[Tensor, "pair token inner"],
        v: Float[Tensor, "pair token inner"],
    ) -> Float[Tensor, "pair query d"]:
        """The block's output at the query tokens, from their input and everybody's keys and values."""
        mixed = scaled_dot_product_attention(self.heads(q), self.heads(k), self.heads(v))
        resid = resid + self.scale1(self.out_proj(mixed.transpose(1, 2).flatten(2)))
        return resid + self.scale2(self.mlp(self.norm2(resid)))


class SparseTail:
    """See the module's docstring. Made by `SparseTail.of`."""

    def __init__(self, resumed: Resumed, blocks: Sequence[_Block], last: Site, class_token_only: bool):
        self.resumed, self.blocks, self.last = resumed, blocks, last
        self.class_token_only = class_token_only

    @classmethod
    def of(cls, resumed: Resumed, value: Float[Tensor, "image token d"]) -> SparseTail | None:
        """The fast tail from `resumed.site`, or None where no block is left after it.

        Args:
            resumed: the general tail from the same site.
            value: clean value at the site of the first images of the batch, to see which tokens are read out.
        """
        model, layer = resumed.model, resumed.site.layer
        assert layer is not None
        layers = model.blocks("vision")
        blocks = [_Block.of(block, model.table.towers["vision"].block) for block in layers[layer + 1 :]]
        if not blocks:
            return None
        tail = cls(resumed, blocks, Site("vision", len(layers) - 1, "hook_resid_post"), class_token_only=False)
        tail.start(slice(0, len(value)), value)
        tail.class_token_only = tail._reads_class_token_only()
        return tail

    def _reads_class_token_only(self) -> bool:
        """Whether the scores stay the same, bit for bit, when every other token of the last block's output is noise."""
        images = torch.arange(len(self.value), device=self.value.device)
        final = self._through_blocks(self.value, self.q, self.k, self.v)
        noisy = final.clone()
        noise = torch.randn(noisy[:, 1:].shape, generator=torch.Generator().manual_seed(0)).to(noisy)
        noisy[:, 1:] += noise * (1 + noisy.abs().max())
        same, other = (self.resumed.finish(self.last, images, value) for value in (final, noisy))
        return bool((same == other).all())

    def start(self, rows: slice, value: Float[Tensor, "image token d"]) -> Float[Tensor, "image target"]:
        """See Tail."""
        self.resumed.chunk, self.resumed.value = self.resumed.batch[rows], value
        self.value = value
        first = self.blocks[0]
        self.q, self.k, self.v = first.qkv(first.norm1(value))
        images = torch.arange(len(value), device=value.device)
        return self.resumed.finish(self.last, images, self._through_blocks(value, self.q, self.k, self.v))

    def scores(self, images: Int[Tensor, " pair"], change: Change) -> Float[Tensor, "pair target"]:
        """See Tail."""
        first, where = self.blocks[0], (change.pair, change.token)
        n_queries = 1 if self._stops_at_class_token(0) else self.value.shape[1]
        new = self.value[images[change.pair], change.token] + change.delta.to(self.value.dtype)
        q_new, k_new, v_new = first.qkv(first.norm1(new))
        k, v = self.k[images].index_put(where, k_new), self.v[images].index_put(where, v_new)
        asks = change.token < n_queries
        where = (change.pair[asks], change.token[asks])
        q = self.q[images, :n_queries].index_put(where, q_new[asks])
        value = self.value[images, :n_queries].index_put(where, new[asks])
        return self.resumed.finish(self.last, images, self._through_blocks(value, q, k, v))

    def _stops_at_class_token(self, index: int) -> bool:
        return self.class_token_only and index == len(self.blocks) - 1

    def _through_blocks(self, value: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Output of the last block, from the input, queries, keys and values of the first."""
        for index, block in enumerate(self.blocks):
            n_queries = 1 if self._stops_at_class_token(index) else value.shape[1]
            if index > 0:
                q, k, v = block.qkv(block.norm1(value), n_queries)
            value = block.finish(value[:, :n_queries], q[:, :n_queries], k, v)
        return value
