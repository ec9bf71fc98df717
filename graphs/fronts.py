"""Targets on their way down a stack: what a change of each position's stream does to them.

A front holds `G [pos, d, target]`, the adjoint of a set of targets at one depth. A target starts at one position, so
at first `G` has rank one in (position, d); each attention layer turns a term `c (x) v` into one more term a head,
`A_h^T c (x) v W_O^hT W_V^hT`, because with its pattern held a head acts on positions and on the stream separately.
While the terms are few, a front keeps them (`Paths`): the `c` are shared by all targets of a position, and the step
costs a fraction of the dense one, which multiplies all of `G`. Where the next terms would be too many, the heads still
read the old ones and write to all positions. The result is the same sum in another order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphs.frozen.attention import FrozenAttention
from graphs.frozen.norms import FrozenNorm
from graphs.frozen.parts import FrozenMLP

__all__ = ["Front", "Heads", "Paths", "Space", "in_batches", "mlp_at", "norm_at"]

CACHE = 8 * 2**20
"""Bytes of `G` in one batch: about what the caches of a core hold."""
STEP, LARGEST, LARGEST_CAUSAL = 32, 1024, 96
"""Targets in a batch: a multiple of `STEP`, because products of other widths take up to half as long again, and few
where a stack is causal, because all of a batch walk through as many positions as its last."""

ADVANTAGE = 1.0
"""Paths are kept while their step needs less than this share of the dense step's products; with 0 there are none."""
FEW = 24
"""Below so many targets one product over all positions, and two copies, cost less than a product for each position."""


class Space:
    """Memory that batches take in turns, by what it is for: fresh pages cost more than what is done in them."""

    def __init__(self):
        self._held: dict[str, Tensor] = {}

    def take(self, purpose: str, like: Tensor, *shape: int) -> Tensor:
        """Memory for this purpose, as it was left."""
        size = math.prod(shape)
        held = self._held.get(purpose)
        if held is None or len(held) < size:
            held = self._held[purpose] = like.new_empty(size)
        return held[:size].view(shape)


@dataclass(frozen=True, eq=False)
class Heads:
    """The adjoint of one attention layer as three matrices a head, input norm and post norm folded in.

    Those over the stream stand below each other, so that one product serves all heads.
    """

    read: Float[Tensor, "inner d"]
    mix: Float[Tensor, "head key query"]
    write: Float[Tensor, "inner d"]

    @classmethod
    def of(cls, attention: FrozenAttention) -> Heads:
        """Fold the norms of a layer: `adjoint(g) = sum_h write_h^T mix_h read_h g`."""
        read, mix, write = attention.folded
        if attention.post is not None:
            read = read - read.mean(-2, keepdim=True) if attention.post.centres else read
            read = read * attention.post.gain[:, None]
            mix = mix / attention.post.scale[:, 0]
        return cls(read.transpose(1, 2).flatten(0, 1).contiguous(), mix.contiguous(), write.flatten(0, 1).contiguous())

    def moved(self, g: Float[Tensor, "pos d target"], space: Space) -> Float[Tensor, "pos inner target"]:
        """What the heads read of `g`, at the positions where they write it."""
        n_pos, _, n = g.shape
        read = _everywhere(self.read, g, space).view(n_pos, len(self.mix), -1)
        moved = space.take("moved", g, *read.shape)
        torch.bmm(self.mix[:, :n_pos, :n_pos], read.transpose(0, 1), out=moved.transpose(0, 1))
        return moved.view(n_pos, -1, n)

    def pull(self, g: Float[Tensor, "pos d target"], space: Space) -> None:
        """Add the adjoint to `g`, in place."""
        if g.shape[2] < FEW:
            g += _everywhere(self.write.T, self.moved(g, space), space)
        else:
            torch.baddbmm(g, self.write.T.expand(len(g), -1, -1), self.moved(g, space), out=g)


