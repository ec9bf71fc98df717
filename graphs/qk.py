"""Why a head looks where it looks: an attention score as a sum over pairs of things written at the query and the key.

A score before the softmax is bilinear, `scaling * q . k`, and with patterns and norm scales held both `q` and `k` are
linear in everything written before: features, errors, patches, words, positions, biases, wherever they were written.
So the score is exactly a sum over pairs (Kamath et al. 2025, "Tracing Attention Computation Through Feature
Interactions"), rotary embedding and query and key norms included. Softmax compares keys: what raises all keys alike
changes nothing, so `contrast` takes the mean over the keys that the query may look at off the key side.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from graphs.frozen.attention import FrozenAttention, Scores
from graphs.frozen.norms import FrozenNorm
from graphs.frozen.parts import FrozenPass, Readout
from graphs.layout import INPUT_TYPES
from graphs.nodes import node_id
from graphs.replace import Replacement
from graphs.sweep import Sweep
from mechinterp.errors import UsageError

__all__ = ["Pair", "QKPanel", "qk_panel"]

CONSTANT = "constant"
"""What neither side owes to any node: biases of the query and key maps, and shifts of their norms."""


@dataclass(frozen=True)
class Pair:
    """One pair of nodes and its part of the score (of the contrast, where that was asked for)."""

    query: str
    key: str
    value: float


@dataclass(frozen=True, eq=False)
class QKPanel:
    """The score of one head for one query and key.

    Fields:
        ids: names of the components, the constant last. Both sides have the same, in node order.
        at_query, at_key: what each component is in the query and in the key, after rotation.
        mean_key: what each component is in the mean of the keys that the query may look at.
        score: as the model had it. `matrix().sum()` is the same number.
    """

    tower: str
    layer: int
    head: int
    query: int
    key: int
    ids: tuple[str, ...]
    at_query: Float[Tensor, "component d_head"]
    at_key: Float[Tensor, "component d_head"]
    mean_key: Float[Tensor, "component d_head"]
    scaling: float
    score: float
    mean_score: float

    @property
    def contrast(self) -> float:
        """The score minus its mean over the allowed keys."""
        return self.score - self.mean_score

    def matrix(self, contrast: bool = False) -> Float[Tensor, "query_component key_component"]:
        """Every pair. Quadratic in the number of components: for large graphs take `top`."""
        return self.scaling * self.at_query @ self._keys(contrast).T

    def query_side(self, contrast: bool = False) -> Float[Tensor, " component"]:
        """Sum over key components."""
        return self.scaling * self.at_query @ self._keys(contrast).sum(0)

    def key_side(self, contrast: bool = False) -> Float[Tensor, " component"]:
        """Sum over query components."""
        return self.scaling * self._keys(contrast) @ self.at_query.sum(0)

    def top(self, n: int = 20, contrast: bool = False) -> list[Pair]:
        """The `n` largest pairs in size; negative ones count as much as positive ones."""
        keys, found = self._keys(contrast), []
        for start in range(0, len(self.ids), 512):
            block = self.scaling * self.at_query[start : start + 512] @ keys.T
            for place in block.abs().flatten().topk(min(n, block.numel())).indices.tolist():
                row, column = divmod(place, block.shape[1])
                found.append(Pair(self.ids[start + row], self.ids[column], float(block[row, column])))
        return sorted(found, key=lambda pair: -abs(pair.value))[:n]

    def _keys(self, contrast: bool) -> Float[Tensor, "component d_head"]:
        return self.at_key - self.mean_key if contrast else self.at_key


def qk_panel(replacement: Replacement, tower: str, layer: int, head: int, query: int, key: int) -> QKPanel:
    """Take one score apart.

    Args:
        replacement: the frozen pass with its dictionaries.
        tower, layer, head: which head; `tower` as the stacks are called.
        query, key: positions.

    Raises UsageError when there is no such head or position, or the key is masked.
    """
    frozen = replacement.frozen
    stack = next((i for i, s in enumerate(frozen.stacks) if s.tower == tower), None)
    if stack is None or not 0 <= layer < len(frozen.stacks[stack].blocks):
        raise UsageError(f"no block {layer} of {tower!r}", where="qk_panel")
    block = frozen.stacks[stack].blocks[layer]
    attention, scores = block.attention, block.attention.scores
    n = len(block.resid_pre)
    if scores is None or not (0 <= head < len(attention.pattern) and 0 <= query < n and 0 <= key < n):
        raise UsageError(f"no score at head {head}, query {query}, key {key}", where=f"{tower}.blocks.{layer}.attn")
    allowed = torch.arange(n) <= query if frozen.stacks[stack].causal else torch.ones(n, dtype=torch.bool)
    allowed &= (attention.pattern[:, query] > 0).any(0)  # sliding windows and padding
    if not allowed[key]:
        raise UsageError(f"key {key} is masked for query {query}", where=f"{tower}.blocks.{layer}.attn")
    keys = allowed.nonzero()[:, 0]
    one = torch.zeros(n, dtype=block.resid_pre.dtype)
    one[key] = 1.0
    mean = allowed.to(one.dtype) / allowed.sum()
    at = torch.zeros_like(one)
    at[query] = 1.0
    sides = [_side(attention, scores, head, "q", at), *(_side(attention, scores, head, "k", w) for w in (one, mean))]
    parts = _components(replacement, stack, layer, torch.cat([seed for seed, _ in sides], dim=1))
    width = sides[0][1].shape[0]
    at_query, at_key, mean_key = (
        torch.cat([parts[1][:, i * width : (i + 1) * width], constant[None]]) for i, (_, constant) in enumerate(sides)
    )
    row = scores.values[head, query]
    return QKPanel(
        tower=tower,
        layer=layer,
        head=head,
        query=query,
        key=key,
        ids=(*parts[0], CONSTANT),
        at_query=at_query,
        at_key=at_key,
        mean_key=mean_key,
        scaling=scores.scaling,
        score=float(row[key]),
        mean_score=float(row[keys].mean()),
    )


def _side(
    attention: FrozenAttention, scores: Scores, head: int, side: str, weights: Float[Tensor, " pos"]
) -> tuple[Float[Tensor, "pos d_head d"], Float[Tensor, " d_head"]]:
    """A weighted sum over positions of queries or keys, as linear forms on the stream, and the constant part."""
    W, b, norms = (scores.W_Q, scores.b_Q, scores.q_norm) if side == "q" else (scores.W_K, scores.b_K, scores.k_norm)
    norm: FrozenNorm | None = norms[head] if norms else None
    width = W.shape[-1]
    n = len(weights)
    eye = torch.eye(width, dtype=W.dtype)[:, None].expand(width, n, width)  # one basis vector a row, at every position
    turned = eye if norm is None else norm.linear(eye)
    turned = turned if scores.rotate is None else scores.rotate(turned)  # [in, pos, out]
    forms = torch.einsum("di,ipo->pod", W[head], turned) * weights[:, None, None]
    constant = (attention.norm.shift @ W[head] + b[head]).expand(n, width)
    constant = constant if norm is None else norm.apply(constant)
    constant = constant if scores.rotate is None else scores.rotate(constant[None])[0]
    return attention.norm.adjoint(forms), weights @ constant


def _components(
    replacement: Replacement, stack: int, layer: int, forms: Float[Tensor, "pos form d"]
) -> tuple[tuple[str, ...], Float[Tensor, "component form"]]:
    """What every node brings to linear forms on the stream that enters a block."""
    if layer == 0:
        return _of_inputs(replacement, stack, forms)
    return _swept(replacement, stack, forms, layer - 1)


def _swept(
    replacement: Replacement, stack: int, forms: Float[Tensor, "pos form d"], layer: int
) -> tuple[tuple[str, ...], Float[Tensor, "component form"]]:
    """The same for the stream after block `layer`, by one sweep with the forms as outputs."""
    frozen = replacement.frozen
    readouts = tuple(
        Readout(f"form {i}", "form", stack, forms[:, i].contiguous(), 0.0, 0.0, layer=layer)
        for i in range(forms.shape[1])
    )
    changed = _with(replacement, replace(frozen, readouts=readouts))
    sweep = Sweep(changed)
    nodes = sweep.layout.nodes
    found = forms.new_zeros(len(nodes), forms.shape[1])
    for targets, edges in sweep.rows(torch.arange(sweep.layout.outputs, len(nodes))):
        found[:, targets - sweep.layout.outputs] = edges
    kept = (found != 0).any(1).nonzero()[:, 0]
    return tuple(nodes.ids[i] for i in kept.tolist()), found[kept]


def _of_inputs(
    replacement: Replacement, stack: int, forms: Float[Tensor, "pos form d"]
) -> tuple[tuple[str, ...], Float[Tensor, "component form"]]:
    """The same for the stream that enters the first block: its inputs, and what the projector brings."""
    parts = replacement.frozen.stacks[stack]
    names: list[str] = []
    rows = []
    for kind, (positions, vectors) in parts.inputs.kinds.items():
        found = torch.einsum("nfd,nd->nf", forms[positions], vectors)
        if kind == "bias":
            found = found.sum(0, keepdim=True)
            positions = positions[:0].new_tensor([-1])
        names += [node_id(INPUT_TYPES[kind], parts.tower, pos=int(p)) for p in positions]
        rows.append(found)
    if parts.bridge is not None and parts.bridge_from is not None:
        names.append(f"{parts.bridge.name}.bias")
        rows.append(torch.einsum("pfd,pd->f", forms, parts.bridge.bias)[None])
        below, last = parts.bridge_from, len(replacement.frozen.stacks[parts.bridge_from].blocks) - 1
        ids, found = _swept(replacement, below, parts.bridge.adjoint(forms), last)
        names += ids
        rows.append(found)
    return tuple(names), torch.cat(rows)


def _with(replacement: Replacement, frozen: FrozenPass) -> Replacement:
    """The same dictionaries on the same pass with other readouts."""
    changed = copy.copy(replacement)
    changed.frozen = frozen
    return changed
