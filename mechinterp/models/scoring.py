"""What a HookedVLM computes: embeddings, scores, reports. The text side of a dual encoder is kept between calls."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import ModelError, UsageError
from mechinterp.models import heads
from mechinterp.models.preprocess import Preprocessor
from mechinterp.models.prompts import decode, prompt_ids, same_prompt, tokenize
from mechinterp.models.tables import Classifier, Dual, Family, Features, Generative
from mechinterp.types import ImageTextBatch, Target

if TYPE_CHECKING:
    from mechinterp.models.hooked import HookedVLM

__all__ = ["TextSide", "encode_image", "encode_text", "generate", "parts_of", "score", "score_features"]

_KEPT = 4096


@dataclass
class TextSide:
    """Normalised text embeddings and prompts that were computed before; dropped when the weights change."""

    weights: tuple[int, ...] = ()
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    prompts: dict[str, Tensor] = field(default_factory=dict)


def parts_of(processor: Any, family: Family) -> tuple[Preprocessor, Any]:
    """The preprocessor and tokenizer inside a processor. Raises ModelError when one is missing."""
    images = getattr(processor, "image_processor", None)
    if images is None and hasattr(processor, "image_mean"):
        images = processor  # a bare image processor
    if images is None:
        raise ModelError("no image preprocessor", hint="a model is only whole with its preprocessor_config.json")
    if not isinstance(images, Preprocessor):
        images = Preprocessor.from_config(images.to_dict(), "image processor")
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None and isinstance(family.head, Dual | Generative):
        raise ModelError(f"no tokenizer, which a {family.name} model needs")
    return images, tokenizer


def text_inputs(model: HookedVLM, texts: Sequence[str]) -> dict[str, Tensor]:
    """Token ids (and mask) of captions for a dual encoder, or of prompts for a generative model."""
    match model.table.head:
        case Dual():
            length = int(model.hf.config.text_config.max_position_embeddings)
            return tokenize(model.tokenizer, texts, length, pad_to_length=model.family == "siglip")
        case Generative():
            rows = [_prompt(model, text) for text in texts]
            if len({len(row) for row in rows}) > 1:
                raise UsageError("the prompts differ in length", hint="ask one question a batch")
            ids = torch.stack(rows)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        case Classifier() | Features():
            raise UsageError(f"a {model.family} model reads no text")
        case _:
            assert_never(model.table.head)


def one_question(targets: Sequence[Target]) -> str:
    """The question that all targets ask. Raises UsageError when there are several."""
    questions = sorted({target.asked() for target in targets})
    if len(questions) != 1:
        raise UsageError(f"a batch asks one question, not {len(questions)}", hint="prepare one batch a target")
    return questions[0]


def with_prompt(model: HookedVLM, batch: ImageTextBatch, question: str) -> ImageTextBatch:
    """The batch with the same prompt in every row."""
    ids = _prompt(model, question).expand(len(batch), -1).clone()
    return replace(batch, input_ids=ids, attention_mask=torch.ones_like(ids))


def score(model: HookedVLM, batch: ImageTextBatch, targets: Sequence[Target]) -> Float[Tensor, "batch target"]:
    """Scores of a batch. Call it inside `model.attached()`."""
    pixels = heads.inputs_of(model.hf, model.table, replace(batch, input_ids=None))["pixel_values"]
    return score_features(model, heads.image_features(model.hf, model.table, pixels), batch, targets)


def score_features(
    model: HookedVLM, features: Tensor, batch: ImageTextBatch, targets: Sequence[Target]
) -> Float[Tensor, "batch target"]:
    """Scores, given what the head reads (`heads.image_features` or `heads.readout`)."""
    if not targets:
        raise UsageError("no targets to score")
    match model.table.head:
        case Dual():
            return _dual_scores(model, features, targets)
        case Generative():
            if batch.input_ids is None or not same_prompt(batch.input_ids, _prompt(model, one_question(targets))):
                raise UsageError("the batch does not ask the targets' question", hint="make it with prepare()")
            logits = heads.last_logits(model.hf, model.table, batch, features)
            return heads.answer_scores(model.tokenizer, logits, targets)
        case Classifier():
            logits = model.hf.classifier(features)
            return torch.stack([heads.class_scores(model.hf, logits, target) for target in targets], dim=1)
        case Features():
            raise UsageError(
                f"a {model.family} model has no text and no classes to score with",
                hint="use encode_image(), or a model with a text tower or a classifier",
            )
        case _:
            assert_never(model.table.head)


def encode_image(model: HookedVLM, batch: ImageTextBatch) -> Float[Tensor, "batch d"]:
    """Image embeddings. Call it inside `model.attached()`."""
    pixels = heads.inputs_of(model.hf, model.table, replace(batch, input_ids=None))["pixel_values"]
    features = heads.image_features(model.hf, model.table, pixels)
    return features.mean(dim=1) if features.ndim == 3 else features


def encode_text(model: HookedVLM, texts: Sequence[str]) -> Float[Tensor, "text d"]:
    """Text embeddings of a dual encoder, projected and unnormalised."""
    if not isinstance(model.table.head, Dual):
        raise UsageError(f"a {model.family} model has no text encoder")
    inputs = {name: value.to(model.hf.device) for name, value in text_inputs(model, texts).items()}
    found = model.hf.get_text_features(**inputs)
    return getattr(found, "pooler_output", found)


def generate(model: HookedVLM, batch: ImageTextBatch, max_new_tokens: int, prompt: str | None) -> list[str]:
    """Greedy text. Call it inside `model.attached()`."""
    if not isinstance(model.table.head, Generative):
        raise UsageError(f"a {model.family} model writes no text")
    if prompt is not None or batch.input_ids is None:
        asked = prompt or getattr(model.hf.config, "report_prompt", None) or "write a report"
        batch = with_prompt(model, batch, asked)
    inputs = heads.inputs_of(model.hf, model.table, batch)
    with torch.no_grad():
        ids = model.hf.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return decode(model.tokenizer, ids[:, inputs["input_ids"].shape[1] :])


def weights_hash(hf: Any) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor of the state dict, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(hf.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _dual_scores(model: HookedVLM, features: Tensor, targets: Sequence[Target]) -> Float[Tensor, "batch target"]:
    texts = list(dict.fromkeys(t for target in targets for t in (target.positive, target.negative) if t is not None))
    column = {text: i for i, text in enumerate(texts)}
    scores = heads.cosine_scores(model.hf, features, _text_embeddings(model, texts))
    columns = []
    for target in targets:
        positive = scores[:, column[target.positive]]
        columns.append(positive if target.negative is None else positive - scores[:, column[target.negative]])
    return torch.stack(columns, dim=1)


def _text_embeddings(model: HookedVLM, texts: list[str]) -> Float[Tensor, "text d"]:
    """Normalised embeddings, from the store where possible, each text on its own so that no padding changes it."""
    if model.hooked("text*"):
        live = encode_text(model, texts)
        return live / live.norm(dim=-1, keepdim=True)
    kept = _fresh(model)
    missing = [text for text in texts if text not in kept.embeddings]
    if missing:
        # not under inference mode: tensors made there could never take part in a gradient
        with torch.inference_mode(False), torch.no_grad():
            for text in missing:
                found = encode_text(model, [text])[0]
                kept.embeddings[text] = found / found.norm()
    return torch.stack([kept.embeddings[text] for text in texts])


def _prompt(model: HookedVLM, question: str) -> Tensor:
    """Prompt token ids `[token]` of one question, kept between calls."""
    prompts = _fresh(model).prompts
    if question not in prompts:
        head = model.table.head
        assert isinstance(head, Generative)
        prompts[question] = prompt_ids(model.hf, model.tokenizer, head, question, _image_tokens(model))
    return prompts[question]


def _image_tokens(model: HookedVLM) -> int:
    """How many tokens the projector makes of an image."""
    if model.family == "gemma3":
        return int(model.hf.config.mm_tokens_per_image)
    rows, columns = model.grid_shape
    return rows * columns + int(model.hf.config.vision_feature_select_strategy == "full")


def _fresh(model: HookedVLM) -> TextSide:
    """The kept text side, emptied when any weight was written to since, or when it grew too large."""
    weights = (*tuple(p._version for p in model.hf.parameters()), id(next(model.hf.parameters())))
    kept = model._text
    if kept.weights != weights or len(kept.embeddings) > _KEPT:
        kept.weights = weights
        kept.embeddings.clear()
        kept.prompts.clear()
    return kept
