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

from graphs.frozen.generative import plans_of
from graphs.targets import Contrast, Feature, Logit, Output, ReportToken, SetContrast, Similarity, TokenLogit, terms_of
from mechinterp.errors import UsageError
from mechinterp.models import HookedVLM, heads
from mechinterp.models.tables import Classifier, Dual, Features, Generative
from mechinterp.types import ImageTextBatch

__all__ = ["Leg", "captions_of", "legs_of", "read_outputs", "text_towers"]

Results = Mapping[str, Tensor]


@dataclass(frozen=True)
class Leg:
    """One forward pass of the model.

    Fields:
        name: of the leg.
        towers: towers of the graph that it runs; the hook names have the part before the dot.
        run: from a number of rows to the result, `[row, ...]`.
        plans: which logits each output of a generative model is; the result has one position for each.
    """

    name: str
    towers: tuple[str, ...]
    run: Callable[[int], Tensor]
    plans: tuple[Any, ...] = ()


def captions_of(outputs: Sequence[Output]) -> tuple[str, ...]:
    """The captions of a dual encoder's outputs, in the order of the text stacks of a frozen pass."""
    found: list[str] = []
    for output in outputs:
        if isinstance(output, Contrast | Similarity | SetContrast):
            found += [caption for _, caption in terms_of(output)]
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

    def classes(n: int) -> Tensor:
        return model.hf.classifier(image(n)) if not model.hooked("vision.hook_logits") else model(rows(n)).logits

    match model.table.head:
        case Dual():
            captions = captions_of(outputs)
            names = text_towers(captions)
            texts = tuple(
                Leg(name, (name,), lambda n, text=text: model.encode_text([text] * n))
                for name, text in zip(names, captions, strict=True)
            )
            return (Leg("vision", ("vision",), image), *texts)
        case Generative():
            return (_generative(model, batch, outputs),)
        case Classifier():
            return (Leg("vision", ("vision",), classes),)
        case Features():
            return (Leg("vision", ("vision",), image),)
        case _:
            assert_never(model.table.head)


def text_towers(captions: Sequence[str]) -> tuple[str, ...]:
    """What the text stacks of a dual encoder are called in a graph."""
    return ("text",) if len(captions) == 1 else tuple(f"text.{i}" for i in range(len(captions)))


def _generative(model: HookedVLM, batch: ImageTextBatch, outputs: Sequence[Output]) -> Leg:
    """The prompt (and as much of the report as the outputs need) that the frozen pass has."""
    plans = plans_of(model, batch, [o for o in outputs if not isinstance(o, Feature)])  # type: ignore[arg-type]
    if not plans and batch.input_ids is None:
        raise UsageError("a generative model needs a prompt", where="batch", hint="make it with prepare()")
    ids = max((plan.ids for plan in plans), key=len) if plans else batch.input_ids[0]  # type: ignore[index]

    def logits(n: int) -> Tensor:
        row = ids[None].expand(n, -1)
        asked = ImageTextBatch(batch.pixel_values.expand(n, -1, -1, -1), row, torch.ones_like(row))
        positions = torch.tensor([plan.row for plan in plans] or [-1])
        with model.attached():
            inputs = heads.inputs_of(model.hf, model.table, asked)
            return model.hf(**inputs, use_cache=False, logits_to_keep=positions).logits

    return Leg("all", ("vision", "text"), logits, tuple(plans))


def read_outputs(
    model: HookedVLM, outputs: Sequence[Output], legs: Sequence[Leg], results: Results
) -> list[Float[Tensor, " row"]]:
    """The values of all outputs that are no features, in their order, from the results of the legs."""
    asked = [output for output in outputs if not isinstance(output, Feature)]
    if isinstance(model.table.head, Generative):
        plans = legs[0].plans
        logits = results[legs[0].name]
        return [_logit(logits[:, i], plan.plus, plan.minus, plan.demeaned) for i, plan in enumerate(plans)]
    captions = captions_of(outputs) if isinstance(model.table.head, Dual) else ()
    return [_read(model, output, captions, results) for output in asked]


def _read(model: HookedVLM, output: Output, captions: tuple[str, ...], results: Results) -> Float[Tensor, " row"]:
    head = model.table.head
    match output:
        case Contrast() | Similarity() | SetContrast() if isinstance(head, Dual):
            towers = dict(zip(captions, text_towers(captions), strict=True))
            cosines = [
                sign * _cosine(model, results["vision"], results[towers[caption]]) for sign, caption in terms_of(output)
            ]
            return torch.stack(torch.broadcast_tensors(*cosines)).sum(0)
        case Contrast(target) if isinstance(head, Classifier):
            return heads.class_scores(model.hf, results["vision"], target)
        case Logit(target, demeaned) if isinstance(head, Classifier):
            return _logit(results["vision"], heads.class_index(model.hf, target), None, demeaned)
        case Contrast() | Similarity() | SetContrast() | Logit() | TokenLogit() | ReportToken() | Feature():
            raise UsageError(f"{type(output).__name__} is no output of a {model.family} model", where="outputs")
        case _:
            assert_never(output)


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
