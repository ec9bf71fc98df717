"""The reverse sweep: its rows are the autograd rows, and they add up to what the forward pass computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from graph_toys import bridged_pass, random_pass, relu_transcoders

from graphs.build import build_graph
from graphs.certificate import CertificateError, certify
from graphs.fronts import Heads
from graphs.frozen.norms import FrozenNorm
from graphs.frozen.parts import FrozenPass
from graphs.graph import AttributionGraph
from graphs.layout import Layout
from graphs.nodes import NodeType
from graphs.replace import Replacement
from graphs.sweep import Sweep
from mechinterp.errors import UsageError
from mechinterp.types import Placed, Site
from saes.dictionary import JumpReLU, SparseDictionary, TopK

FLOAT, DOUBLE = torch.float32, torch.float64
LIMIT = {FLOAT: 1e-5, DOUBLE: 1e-10}


def dictionaries(
    frozen: FrozenPass, kind: str, width: int = 40, seed: int = 0, layers: tuple[int, ...] | None = None
) -> list[Placed]:
    """Random dictionaries of every block: transcoders (with a skip for "skip"), or SAEs of the stream after it."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for stack in frozen.stacks:
        for block in stack.blocks:
            done = {(placed.writes.tower, placed.writes.layer) for placed in found}  # captions share a tower
            if (block.tower, block.layer) in done or (layers is not None and block.layer not in layers):
                continue
            d, dtype = block.mlp_in.shape[1], block.mlp_in.dtype

            def random(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
                return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype) * shape[0] ** -0.5

            jump = kind == "jump"
            dictionary = SparseDictionary(
                random(d, width),
                random(width, d),
                random(width),
                random(d),
                JumpReLU() if jump else TopK(5),
                threshold=torch.full((width,), 0.3, dtype=dtype) if jump else None,
                centred=kind == "sae",
                W_skip=random(d, d) if kind == "skip" else None,
            )
            reads, writes = ("hook_resid_post",) * 2 if kind == "sae" else ("ln2.hook_normalized", "hook_mlp_out")
            found.append(
                Placed(dictionary, Site(block.tower, block.layer, reads), Site(block.tower, block.layer, writes))
            )
    return found


PASSES = {
    "causal": lambda dtype: random_pass(0, dtype=dtype, outputs=2),
    "bidirectional": lambda dtype: random_pass(1, dtype=dtype, causal=False, pos=5),
    "rms": lambda dtype: random_pass(2, dtype=dtype, norm="rms"),
    "two towers": lambda dtype: bridged_pass(3, dtype=dtype),
    "six heads": lambda dtype: random_pass(4, dtype=dtype, d=24, heads=6, causal=False, layers=4),
    "one head": lambda dtype: random_pass(5, dtype=dtype, heads=1, layers=5, pos=9),
    "post norms": lambda dtype: with_post_norms(random_pass(6, dtype=dtype, causal=False)),
}


def with_post_norms(frozen: FrozenPass) -> FrozenPass:
    """Norms after attention and MLP, as Gemma 3 has them. The cached streams are not those of such a model any more."""
    draw = torch.Generator().manual_seed(0)
    (stack,) = frozen.stacks
    blocks = []
    for block in stack.blocks:
        n_pos, d = block.mlp_out.shape
        norms = []
        for centres in (True, False):
            gain, shift, scale = (torch.randn(*s, generator=draw).to(block.mlp_out) for s in ((d,), (d,), (n_pos, 1)))
            norms.append(FrozenNorm(gain, shift, scale, centres))
        blocks.append(
            replace(
                block,
                attention=replace(block.attention, post=norms[0]),
                mlp=replace(block.mlp, post=norms[1]),
            )
        )
    return replace(frozen, stacks=(replace(stack, blocks=tuple(blocks)),))


