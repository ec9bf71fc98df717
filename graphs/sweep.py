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

from graphs.fronts import Front, Heads, merge, mlp_at, norm_at, settle
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
        self._blocks = {
            (number, at): _prepare(replacement, number, at)
            for number, stack in enumerate(self.frozen.stacks)
            for at in range(len(stack.blocks))
        }

    def rows(self, targets: Int[Tensor, " target"]) -> Iterator[Batch]:
        """In-edges of target nodes (features and outputs), batch by batch, in an order that suits the walk.

        Each batch is its target nodes, and signed weights `[node, target]`.
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
        edges = stack.final.new_zeros(len(self.layout.nodes), len(row))

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
            return Front(slice(columns[0], columns[-1] + 1), torch.stack([readouts[c].seed for c in columns], 1))

        self._walk(number, readouts[0].layer % n_blocks, [], entering, edges)
        return torch.tensor(deepest_first, dtype=torch.long) + self.layout.outputs, edges

    def _walk(
        self, number: int, top: int, fronts: list[Front], entering: Entering, edges: Float[Tensor, "node target"]
    ) -> None:
        """From block `top` of a stack down to its inputs, and on through the bridge."""
        stack = self.frozen.stacks[number]
        for at in range(top, -1, -1):
            new = entering(at, "post")
            fronts = merge([*fronts, *([new] if new else [])])
            fronts = self._mlp(number, at, fronts, edges)
            new = entering(at, "mid")
            block = self._blocks[number, at]
            bias, node = stack.blocks[at].attention.bias, self.layout.bias[number, at]
            for front in [*(fronts if not block.in_sources else []), *([new] if new else [])]:
                edges[node, front.columns] += front.dot(bias)
            fronts += [new] if new else []
            settle(fronts, block.heads)
            for front in fronts:
                front.pull(block.heads, stack.causal)
            fronts = merge(fronts)
        self._inputs(number, fronts, edges)
        if stack.bridge is None or stack.bridge_from is None or not fronts:
            return
        for front in fronts:
            edges[self.layout.bridge_bias[number], front.columns] += front.dot(stack.bridge.bias)
            front.paths = None
        (front,) = merge(fronts)
        n_pos, n, d = front.g.shape
        whole = torch.cat([front.g, front.g.new_zeros(len(stack.final) - n_pos, n, d)])
        below = stack.bridge_from
        crossed = Front(front.columns, stack.bridge.adjoint(whole).contiguous())
        self._walk(below, len(self.frozen.stacks[below].blocks) - 1, [crossed], lambda at, point: None, edges)

    def _mlp(self, number: int, at: int, fronts: list[Front], edges: Float[Tensor, "node target"]) -> list[Front]:
        """Read what stands after block `at`, and walk through its MLP's place. What comes out is not at its end yet."""
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
            through = mlp_at(true.mlp, torch.arange(len(fronts[0].g)))
            for front in fronts:
                edges[self.layout.bias[number, at], front.columns] += front.dot(true.mlp.bias)
                front.add(through.adjoint(front.g))
        elif level is not None and level.skip is not None:
            norm = norm_at(true.norm2, torch.arange(len(fronts[0].g)))
            for front in fronts:
                front.add(norm.adjoint(front.g @ level.skip.T))
        return merge(fronts)

    def _read(self, number: int, at: int, sources: _Sources, front: Front, edges: Float[Tensor, "node target"]) -> None:
        """Edges from the errors, biases and features of a block."""
        n_pos, n, _ = front.g.shape
        key = (number, at)
        found = torch.bmm(sources.vectors[:n_pos], front.g.transpose(1, 2))  # [pos, slot, target]
        first = self.layout.errors[key]
        edges[first : first + n_pos, front.columns] = found[:, 0]
        edges[self.layout.bias[key], front.columns] += found[:, 1].sum(0)
        n_features = sources.before[n_pos]
        first = self.layout.features[key].start
        edges[first : first + n_features, front.columns] = found.view(-1, n)[sources.order[:n_features]]

    def _inputs(self, number: int, fronts: list[Front], edges: Float[Tensor, "node target"]) -> None:
        """Edges from patches, words, positions, class token and the constants of the input."""
        kinds = self.layout.input_vectors(self.frozen.stacks[number])
        for front in fronts:
            n_pos, _, d = front.g.shape
            slots = front.g.new_zeros(n_pos, len(kinds), d)
            for slot, (_, pos, vectors) in enumerate(kinds):
                slots[:, slot].index_add_(0, pos[pos < n_pos], vectors[pos < n_pos])
            found = torch.bmm(slots, front.g.transpose(1, 2))  # [pos, slot, target]
            for slot, (kind, pos, _) in enumerate(kinds):
                first = self.layout.inputs[number, kind]
                if kind == "bias":
                    edges[first, front.columns] = found[:, slot].sum(0)
                else:
                    near = (pos < n_pos).nonzero()[:, 0]
                    edges[first + near, front.columns] = found[pos[near], slot]


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
