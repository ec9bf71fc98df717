"""From the vision tower to the score: what each head does with the residual stream after the last block.

`readout` is the one place that knows how a family leaves its vision tower. Scores:

- dual encoder: `exp(logit_scale) cos(image, positive) [+ bias]`, minus the same for `negative` where there is one
  (Radford et al. 2021, section 2.3; with the sigmoid bias, Zhai et al. 2023);
- generative model: logit of the first token of `yes` minus that of `no`, after the prompt;
- classifier: the logit of the class, minus that of the class called `negative` where one is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import ModelError, UsageError
from mechinterp.models.prompts import answer_token, image_mask
from mechinterp.models.tables import Classifier, Dual, Family, Features, Generative
from mechinterp.models.wiring import find
from mechinterp.types import ImageTextBatch, Target

__all__ = [
    "class_index",
    "class_pair",
    "class_scores",
    "cosine_scores",
    "image_features",
    "inputs_of",
    "last_logits",
    "readout",
]


def inputs_of(hf: Any, family: Family, batch: ImageTextBatch) -> dict[str, Any]:
    """The keyword arguments of the transformers model for a batch, on its device and in its dtype."""
    found: dict[str, Any] = {"pixel_values": batch.pixel_values.to(hf.device, hf.dtype)}
    if batch.input_ids is not None and not isinstance(family.head, Classifier | Features):
        found["input_ids"] = batch.input_ids.to(hf.device)
        if batch.attention_mask is not None:
            found["attention_mask"] = batch.attention_mask.to(hf.device)
        if family.name == "gemma3":  # image tokens see each other: its processor sends this, so we do
            found["token_type_ids"] = image_mask(hf, found["input_ids"]).long()
    return found


def image_features(hf: Any, family: Family, pixel_values: Tensor) -> Tensor:
    """What the head reads, from pixels: `[batch, d]`, or `[batch, token, d]` for a generative model."""
    match family.head:
        case Dual():
            found = hf.get_image_features(pixel_values=pixel_values)
            return getattr(found, "pooler_output", found)
        case Generative():
            found = hf.get_image_features(pixel_values=pixel_values)
            found = getattr(found, "pooler_output", found)
            return torch.stack(list(found)) if isinstance(found, list | tuple) else found
        case Classifier():
            return hf.base_model(pixel_values).last_hidden_state[:, 0]
        case Features():
            return hf(pixel_values).pooler_output
        case _:
            assert_never(family.head)


def readout(hf: Any, family: Family, resid: Float[Tensor, "batch pos d"]) -> Tensor:
    """The same, from the residual stream after the last (used) vision block."""
    tower = family.towers["vision"]
    norm = find(hf, tower.ln_final) if tower.ln_final else None
    match family.name:
        case "clip":
            return hf.visual_projection(norm(resid[:, 0]))  # type: ignore[misc]
        case "siglip":
            return hf.vision_model.head(norm(resid))  # type: ignore[misc]
        case "gemma3":
            return hf.model.multi_modal_projector(norm(resid))  # type: ignore[misc]
        case "llava":
            keep_cls = hf.config.vision_feature_select_strategy == "full"
            return hf.model.multi_modal_projector(resid if keep_cls else resid[:, 1:])
        case "dinov2" | "vit":
            return norm(resid)[:, 0]  # type: ignore[misc]
        case _:
            raise ModelError(f"the {family.name} family has no readout")


def cosine_scores(
    hf: Any, features: Float[Tensor, "batch d"], text: Float[Tensor, "text d"]
) -> Float[Tensor, "batch text"]:
    """Scaled cosine of every image with every text: transformers' logits_per_image."""
    features = features / features.norm(dim=-1, keepdim=True)
    scores = features @ text.T.to(features.dtype) * hf.logit_scale.exp()
    return scores + hf.logit_bias if hasattr(hf, "logit_bias") else scores


def last_logits(
    hf: Any, family: Family, batch: ImageTextBatch, features: Float[Tensor, "batch token d"]
) -> Float[Tensor, "batch vocabulary"]:
    """Logits after the prompt of a generative model, given what its projector made of the images."""
    kept = inputs_of(hf, family, batch)
    ids = kept.pop("input_ids")
    kept.pop("pixel_values")
    mask = image_mask(hf, ids)
    table = hf.get_input_embeddings()
    # Gemma's image token may lie beyond the vocabulary; transformers embeds token 0 there, then overwrites it
    embeds = table(ids.masked_fill(mask, 0) if int(ids.max()) >= table.num_embeddings else ids)
    if int(mask.sum()) != features.shape[0] * features.shape[1]:
        raise UsageError(
            f"the prompts hold {int(mask.sum())} image tokens for {features.shape[0]} images of {features.shape[1]}",
            hint="make the batch with prepare(), and give a value for each of its rows",
        )
    embeds = embeds.masked_scatter(mask[..., None], features.to(embeds.dtype))
    return hf(inputs_embeds=embeds, use_cache=False, logits_to_keep=1, **kept).logits[:, -1]


def answer_scores(
    tokenizer: Any, logits: Float[Tensor, "batch vocabulary"], targets: Sequence[Target]
) -> Float[Tensor, "batch target"]:
    """Logit of yes minus logit of no, for every target."""
    yes = [answer_token(tokenizer, t.yes, t.no) for t in targets]
    no = [answer_token(tokenizer, t.no, t.yes) for t in targets]
    return logits[:, yes] - logits[:, no]


def class_index(hf: Any, target: Target) -> int:
    """The class called `target.name` or `target.positive`. Raises UsageError listing the classes."""
    names = _classes(hf)
    for name in (target.name, target.positive):
        if name.lower() in names:
            return names[name.lower()]
    raise _no_class(target.name, "Target.name", names)


def class_pair(hf: Any, target: Target) -> tuple[int, int | None]:
    """The class of a target, and the one that it is held against (None: none).

    Where `positive` is a caption (neither empty, nor a class, nor the target's name), a `negative` that is no class is
    the caption beside it, for dual encoders, and says nothing here. Raises UsageError for any other name of no class,
    and for a class against itself.
    """
    names, index, negative = _classes(hf), class_index(hf, target), target.negative
    if negative is None:
        return index, None
    other = names.get(negative.lower())
    if other is None:
        positive = target.positive.lower()
        if positive in ("", target.name.lower()) or positive in names:
            raise _no_class(negative, "Target.negative", names)
    elif other == index:
        raise UsageError(f"target {target.name!r} contrasts a class with itself", where="Target.negative")
    return index, other


def class_scores(hf: Any, logits: Float[Tensor, "batch class"], target: Target) -> Float[Tensor, " batch"]:
    """Logit of the target's class, less that of the class it is held against."""
    index, other = class_pair(hf, target)
    return logits[:, index] if other is None else logits[:, index] - logits[:, other]


def _classes(hf: Any) -> dict[str, int]:
    return {str(label).lower(): int(index) for index, label in hf.config.id2label.items()}


def _no_class(name: str, where: str, names: dict[str, int]) -> UsageError:
    return UsageError(f"the model has no class {name!r}", where=where, hint=f"its classes: {', '.join(sorted(names))}")
