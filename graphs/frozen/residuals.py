"""Does a frozen pass say what the true forward pass had? Walk it forward, and compare everything on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from graphs.frozen.attention import Scores
from graphs.frozen.parts import FrozenBlock, FrozenPass

__all__ = ["Residual", "check", "worst"]


@dataclass(frozen=True)
class Residual:
    """How far a walked value is from the true one: the largest difference, relative to the largest true value."""

    name: str
    relative: float


def check(frozen: FrozenPass) -> list[Residual]:
    """Every cached value, pattern and readout against what the frozen parts give.

    The streams are walked from the inputs on, with the true MLP outputs added, so that an error anywhere is carried to
    the end. The MLP, its input norm and the pattern of each block start from the true values. For a readout, the
    difference is relative to the sum of the sizes of its summands over positions.
    """
    finals: list[Tensor] = []
    found: list[Residual] = []
    for stack in frozen.stacks:
        x = stack.inputs.total((stack.final.shape[0], stack.final.shape[1]))
        if stack.bridge is not None and stack.bridge_from is not None:
            x = x + stack.bridge.apply(finals[stack.bridge_from]) + stack.bridge.bias
        for block in stack.blocks:
            name = f"{stack.tower}.blocks.{block.layer}"
            found.append(_compare(f"{name}.hook_resid_pre", x, block.resid_pre))
            x = x + block.attention.apply(x) + block.attention.bias
            found.append(_compare(f"{name}.hook_resid_mid", x, block.resid_mid))
            found += _inside(name, block)
            x = x + block.mlp_out
            found.append(_compare(f"{name}.hook_resid_post", x, block.resid_post))
        finals.append(x)
    for readout in frozen.readouts:
        block = frozen.stacks[readout.stack].blocks[readout.layer]
        last = readout.point == "post" and block is frozen.stacks[readout.stack].blocks[-1]
        stream = finals[readout.stack] if last else frozen.stream_of(readout)
        terms = (readout.seed * stream).double().sum(-1)
        size = float(terms.abs().sum()) + abs(readout.constant) + abs(readout.value)
        off = abs(float(terms.sum()) + readout.constant - readout.value)
        found.append(Residual(f"out: {readout.name}", off / size if size else off))
    return found


def worst(residuals: list[Residual]) -> Residual:
    """The largest of them; one that is not a number counts as larger than any number."""
    return max(residuals, key=lambda r: r.relative if r.relative == r.relative else float("inf"))


def _inside(name: str, block: FrozenBlock) -> Iterator[Residual]:
    yield _compare(f"{name}.ln2.hook_normalized", block.norm2.apply(block.resid_mid), block.mlp_in)
    yield _compare(f"{name}.hook_mlp_out", block.mlp.apply(block.resid_mid) + block.mlp.bias, block.mlp_out)
    scores = block.attention.scores
    if scores is not None:
        yield _compare(f"{name}.attn.hook_pattern", _pattern(scores, block.attention.pattern), block.attention.pattern)
        yield from _projections(name, scores, block.attention.norm.apply(block.resid_pre))


def _pattern(scores: Scores, true: Tensor) -> Tensor:
    """The pattern that the scores make on the keys that the true one allows."""
    return torch.softmax(scores.values.masked_fill(true == 0, -torch.inf), dim=-1)


def _projections(name: str, scores: Scores, normed: Tensor) -> Iterator[Residual]:
    """Queries and keys against the linear map that is said to make them."""
    for side, true, W, b, norms in (
        ("q", scores.q, scores.W_Q, scores.b_Q, scores.q_norm),
        ("k", scores.k, scores.W_K, scores.b_K, scores.k_norm),
    ):
        x = normed @ W + b[:, None]
        x = torch.stack([norm.apply(row) for norm, row in zip(norms, x, strict=True)]) if norms else x
        yield _compare(f"{name}.attn.{side}", x if scores.rotate is None else scores.rotate(x), true)


def _compare(name: str, found: Tensor, true: Tensor) -> Residual:
    largest = float(true.abs().max())
    off = float((found - true).abs().max())
    return Residual(name, off / largest if largest else off)
