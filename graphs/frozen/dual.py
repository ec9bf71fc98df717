"""Dual encoders (CLIP, SigLIP): one vision stack, and one text stack for every caption.

A cosine is bilinear: with both lengths held, the image half is linear in the image stream, and the text half in the
text stream, and each of the two by itself sums to the score. They are two ways to take one number apart, so each has
weight 1/2 in a joint graph; how much of the influence begins at each is another matter (`graphs.halves`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from graphs.frozen.attention import FrozenAttention, Scores
from graphs.frozen.blocks import affine, frozen_blocks, frozen_norm
from graphs.frozen.capture import Cache, recording, tower_module
from graphs.frozen.inputs import image_inputs, image_labels, word_inputs, words_of
from graphs.frozen.parts import FrozenMLP, Readout, Stack
from graphs.frozen.readouts import Head, PooledHead, RowHead
from graphs.targets import Contrast, SetContrast, Similarity, terms_of
from mechinterp.models.gates import gate_of
from mechinterp.models.heads import cosine_scores
from mechinterp.models.hooked import HookedVLM
from mechinterp.models.norms import scale_of
from mechinterp.models.scoring import text_inputs
from mechinterp.models.wiring import find
from mechinterp.types import ImageTextBatch

__all__ = ["freeze_dual"]

Scored = Contrast | Similarity | SetContrast
KINDS = {Contrast: "contrast", Similarity: "similarity", SetContrast: "contrast with a set"}
"""What `graph.json` calls them."""


def freeze_dual(
    model: HookedVLM, batch: ImageTextBatch, outputs: Sequence[Scored]
) -> tuple[list[Stack], list[Readout]]:
    """Stacks and readouts of a dual encoder: for each output the image half, and the text half caption by caption."""
    asked = [terms_of(output) for output in outputs]
    captions = list(dict.fromkeys(caption for terms in asked for _, caption in terms))
    runs, texts = [], []
    with recording(model, ("vision", "text")) as cache:
        image = model.encode_image(batch)[0]
        runs.append(dict(cache))
        for caption in captions:
            texts.append(model.encode_text([caption])[0])
            runs.append(dict(cache))
    blocks = frozen_blocks(model, "vision", runs[0])
    stacks = [Stack("vision", blocks, image_inputs(model, batch.pixel_values[0]), False, image_labels(model))]
    names = ["text"] if len(captions) == 1 else [f"text.{i}" for i in range(len(captions))]
    stacks += [_text_stack(model, *each) for each in zip(runs[1:], captions, names, strict=True)]
    heads = [_image_head(model, runs[0]), *(_text_head(model, run) for run in runs[1:])] if outputs else []
    where = {caption: i + 1 for i, caption in enumerate(captions)}
    readouts = [
        readout
        for output, terms in zip(outputs, asked, strict=True)
        for readout in _halves(model, output, terms, where, heads, image, texts)
    ]
    return stacks, readouts


def _halves(
    model: HookedVLM,
    output: Scored,
    signed: Sequence[tuple[float, str]],
    where: dict[str, int],
    heads: Sequence[Head],
    image: Float[Tensor, " d_out"],
    texts: Sequence[Float[Tensor, " d_out"]],
) -> list[Readout]:
    """The image half, and a text readout for each caption; `weight * value` of both halves together is the score."""
    terms = [(sign, where[caption], caption) for sign, caption in signed]
    hf: Any = model.hf
    scale = float(hf.logit_scale.detach().double().exp())
    bias = float(hf.logit_bias.detach()) if hasattr(hf, "logit_bias") else 0.0
    towards = [texts[i - 1] / texts[i - 1].norm() for _, i, _ in terms]
    with torch.no_grad():
        values = cosine_scores(hf, image[None], torch.stack(towards))[0].tolist()
    kind, name = KINDS[type(output)], output.target.name
    direction = sum((sign * unit for (sign, _, _), unit in zip(terms, towards, strict=True)), torch.zeros_like(image))
    seed, constant = heads[0].pull(direction * (scale / image.norm()))
    offset = bias * sum(sign for sign, _, _ in terms)
    value = sum(sign * v for (sign, _, _), v in zip(terms, values, strict=True))
    found = [Readout(f"{name} (image half)", kind, 0, seed, constant + offset, value, 0.5, part_of=name)]
    for (sign, stack, caption), v in zip(terms, values, strict=True):
        text = texts[stack - 1]
        seed, constant = heads[stack].pull(image / image.norm() * (sign * scale / text.norm()))
        half = f"{name} (text half: {caption})"
        found.append(Readout(half, kind, stack, seed, constant + sign * bias, sign * v, 0.5, part_of=name))
    return found


def _text_stack(model: HookedVLM, cache: Cache, caption: str, name: str) -> Stack:
    ids = text_inputs(model, [caption])["input_ids"][0].to(model.hf.device)
    blocks = frozen_blocks(model, "text", cache)
    inputs = word_inputs(model, ids, torch.arange(len(ids), device=ids.device))
    return Stack(name, blocks, inputs, _is_causal(blocks), words_of(model, ids))


def _is_causal(blocks: Sequence[Any]) -> bool:
    return not any(bool(block.attention.pattern.triu(1).any()) for block in blocks)


def _text_head(model: HookedVLM, cache: Cache) -> RowHead:
    """The final norm at the token that is pooled (found by its value), then the projection."""
    norm = frozen_norm(find(model.hf, model.table.towers["text"].ln_final or ""), cache["text.ln_final.hook_scale"])
    pooled = cache["text.hook_pooled"]
    row = int((cache["text.ln_final.hook_normalized"] == pooled).all(-1).nonzero()[0])
    projection = model.hf.text_projection if model.family == "clip" else model.hf.text_model.head
    return RowHead(norm, row, projection.weight.detach(), None if projection.bias is None else projection.bias.detach())


def _image_head(model: HookedVLM, cache: Cache) -> Head:
    tower = tower_module(model, "vision")
    norm = frozen_norm(tower.post_layernorm, _scale(cache, tower.post_layernorm))
    if model.family == "clip":
        return RowHead(norm, 0, model.hf.visual_projection.weight.detach())
    return _pooled_head(tower.head, norm, cache["vision.ln_final.hook_normalized"])


def _scale(cache: Cache, norm: Any) -> Float[Tensor, "pos 1"]:
    """The final norm's scale. CLIP norms the CLS token alone; the scale of the others is 1 and multiplies nothing."""
    scale = cache["vision.ln_final.hook_scale"]
    if scale.ndim == 2:
        return scale
    every = torch.ones_like(cache["vision.blocks.0.hook_resid_pre"][:, :1])
    every[0] = scale
    return every


