"""From an output to a direction in the last stream: the adjoint of what stands between the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from graphs.frozen.attention import FrozenAttention
from graphs.frozen.norms import FrozenNorm
from graphs.frozen.parts import FrozenMLP, Readout, Stack
from graphs.targets import Feature
from mechinterp.errors import UsageError

__all__ = ["Head", "PooledHead", "RowHead", "encoder_of", "feature_readouts"]


@dataclass(frozen=True, eq=False)
class RowHead:
    """`norm(stream)[row] W^T + b`. `W` is None for the identity."""

    norm: FrozenNorm
    row: int
    W: Float[Tensor, "d_out d"] | None = None
    b: Float[Tensor, " d_out"] | None = None

    def pull(self, direction: Float[Tensor, " d_out"]) -> tuple[Float[Tensor, "pos d"], float]:
        """The seed and the constant of `direction . head(stream)`."""
        constant = 0.0 if self.b is None else float(self.b @ direction)
        direction = direction if self.W is None else direction @ self.W
        g = direction.new_zeros(len(self.norm.scale), 1, len(direction))
        g[self.row, 0] = direction
        return self.norm.adjoint(g)[:, 0].contiguous(), constant + float(self.norm.shift @ direction)


@dataclass(frozen=True, eq=False)
class PooledHead:
    """SigLIP's attention pooling: a probe attends over `norm(stream)`; then a residual MLP with its gate held."""

    attention: FrozenAttention
    mlp: FrozenMLP

    def pull(self, direction: Float[Tensor, " d_out"]) -> tuple[Float[Tensor, "pos d"], float]:
        """The seed and the constant of `direction . head(stream)`."""
        g = direction[None, None]
        constant = (self.mlp.bias * direction).sum()
        g = g + self.mlp.adjoint(g)
        return self.attention.adjoint(g)[:, 0].contiguous(), float(constant + (self.attention.bias * g[:, 0]).sum())


Head = RowHead | PooledHead
"""What maps the last stream of a stack to a vector `[d_out]`, frozen."""


def encoder_of(feature: Feature) -> tuple[Float[Tensor, " d"], float]:
    """Direction and constant of a feature's pre-activation: `direction . x + constant`, `x` what it reads.

    The constant is what the dictionary's own `pre_activations` gives at zero, so `b_dec` is in it where it is
    subtracted. For a dictionary without that method: `b_enc`, less `direction . b_dec` where its sae-lens config
    (`apply_b_dec_to_input`) says so.
    """
    dictionary: Any = feature.placed.dictionary
    direction = dictionary.W_enc.detach()[:, feature.index]
    if hasattr(dictionary, "pre_activations"):
        return direction, float(dictionary.pre_activations(torch.zeros_like(direction))[feature.index])
    constant = float(dictionary.b_enc[feature.index])
    if getattr(getattr(dictionary, "cfg", None), "apply_b_dec_to_input", False):
        constant -= float(dictionary.b_dec.detach() @ direction)
    return direction, constant


def feature_readouts(outputs: Sequence[Feature], stacks: Sequence[Stack]) -> list[Readout]:
    """The pre-activations of features as outputs. Raises UsageError for a site that no stack has."""
    return [_feature_readout(feature, stacks) for feature in outputs]


def _feature_readout(feature: Feature, stacks: Sequence[Stack]) -> Readout:
    index = next((i for i, stack in enumerate(stacks) if stack.tower == feature.tower), None)
    if index is None:
        have = ", ".join(stack.tower for stack in stacks)
        raise UsageError(f"there is no stack {feature.tower!r} here", where="Feature.tower", hint=f"there is: {have}")
    stack = stacks[index]
    if not 0 <= feature.layer < len(stack.blocks) or not -len(stack.labels) <= feature.pos < len(stack.labels):
        raise UsageError(f"block {feature.layer}, position {feature.pos} is outside the stack", where=str(stack.tower))
    block, pos, point = stack.blocks[feature.layer], feature.pos % len(stack.labels), feature.placed.reads.point
    direction, constant = encoder_of(feature)
    direction = direction.to(block.resid_mid.dtype)
    match point:
        case "ln2.hook_normalized":
            head, stream, read, at = RowHead(block.norm2, pos), "mid", block.mlp_in, feature.layer
            seed, shift = head.pull(direction)
        case "hook_resid_mid" | "hook_resid_post" | "hook_resid_pre":
            stream, at = ("mid", feature.layer) if point == "hook_resid_mid" else ("post", feature.layer)
            if point == "hook_resid_pre":
                raise UsageError("a stream before a block has no readout", hint="place it at the block before, as post")
            read = block.resid_mid if stream == "mid" else block.resid_post
            seed, shift = torch.zeros_like(read), 0.0
            seed[pos] = direction
        case _:
            raise UsageError(f"a dictionary that reads {point} is no node of these graphs", where="Feature.placed")
    name = f"{feature.tower}.L{feature.layer}.P{pos}.F{feature.index}"
    value = float(read[pos].double() @ direction.double()) + constant
    return Readout(name, "feature", index, seed, constant + shift, value, 1.0, at, stream)
