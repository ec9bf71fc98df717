"""Questions made of models: about the patches of an image, the words of a prompt, both, or any function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, assert_never

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.explain.maps import grid
from mechinterp.explain.question import CHUNK, Inner, Part, Question, Source
from mechinterp.models import HookedVLM
from mechinterp.models.embedded import Words, features_of, score_words, words_of
from mechinterp.types import ImageTextBatch, Target

__all__ = ["Fill", "WordFill", "about_both", "about_function", "about_image", "about_words", "blurred", "patch_owner"]

Fill = Literal["grey", "blur"]
WordFill = Literal["neutral", "mean"]


def about_image(
    model: HookedVLM, batch: ImageTextBatch, target: Target, fill: Fill = "grey", chunk: int = CHUNK
) -> Question:
    """Which patches does the score of `target` rest on?

    Args:
        batch: made with `model.prepare`.
        fill: what a removed patch becomes: the preprocessor's mean grey, or the same image blurred.
        chunk: images through the model at once.
    """
    rows, columns, _, _ = grid(model, batch)

    def function(values: tuple[Tensor, ...]) -> Tensor:
        return model.score(_like(batch, values[0]), [target])[:, 0]

    return Question(
        (_pixels(model, batch, fill),),
        function,
        rows * columns,
        _patch_names(rows, columns),
        (rows, columns),
        Source(model, batch, target),
        chunk=chunk,
        fill=fill,
    )


def about_words(
    model: HookedVLM, batch: ImageTextBatch, target: Target, fill: WordFill = "neutral", chunk: int = CHUNK
) -> Question:
    """Which words of the prompt (positive caption, or question) does the score rest on, each image being given?

    `fill`: a removed word becomes the tokenizer's unknown token, or the mean of the vocabulary's vectors.
    """
    words = words_of(model, target)
    part = _words(words, len(batch), fill, first=0)
    # each row has its own image, which is no part of the question: what the head reads of it travels along, seen once
    with torch.no_grad():
        features = torch.cat(
            [features_of(model, batch.pixel_values[i : i + chunk]) for i in range(0, len(batch), chunk)]
        )
    still = Part("still", features, features, torch.full(features.shape[1:], -1))

    def function(values: tuple[Tensor, ...]) -> Tensor:
        return score_words(model, target, words, values[0], values[1])

    source = Source(model, batch, target)
    return Question((still, part), function, len(words), words.texts, None, source, chunk=chunk, fill=fill)


def about_both(
    model: HookedVLM,
    batch: ImageTextBatch,
    target: Target,
    fill: Fill = "grey",
    word_fill: WordFill = "neutral",
    chunk: int = CHUNK,
) -> Question:
    """Patches and words as elements of one question, patches first."""
    rows, columns, _, _ = grid(model, batch)
    words = words_of(model, target)
    parts = (_pixels(model, batch, fill), _words(words, len(batch), word_fill, first=rows * columns))

    def function(values: tuple[Tensor, ...]) -> Tensor:
        return score_words(model, target, words, features_of(model, values[0]), values[1])

    names = _patch_names(rows, columns) + words.texts
    source = Source(model, batch, target)
    return Question(parts, function, len(names), names, None, source, chunk=chunk, fill=f"{fill}+{word_fill}")


def about_function(
    function: Callable[[Float[Tensor, "n *shape"]], Float[Tensor, " n"]],
    value: Float[Tensor, "row *shape"],
    reference: Float[Tensor, "*shape"],
    owner: Int[Tensor, "*owner"],
    kind: Literal["column", "patch", "word"] = "column",
    shape: tuple[int, int] | None = None,
    inner: Inner | None = None,
    chunk: int = 4096,
) -> Question:
    """A question about any differentiable function of one input, for models that are not a HookedVLM."""
    count = int(owner.max()) + 1
    part = Part(kind, value, reference.expand_as(value), owner)
    return Question(
        (part,), lambda values: function(values[0]), count, tuple(map(str, range(count))), shape, None, inner, chunk
    )


def patch_owner(height: int, width: int, rows: int, columns: int) -> Int[Tensor, "height width"]:
    """Patch of every pixel, row by row from the upper left."""
    down = torch.arange(height) * rows // height
    across = torch.arange(width) * columns // width
    return down[:, None] * columns + across


def blurred(pixels: Float[Tensor, "*batch height width"], share: float = 1 / 8) -> Float[Tensor, "*batch height width"]:
    """Gaussian blur, standard deviation `share` of the smaller side, edges reflected."""
    sigma = share * min(pixels.shape[-2:])
    reach = min(int(3 * sigma), min(pixels.shape[-2:]) - 1)
    at = torch.arange(-reach, reach + 1, dtype=pixels.dtype, device=pixels.device)
    kernel = torch.exp(-at.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    flat = pixels.reshape(-1, 1, *pixels.shape[-2:])
    padded = torch.nn.functional.pad(flat, (reach,) * 4, mode="reflect")
    down = torch.nn.functional.conv2d(padded, kernel.view(1, 1, -1, 1))
    return torch.nn.functional.conv2d(down, kernel.view(1, 1, 1, -1)).reshape(pixels.shape)


def _pixels(model: HookedVLM, batch: ImageTextBatch, fill: Fill) -> Part:
    rows, columns, _, _ = grid(model, batch)
    pixels = batch.pixel_values.detach()
    match fill:
        case "grey":
            reference = torch.zeros_like(pixels)
        case "blur":
            reference = blurred(pixels)
        case _:
            assert_never(fill)
    height, width = pixels.shape[-2:]
    return Part("patch", pixels, reference, patch_owner(height, width, rows, columns))


def _words(words: Words, rows: int, fill: WordFill, first: int) -> Part:
    reference = words.neutral if fill == "neutral" else words.mean
    owner = first + torch.arange(len(words))[:, None]
    return Part("word", words.embeddings.expand(rows, -1, -1), reference.expand(rows, -1, -1), owner)


def _like(batch: ImageTextBatch, pixels: Tensor) -> ImageTextBatch:
    """The batch's prompt, which is the same in every row, beside other pixels."""
    ids, mask = batch.input_ids, batch.attention_mask
    return ImageTextBatch(
        pixels,
        None if ids is None else ids[:1].expand(len(pixels), -1),
        None if mask is None else mask[:1].expand(len(pixels), -1),
    )


def _patch_names(rows: int, columns: int) -> tuple[str, ...]:
    return tuple(f"patch {row},{column}" for row in range(rows) for column in range(columns))
