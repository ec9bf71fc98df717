"""What a target has below it: the order of the sweep as a list of parts, for questions about single edges.

In SAE mode the sources of a block are the whole stream after it, so no path passes them: a target reads down to the
nearest SAE below it and no further.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from graphs.replace import Replacement
from graphs.sweep import Point

__all__ = ["Place", "Step", "between", "down"]


class Place(NamedTuple):
    """A place in the stream: a stack, a block of it (-1: what enters the first), after its attention or after it."""

    stack: int
    layer: int
    point: Point


class Step(NamedTuple):
    """A part of the model on the way down from a target, and the place below it."""

    kind: Literal["attention", "mlp", "bridge"]
    stack: int
    part: Any
    below: Place


def between(replacement: Replacement, start: Place, end: Place) -> list[Step] | None:
    """What lies between what is written at `start` and what reads at `end`, downwards; None where no path does."""
    found: list[Step] = []
    if start == end:
        return found
    for step in down(replacement, end):
        found.append(step)
        if step.below == start:
            return found
    return None


def down(replacement: Replacement, place: Place) -> Iterator[Step]:
    """What a target that reads at this place has below it, as the sweep walks."""
    stacks = replacement.frozen.stacks
    stack, layer, point = place
    while True:
        for block in reversed(stacks[stack].blocks[: layer + 1]):
            if block.layer < layer or point == "post":
                if replacement.mode == "sae" and (stack, block.layer) in replacement.levels:
                    return  # its sources are the whole stream
                yield Step("mlp", stack, block, Place(stack, block.layer, "mid"))
            yield Step("attention", stack, block, Place(stack, block.layer - 1, "post"))
        bridge, below = stacks[stack].bridge, stacks[stack].bridge_from
        if bridge is None or below is None:
            return
        stack, layer, point = below, len(stacks[below].blocks) - 1, "post"
        yield Step("bridge", stack, bridge, Place(stack, layer, point))
