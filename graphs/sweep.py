"""All direct effects on many targets in one walk from the top of a model to its patches and words.

Attention patterns, norm scales (and, in SAE mode, MLP gates) are held, so between the MLPs a model is linear and the
effect of a source on a target is `G[pos of source] . vector of source`, with `G` the adjoint of the target. The walk is
written out: no autograd graph, no second forward pass, and the activations are not repeated for each target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphs.climb import climb, pays
from graphs.fronts import STEP, Front, Heads, Space, in_batches, mlp_at, norm_at
from graphs.layout import Layout
from graphs.replace import Level, Replacement

__all__ = ["Batch", "Sweep"]

Batch = tuple[Int[Tensor, " target"], Float[Tensor, "node target"]]
"""Target nodes, and their in-edges as columns."""
Point = Literal["post", "mid"]
"""Where in a block targets start: after it, or after its attention."""


@dataclass(frozen=True, eq=False)
class _Sources:
    """What one block writes, padded to the same number of vectors at each position.

    Slot 0 of `vectors` is the error, slot 1 the bias, then the features; `order` finds the features in the flattened
    slots; `before[p]` of them stand before position `p`.
    """

    vectors: Float[Tensor, "pos slot d"]
    order: Int[Tensor, " feature"]
    before: list[int]


@dataclass(frozen=True, eq=False)
class _Block:
    """What the walk needs of one block. `in_sources`: the bias slot of the sources holds the attention's bias too."""

    heads: Heads
    sources: _Sources | None
    in_sources: bool


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What enters a stack: `vectors` has a slot for each kind, `nodes` the first node and the positions of each.

    `read` is the vectors as the heads of the first block write them, where nothing below that block has to be walked.
    """

    nodes: list[tuple[str, int, Int[Tensor, " _n"]]]
    vectors: Float[Tensor, "pos slot d"]
    read: Float[Tensor, "pos slot inner"] | None


@dataclass(frozen=True, eq=False)
class _Climbed:
    """What inputs do to the features of each block, and the lowest sources as the heads above them write them."""

    effects: list[Float[Tensor, "input _feature"]]
    read: Float[Tensor, "pos slot inner"]


class Sweep:
    """Rows of the graph for any set of targets.

    Args:
        replacement: the pass and what stands in it.
        layout: its node table.
        batch: targets at a time; default from the size of the stack, so that a batch stays in the cache.
    """

    def __init__(self, replacement: Replacement, layout: Layout | None = None, batch: int | None = None):
        self.replacement = replacement
        self.frozen = replacement.frozen
        self.layout = layout or Layout(replacement)
        self.batch = batch
        self._space = Space()
        self._climbed: dict[int, _Climbed] = {}
        self._memory = self.frozen.stacks[0].final.new_empty(0)
        self._blocks = {
            (number, at): _prepare(replacement, number, at)
            for number, stack in enumerate(self.frozen.stacks)
            for at in range(len(stack.blocks))
        }
        self._inputs = [self._entrance(number) for number in range(len(self.frozen.stacks))]

    def rows(self, targets: Int[Tensor, " target"]) -> Iterator[Batch]:
        """In-edges of target nodes (features and outputs), batch by batch, in an order that suits the walk.

        Each batch is its target nodes, and signed weights `[node, target]`, which stand until the next is asked for.
        """
        features = self.layout.level_of(targets[targets < self.layout.outputs].sort().values)
        for number in {number for (number, _), _ in features}:
            self._climb(number, sum(len(rows) for (stack, _), rows in features if stack == number))
        for (number, at), rows in features:
            yield from self._features(number, at, rows)
        picked = (targets[targets >= self.layout.outputs] - self.layout.outputs).sort().values.tolist()
        for _, same in groupby(sorted(picked, key=self._where), key=self._where):
            seeds = list(same)
            for first in range(0, len(seeds), STEP):
                yield self._readouts(seeds[first : first + STEP])

    def _where(self, readout: int) -> tuple[int, int, str]:
        """Stack, block and point at which an output reads."""
        found = self.frozen.readouts[readout]
        return found.stack, found.layer % len(self.frozen.stacks[found.stack].blocks), found.point

    def _features(self, number: int, at: int, rows: Int[Tensor, " target"]) -> Iterator[Batch]:
        """The features `rows` of a block, batch by batch, by position."""
        stack, level = self.frozen.stacks[number], self.replacement.levels[number, at]
        n_pos, d = stack.final.shape
        sizes = (d, n_pos, stack.causal, stack.final.element_size(), self.batch)
        for batch, reach in in_batches(level.pos[rows], *sizes):
            mine = rows[batch]
            yield self.layout.features[number, at].start + mine, self._feature_rows(number, at, mine, reach)

    def _feature_rows(
        self, number: int, at: int, rows: Int[Tensor, " target"], reach: int
    ) -> Float[Tensor, "node target"]:
        stack, level = self.frozen.stacks[number], self.replacement.levels[number, at]
        pos, directions = level.pos[rows], level.reads[rows]
        edges = self._blank(len(rows))
        if self.replacement.mode == "sae":  # an SAE reads after the MLP: go through it at the one position first
            mlp = stack.blocks[at].mlp
            edges[self.layout.bias[number, at]] += (directions * mlp.bias[pos]).sum(-1)
            directions = directions + mlp_at(mlp, pos).adjoint(directions[:, None])[:, 0]
        front = Front.start(pos, directions, reach, self._space)
        climbed = self._climbed.get(number)
        if climbed is None:
            self._walk(number, at, "mid", front, edges)
        else:
            self._walk_short(number, at, front, climbed.read, edges)
            self._add_inputs(number, climbed.effects[at].index_select(1, rows), edges)
        return edges

    def _blank(self, n: int) -> Float[Tensor, "node target"]:
        """A batch without edges, in memory that all batches share: fresh pages cost more than the zeros."""
        size = len(self.layout.nodes) * n
        if len(self._memory) < size:
            self._memory = self.frozen.stacks[0].final.new_empty(size)
        return self._memory[:size].view(-1, n).zero_()

    def _readouts(self, picked: list[int]) -> Batch:
        """Rows of outputs that read at one point, but perhaps several positions of it: then they start dense."""
        number, at, _ = self._where(picked[0])
        readouts, n_pos = [self.frozen.readouts[k] for k in picked], len(self.frozen.stacks[number].final)
        seeds = torch.stack([readout.seed for readout in readouts])
        read = seeds.abs().amax(2) > 0
        if (read.sum(1) == 1).all():
            at_pos = read.nonzero()[:, 1]
            order = at_pos.argsort(stable=True)
            picked, seeds = [picked[i] for i in order.tolist()], seeds[order]
            front = Front.start(at_pos[order], seeds[torch.arange(len(order)), at_pos[order]], n_pos, self._space)
        else:
            front = Front(seeds.permute(1, 2, 0), self._space)
        edges = seeds.new_zeros(len(self.layout.nodes), len(picked))
        self._walk(number, at, readouts[0].point, front, edges)
        return torch.tensor(picked, dtype=torch.long) + self.layout.outputs, edges

    def _walk(self, number: int, top: int, point: Point, front: Front, edges: Float[Tensor, "node target"]) -> None:
        """From a point of block `top` of a stack down to its inputs, and on through the bridge."""
        stack = self.frozen.stacks[number]
        for at in range(top, -1, -1):
            above_mlp = at < top or point == "post"
            if above_mlp and not self._mlp(number, at, front, edges):
                return
            block = self._blocks[number, at]
            if not (above_mlp and block.in_sources):
                edges[self.layout.bias[number, at]] += front.dot(stack.blocks[at].attention.bias)
            front.settle(block.heads)
            if at or self._inputs[number].read is None:
                front.pull(block.heads)
        self._enter(number, front, edges)
        if stack.bridge is None or stack.bridge_from is None:
            return
        edges[self.layout.bridge_bias[number]] += front.dot(stack.bridge.bias)
        g = front.stream.transpose(1, 2)
        n_pos, n, d = g.shape
        whole = torch.cat([g, g.new_zeros(len(stack.final) - n_pos, n, d)])
        below = stack.bridge_from
        crossed = Front(stack.bridge.adjoint(whole).transpose(1, 2), self._space)
        self._walk(below, len(self.frozen.stacks[below].blocks) - 1, "post", crossed, edges)

    def _mlp(self, number: int, at: int, front: Front, edges: Float[Tensor, "node target"]) -> bool:
        """Read what stands after block `at`, and walk through its MLP's place; whether anything below has an effect."""
        sources, mlp = self._blocks[number, at].sources, self.frozen.stacks[number].blocks[at].mlp
        if sources is not None:
            self._read(number, at, sources, front.against(sources.vectors), edges)
        level = self.replacement.levels.get((number, at))
        if self.replacement.mode == "sae":
            if level is not None:  # its sources are the whole stream
                return False
            edges[self.layout.bias[number, at]] += front.dot(mlp.bias)
            through = mlp_at(mlp, torch.arange(len(front.stream)))
            front.add(through.adjoint(front.stream.transpose(1, 2)))
        elif level is not None and level.skip is not None:
            norm = norm_at(self.frozen.stacks[number].blocks[at].norm2, torch.arange(len(front.stream)))
            front.add(norm.adjoint(front.stream.transpose(1, 2) @ level.skip.T))
        return True

    def _walk_short(
        self,
        number: int,
        top: int,
        front: Front,
        read: Float[Tensor, "pos slot inner"],
        edges: Float[Tensor, "node target"],
    ) -> None:
        """From a block down to the sources of the lowest one, where the effects of inputs are known.

        The last layer is not written out, as one thing only is asked of what is below it.
        """
        edges[self.layout.bias[number, top]] += front.dot(self.frozen.stacks[number].blocks[top].attention.bias)
        for at in range(top, 0, -1):
            heads, below = self._blocks[number, at].heads, self._blocks[number, at - 1].sources
            assert below is not None
            front.settle(heads)
            if at > 1:
                front.pull(heads)
                self._read(number, at - 1, below, front.against(below.vectors), edges)
            else:
                self._read(number, 0, below, front.below(heads, below.vectors, read), edges)

    def _climb(self, number: int, targets: int) -> None:
        """Find what the inputs of a stack do to its features, where that is cheaper than to ask so many targets.

        Only where a stack stands on nothing, and nothing but attention leads past an MLP.
        """
        stack = self.frozen.stacks[number]
        blocks = [self._blocks[number, at] for at in range(len(stack.blocks))]
        if number in self._climbed or stack.bridge is not None or not all(block.in_sources for block in blocks):
            return
        _, places, rows = zip(*self.layout.input_vectors(stack), strict=True)
        pos, vectors = torch.cat(places), torch.cat(rows)
        if pays(len(pos), len(blocks), targets):
            levels = [self.replacement.levels[number, at] for at in range(len(blocks))]
            heads = [block.heads for block in blocks]
            effects = climb(pos, vectors, heads, levels, len(stack.final), stack.causal, self._space)
            lowest, above = blocks[0].sources, heads[min(1, len(heads) - 1)]
            assert lowest is not None
            self._climbed[number] = _Climbed(effects, lowest.vectors @ above.write.T)

    def _add_inputs(
        self, number: int, effects: Float[Tensor, "input target"], edges: Float[Tensor, "node target"]
    ) -> None:
        """Edges from inputs, where their effects are known."""
        start = 0
        for kind, first, pos in self._inputs[number].nodes:
            mine = effects[start : start + len(pos)]
            if kind == "bias":
                edges[first] = mine.sum(0)
            else:
                edges[first : first + len(pos)] = mine
            start += len(pos)

    def _read(
        self,
        number: int,
        at: int,
        sources: _Sources,
        found: Float[Tensor, "pos slot target"],
        edges: Float[Tensor, "node target"],
    ) -> None:
        """Edges from the errors, biases and features of a block."""
        key = (number, at)
        n_pos, _, n = found.shape
        first = self.layout.errors[key]
        edges[first : first + n_pos] = found[:, 0]
        edges[self.layout.bias[key]] += found[:, 1].sum(0)
        n_features = sources.before[n_pos]
        first = self.layout.features[key].start
        torch.index_select(found.view(-1, n), 0, sources.order[:n_features], out=edges[first : first + n_features])

    def _enter(self, number: int, front: Front, edges: Float[Tensor, "node target"]) -> None:
        """Edges from patches, words, positions, class token and the constants of the input."""
        inputs = self._inputs[number]
        if inputs.read is None:
            found = front.against(inputs.vectors)
        else:
            found = front.below(self._blocks[number, 0].heads, inputs.vectors, inputs.read)
        for slot, (kind, first, pos) in enumerate(inputs.nodes):
            if kind == "bias":
                edges[first] = found[:, slot].sum(0)
            else:
                near = (pos < len(found)).nonzero()[:, 0]
                edges[first + near] = found[pos[near], slot]

    def _entrance(self, number: int) -> _Inputs:
        stack = self.frozen.stacks[number]
        kinds = self.layout.input_vectors(stack)
        n_pos, d = stack.final.shape
        slots = stack.final.new_zeros(n_pos, len(kinds), d)
        for slot, (_, pos, vectors) in enumerate(kinds):
            slots[:, slot].index_add_(0, pos, vectors)
        nodes = [(kind, self.layout.inputs[number, kind], pos) for kind, pos, _ in kinds]
        bottom = self._blocks[number, 0].heads.write if stack.bridge is None else None
        return _Inputs(nodes, slots, None if bottom is None else slots @ bottom.T)


def _prepare(replacement: Replacement, number: int, at: int) -> _Block:
    block = replacement.frozen.stacks[number].blocks[at]
    level = replacement.levels.get((number, at))
    in_sources = replacement.mode == "transcoder" and level is not None and level.skip is None
    sources = None
    if level is not None:
        bias = level.bias + block.attention.bias if in_sources else level.bias.expand_as(level.error)
        sources = _pad(level, bias)
    return _Block(Heads.of(block.attention), sources, in_sources)


def _pad(level: Level, bias: Float[Tensor, "pos d"]) -> _Sources:
    n_pos, d = level.error.shape
    counts = torch.bincount(level.pos, minlength=n_pos)
    before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    slots = -(-(2 + int(counts.max())) // 4) * 4  # products of other heights take up to a third longer
    slot = 2 + torch.arange(len(level)) - before[level.pos]
    vectors = level.error.new_zeros(n_pos, slots, d)
    vectors[:, 0], vectors[:, 1] = level.error, bias
    vectors[level.pos, slot] = level.writes
    return _Sources(vectors, level.pos * slots + slot, before.tolist())
