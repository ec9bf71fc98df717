"""What a user asks a model: the target that a text means, in words that the model knows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

from mechinterp.data.phantom import FACTORS
from mechinterp.data.phantom.language import prompts
from mechinterp.errors import UsageError
from mechinterp.models import HookedVLM
from mechinterp.models.bundles import bundled_folder
from mechinterp.models.tables import Classifier, Dual, Generative
from mechinterp.types import Target

__all__ = ["check_texts", "check_words", "target_of", "unknown_words", "word_caution"]

PHRASE = 4  # words; what is longer is taken as a prompt of its own
_PARTS = re.compile(r"[^\W_]+|[^\w\s]|_")
_SMALL = 40  # words


def target_of(model: HookedVLM, text: str, against: str | None = None) -> Target:
    """What a user means by `--target TEXT [--against TEXT]`, in every command that takes a text.

    With `against`, both texts stand as they are. Alone, a phrase of up to four words is a finding, asked in the words
    that the bundled models were taught: "a chest x-ray with X" against "a chest x-ray without X", or "is there X ?".
    A longer text stands as it is; one with a question mark is the question. For a classifier both are names of classes.
    Raises UsageError for an empty text, and for a word that the model does not know.
    """
    if not text.strip():
        raise UsageError("is empty", where="--target", hint="a finding, a caption or a question")
    target = _meant(model, text, against)
    check_words(model, target, "--target" if against is None else "--target or --against")
    return target


def _meant(model: HookedVLM, text: str, against: str | None) -> Target:
    if isinstance(model.table.head, Classifier):
        return Target(text, text, against)
    if against is not None or "?" in text or len(text.split()) > PHRASE:
        return Target(text, text, against, question=text if "?" in text else None)
    if text in FACTORS and bundled_folder(model.label) is not None and not model.label.startswith("cxr"):
        return Target(text, *prompts(text))
    return Target(text, f"a chest x-ray with {text}", f"a chest x-ray without {text}", f"is there {text} ?")


def check_words(model: HookedVLM, target: Target, where: str) -> None:
    """Raise UsageError where the model would read the unknown token in place of a word of the target's texts.

    Two findings that it does not know would have one score: that of neither.
    """
    check_texts(model, _texts(model, target), where)


def word_caution(model: HookedVLM, target: Target) -> str | None:
    """What to say where the target of a data folder holds words that the model does not know; None where it knows all.

    A folder's target is no slip of the pen: it is scored as it stands, and every report says what was scored.
    """
    unknown = unknown_words(model, _texts(model, target))
    if not unknown:
        return None
    return (
        f"{model.label} does not know {', '.join(map(repr, unknown))} and read its unknown word in place of it: the "
        f"score is not of {target.name!r}. Give the target prompts in words that the model knows (dataset.json)."
    )


def _texts(model: HookedVLM, target: Target) -> list[str]:
    match model.table.head:
        case Dual():
            return [text for text in (target.positive, target.negative) if text is not None]
        case Generative():
            return [target.asked()]
        case _:
            return []  # classes have names, and no words are read


def check_texts(model: HookedVLM, texts: Sequence[str], where: str) -> None:
    """Raise UsageError that names the words of `texts` that the model does not know, and some that it does."""
    unknown = unknown_words(model, texts)
    if not unknown:
        return
    near = get_close_matches(unknown[0].lower(), _words(model), 3)
    raise UsageError(
        f"{model.label} does not know {', '.join(map(repr, unknown))}, and would score other text in place of it",
        where=where,
        hint=f"it knows {', '.join(near or _findings(model))}",
    )


def unknown_words(model: HookedVLM, texts: Sequence[str]) -> list[str]:
    """The words and marks of `texts` for which the tokenizer has nothing but its unknown token.

    Empty where it has no such token, or the model reads no text.
    """
    token = getattr(model.tokenizer, "unk_token_id", None)
    if token is None:
        return []

    def unknown(text: str) -> bool:
        return token in model.tokenizer(text, add_special_tokens=False)["input_ids"]

    found: dict[str, None] = {}
    for chunk in filter(unknown, dict.fromkeys(word for text in texts for word in text.split())):
        found |= dict.fromkeys(list(filter(unknown, _PARTS.findall(chunk))) or [chunk])
    return list(found)


def _words(model: HookedVLM) -> list[str]:
    return sorted(word for word in model.tokenizer.get_vocab() if word.isalpha() and len(word) > 3)


def _findings(model: HookedVLM) -> list[str]:
    """What may be asked: the whole vocabulary where it is small, else the phantom's findings that are in it."""
    words = _words(model)
    named = [factor.phrase for factor in FACTORS.values() if factor.phrase]
    if len(words) <= _SMALL:
        return words
    return [phrase for phrase in named if not unknown_words(model, [phrase])] or words[:_SMALL]