def _pooled_head(head: Any, norm: Any, normed: Float[Tensor, "pos d"]) -> PooledHead:
    """SigLIP's pooling, its pattern and gate recomputed from what the final norm gave."""
    mha = head.attention
    d_head = mha.embed_dim // mha.num_heads
    weights, biases = mha.in_proj_weight.detach().chunk(3), mha.in_proj_bias.detach().chunk(3)
    (W_Q, b_Q), (W_K, b_K), (W_V, b_V) = (
        (w.unflatten(0, (-1, d_head)).transpose(1, 2), b.unflatten(0, (-1, d_head)))
        for w, b in zip(weights, biases, strict=True)
    )
    q, k = head.probe.detach()[0] @ W_Q + b_Q[:, None], normed @ W_K + b_K[:, None]
    scores = Scores(q, k, d_head**-0.5, W_Q, W_K, b_Q, b_K)
    W_O = mha.out_proj.weight.detach().unflatten(1, (-1, d_head)).permute(1, 2, 0)
    attention = FrozenAttention(norm, scores.values.softmax(-1), W_V, b_V, W_O, mha.out_proj.bias.detach(), scores)
    pooled = (attention.pattern @ (normed @ W_V + b_V[:, None]) @ W_O).sum(0) + attention.b_O
    inner = frozen_norm(head.layernorm, scale_of(head.layernorm, pooled))
    (W_in, b_in), (W_out, b_out) = affine(head.mlp.fc1), affine(head.mlp.fc2)
    gate = gate_of(head.mlp.activation_fn, inner.apply(pooled) @ W_in + b_in)
    return PooledHead(attention, FrozenMLP(inner, W_in, b_in, gate, W_out, b_out))
