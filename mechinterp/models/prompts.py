"""Text for a model: tokenised captions for a dual encoder, prompts with image tokens for a generative model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp.errors import ModelError, UsageError
from mechinterp.models.tables import Generative

__all__ = ["answer_token", "decode", "prompt_ids", "tokenize"]


def tokenize(tokenizer: Any, texts: Sequence[str], length: int, pad_to_length: bool) -> dict[str, Tensor]:
    """Token ids `[text, token]` (and attention mask, where the tokenizer makes one) of captions.

    `length` is the longest the text tower takes. SigLIP was trained with captions padded to that length and reads the
    last token, so its captions are padded to it (`pad_to_length`).
    """
    encoded = tokenizer(
        list(texts),
        padding="max_length" if pad_to_length else True,
        truncation=True,
        max_length=length,
        return_tensors="pt",
    )
    # a model trained with padding as text (SigLIP) has no mask: its tokenizer does not list one
    keep = {"input_ids"} if pad_to_length else {"input_ids", "attention_mask"}
    return {name: encoded[name] for name in keep if name in encoded}


def prompt_ids(hf: Any, tokenizer: Any, head: Generative, question: str, n_images: int) -> Int[Tensor, " token"]:
    """Token ids of one prompt: the model's chat template (or the family's plain prompt), image token repeated.

    `n_images` is the number of image tokens that the projector produces for one image.
    Raises ModelError when the tokenizer does not know the model's image token.
    """
    ids = {name: _special(hf.config, name) for name in ("image", "boi", "eoi")}
    if ids["image"] is None:
        raise ModelError("has no image token", where="config.json", hint="image_token_index is missing")
    image, boi, eoi = (None if i is None else tokenizer.convert_ids_to_tokens(i) for i in ids.values())
    if image is None:
        raise ModelError(f"does not know the image token {ids['image']}", where="tokenizer")
    # Gemma 3 writes one <start_of_image> where the image goes; its processor expands it so (Gemma3Processor)
    run = image * n_images if boi is None else f"\n\n{boi}{image * n_images}{eoi}\n\n"
    template = getattr(tokenizer, "chat_template", None)
    if template:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        text = text.replace(boi or image, run)
        start = getattr(tokenizer, "bos_token", None)
        special = not (start and text.startswith(start))
    else:
        text, special = head.prompt.format(image=run, question=question), True
    found = tokenizer(text, add_special_tokens=special, return_tensors="pt")["input_ids"][0]
    if int((found == ids["image"]).sum()) != n_images:
        raise ModelError(
            f"the prompt holds {int((found == ids['image']).sum())} image tokens, not {n_images}",
            where="chat template" if template else "tokenizer",
            hint="the template must place the image exactly once, and the tokenizer keep its token whole",
        )
    return found


def answer_token(tokenizer: Any, answer: str, other: str) -> int:
    """The first token of an answer. Raises UsageError when it is unknown or the same as that of the `other` answer."""
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (answer, other))
    unknown = getattr(tokenizer, "unk_token_id", None)
    if not first or first[0] == unknown:
        raise UsageError(f"the tokenizer has no token for the answer {answer!r}", hint="choose other answer words")
    if second and first[0] == second[0]:
        raise UsageError(f"the answers {answer!r} and {other!r} begin with the same token", hint="choose others")
    return int(first[0])


def decode(tokenizer: Any, ids: Int[Tensor, "batch token"]) -> list[str]:
    """Text of generated tokens, special tokens left out."""
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def image_mask(hf: Any, ids: Int[Tensor, "batch token"]) -> Tensor:
    """True where a token stands for a part of the image, `[batch, token]`."""
    return ids == _special(hf.config, "image")


def same_prompt(ids: Int[Tensor, "batch token"], prompt: Int[Tensor, " token"]) -> bool:
    """Whether every row holds exactly this prompt."""
    return ids.shape[1] == len(prompt) and bool(torch.equal(ids, prompt.to(ids.device).expand_as(ids)))


def _special(config: Any, name: str) -> int | None:
    for key in (f"{name}_token_index", f"{name}_token_id"):
        value = getattr(config, key, None)
        if isinstance(value, int):
            return value
    return None
