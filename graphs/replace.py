"""What stands in the place of the MLPs on one input: active features, what they leave unexplained, and constants.

Transcoder mode (Ameisen et al. 2025, local replacement model): at each block, `mlp_out = sum_s a_s d_s + b_dec +
W_skip mlp_in + error`, exactly, because the error is what is left over. A block without a dictionary has no features,
and all of its MLP output is error. SAE mode: at the residual stream after a block, `resid_post = sum_s a_s d_s + b_dec
+ error`; the block between two such places is linearised with its MLP gate held.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from graphs.frozen.norms import FrozenNorm
from graphs.frozen.parts import FrozenBlock, FrozenPass
from mechinterp.errors import UsageError
from mechinterp.types import Dictionary, Placed

__all__ = ["Direction", "Level", "Mode", "Replacement"]

Mode = Literal["transcoder", "sae"]
Direction = Literal["encoder", "decoder"]
TOLERANCE = 1e-3
"""Largest difference, relative to the largest activation, between a dictionary's `encode` and our own reading of it."""


@dataclass(frozen=True, eq=False)
class Level:
    """The features, errors and constants of one block of one stack.

    Args:
        pos, index: position and latent of each active feature, sorted by both.
        activation: of each feature, as its dictionary encodes it.
        pre: pre-activation in the true forward.
        constant: the part of `pre` that does not depend on the stream.
        reads: direction of each feature in the stream that it reads, the norm folded in: `pre - constant = reads . x`.
        writes: activation times decoder row.
        error: what the dictionary leaves unexplained at each position.
        bias: what the dictionary writes at every position, whatever it reads.
        skip: `W_skip` of a transcoder with a linear path.
    """

    stack: int
    layer: int
    pos: Int[Tensor, " feature"]
    index: Int[Tensor, " feature"]
    activation: Float[Tensor, " feature"]
    pre: Float[Tensor, " feature"]
    constant: Float[Tensor, " feature"]
    reads: Float[Tensor, "feature d"]
    writes: Float[Tensor, "feature d"]
    error: Float[Tensor, "pos d"]
    bias: Float[Tensor, " d"]
    skip: Float[Tensor, "d d"] | None = None

    def __len__(self) -> int:
        return len(self.pos)


class Replacement:
    """A frozen pass with dictionaries in it.

    Args:
        frozen: the pass.
        dictionaries: transcoders (from `ln2.hook_normalized` to `hook_mlp_out`) or SAEs at `hook_resid_post`, at most
            one for each block.
        mode: which of the two.
        direction: in SAE mode, what a feature is as a target: its encoder ("why did it fire"; pre-activation) or its
            decoder ("what does the stream hold along it"; Kamath et al. 2025).

    Raises UsageError for a dictionary that stands elsewhere, or whose `encode` is not what its weights say.
    """

    def __init__(
        self,
        frozen: FrozenPass,
        dictionaries: Sequence[Placed],
        mode: Mode = "transcoder",
        direction: Direction = "encoder",
    ):
        if direction == "decoder" and mode == "transcoder":
            raise UsageError("a transcoder's decoder does not live where it reads", where="direction")
        self.frozen, self.mode, self.direction = frozen, mode, direction
        self.placed = _by_block(frozen, dictionaries, mode)
        self.dtype = frozen.stacks[0].final.dtype
        self.levels: dict[tuple[int, int], Level] = {}
        for number, stack in enumerate(frozen.stacks):
            for block in stack.blocks:
                found = self.placed.get((block.tower, block.layer))
                if found is not None:
                    self.levels[number, block.layer] = self._level(number, block, found)
                elif mode == "transcoder":
                    self.levels[number, block.layer] = _all_error(number, block)

    @cached_property
    def n_features(self) -> int:
        """Number of active features."""
        return sum(map(len, self.levels.values()))

    @property
    def freezes(self) -> tuple[str, ...]:
        """Everything that is held: what the pass holds, and in SAE mode the gates of the MLPs that it goes through."""
        if self.mode == "transcoder":
            return self.frozen.freezes
        blocks = [(stack.tower, block.layer) for stack in self.frozen.stacks for block in stack.blocks]
        return (*self.frozen.freezes, *(f"gate of the MLP of {tower}.blocks.{layer}" for tower, layer in blocks))

    def _level(self, number: int, block: FrozenBlock, placed: Placed) -> Level:
        dictionary = _cast(placed.dictionary, self.dtype)
        if self.mode == "transcoder":
            x, written, norm = block.mlp_in, block.mlp_out, block.norm2
        else:
            x, written, norm = block.resid_post, block.resid_post, None
        with torch.no_grad():
            acts = dictionary.encode(x).to(self.dtype)
            pos, index = acts.nonzero(as_tuple=True)
            activation = acts[pos, index]
            encoder = dictionary.W_enc.detach().T[index]
            skip = getattr(dictionary, "W_skip", None)
            skip = None if skip is None else skip.detach()
            b_dec = dictionary.b_dec.detach()
            said = dictionary.decode(acts) if skip is None else dictionary.decode(acts) + x @ skip
            offset = _offset(dictionary, x, pos, index, activation, str(placed.reads))
            bias = b_dec if skip is None or norm is None else b_dec + norm.shift @ skip
            decoder = dictionary.W_dec.detach()[index]
        if self.direction == "decoder":
            encoder, offset = decoder, torch.zeros_like(activation)
        pre = (x[pos] * encoder).sum(-1) + offset
        reads, constant = _through(norm, encoder, pos, offset)
        return Level(
            stack=number,
            layer=block.layer,
            pos=pos,
            index=index,
            activation=activation,
            pre=pre,
            constant=constant,
            reads=reads,
            writes=activation[:, None] * decoder,
            error=written - said,
            bias=bias,
            skip=skip,
        )


