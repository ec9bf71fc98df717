"""A prompt that means nothing, as long as the one it replaces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mechinterp.errors import UsageError
from mechinterp.models import HookedVLM
from mechinterp.models.tables import Classifier, Dual, Features, Generative
from mechinterp.types import Target

__all__ = ["nonsense", "reads_prompt"]

TRIES = 200


def reads_prompt(model: HookedVLM) -> bool:
    """Whether the score depends on words at all: not that of a classifier."""
    return isinstance(model.table.head, Dual | Generative)


def nonsense(model: HookedVLM, target: Target, seed: int = 0) -> Target:
    """The target with every word of its prompts replaced by a random one of the vocabulary, the same number of tokens.

    Prompts are the positive and the negative caption of a dual encoder, or the question of a generative model, whose
    answer words stay. A word that the target uses is not drawn.

    Raises UsageError for a model without prompts, or when no text of that length could be made.
    """
    rng = np.random.default_rng(seed)
    match model.table.head:
        case Dual():
            against = None if target.negative is None else _words(model.tokenizer, target.negative, target, rng)
            return replace(target, positive=_words(model.tokenizer, target.positive, target, rng), negative=against)
        case Generative():
            return replace(target, question=_words(model.tokenizer, target.asked(), target, rng))
        case Classifier() | Features():
            raise UsageError(f"a {model.family} model reads no prompt", where="nonsense")


def _words(tokenizer: Any, text: str, target: Target, rng: np.random.Generator) -> str:
    wanted = _length(tokenizer, text)
    used = f"{target.positive} {target.negative or ''} {target.asked()} {target.yes} {target.no}".lower().split()
    special = set(tokenizer.all_special_tokens)
    words = sorted(
        {
            word
            for token, index in tokenizer.get_vocab().items()
            if token not in special and (word := tokenizer.decode([index]).strip()).isalpha() and word not in used
        }
    )
    for _ in range(TRIES if words else 0):
        made = " ".join(rng.choice(words, size=wanted))
        # word pieces may split or join; only what comes out at the same length counts
        if _length(tokenizer, made) == wanted:
            return made
    raise UsageError(f"found no nonsense of {wanted} tokens", where=repr(text), hint="give another target instead")


def _length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
