"""Attention whose pattern is held: a linear map over positions, head by head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from graphs.frozen.norms import FrozenNorm

__all__ = ["FrozenAttention", "Scores"]


@dataclass(frozen=True, eq=False)
class Scores:
    """How the pattern came about: `softmax(scaling q k^T)` over the allowed keys (Vaswani et al. 2017, equation 1).

    `q` and `k` are after biases, query and key norms and rotary embedding; key heads are repeated for grouped queries.
    `rotate` (rotary embedding) maps `[head, pos, d_head]` to the same; `q_norm` and `k_norm` hold the scales of query
    and key norms, a `[pos, 1]` for each head. So, where these parts exist,
    `q = rotate(q_norm(norm(x) W_Q + b_Q))`, with every step linear.
    """

    q: Float[Tensor, "head query d_head"]
    k: Float[Tensor, "head key d_head"]
    scaling: float
    W_Q: Float[Tensor, "head d d_head"]
    W_K: Float[Tensor, "head d d_head"]
    b_Q: Float[Tensor, "head d_head"]
    b_K: Float[Tensor, "head d_head"]
    rotate: Callable[[Tensor], Tensor] | None = None
    q_norm: tuple[FrozenNorm, ...] = ()
    k_norm: tuple[FrozenNorm, ...] = ()

    @cached_property
    def values(self) -> Float[Tensor, "head query key"]:
        """The scores, before mask and softmax."""
        return self.scaling * self.q @ self.k.transpose(-1, -2)


@dataclass(frozen=True, eq=False)
class FrozenAttention:
    """`post(sum_h A_h (norm(x) W_V^h + b_V^h) W_O^h + b_O)` with the patterns `A_h` held.

    Grouped key-value heads are already repeated. `bias` is all that it writes that does not depend on `x`. Where
    queries are not the positions of `x` (a pooling probe), `query` and `key` differ in length.
    """

    norm: FrozenNorm
    pattern: Float[Tensor, "head query key"]
    W_V: Float[Tensor, "head d d_head"]
    b_V: Float[Tensor, "head d_head"]
    W_O: Float[Tensor, "head d_head d"]
    b_O: Float[Tensor, " d"]
    scores: Scores | None = None
    post: FrozenNorm | None = None

    @cached_property
    def bias(self) -> Float[Tensor, "query d"]:
        """What it writes when the linear part of its input norm gives zero."""
        value = self.norm.shift @ self.W_V + self.b_V  # [head, d_head]
        written = self.pattern.sum(-1).T @ (value[:, None] @ self.W_O)[:, 0] + self.b_O
        return written if self.post is None else self.post.apply(written)

    @cached_property
    def folded(
        self,
    ) -> tuple[Float[Tensor, "head d d_head"], Float[Tensor, "head key query"], Float[Tensor, "head d_head d"]]:
        """The adjoint as three matrices a head, the input norm folded in: `W_O^T`, `A^T / scale`, `(W_V gain C)^T`.

        `adjoint(g) = sum_h mix_h (g read_h) write_h` for `(read, mix, write) = folded`, once `post` is undone.
        """
        write = self.W_V.transpose(-1, -2) * self.norm.gain
        write = write - write.mean(-1, keepdim=True) if self.norm.centres else write
        mix = self.pattern.transpose(-1, -2) / self.norm.scale
        return self.W_O.transpose(-1, -2), mix.contiguous(), write.contiguous()

    def apply(self, x: Float[Tensor, "*rest key d"]) -> Float[Tensor, "*rest query d"]:
        """What it writes because of `x`, without `bias`."""
        normed = self.norm.linear(x)[..., None, :, :]
        written = (self.pattern @ (normed @ self.W_V) @ self.W_O).sum(-3)
        return written if self.post is None else self.post.linear(written)

    def adjoint(self, g: Float[Tensor, "query target d"]) -> Float[Tensor, "key target d"]:
        """The transpose of `apply`: what is to be added to `g`, the identity path excluded."""
        g = g if self.post is None else self.post.adjoint(g)
        read, mix, write = self.folded
        pulled = g.new_zeros(mix.shape[1], g.shape[1], write.shape[-1])
        flat = pulled.view(-1, write.shape[-1])
        for head in range(len(mix)):  # three matrix products a head, no permutation
            moved = mix[head] @ (g @ read[head]).flatten(1)
            flat.addmm_(moved.view(len(flat), -1), write[head])
        return pulled

    def adjoint_by_head(self, g: Float[Tensor, "query target d"]) -> Float[Tensor, "head key target d"]:
        """`adjoint`, one summand a head."""
        g = g if self.post is None else self.post.adjoint(g)
        read, mix, write = self.folded
        moved = mix @ (g @ read[:, None]).flatten(2)  # [head, key, target * d_head]
        return moved.unflatten(-1, (g.shape[1], -1)) @ write[:, None]