def _by_block(frozen: FrozenPass, dictionaries: Sequence[Placed], mode: Mode) -> dict[tuple[str, int], Placed]:
    """The dictionary of each block, checked. The prompts `text.0`, `text.1` of a contrast share those of `text`."""
    points = ("ln2.hook_normalized", "hook_mlp_out") if mode == "transcoder" else ("hook_resid_post",) * 2
    given: dict[tuple[str, int], Placed] = {}
    for placed in dictionaries:
        where = f"{placed.reads} -> {placed.writes}"
        if (placed.reads.point, placed.writes.point) != points or placed.reads.layer != placed.writes.layer:
            hint = f"a {mode} graph takes dictionaries from {points[0]} to {points[1]} of one block"
            raise UsageError("a dictionary stands in the wrong place", where=where, hint=hint)
        assert placed.reads.layer is not None
        if (placed.reads.tower, placed.reads.layer) in given:
            raise UsageError("a block has two dictionaries", where=where)
        given[placed.reads.tower, placed.reads.layer] = placed
    blocks = [(block.tower, block.layer) for stack in frozen.stacks for block in stack.blocks]
    found = {}
    for tower, layer in blocks:
        placed = given.get((tower, layer)) or given.get((tower.partition(".")[0], layer))
        if placed is not None:
            found[tower, layer] = placed
    absent = sorted(set(given) - set(found) - {(tower.partition(".")[0], layer) for tower, layer in found})
    if absent:
        tower, layer = absent[0]
        raise UsageError(f"the pass has no block {layer} of {tower}", where=str(given[tower, layer].reads))
    return found


def _cast(dictionary: Dictionary, dtype: torch.dtype) -> Dictionary:
    """The dictionary in this dtype; a copy where it has another."""
    if dictionary.W_enc.dtype == dtype:
        return dictionary
    if not isinstance(dictionary, nn.Module):
        raise UsageError(f"a dictionary has weights of {dictionary.W_enc.dtype} in a graph of {dtype}", where="dtype")
    return copy.deepcopy(dictionary).to(dtype)


def _offset(
    dictionary: Dictionary,
    x: Float[Tensor, "pos d"],
    pos: Int[Tensor, " feature"],
    index: Int[Tensor, " feature"],
    activation: Float[Tensor, " feature"],
    where: str,
) -> Float[Tensor, " feature"]:
    """`pre - e . x` of each feature: its bias, and what centring takes off. Checked against `encode`."""
    encoder = dictionary.W_enc.detach().T[index]
    plain = dictionary.b_enc.detach()[index]
    centring = plain - encoder @ dictionary.b_dec.detach() if encoder.shape[1] == len(dictionary.b_dec) else plain
    centred = getattr(dictionary, "centred", None)
    options = {True: (centring,), False: (plain,), None: (plain, centring)}[centred]
    gated = getattr(dictionary, "r_mag", None) is not None  # there the magnitude differs from the gate by design
    if gated or not len(activation):
        return options[-1]
    linear = (x[pos] * encoder).sum(-1)
    wrong = [float((linear + offset - activation).abs().amax()) for offset in options]
    if min(wrong) > TOLERANCE * float(activation.abs().amax()):
        raise UsageError(
            "a dictionary's activations are not its weights applied to its input",
            where=where,
            hint="dictionaries that normalise their input must be folded first",
        )
    return options[wrong.index(min(wrong))]


def _through(
    norm: FrozenNorm | None,
    encoder: Float[Tensor, "feature d"],
    pos: Int[Tensor, " feature"],
    offset: Float[Tensor, " feature"],
) -> tuple[Float[Tensor, "feature d"], Float[Tensor, " feature"]]:
    """Directions and constants as the raw stream sees them: `e . norm(x) = (C gain e / scale) . x + e . shift`."""
    if norm is None:
        return encoder, offset
    g = encoder * norm.gain
    g = g - g.mean(-1, keepdim=True) if norm.centres else g
    return g / norm.scale[pos], offset + encoder @ norm.shift


def _all_error(number: int, block: FrozenBlock) -> Level:
    none = torch.zeros(0, dtype=torch.long)
    rows, scalars = block.mlp_out[:0], block.mlp_out.new_zeros(0)
    zero = block.mlp_out.new_zeros(block.mlp_out.shape[1])
    return Level(number, block.layer, none, none, scalars, scalars, scalars, rows, rows, block.mlp_out, zero)
