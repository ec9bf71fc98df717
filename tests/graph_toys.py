"""Toy forward passes whose every number is known: `random_pass`, `bridged_pass`, and dictionaries that are exact.

    frozen = random_pass(seed=0)                      # one causal stack with words and learned positions
    frozen = random_pass(seed=0, causal=False)        # a vision stack: CLS, patches, positions, biases
    frozen = bridged_pass(seed=0)                     # a vision stack, a GELU projector, a causal RMSNorm stack
    placed = relu_transcoders(frozen)                 # the ReLU MLPs themselves, as transcoders without error

The toy runs a true nonlinear forward pass (softmax, norms, ReLU) and keeps what came out, independent of the parts
under test: nothing here calls `apply`, `adjoint` or `bias`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphs.frozen.attention import FrozenAttention, Scores
from graphs.frozen.norms import FrozenNorm
from graphs.frozen.parts import Bridge, FrozenBlock, FrozenMLP, FrozenPass, Inputs, Readout, Stack
from mechinterp.types import Placed, Site

EPS = 1e-6


class ReluTranscoder:
    """A ReLU MLP as a dictionary: `encode` its hidden layer, `decode` its output."""

    def __init__(self, mlp: FrozenMLP):
        self.W_enc, self.b_enc = torch.nn.Parameter(mlp.W_in), torch.nn.Parameter(mlp.b_in)
        self.W_dec, self.b_dec = torch.nn.Parameter(mlp.W_out), torch.nn.Parameter(mlp.b_out)
        for parameter in (self.W_enc, self.b_enc, self.W_dec, self.b_dec):
            parameter.requires_grad_(False)

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.W_enc + self.b_enc)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return feature_acts @ self.W_dec + self.b_dec


def relu_transcoders(frozen: FrozenPass) -> list[Placed]:
    """The MLP of every block of every stack, as a transcoder whose error is zero."""
    return [
        Placed(
            ReluTranscoder(block.mlp),
            reads=Site(block.tower, block.layer, "ln2.hook_normalized"),
            writes=Site(block.tower, block.layer, "hook_mlp_out"),
        )
        for stack in frozen.stacks
        for block in stack.blocks
    ]


@dataclass
class Draw:
    """Random tensors of one dtype from one seed."""

    generator: torch.Generator
    dtype: torch.dtype

    def __call__(self, *shape: int, std: float = 1.0) -> Tensor:
        found = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * std
        return found.to(self.dtype)


def true_norm(x: Tensor, gain: Tensor, shift: Tensor, centres: bool) -> tuple[Tensor, Tensor]:
    """What the norm gives, and its scale."""
    x = x - x.mean(-1, keepdim=True) if centres else x
    scale = (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    return gain * x / scale + shift, scale


def _block(draw: Draw, tower: str, layer: int, x: Tensor, heads: int, m: int, causal: bool, centres: bool):
    """One block on the stream `x`: its true forward pass, and the parts."""
    pos, d = x.shape
    d_head = d // heads
    gains, shifts = [1 + draw(d, std=0.3) for _ in range(2)], [draw(d, std=0.3 * centres) for _ in range(2)]
    W_Q, W_K, W_V = (draw(heads, d, d_head, std=d**-0.5) for _ in range(3))
    b_Q, b_K, b_V = (draw(heads, d_head, std=0.3) for _ in range(3))
    W_O, b_O = draw(heads, d_head, d, std=d**-0.5), draw(d, std=0.3)
    W_in, b_in = draw(d, m, std=d**-0.5), draw(m, std=0.3)
    W_out, b_out = draw(m, d, std=m**-0.5), draw(d, std=0.3)

    normed, scale1 = true_norm(x, gains[0], shifts[0], centres)
    q, k, v = (normed @ W + b[:, None] for W, b in ((W_Q, b_Q), (W_K, b_K), (W_V, b_V)))
    scores = q @ k.transpose(-1, -2) * d_head**-0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(pos, pos, dtype=torch.bool).tril(), -torch.inf)
    pattern = scores.softmax(-1)
    mid = x + (pattern @ v @ W_O).sum(0) + b_O
    mlp_in, scale2 = true_norm(mid, gains[1], shifts[1], centres)
    pre = mlp_in @ W_in + b_in
    mlp_out = torch.relu(pre) @ W_out + b_out

    norms = [FrozenNorm(g, s, c, centres) for g, s, c in zip(gains, shifts, (scale1, scale2), strict=True)]
    kept = Scores(q, k, d_head**-0.5, W_Q, W_K, b_Q, b_K)
    attention = FrozenAttention(norms[0], pattern, W_V, b_V, W_O, b_O, kept)
    mlp = FrozenMLP(norms[1], W_in, b_in, (pre > 0).to(x.dtype), W_out, b_out)
    return FrozenBlock(tower, layer, attention, mlp, x, mid, mlp_in, mlp_out, mid + mlp_out)


def _blocks(draw: Draw, tower: str, x: Tensor, heads: int, layers: int, causal: bool, centres: bool):
    blocks: list[FrozenBlock] = []
    for layer in range(layers):
        blocks.append(_block(draw, tower, layer, x, heads, 2 * x.shape[1], causal, centres))
        x = blocks[-1].resid_post
    return tuple(blocks)


def _readout(draw: Draw, stacks: list[Stack], index: int, centres: bool, pos: int, name: str, weight: float) -> Readout:
    """A logit with a final norm: `u . norm(x_pos) + b`."""
    x = stacks[index].final
    d = x.shape[1]
    gain, shift = 1 + draw(d, std=0.3), draw(d, std=0.3 * centres)
    u, b = draw(d), float(draw(1))
    normed, scale = true_norm(x, gain, shift, centres)
    direction = u * gain / scale[pos]
    seed = torch.zeros_like(x)
    seed[pos] = direction - direction.mean() if centres else direction
    value = float(normed[pos].double() @ u.double()) + b
    return Readout(name, "logit", index, seed, float(shift.double() @ u.double()) + b, value, weight)


def _freezes(stacks: list[Stack]) -> tuple[str, ...]:
    names = ("ln1.hook_scale", "attn.hook_pattern", "ln2.hook_scale")
    held = [f"{s.tower}.blocks.{b.layer}.{name}" for s in stacks for b in s.blocks for name in names]
    return (*held, *(f"{s.tower}.ln_final.hook_scale" for s in stacks[-1:]))


def random_pass(
    seed: int = 0,
    d: int = 16,
    heads: int = 2,
    layers: int = 3,
    pos: int = 6,
    causal: bool = True,
    dtype: torch.dtype = torch.float64,
    norm: str = "layer",
    outputs: int = 1,
) -> FrozenPass:
    """One stack of ReLU blocks. Causal: tower "text", word inputs; else tower "vision", CLS and patch inputs.

    `norm` is "layer" (centring, with shifts) or "rms". The outputs are logits at the last position (causal) or at CLS.
    """
    draw = Draw(torch.Generator().manual_seed(seed), dtype)
    centres = norm == "layer"
    every = torch.arange(pos)
    if causal:
        kinds = {"token": (every, draw(pos, d)), "pos": (every, draw(pos, d, std=0.5))}
        labels = tuple(f"word{i}" for i in range(pos))
    else:
        kinds = {
            "patch": (every[1:], draw(pos - 1, d)),
            "cls": (every[:1], draw(1, d)),
            "pos": (every, draw(pos, d, std=0.5)),
            "bias": (every, draw(d, std=0.3).expand(pos, d).clone()),
        }
        labels = ("CLS", *(f"patch 0,{i}" for i in range(pos - 1)))
    x = torch.zeros(pos, d, dtype=dtype)
    for where, vectors in kinds.values():
        x[where] += vectors
    tower = "text" if causal else "vision"
    stacks = [Stack(tower, _blocks(draw, tower, x, heads, layers, causal, centres), Inputs(kinds), causal, labels)]
    at = pos - 1 if causal else 0
    readouts = tuple(_readout(draw, stacks, 0, centres, at, f"logit {i}", 1 / outputs) for i in range(outputs))
    return FrozenPass(tuple(stacks), readouts, _freezes(stacks), {"label": "toy", "family": "toy", "sha256": "0"}, "0")


def bridged_pass(
    seed: int = 0, d: tuple[int, int] = (12, 16), layers: tuple[int, int] = (2, 2), dtype: torch.dtype = torch.float64
) -> FrozenPass:
    """A vision stack (LayerNorm, CLS and 4 patches), a two-layer GELU projector, a causal RMSNorm stack of 7 positions.

    Image tokens stand at positions 1 to 4 of the text stack; the projector does not read CLS.
    """
    seen = random_pass(seed, d=d[0], layers=layers[0], pos=5, causal=False, dtype=dtype)
    draw = Draw(torch.Generator().manual_seed(seed + 1000), dtype)
    pos, slots, words = 7, torch.arange(1, 5), torch.tensor([0, 5, 6])
    W_in, b_in = draw(d[0], 20, std=d[0] ** -0.5), draw(20, std=0.3)
    W_out, b_out = draw(20, d[1], std=20**-0.5), draw(d[1], std=0.3)
    z = seen.stacks[0].final[1:] @ W_in + b_in
    hidden = torch.nn.functional.gelu(z)
    x = torch.zeros(pos, d[1], dtype=dtype)
    x[slots] = hidden @ W_out + b_out
    tokens = draw(3, d[1])
    x[words] = tokens
    gate = torch.special.ndtr(z)
    bias = torch.zeros(pos, d[1], dtype=dtype)
    bias[slots] = (b_in * gate) @ W_out + b_out
    mix = torch.eye(5, dtype=dtype)[1:].contiguous()
    bridge = Bridge(None, mix, None, W_in, gate, W_out, slots, bias)
    labels = ("<s>", *(f"image 0,{i}" for i in range(4)), "is", "it")
    blocks = _blocks(draw, "text", x, 2, layers[1], True, False)
    stacks = [seen.stacks[0], Stack("text", blocks, Inputs({"token": (words, tokens)}), True, labels, bridge, 0)]
    readouts = (_readout(draw, stacks, 1, False, pos - 1, "logit 0", 1.0),)
    freezes = (*_freezes(stacks), "projector gate")
    return FrozenPass(tuple(stacks), readouts, freezes, {"label": "toy", "family": "toy", "sha256": "0"}, "0")


def parts_of(frozen: FrozenPass) -> dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Any, Any]]:
    """Every linear part of a pass: its map, its adjoint, the shape that goes in and the one that comes out."""
    found = {}
    for stack in frozen.stacks:
        for block in stack.blocks:
            shape, name = tuple(block.resid_pre.shape), f"{stack.tower}.{block.layer}"
            found[f"{name}.attention"] = (block.attention.apply, block.attention.adjoint, shape, shape)
            found[f"{name}.mlp"] = (block.mlp.apply, block.mlp.adjoint, shape, shape)
            found[f"{name}.norm2"] = (block.norm2.linear, block.norm2.adjoint, shape, shape)
        if stack.bridge is not None:
            source = frozen.stacks[stack.bridge_from].final
            shapes = tuple(source.shape), tuple(stack.final.shape)
            found[f"{stack.tower}.bridge"] = (stack.bridge.apply, stack.bridge.adjoint, *shapes)
    return found


def pairing_errors(frozen: FrozenPass, seed: int) -> dict[str, float]:
    """`<adjoint(g), x> - <g, apply(x)>` of every part, relative, for several g at once."""
    generator = torch.Generator().manual_seed(seed)
    errors = {}
    for name, (apply, adjoint, shape_in, shape_out) in parts_of(frozen).items():
        x = torch.randn(shape_in, generator=generator, dtype=torch.float64)
        g = torch.randn(shape_out[0], 3, shape_out[1], generator=generator, dtype=torch.float64)
        back, ahead = torch.einsum("ptd,pd->t", adjoint(g), x), torch.einsum("ptd,pd->t", g, apply(x))
        errors[name] = float(((back - ahead).abs() / (ahead.abs() + 1)).max())
    return errors
