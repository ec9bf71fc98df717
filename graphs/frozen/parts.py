"""A forward pass as a chain of linear maps: patterns, norm scales and gates held at their values on one input.

Every part has two directions. `apply` is the part without its constants; `adjoint` is the transpose of `apply`, so that
`<adjoint(g), x> == <g, apply(x)>`; the constants stand in `shift` or `bias`. There is no batch axis: one image, one
prompt. Streams are `[pos, d]`; what runs backwards carries many targets at once, `[pos, target, d]`.

After Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models", local replacement
model; unlike there, biases and learned positions are kept, so that sums come out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphs.frozen.attention import FrozenAttention
from graphs.frozen.norms import FrozenNorm

__all__ = [
    "Bridge",
    "FrozenAttention",
    "FrozenBlock",
    "FrozenMLP",
    "FrozenNorm",
    "FrozenPass",
    "Inputs",
    "Readout",
    "Stack",
]


@dataclass(frozen=True, eq=False)
class FrozenMLP:
    """`post((norm(x) W_in + b_in) * gate W_out + b_out)` with the gate held.

    For an MLP without gating `gate = phi(z) / z` at `z = norm(x) W_in + b_in`. A gated MLP has `W_in` of its up branch,
    and `gate = phi(gate branch)`. `bias` is all that it writes that does not depend on `x`.
    """

    norm: FrozenNorm
    W_in: Float[Tensor, "d m"]
    b_in: Float[Tensor, " m"]
    gate: Float[Tensor, "pos m"]
    W_out: Float[Tensor, "m d"]
    b_out: Float[Tensor, " d"]
    post: FrozenNorm | None = None

    @cached_property
    def bias(self) -> Float[Tensor, "pos d"]:
        """What it writes when the linear part of its input norm gives zero."""
        hidden = (self.norm.shift @ self.W_in + self.b_in) * self.gate
        written = hidden @ self.W_out + self.b_out
        return written if self.post is None else self.post.apply(written)

    def apply(self, x: Float[Tensor, "*rest pos d"]) -> Float[Tensor, "*rest pos d"]:
        """What it writes because of `x`, without `bias`."""
        written = ((self.norm.linear(x) @ self.W_in) * self.gate) @ self.W_out
        return written if self.post is None else self.post.linear(written)

    def adjoint(self, g: Float[Tensor, "pos target d"]) -> Float[Tensor, "pos target d"]:
        """The transpose of `apply`."""
        g = g if self.post is None else self.post.adjoint(g)
        return self.norm.adjoint(((g @ self.W_out.T) * self.gate[:, None]) @ self.W_in.T)


@dataclass(frozen=True, eq=False)
class FrozenBlock:
    """One block: its two parts, and what the true forward pass had in it.

    `tower` is the model's own name of the tower, as in hook names ("text" also in the stack "text.1").
    `mlp_in` is what a transcoder reads (`ln2.hook_normalized`), and `norm2` makes it of `resid_mid`; `mlp_out` is what
    the block adds to the stream (`hook_mlp_out`, after a post-norm or layer scale where there is one).
    """

    tower: str
    layer: int
    attention: FrozenAttention
    mlp: FrozenMLP
    resid_pre: Float[Tensor, "pos d"]
    resid_mid: Float[Tensor, "pos d"]
    mlp_in: Float[Tensor, "pos d"]
    mlp_out: Float[Tensor, "pos d"]
    resid_post: Float[Tensor, "pos d"]

    @property
    def norm2(self) -> FrozenNorm:
        """The norm before the MLP."""
        return self.mlp.norm


@dataclass(frozen=True, eq=False)
class Inputs:
    """The summands of the stream that enters the first block, after any input norm has been folded into them.

    `kinds` has, under "patch", "cls", "pos", "token" or "bias", positions and a vector for each. Their sum, and what
    the bridge brings, is `resid_pre` of the first block. The rows of "bias" are one node.
    """

    kinds: Mapping[str, tuple[Int[Tensor, " _n"], Float[Tensor, "_n _d"]]]

    def total(self, shape: tuple[int, int]) -> Float[Tensor, "pos d"]:
        """Their sum as a stream of this shape."""
        found = next(iter(self.kinds.values()))[1].new_zeros(shape)
        for positions, vectors in self.kinds.values():
            found.index_add_(0, positions, vectors)
        return found


@dataclass(frozen=True, eq=False)
class Bridge:
    """From the last stream of one stack into the input of the next: a projector with its gate held.

    `norm`, then `mix` over positions (picks or pools rows), then `inner` norm, `W_in`, `gate`, `W_out`; row `i` lands
    at position `slots[i]`. Parts that a projector does not have are None. `bias` is all that does not depend on `x`,
    at every position of the receiving stack.
    """

    norm: FrozenNorm | None
    mix: Float[Tensor, "slot pos_prev"]
    inner: FrozenNorm | None
    W_in: Float[Tensor, "d_prev m"]
    gate: Float[Tensor, "slot m"] | None
    W_out: Float[Tensor, "m d"] | None
    slots: Int[Tensor, " slot"]
    bias: Float[Tensor, "pos d"]
    name: str = "projector"

    def apply(self, x: Float[Tensor, "pos_prev d_prev"]) -> Float[Tensor, "pos d"]:
        """What it brings because of `x`, without `bias`."""
        x = self.mix @ (x if self.norm is None else self.norm.linear(x))
        x = (x if self.inner is None else self.inner.linear(x)) @ self.W_in
        x = x if self.gate is None else x * self.gate
        x = x if self.W_out is None else x @ self.W_out
        return torch.zeros_like(self.bias).index_add_(0, self.slots, x)

    def adjoint(self, g: Float[Tensor, "pos target d"]) -> Float[Tensor, "pos_prev target d_prev"]:
        """The transpose of `apply`."""
        g = g[self.slots]
        g = g if self.W_out is None else g @ self.W_out.T
        g = (g if self.gate is None else g * self.gate[:, None]) @ self.W_in.T
        g = g if self.inner is None else self.inner.adjoint(g)
        g = (self.mix.T @ g.flatten(1)).unflatten(1, g.shape[1:])
        return g if self.norm is None else self.norm.adjoint(g)


@dataclass(frozen=True, eq=False)
class Stack:
    """The blocks of one tower on one input.

    `tower` is "vision" or "text", or "text.0", "text.1", ... for the prompts of a dual encoder. `labels` names the
    positions: "CLS", "patch 0,3", or the word. `bridge_from` is the index of the stack that the bridge reads.
    """

    tower: str
    blocks: tuple[FrozenBlock, ...]
    inputs: Inputs
    causal: bool
    labels: tuple[str, ...]
    bridge: Bridge | None = None
    bridge_from: int | None = None

    @property
    def final(self) -> Float[Tensor, "pos d"]:
        """The stream after the last block."""
        return self.blocks[-1].resid_post


@dataclass(frozen=True, eq=False)
class Readout:
    """An output that is linear in one stream of one stack: `(seed * stream).sum() + constant == value`.

    The stream is the last one, or that of block `layer`: after its attention (`point` "mid") or after all of it
    ("post"). `value` is the output's own value from the true forward pass. `weight` is its share in a joint graph: over
    the readouts of one output, `weight * value` adds up to its value (of several logits, to their mean).
    `part_of` names the score that a readout is a half of; empty where it is an output by itself.
    """

    name: str
    kind: str
    stack: int
    seed: Float[Tensor, "pos d"]
    constant: float
    value: float
    weight: float = 1.0
    layer: int = -1
    point: Literal["mid", "post"] = "post"
    part_of: str = ""


@dataclass(frozen=True, eq=False)
class FrozenPass:
    """All of it for one input: stacks (one that a bridge reads stands before the bridge's own), and outputs.

    `freezes` names every value that is held: hook names, and in words what has no hook. The MLPs of the pass are for a
    `Replacement` to replace or to go through; where it goes through them, its own `freezes` has their gates too.
    """

    stacks: tuple[Stack, ...]
    readouts: tuple[Readout, ...]
    freezes: tuple[str, ...]
    model: Mapping[str, str] = field(default_factory=dict)
    image: str = ""

    def stream_of(self, readout: Readout) -> Float[Tensor, "pos d"]:
        """The stream that a readout reads."""
        block = self.stacks[readout.stack].blocks[readout.layer]
        return block.resid_mid if readout.point == "mid" else block.resid_post
