"""TransformerLens language models, frozen: the same anchor as for every other family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from graph_toys import pairing_errors
from test_graphs_sweep import dictionaries
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from graphs.build import build_graph
from graphs.frozen import check, from_transformer_lens, worst
from graphs.graph import AttributionGraph
from graphs.nodes import NodeType
from graphs.targets import TokenLogit
from mechinterp.errors import ModelError, UsageError
from mechinterp.types import Placed

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")

KINDS: dict[str, dict[str, Any]] = {
    "GPT-2": {"act_fn": "gelu_new", "normalization_type": "LN"},
    "GPT-2 folded": {"act_fn": "gelu", "normalization_type": "LNPre"},
    "Llama": {
        "act_fn": "silu",
        "normalization_type": "RMS",
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": 8,
        "n_key_value_heads": 2,
    },
    "Gemma": {
        "act_fn": "gelu_pytorch_tanh",
        "normalization_type": "RMSPre",
        "gated_mlp": True,
        "use_normalization_before_and_after": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": 4,
        "attn_scores_soft_cap": 5.0,
    },
    "no norms": {"act_fn": "relu", "normalization_type": None},
}
MORE: dict[str, dict[str, Any]] = {
    "ALiBi": {"act_fn": "gelu", "normalization_type": "LN", "positional_embedding_type": "alibi"},
    "one key head, local": {
        "act_fn": "gelu_new",
        "normalization_type": "RMS",
        "n_key_value_heads": 1,
        "use_local_attn": True,
        "window_size": 3,
        "attn_types": ["local", "global"],
    },
    "normed queries": {
        "act_fn": "silu",
        "normalization_type": "RMS",
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": 8,
        "use_qk_norm": True,
    },
    "LayerNorm, gated, rotary": {
        "act_fn": "gelu",
        "normalization_type": "LN",
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": 4,
        "n_key_value_heads": 2,
    },
}
"""Kinds beyond the common ones, by what is unusual."""
TOKENS = torch.tensor([3, 1, 4, 1, 5, 9])


def lens(dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    size = {"n_layers": 2, "d_model": 32, "n_ctx": 16, "d_head": 8, "n_heads": 4, "d_mlp": 48, "d_vocab": 20}
    model = HookedTransformer(HookedTransformerConfig(**size, **changes, dtype=dtype, seed=0, device="cpu"))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and gains too
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw, dtype=dtype))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_walking_the_parts_gives_back_the_true_pass(kind: str, dtype: torch.dtype, limit: float) -> None:
    model = lens(dtype, **KINDS[kind])
    outputs = [TokenLogit(7), TokenLogit(7, 2, versus=8), TokenLogit(0, 3, demeaned=True)]
    frozen = from_transformer_lens(model, TOKENS, outputs)
    assert worst(check(frozen)).relative < limit, worst(check(frozen))
    logits = model(TOKENS[None])[0].detach()
    want = [logits[-1, 7], logits[2, 7] - logits[2, 8], logits[3, 0] - logits[3].mean()]
    assert [r.value for r in frozen.readouts] == pytest.approx([float(w) for w in want], abs=1e-5)
    assert frozen.stacks[0].causal
    if dtype == torch.float64:
        assert max(pairing_errors(frozen, 0).values()) < 1e-12


def live_rows(model: Any, graph: AttributionGraph, given: list[Placed], logit: int) -> Tensor:
    """Edges into every feature, then into the last position's logit, by autograd through the live model.

    What the graph names as held is detached, MLPs give features and errors, and every source has a multiplier.
    """
    nodes = graph.nodes
    one = torch.ones(len(nodes), dtype=torch.float64, requires_grad=True)
    pre: list[Tensor] = []
    hooks: list[Any] = [(name.removeprefix("text."), lambda v, hook: v.detach()) for name in graph.meta["freezes"]]

    def of(kind: NodeType, layer: int) -> Tensor:
        return ((nodes.type == kind) & (nodes.layer == layer)).nonzero()[:, 0]

    def times(kind: NodeType) -> Any:
        return lambda value, hook: value.detach() * one[of(kind, -1)][:, None]

    hooks += [("hook_embed", times(NodeType.TOKEN)), ("hook_pos_embed", times(NodeType.POSITION))]
    handles = []
    for layer, placed in enumerate(given):
        dictionary: Any = placed.dictionary
        found, errors = of(NodeType.FEATURE, layer), of(NodeType.ERROR, layer)
        at, index = nodes.pos[found].long(), nodes.feature[found].long()

        def reads(module: Any, args: Any, x: Tensor, at: Any = at, index: Any = index, d: Any = dictionary) -> None:
            pre.append((x[0, at] * d.W_enc.T[index]).sum(-1))

        handles.append(model.blocks[layer].ln2.register_forward_hook(reads))

        def writes(out: Tensor, hook: Any, f: Any = (found, errors, at, index, dictionary)) -> Tensor:
            found, errors, at, index, d = f
            acts = torch.zeros(out.shape[1], d.W_dec.shape[0], dtype=out.dtype)
            acts[at, index] = nodes.activation[found]
            error = (out[0] - acts @ d.W_dec - d.b_dec).detach() * one[errors][:, None]
            live = acts.index_put((at, index), nodes.activation[found] * one[found])
            return (live @ d.W_dec + d.b_dec + error)[None]

        hooks.append((f"blocks.{layer}.hook_mlp_out", writes))
    try:
        logits = model.run_with_hooks(TOKENS[None], fwd_hooks=[hook for hook in hooks if hook[0] in model.hook_dict])
    finally:
        for handle in handles:
            handle.remove()
    values = torch.cat([*pre, logits[0, -1, logit][None]])
    return torch.autograd.grad(values, one, torch.eye(len(values), dtype=one.dtype), is_grads_batched=True)[0]


@pytest.mark.parametrize("bare", [False, True], ids=["", "no biases"])
@pytest.mark.parametrize("kind", [*KINDS, *MORE])
def test_a_graph_has_the_live_models_own_edges(kind: str, bare: bool) -> None:
    """A graph with transcoders conserves to 1e-10, and its edges are autograd's through the model with its freezes."""
    model = lens(**{**KINDS, **MORE}[kind])
    for name, parameter in model.named_parameters():
        if bare and name.rpartition(".")[2].startswith("b"):
            parameter.detach().zero_()
    frozen = from_transformer_lens(model, TOKENS, [TokenLogit(7)])
    given = dictionaries(frozen, "plain")
    graph = build_graph(frozen, given, limit=1e-10)
    assert 0 < graph.meta["max_relative_residual"] <= 1e-10
    assert graph.outputs[0].value == pytest.approx(model(TOKENS[None])[0, -1, 7].item(), rel=1e-12)
    sources = graph.nodes.is_type(NodeType.FEATURE, NodeType.ERROR, NodeType.TOKEN, NodeType.POSITION)
    live, edges = live_rows(model, graph, given, 7)[:, sources], graph.dense()[:, sources]
    assert len(edges) == 2 * 5 * len(TOKENS) + 1 and (edges != 0).sum() > len(edges)
    torch.testing.assert_close(edges, live, rtol=1e-9, atol=1e-11)


