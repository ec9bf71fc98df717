"""What the inputs of a stack do to all of its features, in one walk from the bottom up.

A walk down ends with a layer that only inputs are asked for. A stack has few inputs and many features, so it costs less
to walk the inputs up: the transpose of a frozen layer of attention is one too, with what it reads and what it writes
exchanged and the pattern turned, and inputs then take the place of targets in a `Front`. In a causal stack an input
reaches the positions after it, so they are counted from the last one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphs.fronts import Front, Heads, Space, in_batches
from graphs.replace import Level

__all__ = ["climb", "pays"]


def pays(inputs: int, layers: int, targets: int) -> bool:
    """Whether walking so many inputs up all layers costs less than the one layer that each target saves."""
    return inputs * layers < targets


def climb(
    pos: Int[Tensor, " input"],
    vectors: Float[Tensor, "input d"],
    heads: Sequence[Heads],
    levels: Sequence[Level],
    n_pos: int,
    causal: bool,
    space: Space,
) -> list[Float[Tensor, "input _feature"]]:
    """The effect of every input of a stack on all features of each block, which read after its attention.

    Args:
        pos, vectors: what enters the stack, and where.
        heads, levels: attention and features of all blocks, from the bottom up.
        n_pos, causal: of the stack.
        space: for the front; what is returned has memory of its own.
    """
    turned = [_turned(each, causal) for each in heads]
    place = n_pos - 1 - pos if causal else pos
    order = place.argsort(stable=True)
    place, vectors = place[order], vectors[order]
    on = [vectors.new_zeros(len(place), len(level)) for level in levels]
    reads = [_by_position(level, n_pos, causal) for level in levels]
    for batch, reach in in_batches(place, vectors.shape[1], n_pos, causal, vectors.element_size()):
        front = Front.start(place[batch], vectors[batch], reach, space)
        for layer, effects, (padded, slots) in zip(turned, on, reads, strict=True):
            front.settle(layer)
            front.pull(layer)
            found = front.against(padded)
            near = (slots < reach * padded.shape[1]).nonzero()[:, 0]
            effects[order[batch, None], near] = found.view(-1, found.shape[2])[slots[near]].T
    return on


def _turned(heads: Heads, causal: bool) -> Heads:
    mix = heads.mix.transpose(1, 2)
    return Heads(heads.write, (mix.flip(1, 2) if causal else mix).contiguous(), heads.read)


def _by_position(level: Level, n_pos: int, causal: bool) -> tuple[Tensor, Tensor]:
    """What the features read, in as many slots at each position; and the slot of each of them, counted through."""
    counts = torch.bincount(level.pos, minlength=n_pos)
    slot = torch.arange(len(level)) - (counts.cumsum(0) - counts)[level.pos]
    place = n_pos - 1 - level.pos if causal else level.pos
    padded = level.reads.new_zeros(n_pos, int(counts.max()), level.reads.shape[1])
    padded[place, slot] = level.reads
    return padded, place * padded.shape[1] + slot