@dataclass(frozen=True, eq=False)
class Paths:
    """`G[:, :, t] = sum_r where[r, start of t] (x) what[r, t]`: one term for each way through the heads so far."""

    where: Float[Tensor, "path start pos"]
    what: Float[Tensor, "path target d"]
    pos: Int[Tensor, " target"]
    starts: tuple[tuple[int, slice], ...]
    """Position and targets of each start."""

    def pays(self, heads: Heads) -> bool:
        """Whether one more layer costs less by paths than by the dense step."""
        return self._last(heads, 1) < ADVANTAGE * self._dense(heads)

    def multiply(self, heads: Heads) -> bool:
        """Whether it is cheaper to keep paths for the layer after the next, when there are more of them."""
        (n_paths, _, n_pos), (inner, d), more = self.where.shape, heads.read.shape, 1 + len(heads.mix)
        kept = n_paths * (4 * d * inner + 2 * more * n_pos * d) + self._last(heads, more)
        return kept < ADVANTAGE * (self._last(heads, 1) + self._dense(heads))

    def _last(self, heads: Heads, more: int) -> int:
        """Operations a target of a layer that reads `more` times these paths and writes all positions."""
        n_paths, (inner, d), n_pos = more * len(self.where), heads.read.shape, self.where.shape[2]
        return 2 * inner * (n_paths * (d + n_pos) + n_pos * d)

    def _dense(self, heads: Heads) -> int:
        """Operations a target of a layer that reads and writes all positions."""
        (inner, d), n_pos = heads.read.shape, self.where.shape[2]
        return 2 * inner * n_pos * (2 * d + n_pos)

    def through(self, heads: Heads, out: Float[Tensor, "head path start pos"]) -> Tensor:
        """Where the terms stand after a layer, head by head."""
        n_heads, n_pos = len(heads.mix), self.where.shape[2]
        whole = self.where.view(1, -1, n_pos).expand(n_heads, -1, -1)
        torch.bmm(whole, heads.mix[:, :n_pos, :n_pos].transpose(1, 2), out=out.view(n_heads, -1, n_pos))
        return out

    def moved(self, heads: Heads, space: Space) -> Float[Tensor, "head pos target d_head"]:
        """What the heads read, at the positions where they write it."""
        n_heads, (n_paths, n, d) = len(heads.mix), self.what.shape
        n_pos, d_head = self.where.shape[2], heads.read.shape[0] // n_heads
        where = self.through(heads, space.take("through", self.where, n_heads, *self.where.shape))
        terms = space.take("read", self.what, n_heads, n_paths * n, d_head)
        read = heads.read.view(n_heads, d_head, d).transpose(1, 2)
        torch.bmm(self.what.view(1, -1, d).expand(n_heads, -1, -1), read, out=terms)
        terms = terms.view(n_heads, n_paths, n * d_head)
        moved = space.take("moved", terms, n_heads, n_pos, n * d_head)
        for start, (_, span) in enumerate(self.starts):
            picked = slice(span.start * d_head, span.stop * d_head)
            torch.bmm(where[:, :, start].transpose(1, 2), terms[:, :, picked], out=moved[:, :, picked])
        return moved.view(n_heads, n_pos, n, d_head)

    def multiplied(self, heads: Heads, space: Space) -> Paths:
        """These terms, and one more of each for each head."""
        n_heads, (n_paths, n, d) = len(heads.mix), self.what.shape
        where = space.take(f"where of {n_paths}", self.where, 1 + n_heads, *self.where.shape)
        what = space.take(f"what of {n_paths}", self.what, 1 + n_heads, n_paths, n, d)
        where[0], what[0] = self.where, self.what
        self.through(heads, where[1:])
        read = (self.what.view(-1, d) @ heads.read.T).view(n_paths * n, n_heads, -1).transpose(0, 1)
        torch.bmm(read, heads.write.view(n_heads, -1, d), out=what[1:].view(n_heads, -1, d))
        return Paths(where.flatten(0, 1), what.flatten(0, 1), self.pos, self.starts)

    def added_up(self, space: Space) -> Float[Tensor, "pos target d"]:
        """`G`."""
        (_, _, n_pos), (_, n, d) = self.where.shape, self.what.shape
        g, terms = space.take("added up", self.what, n_pos, n * d), self.what.view(-1, n * d)
        for start, (_, span) in enumerate(self.starts):
            picked = slice(span.start * d, span.stop * d)
            torch.mm(self.where[:, start].T, terms[:, picked], out=g[:, picked])
        return g.view(n_pos, n, d)