def rows_by_autograd(replacement: Replacement, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Every target's value and row: run forwards with one multiplier a source, and ask autograd for the rest.

    Only `apply` of the parts is used (tested by itself), never an adjoint. Patterns, scales and gates are constants.
    """
    frozen = replacement.frozen
    one = torch.ones(len(layout.nodes), dtype=replacement.dtype, requires_grad=True)
    streams, targets = [], []
    for number, stack in enumerate(frozen.stacks):
        n_pos, d = stack.final.shape
        x = torch.zeros(n_pos, d, dtype=replacement.dtype)
        for kind, (pos, vectors) in stack.inputs.kinds.items():
            first = layout.inputs[number, kind]
            scale = one[first] if kind == "bias" else one[first : first + len(pos), None]
            x = x.index_add(0, pos, scale * vectors)
        if stack.bridge is not None:
            x = x + stack.bridge.apply(streams[stack.bridge_from][-1][1])
            x = x + one[layout.bridge_bias[number]] * stack.bridge.bias
        kept = []
        for block in stack.blocks:
            key = (number, block.layer)
            bias, level = one[layout.bias[key]], replacement.levels.get(key)
            mid = x + block.attention.apply(x) + bias * block.attention.bias
            if replacement.mode == "transcoder":
                post = mid
                if level.skip is not None:
                    post = post + block.norm2.linear(mid) @ level.skip
            else:
                post = mid + block.mlp.apply(mid) + bias * block.mlp.bias
            if level is not None:
                read = mid if replacement.mode == "transcoder" else post
                targets.append((level.reads * read[level.pos]).sum(-1))
                span = layout.features[key]
                written = torch.zeros_like(mid).index_add(
                    0, level.pos, one[span.start : span.stop, None] * level.writes
                )
                errors = one[layout.errors[key] : layout.errors[key] + n_pos, None] * level.error
                written = written + errors + bias * level.bias
                post = post + written if replacement.mode == "transcoder" else written
            kept.append((mid, post))
            x = post
        streams.append(kept)
    for readout in frozen.readouts:
        mid, post = streams[readout.stack][readout.layer]
        targets.append((readout.seed * (mid if readout.point == "mid" else post)).sum()[None])
    values = torch.cat(targets)
    every = torch.eye(len(values), dtype=values.dtype)
    (rows,) = torch.autograd.grad(values, one, every, is_grads_batched=True)
    return values.detach(), rows


def rows_by_sweep(replacement: Replacement, layout: Layout, batch: int | None = None) -> torch.Tensor:
    targets = layout.nodes.is_type(NodeType.FEATURE, NodeType.OUTPUT).nonzero()[:, 0]
    found = torch.full((len(layout.nodes), len(layout.nodes)), torch.nan, dtype=replacement.dtype)
    for nodes, edges in Sweep(replacement, layout, batch).rows(targets[torch.randperm(len(targets))]):
        found[nodes] = edges.T
    assert not found[targets].isnan().any() and found.isnan().all(1).sum() == len(found) - len(targets)
    return found[targets]


@pytest.mark.parametrize("climbs", [True, False])
@pytest.mark.parametrize("kind", ["plain", "skip", "sae"])
@pytest.mark.parametrize("name", PASSES)
def test_sweep_equals_autograd(name, kind, climbs, monkeypatch):
    monkeypatch.setattr("graphs.sweep.pays", lambda *_: climbs)
    if (name, kind) == ("post norms", "plain"):
        kind = "jump"
    frozen = PASSES[name](DOUBLE)
    replacement = Replacement(frozen, dictionaries(frozen, kind), "sae" if kind == "sae" else "transcoder")
    layout = Layout(replacement)
    _, truth = rows_by_autograd(replacement, layout)
    assert replacement.n_features > 50
    torch.testing.assert_close(rows_by_sweep(replacement, layout), truth, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(rows_by_sweep(replacement, layout, batch=7), truth, rtol=1e-9, atol=1e-11)


def test_sweep_in_single_precision_equals_autograd():
    frozen = PASSES["two towers"](FLOAT)
    replacement = Replacement(frozen, dictionaries(frozen, "plain"))
    layout = Layout(replacement)
    truth = rows_by_autograd(replacement, layout)[1]
    assert (rows_by_sweep(replacement, layout) - truth).abs().max() <= 1e-6 * truth.abs().max()


def test_paths_and_the_dense_step_agree_and_both_are_used(monkeypatch):
    frozen = random_pass(0, d=32, heads=2, layers=6, pos=24, causal=False)
    replacement = Replacement(frozen, dictionaries(frozen, "plain"))
    layout = Layout(replacement)
    used = []
    dense = Heads.pull
    monkeypatch.setattr(Heads, "pull", lambda self, g, space: (used.append(g.shape[2]), dense(self, g, space)))
    by_both = rows_by_sweep(replacement, layout)
    share = sum(used)
    monkeypatch.setattr("graphs.fronts.ADVANTAGE", 0.0)
    used.clear()
    by_dense = rows_by_sweep(replacement, layout)
    assert 0 < share < 0.7 * sum(used)
    torch.testing.assert_close(by_both, by_dense, rtol=1e-9, atol=1e-11)
    monkeypatch.undo()  # and where batches follow each other in the same memory
    torch.testing.assert_close(rows_by_sweep(replacement, layout, batch=32), by_dense, rtol=1e-9, atol=1e-11)


def test_inputs_are_walked_up_where_that_pays(monkeypatch):
    walked = []
    enter = Sweep._enter
    monkeypatch.setattr(
        Sweep, "_enter", lambda self, number, *rest: (walked.append(number), enter(self, number, *rest))
    )

    def bottoms(frozen, kind="plain", targets=10**9):
        replacement = Replacement(frozen, dictionaries(frozen, kind))
        layout, walked[:] = Layout(replacement), []
        features = layout.nodes.is_type(NodeType.FEATURE).nonzero()[:targets, 0]
        for _ in Sweep(replacement, layout, batch=8).rows(features):
            pass
        return set(walked)

    assert bottoms(PASSES["causal"](DOUBLE)) == set()
    assert bottoms(PASSES["causal"](DOUBLE), targets=8) == {0}, "so few are asked one by one"
    assert bottoms(PASSES["causal"](DOUBLE), "skip") == {0}, "a linear path leads past the attention"
    assert bottoms(PASSES["two towers"](DOUBLE)) == {0, 1}, "only what stands on nothing is climbed"


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in PASSES if name != "post norms" for kind in ("plain", "skip", "sae")]
    + [("causal", "jump"), ("two towers", "none"), ("two towers", "relu"), ("bidirectional", "relu")],
)
def test_graphs_conserve(name, kind, dtype):
    frozen = PASSES[name](dtype)
    given = {"none": list, "relu": lambda: relu_transcoders(frozen)}.get(kind, lambda: dictionaries(frozen, kind))()
    graph = build_graph(frozen, given, mode="sae" if kind == "sae" else "transcoder")
    assert graph.meta["max_relative_residual"] <= LIMIT[dtype]
    assert graph.residuals().abs().max() <= LIMIT[dtype] * 10
    assert certify(graph).holds and graph.meta["certificate"]["holds"]
    for output, readout in zip(graph.outputs, frozen.readouts, strict=True):
        sources, weights = graph.in_edges(output.node)
        assert abs(float(weights.double().sum()) + readout.constant - readout.value) < 1e-5 * (1 + abs(readout.value))
        assert len(sources)


def test_zero_error_transcoders_leave_no_error():
    frozen = random_pass(0, causal=False)
    graph = build_graph(frozen, relu_transcoders(frozen))
    _, sources, weights = graph.edges
    of_error = graph.nodes.type[sources] == int(NodeType.ERROR)
    assert weights[of_error].abs().sum() < 1e-10 * weights.abs().sum()


@pytest.mark.parametrize("direction", ["encoder", "decoder"])
def test_sae_graphs_cross_one_block(direction):
    frozen = random_pass(3, layers=4, causal=False)
    graph = build_graph(frozen, dictionaries(frozen, "sae", layers=(1, 2)), mode="sae", direction=direction)
    assert graph.meta["direction"] == direction
    targets, sources, _ = graph.edges
    nodes = graph.nodes
    feature = nodes.type[sources] == int(NodeType.FEATURE)
    assert (nodes.layer[targets[feature]] - nodes.layer[sources[feature]] == 1)[
        nodes.type[targets[feature]] == int(NodeType.FEATURE)
    ].all()
    of_second = (nodes.type[targets] == int(NodeType.FEATURE)) & (nodes.layer[targets] == 2)
    assert set(nodes.type[sources[of_second]].tolist()) == {NodeType.FEATURE, NodeType.ERROR, NodeType.BIAS}
    of_first = (nodes.type[targets] == int(NodeType.FEATURE)) & (nodes.layer[targets] == 1)
    kinds = set(nodes.type[sources[of_first]].tolist())
    assert kinds == {NodeType.PATCH, NodeType.CLS, NodeType.POSITION, NodeType.BIAS}
    row = int(((nodes.type == int(NodeType.FEATURE)) & (nodes.layer == 2)).nonzero()[0])
    placed = dictionaries(frozen, "sae", layers=(1, 2))[1].dictionary
    x = frozen.stacks[0].blocks[2].resid_post[nodes.pos[row]]
    if direction == "decoder":
        expected = x @ placed.W_dec[nodes.feature[row]]
    else:
        expected = placed.pre_activations(x)[nodes.feature[row]]
    torch.testing.assert_close(nodes.pre[row], expected)


def broken(frozen: FrozenPass, what: str) -> FrozenPass:
    """One thing wrong, as it would be in a model that is not what its freezes say."""
    stack = frozen.stacks[-1]
    blocks = list(stack.blocks)
    block = blocks[1]
    attention = block.attention
    inputs = stack.inputs
    match what:
        case "pattern":
            pattern = attention.pattern.roll(1, 0)
            blocks[1] = replace(block, attention=replace(attention, pattern=pattern))
        case "scale":
            norm = replace(attention.norm, scale=attention.norm.scale * 1.001)
            blocks[1] = replace(block, attention=replace(attention, norm=norm))
        case "shift":
            norm = replace(block.norm2, shift=torch.zeros_like(block.norm2.shift))
            blocks[1] = replace(block, mlp=replace(block.mlp, norm=norm))
        case "bias":
            blocks[1] = replace(block, attention=replace(attention, b_O=torch.zeros_like(attention.b_O)))
        case "value bias":
            blocks[0] = replace(blocks[0], attention=replace(blocks[0].attention, b_V=torch.zeros_like(attention.b_V)))
        case "position":
            inputs = replace(inputs, kinds={k: v for k, v in inputs.kinds.items() if k != "pos"})
        case "order":
            blocks = [replace(blocks[1], layer=0), replace(blocks[0], layer=1), *blocks[2:]]
        case "heads":
            blocks[1] = replace(block, attention=replace(attention, W_O=attention.W_O.flip(0)))
        case "mlp":
            blocks[0] = replace(blocks[0], mlp_out=blocks[0].mlp_out * 1.001)
    changed = replace(stack, blocks=tuple(blocks), inputs=inputs)
    return replace(frozen, stacks=(*frozen.stacks[:-1], changed))


BROKEN = ["pattern", "scale", "shift", "bias", "value bias", "position", "order", "heads", "mlp"]


@pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("what", BROKEN)
def test_a_freeze_that_does_not_hold_is_found(what, dtype):
    frozen = random_pass(0, dtype=dtype)
    given = dictionaries(frozen, "plain")
    assert build_graph(frozen, given, max_features=10**6)
    with pytest.raises(CertificateError, match="relative residual"):
        build_graph(broken(frozen, what), given)


def test_a_certificate_refuses_numbers_that_are_none():
    frozen = random_pass(0)
    graph: AttributionGraph = build_graph(frozen, dictionaries(frozen, "plain"))
    graph.weights.values()[5] = torch.nan
    with pytest.raises(CertificateError):
        certify(graph)


def test_dictionaries_in_the_wrong_place_are_refused():
    frozen = random_pass(0)
    good = dictionaries(frozen, "plain")
    with pytest.raises(UsageError, match="two dictionaries"):
        Replacement(frozen, [*good, good[0]])
    with pytest.raises(UsageError, match="wrong place"):
        Replacement(frozen, good, "sae")
    with pytest.raises(UsageError, match="no block 7"):
        sites = {"reads": Site("text", 7, "ln2.hook_normalized"), "writes": Site("text", 7, "hook_mlp_out")}
        Replacement(frozen, [replace(good[0], **sites)])
    with pytest.raises(UsageError, match="decoder"):
        Replacement(frozen, good, direction="decoder")
    scaled = dictionaries(frozen, "plain")
    encode = scaled[0].dictionary.encode
    scaled[0].dictionary.encode = lambda x: encode(x / x.norm(dim=-1, keepdim=True))
    with pytest.raises(UsageError, match="not its weights"):
        Replacement(frozen, scaled)
