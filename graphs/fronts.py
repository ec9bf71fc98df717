"""Targets on their way down a stack: what a change of each position's stream does to them.

A front holds `G [pos, d, target]`, the adjoint of a set of targets at one depth. A target starts at one position, so
at first `G` has rank one in (position, d); each attention layer turns a term `c (x) v` into one more term a head,
`A_h^T c (x) v W_O^hT W_V^hT`, because with its pattern held a head acts on positions and on the stream separately.
While the terms are few, a front keeps them (`Paths`): the `c` are shared by all targets of a position, and the step
costs a fraction of the dense one, which multiplies all of `G`. The result is the same sum in another order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphs.frozen.attention import FrozenAttention
from graphs.frozen.norms import FrozenNorm
from graphs.frozen.parts import FrozenMLP

__all__ = ["Front", "Heads", "Paths", "mlp_at", "norm_at"]

ADVANTAGE = 0.8
"""Paths are kept while their step needs less than this share of the dense step's products."""
FEW = 24
"""Below so many targets one product over all positions, and two copies, cost less than a product for each position."""


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

    def moved(self, g: Float[Tensor, "pos d target"]) -> Float[Tensor, "pos inner target"]:
        """What the heads read of `g`, at the positions where they write it."""
        n_pos, _, n = g.shape
        read = _everywhere(self.read, g).view(n_pos, len(self.mix), -1)
        moved = torch.empty_like(read)
        torch.bmm(self.mix[:, :n_pos, :n_pos], read.transpose(0, 1), out=moved.transpose(0, 1))
        return moved.view(n_pos, -1, n)

    def pull(self, g: Float[Tensor, "pos d target"]) -> None:
        """Add the adjoint to `g`, in place."""
        if g.shape[2] < FEW:
            g += _everywhere(self.write.T, self.moved(g))
        else:
            torch.baddbmm(g, self.write.T.expand(len(g), -1, -1), self.moved(g), out=g)


@dataclass(frozen=True, eq=False)
class Paths:
    """`G[:, :, t] = sum_r where[r, start of t] (x) what[r, t]`: one term for each way through the heads so far."""

    where: Float[Tensor, "path start pos"]
    what: Float[Tensor, "path target d"]
    pos: Int[Tensor, " target"]
    starts: tuple[tuple[int, slice], ...]
    """Position and targets of each start."""

    def pays(self, heads: Heads, n_paths: int | None = None) -> bool:
        """Whether one more layer costs less by paths (or by `n_paths` of them) than by the dense step."""
        n_now, n_starts, n_pos = self.where.shape
        n_paths = n_paths or n_now
        n_heads, (inner, d) = len(heads.mix), heads.read.shape
        n = self.what.shape[1]
        by_path = n_paths * (4 * d * inner * n + 2 * n_heads * n_pos * (d * n + n_pos * n_starts))
        return by_path < ADVANTAGE * n * n_pos * (4 * d * inner + 2 * n_pos * inner)

    def through(self, heads: Heads, out: Float[Tensor, "head path start pos"]) -> None:
        """Where the terms stand after a layer, head by head."""
        n_heads, (n_paths, n_starts, n_pos) = len(heads.mix), self.where.shape
        whole = self.where.view(1, -1, n_pos).expand(n_heads, -1, -1)
        torch.bmm(whole, heads.mix[:, :n_pos, :n_pos].transpose(1, 2), out=out.view(n_heads, -1, n_pos))