@dataclass(eq=False)
class Front:
    """Targets that walk together.

    `g` is None while each of them stands at its one position. With paths its memory is `[pos, target, d]`, so that the
    targets of a start lie together; without, it is that of its shape, in which the dense step is fastest.
    """

    g: Float[Tensor, "pos d target"] | None
    space: Space
    paths: Paths | None = None

    @classmethod
    def start(
        cls, pos: Int[Tensor, " target"], directions: Float[Tensor, "target d"], n_pos: int, space: Space
    ) -> Front:
        """Targets at single positions, sorted by position."""
        found, counts = pos.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0).tolist()
        spans = [slice(e - c, e) for e, c in zip(ends, counts.tolist(), strict=True)]
        where = directions.new_zeros(1, len(found), n_pos)
        where[0, torch.arange(len(found)), found] = 1
        return cls(None, space, Paths(where, directions[None], pos, tuple(zip(found.tolist(), spans, strict=True))))

    @property
    def stream(self) -> Float[Tensor, "pos d target"]:
        """`g`, written out where it was not yet."""
        if self.g is None:
            assert self.paths is not None
            _, n, d = self.paths.what.shape
            g = self.space.take("added up", self.paths.what, self.paths.where.shape[2], n, d).zero_()
            g[self.paths.pos, torch.arange(n)] = self.paths.what[0]
            self.g = g.transpose(1, 2)
        return self.g

    def against(self, vectors: Float[Tensor, "every_pos slot d"]) -> Float[Tensor, "pos slot target"]:
        """`G[pos] . vectors[pos, slot]` of each target."""
        if self.g is None:
            assert self.paths is not None
            what, pos = self.paths.what[0], self.paths.pos
            found = what.new_zeros(self.paths.where.shape[2], vectors.shape[1], len(what))
            found[pos, :, torch.arange(len(what))] = (vectors[pos] @ what[:, :, None])[..., 0]
            return found
        n_pos, _, n = self.g.shape
        found = self.space.take("found", self.g, n_pos, vectors.shape[1], n)
        return torch.bmm(vectors[:n_pos], self.g, out=found)

    def dot(self, vectors: Float[Tensor, "every_pos d"]) -> Float[Tensor, " target"]:
        """`sum_pos G[pos] . vectors[pos]` of each target."""
        if self.g is None:
            assert self.paths is not None
            return (self.paths.what[0] * vectors[self.paths.pos]).sum(-1)
        return self.against(vectors[:, None])[:, 0].sum(0)

    def add(self, more: Float[Tensor, "pos target d"]) -> None:
        """Add to `g` something that is no product of a part over positions and a part over the stream."""
        self.stream.add_(more.transpose(1, 2))
        self.paths = None

    def settle(self, heads: Heads) -> None:
        """Drop the paths where the dense step is cheaper from here on."""
        if self.paths is not None and not self.paths.pays(heads):
            self._write_out(self.stream)
            self.paths = None
        elif self.paths is None and self.g is not None and not self.g.is_contiguous():
            self._write_out(self.g)

    def _write_out(self, g: Float[Tensor, "pos d target"]) -> None:
        self.g = self.space.take("stream", g, *g.shape).copy_(g)

    def pull(self, heads: Heads) -> None:
        """Walk through one attention layer: `g` becomes `g + adjoint(g)`."""
        if self.paths is None:
            heads.pull(self.stream, self.space)
        elif self.paths.multiply(heads):
            self.paths = self.paths.multiplied(heads, self.space)
            self.g = self.paths.added_up(self.space).transpose(1, 2)
        else:
            g = self.stream.transpose(1, 2)
            moved, self.paths = self.paths.moved(heads, self.space), None
            for part, write in zip(moved, heads.write.chunk(len(moved)), strict=True):
                g.view(-1, g.shape[2]).addmm_(part.flatten(0, 1), write)

    def below(
        self, heads: Heads, vectors: Float[Tensor, "every_pos slot d"], read: Float[Tensor, "every_pos slot inner"]
    ) -> Float[Tensor, "pos slot target"]:
        """`against` after one more layer, when nothing else is asked of that depth: then it need not be written out.

        `read` are the vectors as the heads write them: `vectors @ heads.write.T`.
        """
        found = self.against(vectors)
        if self.paths is None:
            return found.baddbmm_(read[: len(found)], heads.moved(self.stream, self.space))
        moved = self.paths.moved(heads, self.space)
        for own, part in zip(read[: len(found)].chunk(len(moved), 2), moved, strict=True):
            found.baddbmm_(own, part.transpose(1, 2))
        return found


def _everywhere(
    matrix: Float[Tensor, "a b"], g: Float[Tensor, "pos b target"], space: Space
) -> Float[Tensor, "pos a target"]:
    """`matrix @ g[pos]` at every position."""
    n_pos, b, n = g.shape
    if n >= FEW:
        return torch.bmm(matrix.expand(n_pos, -1, -1), g, out=space.take("read", g, n_pos, len(matrix), n))
    return (g.transpose(1, 2).reshape(-1, b) @ matrix.T).view(n_pos, n, -1).transpose(1, 2).contiguous()


def norm_at(norm: FrozenNorm, pos: Int[Tensor, " row"]) -> FrozenNorm:
    """The norm at these positions."""
    return FrozenNorm(norm.gain, norm.shift, norm.scale[pos], norm.centres)


def mlp_at(mlp: FrozenMLP, pos: Int[Tensor, " row"]) -> FrozenMLP:
    """The MLP at these positions: its adjoint then takes `[row, target, d]`."""
    post = None if mlp.post is None else norm_at(mlp.post, pos)
    return FrozenMLP(norm_at(mlp.norm, pos), mlp.W_in, mlp.b_in, mlp.gate[pos], mlp.W_out, mlp.b_out, post)


def in_batches(
    pos: Int[Tensor, " target"], d: int, n_pos: int, causal: bool, itemsize: int, batch: int | None = None
) -> Iterator[tuple[slice, int]]:
    """Targets sorted by position in batches, and how many positions each batch walks through."""
    first = 0
    while first < len(pos):
        reach = int(pos[min(first + STEP, len(pos)) - 1]) + 1 if causal else n_pos
        fits = CACHE // (reach * d * itemsize) // STEP * STEP
        last = first + (batch or max(STEP, min(LARGEST_CAUSAL if causal else LARGEST, fits)))
        yield slice(first, last), int(pos[min(last, len(pos)) - 1]) + 1 if causal else n_pos
        first = last
