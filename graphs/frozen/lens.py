"""A plain TransformerLens language model (`HookedTransformer`), frozen on one text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphs.frozen.attention import FrozenAttention, Scores
from graphs.frozen.capture import sha256_of
from graphs.frozen.norms import FrozenNorm
from graphs.frozen.parts import FrozenBlock, FrozenMLP, FrozenPass, Inputs, Readout, Stack
from graphs.frozen.readouts import RowHead, feature_readouts
from graphs.targets import Feature, TokenLogit
from mechinterp.errors import ModelError, UsageError
from mechinterp.models.gates import gate_of

__all__ = ["from_transformer_lens"]

_VALUES = ("hook_scale", "hook_pattern", "hook_normalized", "hook_pre", "hook_embed", "hook_pos_embed", "hook_mlp_out")
_STREAMS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_q", "hook_k", "hook_rot_q", "hook_rot_k")


@torch.no_grad()
def from_transformer_lens(
    model: Any, tokens: Int[Tensor, " pos"] | str, outputs: Sequence[TokenLogit | Feature]
) -> FrozenPass:
    """One stack, "text", of a `HookedTransformer`, in the model's own precision.

    Sites of dictionaries are written as for any tower (`text.blocks.3.ln2.hook_normalized`). `mlp_in` is what the MLP
    reads; where TransformerLens has not folded the norm's weights, its own `ln2.hook_normalized` is without them.

    Raises ModelError for what no frozen part stands for: parallel attention and MLP, attention-only models, norms
    after the stream (OLMo 2), shortformer positions, softcapped logits, and TransformerBridge.
    """
    _supported(model)
    ids = (model.to_tokens(tokens) if isinstance(tokens, str) else tokens[None]).to(model.cfg.device)
    wanted = (*_VALUES, *_STREAMS)
    logits, cache = model.run_with_cache(ids, names_filter=lambda name: name.endswith(wanted))
    at = {name: value[0] for name, value in cache.items()}
    blocks = tuple(_block(model, layer, at) for layer in range(model.cfg.n_layers))
    every = torch.arange(ids.shape[1], device=ids.device)
    kinds = {"token": (every, at["hook_embed"].contiguous())}
    if "hook_pos_embed" in at:
        kinds["pos"] = (every, at["hook_pos_embed"].contiguous())
    words = tuple(model.to_str_tokens(ids[0])) if model.tokenizer is not None else tuple(map(str, ids[0].tolist()))
    causal = not any(bool(block.attention.pattern.triu(1).any()) for block in blocks)
    stack = Stack("text", blocks, Inputs(kinds), causal, words)
    logit = [output for output in outputs if isinstance(output, TokenLogit)]
    readouts = [_readout(model, output, at, logits[0], 1 / len(logit)) for output in logit]
    readouts += feature_readouts([output for output in outputs if isinstance(output, Feature)], [stack])
    if not readouts:
        raise UsageError("nothing to explain", where="outputs", hint="such as TokenLogit(token)")
    # norms of queries and keys are inside the pattern, which is held whole
    held = [n for n in at if n.endswith("attn.hook_pattern") or (n.endswith("hook_scale") and ".attn." not in n)]
    known = {"label": str(model.cfg.model_name), "family": "transformer_lens", "sha256": sha256_of(model)}
    return FrozenPass((stack,), tuple(readouts), tuple(f"text.{name}" for name in held), known)


def _supported(model: Any) -> None:
    kind = type(model).__name__
    if kind == "TransformerBridge":  # its vision hooks cannot hold attention, and its LLM hooks see no projector
        hint = (
            "HookedVLM.from_pretrained(folder) for LLaVA and Gemma 3, or a HookedTransformer for plain language models"
        )
        raise ModelError("a TransformerBridge cannot be frozen", where=_name_of(model), hint=hint)
    if kind != "HookedTransformer":
        raise ModelError(f"{kind} is not a HookedTransformer", hint="load it as a HookedTransformer")
    cfg = model.cfg
    refused = {
        "parallel attention and MLP": cfg.parallel_attn_mlp,
        "no MLPs": cfg.attn_only,
        "shortformer positions": cfg.positional_embedding_type == "shortformer",
        "softcapped logits": cfg.output_logits_soft_cap > 0,
        "norms after each part alone": cfg.original_architecture in ("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
        f"the activation {cfg.act_fn}": cfg.is_layer_norm_activation(),
        "experts": cfg.num_experts is not None,
    }
    for what, there in refused.items():
        if there:
            raise ModelError(f"has {what}, which no frozen part stands for", where=str(cfg.model_name))


def _name_of(model: Any) -> str | None:
    return getattr(getattr(model, "cfg", None), "model_name", None)


def _norm(norm: Any, name: str, at: dict[str, Tensor], d: int, rows: int) -> FrozenNorm:
    """A TransformerLens norm at its true scale; the kinds whose weights are folded away have gain 1."""
    kind = type(norm).__name__
    scale = at.get(f"{name}.hook_scale")
    like = at["hook_embed"]
    if scale is None:  # a model without norms
        return FrozenNorm(like.new_ones(d), like.new_zeros(d), like.new_ones(rows, 1), centres=False)
    gain = norm.w.detach() if hasattr(norm, "w") else scale.new_ones(d)
    shift = norm.b.detach() if hasattr(norm, "b") else scale.new_zeros(d)
    return FrozenNorm(gain, shift, scale, centres=kind.startswith("LayerNorm"))


def _block(model: Any, layer: int, at: dict[str, Tensor]) -> FrozenBlock:
    block, name, d = model.blocks[layer], f"blocks.{layer}", model.cfg.d_model
    resid_pre, resid_mid = at[f"{name}.hook_resid_pre"], at[f"{name}.hook_resid_mid"]

    def norm(which: str) -> FrozenNorm:
        return _norm(getattr(block, which), f"{name}.{which}", at, d, len(resid_pre))

    both = model.cfg.use_normalization_before_and_after
    norm2 = norm("ln2")
    attn = block.attn
    W_V, b_V, W_O, b_O = (getattr(attn, w).detach() for w in ("W_V", "b_V", "W_O", "b_O"))
    post = norm("ln1_post") if both else None
    pattern = at[f"{name}.attn.hook_pattern"]
    attention = FrozenAttention(norm("ln1"), pattern, W_V, b_V, W_O, b_O, _scores(attn, f"{name}.attn", at), post)
    mlp = _mlp(model, block.mlp, norm2, at[f"{name}.mlp.hook_pre"], norm("ln2_post") if both else None)
    mlp_in = at.get(f"{name}.ln2.hook_normalized", resid_mid) * norm2.gain + norm2.shift
    return FrozenBlock(
        "text",
        layer,
        attention,
        mlp,
        resid_pre,
        resid_mid,
        mlp_in,
        at[f"{name}.hook_mlp_out"],
        at[f"{name}.hook_resid_post"],
    )


def _scores(attn: Any, name: str, at: dict[str, Tensor]) -> Scores | None:
    """Queries and keys, or None where the pattern is not a softmax of their product (caps, ALiBi, normed queries)."""
    cfg = attn.cfg
    if cfg.attn_scores_soft_cap > 0 or cfg.positional_embedding_type == "alibi" or attn.q_norm is not None:
        return None
    rotary = cfg.positional_embedding_type == "rotary"
    q, k = (at[f"{name}.hook_rot_{side}" if rotary else f"{name}.hook_{side}"].transpose(0, 1) for side in "qk")
    k = k.repeat_interleave(len(q) // len(k), dim=0)
    W_Q, W_K, b_Q, b_K = (getattr(attn, w).detach() for w in ("W_Q", "W_K", "b_Q", "b_K"))

    def rotate(x: Float[Tensor, "head pos d_head"]) -> Float[Tensor, "head pos d_head"]:
        return attn.apply_rotary(x.transpose(0, 1)[None])[0].transpose(0, 1)

    return Scores(q, k, 1 / float(attn.attn_scale), W_Q, W_K, b_Q, b_K, rotate if rotary else None)


def _mlp(model: Any, mlp: Any, norm: FrozenNorm, pre: Float[Tensor, "pos m"], post: FrozenNorm | None) -> FrozenMLP:
    W_in, b_in, W_out, b_out = (getattr(mlp, w).detach() for w in ("W_in", "b_in", "W_out", "b_out"))
    if not model.cfg.gated_mlp:
        return FrozenMLP(norm, W_in, b_in, gate_of(model.cfg.act_fn, pre), W_out, b_out, post)
    # TransformerLens adds b_in after the gate
    return FrozenMLP(norm, W_in, torch.zeros_like(b_in), mlp.act_fn(pre), W_out, b_in @ W_out + b_out, post)


def _readout(model: Any, output: TokenLogit, at: dict[str, Tensor], logits: Tensor, weight: float) -> Readout:
    n_pos = len(logits)
    if not -n_pos <= output.position < n_pos:
        raise UsageError(f"position {output.position} is outside the text of {n_pos} tokens")
    row = output.position % n_pos
    plus = _token(model, output.token)
    W, b = model.unembed.W_U.detach(), model.unembed.b_U.detach()
    direction, offset, value = W[:, plus], b[plus], logits[row, plus]
    name = str(output.token)
    if output.versus is not None:
        minus = _token(model, output.versus)
        direction, offset, value = direction - W[:, minus], offset - b[minus], value - logits[row, minus]
        name = f"{name} - {output.versus}"
    elif output.demeaned:
        direction, offset, value = direction - W.mean(1), offset - b.mean(), value - logits[row].mean()
    head = RowHead(_norm(getattr(model, "ln_final", None), "ln_final", at, len(W), n_pos), row)
    seed, constant = head.pull(direction)
    return Readout(name, "logit", 0, seed, constant + float(offset), float(value), weight)


def _token(model: Any, token: str | int) -> int:
    return token if isinstance(token, int) else int(model.to_single_token(token))
