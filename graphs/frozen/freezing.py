"""`freeze`: a model, one input and some outputs, to a frozen pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import assert_never

import torch

from graphs.frozen.capture import in_dtype, sha256_of
from graphs.frozen.classes import freeze_classes
from graphs.frozen.dual import freeze_dual
from graphs.frozen.generative import freeze_generative
from graphs.frozen.parts import FrozenPass, Stack
from graphs.frozen.readouts import feature_readouts
from graphs.targets import Contrast, Feature, Logit, Output, ReportToken, SetContrast, Similarity, TokenLogit
from mechinterp.errors import UsageError
from mechinterp.models.freeze_words import freezes_in_words
from mechinterp.models.hooked import HookedVLM
from mechinterp.models.tables import Classifier, Dual, Features, Generative
from mechinterp.types import ImageTextBatch

__all__ = ["freeze"]


@torch.no_grad()
def freeze(
    model: HookedVLM, batch: ImageTextBatch, outputs: Sequence[Output], dtype: torch.dtype = torch.float32
) -> FrozenPass:
    """The true forward pass on one image as a chain of linear maps, and the outputs as readouts of it.

    Args:
        model: any `HookedVLM`.
        batch: one image. A generative model's prompt is taken from it, or made from the outputs where it has none.
        outputs: what to explain. All of them share one prompt. A dual encoder takes its captions from them.
        dtype: what to compute in. A model of another precision is copied first, so that what is kept is a true
            forward pass in this precision and not a rounded one (`in_dtype` makes the copy once for many images).

    Raises UsageError where outputs do not fit the model or each other, ModelError where a model has a part that no
    frozen part stands for.
    """
    if len(batch) != 1:
        raise UsageError(f"{len(batch)} images", where="batch", hint="freeze one image at a time: batch[:1]")
    if not outputs:
        raise UsageError("nothing to explain", where="outputs", hint="such as Contrast(target)")
    known = {"label": model.label, "family": model.family, "sha256": sha256_of(model.hf)}
    model = in_dtype(model, dtype)
    features = [output for output in outputs if isinstance(output, Feature)]
    others = [output for output in outputs if not isinstance(output, Feature)]
    match model.table.head:
        case Dual():
            stacks, readouts = freeze_dual(model, batch, _only(model, others, (Contrast, Similarity, SetContrast)))
        case Generative():
            wanted = _only(model, others, (Contrast, Logit, TokenLogit, ReportToken))
            stacks, readouts = freeze_generative(model, batch, wanted)
        case Classifier() | Features():
            wanted = _only(model, others, (Contrast, Logit) if isinstance(model.table.head, Classifier) else ())
            stacks, readouts = freeze_classes(model, batch, wanted)
        case _:
            assert_never(model.table.head)
    readouts = [*readouts, *feature_readouts(features, stacks)]
    image = batch.ids[0] if batch.ids else ""
    return FrozenPass(tuple(stacks), tuple(readouts), tuple(_freezes(model, stacks)), known, image)


def _only(model: HookedVLM, outputs: Sequence[Output], kinds: tuple[type, ...]) -> list:
    for output in outputs:
        if not isinstance(output, kinds):
            names = ", ".join(kind.__name__ for kind in (*kinds, Feature))
            raise UsageError(
                f"a {model.family} model has no {type(output).__name__}", where="outputs", hint=f"it has: {names}"
            )
    return list(outputs)


def _freezes(model: HookedVLM, stacks: Sequence[Stack]) -> Iterator[str]:
    """Everything that is held: by hook name where there is a hook point, else in words; `verify_freeze` proves each."""
    points = ("ln1.hook_scale", "attn.hook_pattern", "ln1_post.hook_scale", "ln2.hook_scale", "ln2_post.hook_scale")
    for stack in stacks:
        for block in stack.blocks:
            names = [f"{block.tower}.blocks.{block.layer}.{point}" for point in points]
            yield from (_of(stack, block.tower, name) for name in names if name in model.hook_dict)
    for tower in dict.fromkeys(stack.blocks[0].tower for stack in stacks):
        if f"{tower}.ln_final.hook_scale" in model.hook_dict:
            yield f"{tower}.ln_final.hook_scale"
    yield from freezes_in_words(model.family)


def _of(stack: Stack, tower: str, name: str) -> str:
    """The hook name; with the caption's stack where several captions went through one tower."""
    return name if stack.tower == tower else f"{stack.tower}{name.removeprefix(tower)}"
