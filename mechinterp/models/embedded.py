"""Scores as a function of pixels and of the embeddings of the words, so that words can be explained like patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, assert_never

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import UsageError
from mechinterp.models import heads
from mechinterp.models.prompts import image_mask
from mechinterp.models.scoring import one_question, score_features, text_inputs
from mechinterp.models.tables import Classifier, Dual, Features, Generative
from mechinterp.types import ImageTextBatch, Target

if TYPE_CHECKING:
    from mechinterp.models.hooked import HookedVLM

__all__ = ["Words", "features_of", "score_words", "words_of"]

POINT = "text.hook_embed"


@dataclass(frozen=True)
class Words:
    """The words of a target's prompt: those of the positive caption, or of the question.

    Args:
        ids: the whole prompt, image tokens and special tokens included.
        positions: which of them are words.
        texts: the words.
        embeddings: what block 0 of the text tower reads at the words (positions included where the tower adds them).
        neutral: the same with every word replaced by the tokenizer's unknown (else padding) token.
        mean: the same for the mean of the vocabulary's embeddings.
        masked: whether the text tower is given an attention mask.
    """

    ids: Int[Tensor, " token"]
    positions: Int[Tensor, " word"]
    texts: tuple[str, ...]
    embeddings: Float[Tensor, "word d"]
    neutral: Float[Tensor, "word d"]
    mean: Float[Tensor, "word d"]
    masked: bool = True

    def __len__(self) -> int:
        return len(self.positions)


@torch.no_grad()
def words_of(model: HookedVLM, target: Target) -> Words:
    """The words that the model reads for a target. Raises UsageError where the model reads none."""
    ids, mask = _prompt_of(model, target)
    special = set(model.tokenizer.all_special_ids)
    image = (
        image_mask(model.hf, ids[None])[0] if isinstance(model.table.head, Generative) else torch.zeros_like(ids).bool()
    )
    wanted = [i for i, token in enumerate(ids.tolist()) if token not in special and not image[i]]
    if not wanted:
        raise UsageError("no word to explain", where=f"target {target.name!r}")
    positions = torch.tensor(wanted, device=ids.device)
    blank = ids.clone()
    unknown = model.tokenizer.unk_token_id
    blank[positions] = model.tokenizer.pad_token_id if unknown is None else unknown
    table = _table(model)
    embeddings, neutral = _read(model, ids, mask)[positions], _read(model, blank, mask)[positions]
    # whatever the tower adds to a token's vector (its position), it adds to the mean vector too
    mean = neutral - table(blank[positions]) + table(torch.arange(table.num_embeddings, device=ids.device)).mean(0)
    texts = tuple(model.tokenizer.decode([int(token)]).strip() for token in ids[positions])
    return Words(ids, positions, texts, embeddings, neutral, mean, mask)


def score_words(
    model: HookedVLM,
    target: Target,
    words: Words,
    features: Float[Tensor, "row *image"],
    embeddings: Float[Tensor, "row word d"],
) -> Float[Tensor, " row"]:
    """`model.score` with the words' embeddings set to given values; differentiable in both arguments.

    `features` are what the head reads of the images (`features_of`), so that images that stay are seen once. A dual
    encoder's negative prompt stays as it is: a contrast is explained by the words of its positive side.
    """

    def put(value: Tensor, hook: object) -> Tensor:
        return value.index_copy(1, words.positions, embeddings.to(value.dtype))

    ids = words.ids.expand(len(features), -1)
    match model.table.head:
        case Dual():
            inputs: dict[str, Any] = {"input_ids": ids}
            if words.masked:
                inputs["attention_mask"] = torch.ones_like(ids)
            with model.hooks(fwd_hooks=[(POINT, put)]), model.attached():
                found = model.hf.get_text_features(**inputs)
            text = getattr(found, "pooler_output", found)
            unit = [v / v.norm(dim=-1, keepdim=True) for v in (features, text)]
            score = (unit[0] * unit[1]).sum(-1) * model.hf.logit_scale.exp()
            if target.negative is None:
                return score + model.hf.logit_bias if hasattr(model.hf, "logit_bias") else score
            with torch.no_grad():
                against = model.encode_text([target.negative])[0]
            return score - unit[0] @ (against / against.norm()) * model.hf.logit_scale.exp()
        case Generative():
            no_pixels = features.new_empty(len(ids), 0, 0, 0)  # the features stand in their place
            batch = ImageTextBatch(no_pixels, ids, torch.ones_like(ids))
            with model.hooks(fwd_hooks=[(POINT, put)]), model.attached():
                return score_features(model, features, batch, [target])[:, 0]
        case Classifier() | Features():
            raise UsageError(f"a {model.family} model reads no words")
        case _:
            assert_never(model.table.head)


def features_of(model: HookedVLM, pixels: Float[Tensor, "row channel height width"]) -> Float[Tensor, "row *image"]:
    """What the head reads of images: an embedding (dual encoder), or the projected tokens (generative model)."""
    with model.attached():
        return heads.image_features(model.hf, model.table, pixels.to(model.hf.device, model.hf.dtype))


def _prompt_of(model: HookedVLM, target: Target) -> tuple[Int[Tensor, " token"], bool]:
    """Token ids of the prompt, and whether the text tower is given an attention mask."""
    text = one_question([target]) if isinstance(model.table.head, Generative) else target.positive
    found = text_inputs(model, [text])  # raises UsageError where there is no text tower
    return found["input_ids"][0].to(model.hf.device), "attention_mask" in found


def _read(model: HookedVLM, ids: Int[Tensor, " token"], mask: bool) -> Float[Tensor, "token d"]:
    """What block 0 of the text tower reads for a prompt."""
    kept: list[Tensor] = []
    inputs = {"input_ids": ids[None]} | ({"attention_mask": torch.ones_like(ids)[None]} if mask else {})

    def keep(value: Tensor, hook: object) -> None:
        kept.append(value[0].detach().clone())

    with model.hooks(fwd_hooks=[(POINT, keep)]), model.attached():
        if isinstance(model.table.head, Dual):
            model.hf.get_text_features(**inputs)
        else:
            # without an image its tokens keep their own vectors; no word is among them
            model.hf(**inputs, logits_to_keep=1)
    return kept[0]


def _table(model: HookedVLM) -> Any:
    """The table of token vectors."""
    if isinstance(model.table.head, Dual):
        return model.hf.text_model.embeddings.token_embedding
    return model.hf.get_input_embeddings()
