"""Which attention heads carry an edge.

A path from a source to a target passes through any number of heads. An edge is a sum over all those paths, which
cannot be shared out among heads path by path once several layers lie between (their number is exponential, Kamath et
al. 2025, "Tracing Attention Computation Through Feature Interactions"). Two partitions stay exact and cheap:

- by the *last* head before the target: `seed . head(what the source has become on entering that layer)`;
- by the *first* head after the source: `(what the target reads there) . head(source)`.

Both have a part that passes through no head at all. Where one attention layer lies between, both are the same: the head
loadings; `top_edges` has the strongest such edges of a graph. `top_reads` ranks what heads bring, by key, for every
target of a graph: where to open a QK panel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from graphs.descent import Place, between, down
from graphs.frozen.attention import FrozenAttention
from graphs.frozen.parts import FrozenBlock
from graphs.graph import AttributionGraph
from graphs.influence import influence, output_weights
from graphs.nodes import Node, NodeType
from graphs.replace import Level, Replacement
from mechinterp.errors import UsageError

__all__ = ["EdgeHeads", "HeadRead", "edge_heads", "source_stream", "target_seed", "top_edges", "top_reads"]

Head = tuple[str, int, int]


@dataclass(frozen=True)
class EdgeHeads:
    """One edge by heads. `no_head + sum(last) == no_head + sum(first) == edge`.

    Fields:
        edge: the weight, computed here (equal to the graph's).
        no_head: the part that passes through no attention head.
        last, first: the rest by (tower, layer, head), largest in size first.
        one_hop: whether only one attention layer lies between; then `last` and `first` agree.

    Two nodes that no path joins have 0, no heads, and no hop.
    """

    edge: float
    no_head: float
    last: dict[Head, float]
    first: dict[Head, float]
    one_hop: bool


@dataclass(frozen=True)
class HeadRead:
    """What head `head` of block `layer` brings from position `key` straight to a target at position `query`.

    `score` is |loading| as a share of the target's in-edges, times the target's influence, summed over the targets at
    this position; `loading` is the signed sum.
    """

    tower: str
    layer: int
    head: int
    query: int
    key: int
    score: float
    loading: float


class _Chain:
    """What is linear in a block besides attention: a transcoder's skip, or the MLP with its gate held (SAE mode)."""

    def __init__(self, replacement: Replacement):
        self.frozen, self.levels, self.mode = replacement.frozen, replacement.levels, replacement.mode

    def _skip(self, stack: int, block: FrozenBlock) -> Tensor | None:
        level = self.levels.get((stack, block.layer))
        return None if level is None or self.mode == "sae" else level.skip

    def through_mlp(self, stack: int, block: FrozenBlock, x: Float[Tensor, "pos d"]) -> Float[Tensor, "pos d"]:
        """From the stream after attention to the stream after the block."""
        if self.mode == "sae":
            return x + block.mlp.apply(x)
        skip = self._skip(stack, block)
        return x if skip is None else x + block.norm2.linear(x) @ skip

    def mlp_adjoint(self, stack: int, block: FrozenBlock, g: Float[Tensor, "pos d"]) -> Float[Tensor, "pos d"]:
        """The transpose of `through_mlp`."""
        if self.mode == "sae":
            return g + block.mlp.adjoint(g[:, None])[:, 0]
        skip = self._skip(stack, block)
        return g if skip is None else g + block.norm2.adjoint((g @ skip.T)[:, None])[:, 0]


def edge_heads(replacement: Replacement, graph: AttributionGraph, target: int, source: int) -> EdgeHeads:
    """The edge from node `source` to node `target` (rows of the node table), by heads.

    All zero where no path leads from the source to the target. Raises UsageError for a target without in-edges and for
    a bias node as source (it enters at many places).
    """
    chain = _Chain(replacement)
    start, stream = source_stream(replacement, graph.nodes[source])
    end, seed = target_seed(replacement, graph, target)
    steps = between(replacement, start, end)
    if steps is None:
        return EdgeHeads(0.0, 0.0, {}, {}, one_hop=False)
    # downwards: with every head (full) and with none (straight); kept as they stand above each attention layer
    full = straight = seed
    above: list[tuple[Tensor, Tensor]] = []
    for kind, stack, part, _ in steps:
        if kind == "attention":
            above.append((full, straight))
            full = full + part.attention.adjoint(full[:, None])[:, 0]
        elif kind == "mlp":
            full, straight = chain.mlp_adjoint(stack, part, full), chain.mlp_adjoint(stack, part, straight)
        else:
            full, straight = (part.adjoint(g[:, None])[:, 0] for g in (full, straight))
    above.reverse()
    edge, no_head = float((full * stream).sum()), float((straight * stream).sum())
    moved = alone = stream
    last: dict[Head, float] = {}
    first: dict[Head, float] = {}
    crossed = 0
    for kind, stack, part, _ in reversed(steps):
        if kind == "attention":
            full, straight = above[crossed]
            crossed += 1
            names = [(part.tower, part.layer, h) for h in range(len(part.attention.pattern))]
            last |= dict(zip(names, _by_head(part.attention, moved, straight), strict=True))
            first |= dict(zip(names, _by_head(part.attention, alone, full), strict=True))
            moved = moved + part.attention.apply(moved)
        elif kind == "mlp":
            moved, alone = chain.through_mlp(stack, part, moved), chain.through_mlp(stack, part, alone)
        else:
            moved, alone = part.apply(moved), part.apply(alone)
    return EdgeHeads(edge, no_head, _sorted(last), _sorted(first), one_hop=crossed == 1)


def _by_head(attention: FrozenAttention, x: Float[Tensor, "pos d"], g: Float[Tensor, "pos d"]) -> list[float]:
    """`g . head(x)` for each head."""
    pulled = attention.adjoint_by_head(g[:, None])[:, :, 0]
    return (pulled * x).sum((1, 2)).tolist()


def _sorted(shares: dict[Head, float]) -> dict[Head, float]:
    return dict(sorted(shares.items(), key=lambda item: -abs(item[1])))


def source_stream(replacement: Replacement, node: Node) -> tuple[Place, Float[Tensor, "pos d"]]:
    """Where a node's vector is written, and a stream that holds it alone."""
    stacks = replacement.frozen.stacks
    index = next((i for i, s in enumerate(stacks) if s.tower == node.tower), None)
    if index is None or node.type in (NodeType.OUTPUT, NodeType.BIAS):
        raise UsageError(f"{node.id} does not enter the stream at one place", where="source")
    stream = torch.zeros_like(stacks[index].blocks[0].resid_pre)
    place = Place(index, node.layer, "post")
    if node.type in _KINDS:
        positions, vectors = stacks[index].inputs.kinds[_KINDS[node.type]]
        rows = positions == node.pos if node.pos >= 0 else torch.ones_like(positions, dtype=torch.bool)
        stream.index_add_(0, positions[rows], vectors[rows])
        return place, stream
    level = replacement.levels[index, node.layer]
    if node.type == NodeType.FEATURE:
        stream[node.pos] = level.writes[_row(level, node)]
    else:
        stream[node.pos] = level.error[node.pos]
    return place, stream


_KINDS = {NodeType.PATCH: "patch", NodeType.TOKEN: "token", NodeType.POSITION: "pos", NodeType.CLS: "cls"}


def _row(level: Level, node: Node) -> int:
    """Row of a feature in its level. Raises UsageError when it is not active there."""
    found = ((level.pos == node.pos) & (level.index == node.feature)).nonzero()
    if not len(found):
        raise UsageError(f"{node.id} is not active on this input", where="node")
    return int(found[0])


def target_seed(replacement: Replacement, graph: AttributionGraph, target: int) -> tuple[Place, Float[Tensor, "pos d"]]:
    """Where a target reads, and its linear form on the stream there.

    A feature of an SAE reads after its MLP, but nothing else stands there: its form is pulled through that MLP.
    """
    node, chain = graph.nodes[target], _Chain(replacement)
    if node.type == NodeType.OUTPUT:
        readout = replacement.frozen.readouts[[o.node for o in graph.outputs].index(target)]
        layer = replacement.frozen.stacks[readout.stack].blocks[readout.layer].layer
        return Place(readout.stack, layer, readout.point), readout.seed
    if node.type != NodeType.FEATURE:
        raise UsageError(f"{node.id} has no in-edges", where="target")
    index = next(i for i, s in enumerate(replacement.frozen.stacks) if s.tower == node.tower)
    block, level = replacement.frozen.stacks[index].blocks[node.layer], replacement.levels[index, node.layer]
    seed = torch.zeros_like(block.resid_mid)
    seed[node.pos] = level.reads[_row(level, node)]
    seed = chain.mlp_adjoint(index, block, seed) if replacement.mode == "sae" else seed
    return Place(index, node.layer, "mid"), seed


def top_edges(replacement: Replacement, graph: AttributionGraph, n: int = 5) -> list[tuple[int, int, float, EdgeHeads]]:
    """The `n` strongest edges with one attention layer between: target, source, share of influence, heads.

    An edge's share is its part of the target's in-edges in size, times the target's influence. Biases as sources, which
    enter at many places, are left out.
    """
    targets, sources, weights = graph.edges
    size = weights.double().abs()
    into = torch.zeros(len(graph.nodes), dtype=torch.float64).index_add_(0, targets, size)
    share = size / into.clamp_min(1e-30)[targets] * (influence(graph) + output_weights(graph))[targets]
    share[graph.nodes.type[sources] == NodeType.BIAS] = 0.0
    reads = {target: target_seed(replacement, graph, target)[0] for target in targets.unique().tolist()}
    found: list[tuple[int, int, float, EdgeHeads]] = []
    for i in share.argsort(descending=True, stable=True).tolist():
        if len(found) == n or share[i] == 0:
            break
        target, source = int(targets[i]), int(sources[i])
        steps = between(replacement, source_stream(replacement, graph.nodes[source])[0], reads[target])
        if steps is not None and sum(step.kind == "attention" for step in steps) == 1:
            found.append((target, source, float(share[i]), edge_heads(replacement, graph, target, source)))
    return found


def top_reads(replacement: Replacement, graph: AttributionGraph, n: int = 10) -> list[HeadRead]:
    """The `n` (head, query, key) that bring most to the targets of a graph, straight (no later head between).

    Heads of the target's own stack that it can read: in SAE mode those above the nearest SAE below it.
    """
    strength = influence(graph) + output_weights(graph)
    sizes = torch.zeros(len(graph.targets), dtype=torch.float64)
    counts = graph.weights.crow_indices().diff()
    rows = torch.arange(len(graph.targets)).repeat_interleave(counts)
    sizes.index_add_(0, rows, graph.weights.values().double().abs())
    found: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}
    chain = _Chain(replacement)
    for row, target in enumerate(graph.targets.tolist()):
        weight = float(strength[target] / sizes[row].clamp_min(1e-30))
        if weight == 0:
            continue
        place, seed = target_seed(replacement, graph, target)
        tower = replacement.frozen.stacks[place.stack].tower
        for kind, stack, block, _ in down(replacement, place):
            if kind == "bridge":
                break
            if kind == "mlp":
                seed = chain.mlp_adjoint(stack, block, seed)
                continue
            for query in seed.abs().sum(1).nonzero()[:, 0].tolist():
                brought = _brought(block.attention, block.resid_pre, seed, query)  # [head, key]
                key = (tower, block.layer, query)  # of the stack: captions share the blocks of "text"
                score, loading = found.get(key, (torch.zeros_like(brought), torch.zeros_like(brought)))
                found[key] = (score + weight * brought.abs(), loading + brought)
    ranked = []
    for (tower, layer, query), (score, loading) in found.items():
        for place in score.flatten().topk(min(n, score.numel())).indices.tolist():
            head, key = divmod(place, score.shape[1])
            ranked.append(HeadRead(tower, layer, head, query, key, float(score[head, key]), float(loading[head, key])))
    return sorted(ranked, key=lambda r: -r.score)[:n]


def _brought(
    attention: FrozenAttention, x: Float[Tensor, "pos d"], seed: Float[Tensor, "pos d"], query: int
) -> Float[Tensor, "head key"]:
    """What each head brings from each key to the seed's row `query`, out of the whole stream `x`."""
    g = seed[query : query + 1]
    if attention.post is not None:
        full = torch.zeros_like(seed)
        full[query] = seed[query]
        g = attention.post.adjoint(full[:, None])[query]
    value = attention.norm.linear(x) @ attention.W_V  # [head, key, d_head]
    read = (attention.W_O @ g[0])[..., None]  # [head, d_head, 1]
    return attention.pattern[:, query] * (value @ read)[..., 0]
