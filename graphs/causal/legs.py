"""How a model runs with many rows of the same input, and how outputs are read from what it gives.

A dual encoder has one leg for the image and one for each caption: a change on one side leaves the other alone. Every
other model has one leg. A leg's result is what the outputs need: an embedding, logits at some positions, or classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from graphs.targets import Contrast, Feature, Logit, Output, ReportToken, Similarity, TokenLogit
from mechinterp.errors import UsageError
from mechinterp.models import HookedVLM, heads
from mechinterp.models.prompts import answer_token
from mechinterp.models.tables import Classifier, Dual, Features, Generative
from mechinterp.types import ImageTextBatch

__all__ = ["Leg", "captions_of", "legs_of", "read_output"]

Results = Mapping[str, Tensor]


@dataclass(frozen=True)
class Leg:
    """One forward pass of the model.

    Fields:
        name: of the leg.
        towers: towers of the graph that it runs; the hook names have the part before the dot.
        run: from a number of rows to the result, `[row, ...]`.
    """

    name: str
    towers: tuple[str, ...]
    run: Callable[[int], Tensor]


def captions_of(outputs: Sequence[Output]) -> tuple[str, ...]:
    """The captions of a dual encoder's outputs, in the order of the text stacks of a frozen pass."""
    found: list[str] = []
    for output in outputs:
        if isinstance(output, Contrast | Similarity):
            texts = (output.target.positive, output.target.negative if isinstance(output, Contrast) else None)
            found += [text for text in texts if text is not None]
    return tuple(dict.fromkeys(found))


def legs_of(model: HookedVLM, batch: ImageTextBatch, outputs: Sequence[Output]) -> tuple[Leg, ...]:
    """The legs of a model for one image."""

    def rows(n: int) -> ImageTextBatch:
        return ImageTextBatch(
            batch.pixel_values.expand(n, -1, -1, -1),
            None if batch.input_ids is None else batch.input_ids.expand(n, -1),
            None if batch.attention_mask is None else batch.attention_mask.expand(n, -1),
        )

    def image(n: int) -> Tensor:
        with model.attached():
            inputs = heads.inputs_of(model.hf, model.table, replace(rows(n), input_ids=None, attention_mask=None))
            return heads.image_features(model.hf, model.table, inputs["pixel_values"])

    def logits(n: int) -> Tensor:
        if batch.input_ids is None:
            raise UsageError("a generative model needs a prompt", where="batch", hint="make it with prepare()")
        with model.attached():
            return model.hf(**heads.inputs_of(model.hf, model.table, rows(n)), use_cache=False).logits

    def classes(n: int) -> Tensor:
        return model.hf.classifier(image(n)) if not model.hooked("vision.hook_logits") else model(rows(n)).logits

    match model.table.head:
        case Dual():
            captions = captions_of(outputs)
            texts = tuple(
                Leg(f"text.{i}", (f"text.{i}",), lambda n, text=text: model.encode_text([text] * n))
                for i, text in enumerate(captions)
            )
            return (Leg("vision", ("vision",), image), *texts)
        case Generative():
            return (Leg("all", ("vision", "text"), logits),)
        case Classifier():
            return (Leg("vision", ("vision",), classes),)
        case Features():
            return (Leg("vision", ("vision",), image),)
        case _:
            assert_never(model.table.head)


def read_output(
    model: HookedVLM, output: Output, outputs: Sequence[Output], results: Results, prompt_end: int = -1
) -> Float[Tensor, " row"]:
    """The value of an output in each row. `prompt_end`: where a generative model's answer is read.

    Raises UsageError for an output that the family does not have, and for a feature (watch it instead).
    """
    head = model.table.head
    match output:
        case Contrast(target) | Similarity(target) if isinstance(head, Dual):
            captions = captions_of(outputs)
            similarity = {}
            for text in (target.positive, target.negative if isinstance(output, Contrast) else None):
                if text is not None:
                    similarity[text] = _cosine(model, results["vision"], results[f"text.{captions.index(text)}"])
            value = similarity[target.positive]
            return value - similarity[target.negative] if len(similarity) == 2 else value
        case Contrast(target) if isinstance(head, Generative):
            return heads.answer_scores(model.tokenizer, results["all"][:, prompt_end], [target])[:, 0]
        case Contrast(target) if isinstance(head, Classifier):
            logits = results["vision"]
            value = logits[:, heads.class_index(model.hf, target)]
            if target.negative is None:
                return value - logits.mean(1)
            other = replace(target, name=target.negative, positive=target.negative)
            return value - logits[:, heads.class_index(model.hf, other)]
        case Logit(target, demeaned) if isinstance(head, Generative):
            token = answer_token(model.tokenizer, target.yes, target.no)
            return _logit(results["all"][:, prompt_end], token, None, demeaned)
        case Logit(target, demeaned) if isinstance(head, Classifier):
            return _logit(results["vision"], heads.class_index(model.hf, target), None, demeaned)
        case TokenLogit(token, position, versus, demeaned) if isinstance(head, Generative):
            logits = results["all"][:, position]
            return _logit(logits, token_id(model, token), None if versus is None else token_id(model, versus), demeaned)
        case Feature():
            raise UsageError("a feature is watched, not read", where="outputs")
        case Contrast() | Similarity() | Logit() | TokenLogit() | ReportToken():
            raise UsageError(f"{type(output).__name__} is no output of a {model.family} model", where="outputs")
        case _:
            assert_never(output)


def token_id(model: HookedVLM, token: str | int) -> int:
    """The id of a token given by its text or id."""
    if isinstance(token, int):
        return token
    ids: list[int] = model.tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise UsageError(f"{token!r} is {len(ids)} tokens", where="token", hint="give one token, or its id")
    return ids[0]


def _logit(logits: Float[Tensor, "row word"], token: int, versus: int | None, demeaned: bool) -> Tensor:
    value = logits[:, token]
    if versus is not None:
        return value - logits[:, versus]
    return value - logits.mean(1) if demeaned else value


def _cosine(model: HookedVLM, image: Float[Tensor, "row d"], text: Float[Tensor, "row d"]) -> Float[Tensor, " row"]:
    """Scaled cosine of paired rows."""
    hf: Any = model.hf
    value = torch.nn.functional.cosine_similarity(image, text) * hf.logit_scale.exp()
    return value + hf.logit_bias if hasattr(hf, "logit_bias") else value