def test_a_graph_says_which_weights_it_is_of() -> None:
    """The hash in a graph is that of the model's weights: the same again, another once one weight is written to."""
    model = lens(**KINDS["GPT-2"])

    def said() -> str:
        return build_graph(from_transformer_lens(model, TOKENS, [TokenLogit(7)]), []).meta["model"]["sha256"]

    first = said()
    assert len(first) == 64 and said() == first
    with torch.no_grad():
        model.unembed.b_U[0] += 1
    found = [first, said()]
    for _ in range(3):  # new tensors, written to as often as each other
        model.unembed.b_U = torch.nn.Parameter(model.unembed.b_U.detach() * 2)
        found.append(said())
    assert len(set(found)) == 5


def test_grouped_heads_in_another_order_are_found() -> None:
    frozen = from_transformer_lens(lens(**KINDS["Llama"]), TOKENS, [TokenLogit(7)])
    (stack,) = frozen.stacks
    first = stack.blocks[0]
    swapped = replace(first.attention, W_V=first.attention.W_V[::2].repeat(2, 1, 1))
    blocks = (replace(first, attention=swapped), *stack.blocks[1:])
    bad = [r for r in check(replace(frozen, stacks=(replace(stack, blocks=blocks),))) if r.relative > 1e-4]
    assert bad and bad[0].name == "text.blocks.0.hook_resid_mid"


def test_what_cannot_be_frozen_says_why() -> None:
    with pytest.raises(ModelError, match="parallel attention"):
        from_transformer_lens(lens(act_fn="gelu", parallel_attn_mlp=True), TOKENS, [TokenLogit(1)])
    with pytest.raises(ModelError, match="Linear is not a HookedTransformer"):
        from_transformer_lens(torch.nn.Linear(1, 1), TOKENS, [TokenLogit(1)])
    bridge = TransformerBridge.__new__(TransformerBridge)  # refused by its type, before anything in it is touched
    torch.nn.Module.__init__(bridge)
    with pytest.raises(ModelError, match=r"a TransformerBridge cannot be frozen .*HookedVLM\.from_pretrained") as said:
        from_transformer_lens(bridge, TOKENS, [TokenLogit(1)])
    assert len(str(said.value).splitlines()) == 1
    model = lens(act_fn="gelu")
    with pytest.raises(UsageError, match="position 9"):
        from_transformer_lens(model, TOKENS, [TokenLogit(1, 9)])
    with pytest.raises(UsageError, match="nothing to explain"):
        from_transformer_lens(model, TOKENS, [])