@dataclass(eq=False)
class Front:
    """Targets that walk together.

    `g` is None while each of them stands at its one position. With paths its memory is `[pos, target, d]`, so that the
    targets of a start lie together; without, it is that of its shape, in which the dense step is fastest.
    """

    g: Float[Tensor, "pos d target"] | None
    paths: Paths | None = None

    @classmethod
    def start(cls, pos: Int[Tensor, " target"], directions: Float[Tensor, "target d"], n_pos: int) -> Front:
        """Targets at single positions, sorted by position."""
        found, counts = pos.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0).tolist()
        spans = [slice(e - c, e) for e, c in zip(ends, counts.tolist(), strict=True)]
        where = directions.new_zeros(1, len(found), n_pos)
        where[0, torch.arange(len(found)), found] = 1
        return cls(None, Paths(where, directions[None], pos, tuple(zip(found.tolist(), spans, strict=True))))

    @property
    def stream(self) -> Float[Tensor, "pos d target"]:
        """`g`, written out where it was not yet."""
        if self.g is None:
            assert self.paths is not None
            _, n, d = self.paths.what.shape
            g = self.paths.what.new_zeros(self.paths.where.shape[2], n, d)
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
        return torch.bmm(vectors[: len(self.g)], self.g)

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
            self.g, self.paths = self.stream.contiguous(), None
        elif self.paths is None and self.g is not None:
            self.g = self.g.contiguous()

    def pull(self, heads: Heads, causal: bool) -> None:
        """Walk through one attention layer: `g` becomes `g + adjoint(g)`."""
        paths = self.paths
        if paths is None:
            heads.pull(self.stream)
            return
        n_paths, n_starts, n_pos = paths.where.shape
        n, d = paths.what.shape[1:]
        n_heads = len(heads.mix)
        kept = paths.pays(heads, n_paths * (1 + n_heads))
        old = int(kept or self.g is None)  # 1: `g` is written anew, by all terms; 0: the new terms are added to it
        where = paths.where.new_empty(old + n_heads, n_paths, n_starts, n_pos)
        what = paths.what.new_empty(old + n_heads, n_paths, n, d)
        if old:
            where[0], what[0] = paths.where, paths.what
        paths.through(heads, where[old:])
        read = paths.what.view(-1, d) @ heads.read.T
        by_head = read.view(len(read), n_heads, -1).transpose(0, 1)
        torch.bmm(by_head, heads.write.view(n_heads, -1, d), out=what[old:].view(n_heads, -1, d))
        where, what = where.flatten(0, 1), what.flatten(0, 1)
        g = what.new_empty(n_pos, n, d) if old else self.stream.transpose(1, 2)
        flat, terms = g.view(n_pos, n * d), what.view(-1, n * d)
        for start, (pos, span) in enumerate(paths.starts):
            rows = pos + 1 if causal and not old else n_pos  # nothing is added after a start in a causal stack
            picked = slice(span.start * d, span.stop * d)
            flat[:rows, picked].addmm_(where[:, start, :rows].T, terms[:, picked], beta=1 - old)
        self.g = g.transpose(1, 2)
        self.paths = Paths(where, what, paths.pos, paths.starts) if kept else None

    def below(
        self, heads: Heads, vectors: Float[Tensor, "every_pos slot d"], read: Float[Tensor, "every_pos slot inner"]
    ) -> Float[Tensor, "pos slot target"]:
        """`against` after one more layer, when nothing else is asked of that depth: then it need not be written out.

        `read` are the vectors as the heads write them: `vectors @ heads.write.T`.
        """
        found = self.against(vectors)
        if self.paths is None:
            return found.baddbmm_(read[: len(found)], heads.moved(self.stream))
        n_heads, (n_paths, n, d) = len(heads.mix), self.paths.what.shape
        where = self.paths.where.new_empty(n_heads, *self.paths.where.shape)
        self.paths.through(heads, where)
        n_pos = where.shape[3]
        terms = self.paths.what.view(-1, d) @ heads.read.view(n_heads, -1, d).transpose(1, 2)
        d_head = terms.shape[2]
        terms = terms.view(n_heads, n_paths, n * d_head)
        moved = terms.new_empty(n_heads, n_pos, n * d_head)
        for start, (_, span) in enumerate(self.paths.starts):
            picked = slice(span.start * d_head, span.stop * d_head)
            torch.bmm(where[:, :, start].transpose(1, 2), terms[:, :, picked], out=moved[:, :, picked])
        for own, part in zip(read[:n_pos].chunk(n_heads, 2), moved, strict=True):
            found.baddbmm_(own, part.view(n_pos, n, d_head).transpose(1, 2))
        return found


def _everywhere(matrix: Float[Tensor, "a b"], g: Float[Tensor, "pos b target"]) -> Float[Tensor, "pos a target"]:
    """`matrix @ g[pos]` at every position."""
    n_pos, b, n = g.shape
    if n >= FEW:
        return torch.bmm(matrix.expand(n_pos, -1, -1), g)
    return (g.transpose(1, 2).reshape(-1, b) @ matrix.T).view(n_pos, n, -1).transpose(1, 2).contiguous()


def norm_at(norm: FrozenNorm, pos: Int[Tensor, " row"]) -> FrozenNorm:
    """The norm at these positions."""
    return FrozenNorm(norm.gain, norm.shift, norm.scale[pos], norm.centres)


def mlp_at(mlp: FrozenMLP, pos: Int[Tensor, " row"]) -> FrozenMLP:
    """The MLP at these positions: its adjoint then takes `[row, target, d]`."""
    post = None if mlp.post is None else norm_at(mlp.post, pos)
    return FrozenMLP(norm_at(mlp.norm, pos), mlp.W_in, mlp.b_in, mlp.gate[pos], mlp.W_out, mlp.b_out, post)
