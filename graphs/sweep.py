"""All direct effects on many targets in one walk from the top of a model to its patches and words.

Attention patterns, norm scales (and, in SAE mode, MLP gates) are held, so between the MLPs a model is linear and the
effect of a source on a target is `G[pos of source] . vector of source`, with `G` the adjoint of the target. The walk is
written out: no autograd graph, no second forward pass, and the activations are not repeated for each target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphs.fronts import Front, Heads, mlp_at, norm_at, settle
from graphs.layout import Layout
from graphs.replace import Level, Replacement

__all__ = ["Batch", "Sweep"]

CACHE = 8 * 2**20
"""Bytes of `G` in one batch: about what the caches of a core hold."""
SMALLEST, LARGEST = 16, 1024
"""Targets in a batch."""


Batch = tuple[Int[Tensor, " target"], Float[Tensor, "node target"]]
"""Target nodes, and their in-edges as columns."""
Entering = Callable[[int, str], "Front | None"]
"""What starts at a block and a point of it ("post" or "mid")."""


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
        readouts = (targets[targets >= self.layout.outputs] - self.layout.outputs).sort().values.tolist()
        for number in range(len(self.frozen.stacks)):
            starts = [(key[1], rows) for key, rows in features if key[0] == number]
            if starts:
                yield from self._feature_batches(number, starts)
            seeds = [k for k in readouts if self.frozen.readouts[k].stack == number]
            for first in range(0, len(seeds), SMALLEST):
                yield self._readouts(number, seeds[first : first + SMALLEST])

    def _feature_batches(self, number: int, starts: list[tuple[int, Int[Tensor, " _row"]]]) -> Iterator[Batch]:
        """Cut the feature targets of a stack into batches. Causal: of near positions, whatever their layer."""
        stack = self.frozen.stacks[number]
        layer = torch.cat([torch.full_like(rows, at) for at, rows in starts])
        row = torch.cat([rows for _, rows in starts])
        pos = torch.cat([self.replacement.levels[number, at].pos[rows] for at, rows in starts])
        n_pos, d = stack.final.shape
        key = pos if stack.causal else -layer
        order = torch.argsort(key, stable=True)
        layer, row, pos = layer[order], row[order], pos[order]
        first = 0
        while first < len(row):
            reach = int(pos[min(first + SMALLEST, len(pos)) - 1]) + 1 if stack.causal else n_pos
            n = self.batch or max(SMALLEST, min(LARGEST, CACHE // (reach * d * stack.final.element_size())))
            picked = slice(first, first + n)
            yield self._features(number, layer[picked], row[picked], pos[picked])
            first += n

    def _features(
        self, number: int, layer: Int[Tensor, " target"], row: Int[Tensor, " target"], pos: Int[Tensor, " target"]
    ) -> Batch:
        stack = self.frozen.stacks[number]
        n_pos = int(pos.max()) + 1 if stack.causal else len(stack.final)
        order = torch.argsort(pos - layer * len(stack.final), stable=True)
        layer, row, pos = layer[order], row[order], pos[order]
        spans = [self.layout.features.get((number, at), range(0)) for at in range(len(stack.blocks))]
        nodes = row + torch.tensor([span.start for span in spans])[layer]
        edges = self._blank(len(row))

        def entering(at: int, point: str) -> Front | None:
            mine = (layer == at).nonzero()[:, 0]
            if point != "mid" or not len(mine):
                return None
            columns = slice(int(mine[0]), int(mine[-1]) + 1)
            at_pos, directions = pos[columns], self.replacement.levels[number, at].reads[row[columns]]
            if self.replacement.mode == "sae":  # an SAE reads after the MLP: go through it at the one position first
                mlp = stack.blocks[at].mlp
                edges[self.layout.bias[number, at], columns] += (directions * mlp.bias[at_pos]).sum(-1)
                directions = directions + mlp_at(mlp, at_pos).adjoint(directions[:, None])[:, 0]
            return Front.start(columns, at_pos, directions, n_pos)

        self._walk(number, int(layer[0]), [], entering, edges)
        return nodes, edges

    def _blank(self, n: int) -> Float[Tensor, "node target"]:
        """A batch without edges, in memory that all batches share: fresh pages cost more than the zeros."""
        size = len(self.layout.nodes) * n
        if len(self._memory) < size:
            self._memory = self.frozen.stacks[0].final.new_empty(size)
        return self._memory[:size].view(-1, n).zero_()

    def _readouts(self, number: int, picked: list[int]) -> Batch:
        """Rows of outputs, which may read several positions and start dense."""
        stack = self.frozen.stacks[number]
        n_blocks = len(stack.blocks)
        deepest_first = sorted(
            picked,
            key=lambda k: (self.frozen.readouts[k].layer % n_blocks, self.frozen.readouts[k].point == "post"),
            reverse=True,
        )
        readouts = [self.frozen.readouts[k] for k in deepest_first]
        edges = stack.final.new_zeros(len(self.layout.nodes), len(picked))

        def entering(at: int, point: str) -> Front | None:
            columns = [c for c, r in enumerate(readouts) if (r.layer % n_blocks, r.point) == (at, point)]
            if not columns:
                return None
            mine, seeds = slice(columns[0], columns[-1] + 1), torch.stack([readouts[c].seed for c in columns])
            read = seeds.abs().amax(2) > 0
            if (read.sum(1) == 1).all():
                return Front.start(mine, read.nonzero()[:, 1], seeds[read], len(stack.final))
            return Front(mine, seeds.permute(1, 2, 0))

        self._walk(number, readouts[0].layer % n_blocks, [], entering, edges)
        return torch.tensor(deepest_first, dtype=torch.long) + self.layout.outputs, edges

    def _walk(
        self, number: int, top: int, fronts: list[Front], entering: Entering, edges: Float[Tensor, "node target"]
    ) -> None:
        """From block `top` of a stack down to its inputs, and on through the bridge."""
        stack = self.frozen.stacks[number]
        for at in range(top, -1, -1):
            new = entering(at, "post")
            fronts = self._mlp(number, at, [*fronts, *([new] if new else [])], edges)
            new = entering(at, "mid")
            block = self._blocks[number, at]
            bias, node = stack.blocks[at].attention.bias, self.layout.bias[number, at]
            for front in [*(fronts if not block.in_sources else []), *([new] if new else [])]:
                edges[node, front.columns] += front.dot(bias)
            fronts = settle([*fronts, *([new] if new else [])], block.heads)
            if at or self._inputs[number].read is None:
                for front in fronts:
                    front.pull(block.heads, stack.causal)
        for front in fronts:
            self._enter(number, front, edges)
        if stack.bridge is None or stack.bridge_from is None or not fronts:
            return
        for front in fronts:
            edges[self.layout.bridge_bias[number], front.columns] += front.dot(stack.bridge.bias)
        g = torch.cat([front.stream for front in fronts], 2).transpose(1, 2)
        n_pos, n, d = g.shape
        whole = torch.cat([g, g.new_zeros(len(stack.final) - n_pos, n, d)])
        below = stack.bridge_from
        columns = slice(fronts[0].columns.start, fronts[-1].columns.stop)
        crossed = Front(columns, stack.bridge.adjoint(whole).transpose(1, 2))
        self._walk(below, len(self.frozen.stacks[below].blocks) - 1, [crossed], lambda at, point: None, edges)

    def _mlp(self, number: int, at: int, fronts: list[Front], edges: Float[Tensor, "node target"]) -> list[Front]:
        """Read what stands after block `at`, and walk through its MLP's place."""
        if not fronts:
            return fronts
        block, true = self._blocks[number, at], self.frozen.stacks[number].blocks[at]
        if block.sources is not None:
            for front in fronts:
                self._read(number, at, block.sources, front, edges)
        level = self.replacement.levels.get((number, at))
        if self.replacement.mode == "sae":
            if level is not None:  # its sources are the whole stream: nothing below has a direct effect
                return []
            through = mlp_at(true.mlp, torch.arange(len(fronts[0].stream)))
            for front in fronts:
                edges[self.layout.bias[number, at], front.columns] += front.dot(true.mlp.bias)
                front.add(through.adjoint(front.stream.transpose(1, 2)))
        elif level is not None and level.skip is not None:
            norm = norm_at(true.norm2, torch.arange(len(fronts[0].stream)))
            for front in fronts:
                front.add(norm.adjoint(front.stream.transpose(1, 2) @ level.skip.T))
        return fronts

    def _read(self, number: int, at: int, sources: _Sources, front: Front, edges: Float[Tensor, "node target"]) -> None:
        """Edges from the errors, biases and features of a block."""
        key, mine = (number, at), edges[:, front.columns]
        found = front.against(sources.vectors)
        n_pos, _, n = found.shape
        first = self.layout.errors[key]
        mine[first : first + n_pos] = found[:, 0]
        mine[self.layout.bias[key]] += found[:, 1].sum(0)
        n_features = sources.before[n_pos]
        first = self.layout.features[key].start
        mine[first : first + n_features] = found.view(-1, n).index_select(0, sources.order[:n_features])

    def _enter(self, number: int, front: Front, edges: Float[Tensor, "node target"]) -> None:
        """Edges from patches, words, positions, class token and the constants of the input."""
        inputs, mine = self._inputs[number], edges[:, front.columns]
        if inputs.read is None:
            found = front.against(inputs.vectors)
        else:
            found = front.below(self._blocks[number, 0].heads, inputs.vectors, inputs.read)
        for slot, (kind, first, pos) in enumerate(inputs.nodes):
            if kind == "bias":
                mine[first] = found[:, slot].sum(0)
            else:
                near = (pos < len(found)).nonzero()[:, 0]
                mine[first + near] = found[pos[near], slot]

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
    slots = 2 + int(counts.max())
    slot = 2 + torch.arange(len(level)) - before[level.pos]
    vectors = level.error.new_zeros(n_pos, slots, d)
    vectors[:, 0], vectors[:, 1] = level.error, bias
    vectors[level.pos, slot] = level.writes
    return _Sources(vectors, level.pos * slots + slot, before.tolist())
