"""TransformerLens language models, frozen: the same anchor as for every other family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from graph_toys import pairing_errors
from transformer_lens.model_bridge import TransformerBridge

from graphs.frozen import check, from_transformer_lens, worst
from graphs.targets import TokenLogit
from mechinterp.errors import ModelError, UsageError

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
