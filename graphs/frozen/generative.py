"""Generative models (LLaVA, Gemma 3): a vision stack, a projector with its gate held, and a language stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, assert_never

import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphs.frozen.blocks import affine, frozen_blocks, frozen_norm
from graphs.frozen.capture import Cache, recording
from graphs.frozen.inputs import image_inputs, image_labels, word_inputs, words_of
from graphs.frozen.norms import FrozenNorm
from graphs.frozen.parts import Bridge, Readout, Stack
from graphs.frozen.readouts import RowHead
from graphs.targets import Contrast, Logit, ReportToken, TokenLogit
from mechinterp.errors import ModelError, UsageError
from mechinterp.models.gates import gate_of
from mechinterp.models.heads import inputs_of
from mechinterp.models.hooked import HookedVLM
from mechinterp.models.norms import scale_of
from mechinterp.models.prompts import answer_token, image_mask
from mechinterp.models.scoring import one_question, with_prompt
from mechinterp.models.wiring import find
from mechinterp.types import ImageTextBatch

__all__ = ["Plan", "freeze_generative", "plans_of", "report_of"]

Answer = Contrast | Logit | TokenLogit | ReportToken


def report_of(
    model: HookedVLM, batch: ImageTextBatch, prompt: str | None = None, max_new_tokens: int = 96
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Ids and texts of the tokens of the model's greedy report on one image: what `ReportToken.index` counts."""
    asked = _asked(model, batch, prompt)
    inputs = inputs_of(model.hf, model.table, asked)
    with torch.no_grad():
        made = model.hf.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    ids = made[0, inputs["input_ids"].shape[1] :]
    return tuple(ids.tolist()), words_of(model, ids)


def freeze_generative(
    model: HookedVLM, batch: ImageTextBatch, outputs: Sequence[Answer]
) -> tuple[list[Stack], list[Readout]]:
    """Vision stack, language stack behind the projector, and logits of the language model as readouts."""
    plans = plans_of(model, batch, outputs)
    ids = max((plan.ids for plan in plans), key=len) if plans else _asked(model, batch, None).input_ids[0]  # type: ignore[index]
    for plan in plans:
        if not torch.equal(plan.ids, ids[: len(plan.ids)]):
            raise UsageError("the outputs need different prompts", where="outputs", hint="freeze once for each prompt")
    batch = replace(batch, input_ids=ids[None], attention_mask=torch.ones_like(ids)[None])
    with recording(model, ("vision", "text")) as cache:
        logits = model(batch).logits[0]
    seen = frozen_blocks(model, "vision", cache)
    told = frozen_blocks(model, "text", cache)
    vision = Stack("vision", seen, image_inputs(model, batch.pixel_values[0]), False, image_labels(model))
    at_image = image_mask(model.hf, ids[None])[0]
    slots, words = at_image.nonzero()[:, 0], (~at_image).nonzero()[:, 0]
    bridge = _projector(model, cache, vision.final, slots, len(ids))
    # an image's tokens may see each other: only what the patterns say is causal is called so
    causal = not any(bool(block.attention.pattern.triu(1).any()) for block in told)
    labels = _labels(model, ids, slots)
    text = Stack("text", told, word_inputs(model, ids, words), causal, labels, bridge, 0)
    return [vision, text], [_readout(model, cache, plan, logits, 1 / len(plans)) for plan in plans]


# ------------------------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Plan:
    """A combination of logits after a prompt: token `plus`, less token `minus` or the vocabulary's mean."""

    name: str
    kind: str
    ids: Int[Tensor, " pos"]
    row: int
    plus: int
    minus: int | None
    demeaned: bool


def plans_of(model: HookedVLM, batch: ImageTextBatch, outputs: Sequence[Answer]) -> list[Plan]:
    """Prompt and logits of each output. Causal attention: the longest prompt serves them all."""
    return [_plan(model, batch, output) for output in outputs]


def _plan(model: HookedVLM, batch: ImageTextBatch, output: Answer) -> Plan:
    words = model.tokenizer
    match output:
        case Contrast(target=target) | Logit(target=target):
            ids = _ids(with_prompt(model, batch, one_question([target])))
            if batch.input_ids is not None and not torch.equal(batch.input_ids[0], ids):
                raise UsageError("the batch does not ask the target's question", hint="make it with prepare()")
            yes, no = answer_token(words, target.yes, target.no), answer_token(words, target.no, target.yes)
            if isinstance(output, Contrast):
                return Plan(target.name, "contrast", ids, len(ids) - 1, yes, no, False)
            return Plan(f"{target.name}: {target.yes}", "logit", ids, len(ids) - 1, yes, None, output.demeaned)
        case TokenLogit():
            if batch.input_ids is None:
                raise UsageError("a batch without a prompt has no token positions", hint="make it with prepare()")
            ids, plus = _ids(batch), _token(words, output.token)
            if not -len(ids) <= output.position < len(ids):
                raise UsageError(f"position {output.position} is outside the prompt of {len(ids)} tokens")
            minus = None if output.versus is None else _token(words, output.versus)
            name = _name(model, plus, minus)
            return Plan(name, "logit", ids, output.position % len(ids), plus, minus, output.demeaned)
        case ReportToken():
            asked = _asked(model, batch, output.prompt)
            made = report_of(model, batch, output.prompt)[0] if output.tokens is None else output.tokens
            if not 0 <= output.index < len(made):
                raise UsageError(f"the report has {len(made)} tokens", where=f"ReportToken.index {output.index}")
            prefix = torch.tensor(made[: output.index], dtype=torch.long)
            ids = torch.cat([_ids(asked), prefix])
            minus = None if output.versus is None else _token(words, output.versus)
            name = _name(model, made[output.index], minus)
            return Plan(name, "report token", ids, len(ids) - 1, made[output.index], minus, output.demeaned)
        case _:
            assert_never(output)


