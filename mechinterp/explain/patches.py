"""The same question about an image, asked of its patch embeddings instead of its pixels.

Embedding a patch is affine, and a patch token depends on the pixels of its own patch alone. So mixing values and
references, and sums of gradient times difference over a patch, come out the same in either space; but an image is then
embedded once, however many copies of it are scored, and a pass starts at the first block. What only the class token
reads is computed for it alone (`HookedVLM.run_from`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mechinterp.explain.question import Part, Question
from mechinterp.models import HookedVLM
from mechinterp.models.tables import Generative
from mechinterp.models.wiring import find
from mechinterp.types import ImageTextBatch

__all__ = ["in_patches"]

START = "vision.blocks.0.hook_resid_pre"
CHUNK = 64  # passes at once: their activations stay in the processor's cache
TOLERANCE = 1e-5


@torch.no_grad()
def in_patches(question: Question) -> Question:
    """The question in the space of patch embeddings, or the question itself where it cannot be put so.

    Proved on the first row before it is used: its score, and that of half of its patches, must be the same in both.
    """
    if question.source is None or question.kinds != ("patch",) or not len(question):
        return question
    model, part = question.source.model, question.parts[0]
    found = _front(model)
    if found is None or model.hf.training:
        return question
    embed, norm = found
    owner = torch.full((model.patch_tokens().stop, 1), -1)
    owner[model.patch_tokens(), 0] = torch.arange(question.count)
    value = torch.cat([embed(_cast(model, part.value[i : i + CHUNK])) for i in range(0, len(question), CHUNK)])
    same = bool((part.reference == part.reference[:1]).all())
    reference = embed(_cast(model, part.reference[:1] if same else part.reference)).expand_as(value)
    source = question.source

    def function(values: tuple[Tensor, ...]) -> Tensor:
        resid = norm(values[0])
        return model.run_from(START, resid, _prompts(source.batch, len(resid)), [source.target])[:, 0]

    moved = replace(
        question,
        parts=(Part("patch", value, reference, owner.to(value.device)),),
        function=function,
        chunk=question.chunk if isinstance(model.table.head, Generative) else min(question.chunk, CHUNK),
    )
    return moved if _agree(question[:1], moved[:1]) else question


def _front(model: HookedVLM) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
    """From pixels to embeddings (affine), and from there to what the first block reads; None for an unknown tower."""
    tower: Any = find(model.hf, model.table.towers["vision"].module)
    tower = getattr(tower, "vision_model", tower)
    embed = getattr(tower, "embeddings", None)
    return None if embed is None else (embed, getattr(tower, "pre_layrnorm", torch.nn.Identity()))


def _cast(model: HookedVLM, pixels: Tensor) -> Tensor:
    return pixels.to(model.hf.device, model.hf.dtype)


def _prompts(batch: ImageTextBatch, rows: int) -> ImageTextBatch:
    """The prompt, the same in every row; pixels that nobody reads."""
    ids, mask = batch.input_ids, batch.attention_mask
    return ImageTextBatch(
        batch.pixel_values[:1].expand(rows, -1, -1, -1),
        None if ids is None else ids[:1].expand(rows, -1),
        None if mask is None else mask[:1].expand(rows, -1),
    )


def _agree(question: Question, moved: Question) -> bool:
    """Whether both say the same of the first row, whole and with every other patch at its reference."""
    if moved.parts[0].value.shape[1] != len(moved.parts[0].owner):
        return False
    half = torch.arange(question.count, device=question.parts[0].value.device) % 2 == 0
    members = torch.stack([torch.ones_like(half), half])
    one, other = question.shared(members), moved.shared(members)
    return bool((one - other).abs().max() <= TOLERANCE * one.abs().max().clamp(min=1.0))
