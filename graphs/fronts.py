"""Targets on their way down a stack: what a change of each position's stream does to them.

A front holds `G [pos, target, d]`, the adjoint of a set of targets at one depth. A target starts at one position, so
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

__all__ = ["Front", "Heads", "Paths", "merge", "mlp_at", "norm_at", "settle"]

ADVANTAGE = 0.8
"""Paths are kept while their step needs less than this share of the dense step's products."""


@dataclass(frozen=True, eq=False)
class Heads:
    """The adjoint of one attention layer as three matrices a head, input norm and post norm folded in."""

    read: Float[Tensor, "head d d_head"]
    mix: Float[Tensor, "head key query"]
    write: Float[Tensor, "head d_head d"]

    @classmethod
    def of(cls, attention: FrozenAttention) -> Heads:
        """Fold the norms of a layer: `adjoint(g) = sum_h mix_h (g read_h) write_h`."""
        read, mix, write = attention.folded
        if attention.post is not None:
            read = read - read.mean(-2, keepdim=True) if attention.post.centres else read
            read = read * attention.post.gain[:, None]
            mix = mix / attention.post.scale[:, 0]
        return cls(read.contiguous(), mix.contiguous(), write.contiguous())

    def pull(self, g: Float[Tensor, "pos target d"]) -> None:
        """Add the adjoint to `g`, in place: three products a head, no permutation."""
        n_pos, n, d = g.shape
        flat = g.view(n_pos * n, d)
        d_head = self.read.shape[2]
        read = g.new_empty(n_pos, n * d_head)
        moved = g.new_empty(len(self.read), n_pos, n * d_head)
        for head in range(len(self.read)):
            torch.mm(flat, self.read[head], out=read.view(n_pos * n, d_head))
            torch.mm(self.mix[head, :n_pos, :n_pos], read, out=moved[head])
        for head in range(len(self.read)):
            flat.addmm_(moved[head].view(n_pos * n, d_head), self.write[head])


@dataclass(frozen=True, eq=False)
class Paths:
    """`G[:, t] = sum_r where[:, start of t, r] (x) what[r, t]`: one term for each way through the heads so far."""

    where: Float[Tensor, "pos start path"]
    what: Float[Tensor, "path target d"]
    starts: tuple[tuple[int, slice], ...]
    """Position and targets of each start."""

    def pays(self, heads: Heads) -> bool:
        """Whether one more layer costs less by paths than by the dense step."""
        n_pos, n_starts, n_paths = self.where.shape
        n_heads, d, d_head = heads.read.shape
        n = self.what.shape[1]
        inner = n_heads * d_head
        by_path = n_paths * (4 * d * inner * n + 2 * n_heads * n_pos * (d * n + n_pos * n_starts))
        return by_path < ADVANTAGE * n * n_pos * (4 * d * inner + 2 * n_pos * inner)


@dataclass(eq=False)
class Front:
    """Targets that walk together, as columns `columns` of the result."""

    columns: slice
    g: Float[Tensor, "pos target d"]
    paths: Paths | None = None

    @classmethod
    def start(
        cls, columns: slice, pos: Int[Tensor, " target"], directions: Float[Tensor, "target d"], n_pos: int
    ) -> Front:
        """Targets at single positions, sorted by position."""
        n, d = directions.shape
        g = directions.new_zeros(n_pos, n, d)
        g[pos, torch.arange(n)] = directions
        found, counts = pos.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0).tolist()
        spans = [slice(e - c, e) for e, c in zip(ends, counts.tolist(), strict=True)]
        where = directions.new_zeros(n_pos, len(found), 1)
        where[found, torch.arange(len(found)), 0] = 1
        return cls(columns, g, Paths(where, directions[None], tuple(zip(found.tolist(), spans, strict=True))))

    def dot(self, vectors: Float[Tensor, "every_pos d"]) -> Float[Tensor, " target"]:
        """`sum_pos G[pos] . vectors[pos]` of each target."""
        paths = self.paths
        if paths is not None and paths.what.shape[0] == 1:  # still at its one position
            picked = vectors[[pos for pos, _ in paths.starts]]
            counts = torch.tensor([span.stop - span.start for _, span in paths.starts])
            return (paths.what[0] * picked.repeat_interleave(counts, 0)).sum(-1)
        return torch.bmm(self.g, vectors[: len(self.g), :, None])[..., 0].sum(0)

    def add(self, more: Float[Tensor, "pos target d"]) -> None:
        """Add to `g` something that is no product of a part over positions and a part over the stream."""
        self.g += more
        self.paths = None

    def pull(self, heads: Heads, causal: bool) -> None:
        """Walk through one attention layer: `g` becomes `g + adjoint(g)`."""
        if self.paths is None:
            heads.pull(self.g)
            return
        where, what = self.paths.where, self.paths.what
        n_pos, n_starts, n_paths = where.shape
        n, d = what.shape[1:]
        n_heads = len(heads.read)
        new_where = where.new_empty(n_pos, n_starts, n_heads, n_paths)
        new_what = what.new_empty(n_heads, n_paths, n, d)
        for head in range(n_heads):
            moved = heads.mix[head, :n_pos, :n_pos] @ where.view(n_pos, -1)
            new_where[:, :, head] = moved.view(n_pos, n_starts, n_paths)
            torch.mm(what.view(-1, d) @ heads.read[head], heads.write[head], out=new_what[head].view(-1, d))
        new_where, new_what = new_where.flatten(2), new_what.flatten(0, 1)
        flat, terms = self.g.view(n_pos, n * d), new_what.view(n_heads * n_paths, n * d)
        for start, (pos, span) in enumerate(self.paths.starts):
            rows = pos + 1 if causal else n_pos
            picked = slice(span.start * d, span.stop * d)
            flat[:rows, picked].addmm_(new_where[:rows, start], terms[:, picked])
        self.paths = Paths(torch.cat([where, new_where], 2), torch.cat([what, new_what]), self.paths.starts)


def merge(fronts: list[Front]) -> list[Front]:
    """Join the fronts that have no paths any more into one; those that have stay by themselves."""
    dense = [f for f in fronts if f.paths is None]
    if len(dense) < 2:
        return fronts
    columns = slice(dense[0].columns.start, dense[-1].columns.stop)
    joined = Front(columns, torch.cat([f.g for f in dense], 1))
    return [joined, *(f for f in fronts if f.paths is not None)]


def settle(fronts: list[Front], heads: Heads) -> None:
    """Drop the paths of fronts that would be slower with them, and of all that started above one that has none."""
    dense = False
    for front in reversed(fronts):
        if dense or front.paths is None or not front.paths.pays(heads):
            front.paths, dense = None, True


def norm_at(norm: FrozenNorm, pos: Int[Tensor, " row"]) -> FrozenNorm:
    """The norm at these positions."""
    return FrozenNorm(norm.gain, norm.shift, norm.scale[pos], norm.centres)


def mlp_at(mlp: FrozenMLP, pos: Int[Tensor, " row"]) -> FrozenMLP:
    """The MLP at these positions: its adjoint then takes `[row, target, d]`."""
    post = None if mlp.post is None else norm_at(mlp.post, pos)
    return FrozenMLP(norm_at(mlp.norm, pos), mlp.W_in, mlp.b_in, mlp.gate[pos], mlp.W_out, mlp.b_out, post)