def _asked(model: HookedVLM, batch: ImageTextBatch, prompt: str | None) -> ImageTextBatch:
    """The batch with a prompt: this one, or its own, or the model's own request for a report."""
    if prompt is None and batch.input_ids is not None:
        return batch
    return with_prompt(model, batch, prompt or getattr(model.hf.config, "report_prompt", None) or "write a report")


def _ids(batch: ImageTextBatch) -> Int[Tensor, " pos"]:
    assert batch.input_ids is not None
    return batch.input_ids[0]


def _token(tokenizer: Any, token: str | int) -> int:
    return token if isinstance(token, int) else answer_token(tokenizer, token, "")


def _name(model: HookedVLM, plus: int, minus: int | None) -> str:
    return " - ".join(words_of(model, torch.tensor([plus] if minus is None else [plus, minus])))


def _readout(model: HookedVLM, cache: Cache, plan: Plan, logits: Tensor, weight: float) -> Readout:
    config = model.hf.config.text_config
    if getattr(config, "final_logit_softcapping", None) is not None:
        raise ModelError("caps its logits, which no frozen part stands for", where="config.json")
    W = model.hf.lm_head.weight.detach()
    bias = model.hf.lm_head.bias
    norm = find(model.hf, model.table.towers["text"].ln_final or "")
    head = RowHead(frozen_norm(norm, cache["text.ln_final.hook_scale"]), plan.row)
    row = logits[plan.row].double()
    offset = 0.0 if bias is None else float(bias[plan.plus])
    if plan.minus is not None:
        seed, constant = head.pull(W[plan.plus] - W[plan.minus])
        value = row[plan.plus] - row[plan.minus]
        offset -= 0.0 if bias is None else float(bias[plan.minus])
    elif plan.demeaned:
        seed, constant = head.pull(W[plan.plus] - W.mean(0))
        value = row[plan.plus] - row.mean()
        offset -= 0.0 if bias is None else float(bias.double().mean())
    else:
        seed, constant = head.pull(W[plan.plus])
        value = row[plan.plus]
    return Readout(plan.name, plan.kind, 1, seed, constant + offset, float(value), weight)


# ------------------------------------------------------------------------------------------------- the projector


def _labels(model: HookedVLM, ids: Int[Tensor, " pos"], slots: Int[Tensor, " slot"]) -> tuple[str, ...]:
    """The words, and at image tokens the patch they stand for (or a number, where a token pools several)."""
    labels = list(words_of(model, ids))
    patches = [name.replace("patch", "image") for name in image_labels(model) if name != "CLS"]
    if len(patches) + 1 == len(slots):
        patches = ["image CLS", *patches]
    names = patches if len(patches) == len(slots) else [f"image {i}" for i in range(len(slots))]
    for slot, name in zip(slots.tolist(), names, strict=True):
        labels[slot] = name
    return tuple(labels)


def _projector(
    model: HookedVLM, cache: Cache, x: Float[Tensor, "pos_prev d"], slots: Int[Tensor, " slot"], n_pos: int
) -> Bridge:
    projector = model.hf.model.multi_modal_projector
    every = torch.eye(len(x), dtype=x.dtype, device=x.device)
    if model.family == "gemma3":
        norm = frozen_norm(
            find(model.hf, model.table.towers["vision"].ln_final or ""), cache["vision.ln_final.hook_scale"]
        )
        # pooling as a matrix: what the projector's own pooling makes of every position alone
        side = projector.patches_per_image
        mix = projector.avg_pool(every.unflatten(1, (side, side))[:, None]).flatten(1).T.contiguous()
        inner = frozen_norm(
            projector.mm_soft_emb_norm,
            scale_of(projector.mm_soft_emb_norm, mix @ cache["vision.ln_final.hook_normalized"]),
        )
        return _bridge(norm, mix, inner, projector.mm_input_projection_weight.detach(), None, None, None, slots, n_pos)
    mix = every if model.hf.config.vision_feature_select_strategy == "full" else every[1:]
    (W_in, b_in), (W_out, b_out) = affine(projector.linear_1), affine(projector.linear_2)
    gate = gate_of(projector.act, x[len(x) - len(mix) :] @ W_in + b_in)
    return _bridge(None, mix.contiguous(), None, W_in, (b_in, gate), W_out, b_out, slots, n_pos)


def _bridge(
    norm: FrozenNorm | None,
    mix: Float[Tensor, "slot pos_prev"],
    inner: FrozenNorm | None,
    W_in: Float[Tensor, "d_prev m"],
    gated: tuple[Float[Tensor, " m"], Float[Tensor, "slot m"]] | None,
    W_out: Float[Tensor, "m d"] | None,
    b_out: Float[Tensor, " d"] | None,
    slots: Int[Tensor, " slot"],
    n_pos: int,
) -> Bridge:
    """The bridge with its constants carried through to the receiving stream."""
    rows = mix.new_zeros(len(mix), W_in.shape[0])
    if norm is not None:
        rows = mix.sum(1, keepdim=True) * norm.shift
    rows = (rows if inner is None else inner.apply(rows)) @ W_in
    rows = rows if gated is None else (rows + gated[0]) * gated[1]
    rows = rows if W_out is None else rows @ W_out
    rows = rows if b_out is None else rows + b_out
    bias = rows.new_zeros(n_pos, rows.shape[1]).index_copy_(0, slots, rows)
    return Bridge(norm, mix, inner, W_in, None if gated is None else gated[1], W_out, slots, bias)
