"""What a stream starts from: patch content, CLS, learned positions, words, constants; any input norm folded in."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import conv2d

from graphs.frozen.blocks import frozen_norm
from graphs.frozen.capture import tower_module
from graphs.frozen.parts import Inputs
from mechinterp.models.hooked import HookedVLM
from mechinterp.models.norms import scale_of

__all__ = ["image_inputs", "image_labels", "word_inputs", "words_of"]

Kinds = dict[str, tuple[Tensor, Tensor]]


def image_inputs(model: HookedVLM, pixels: Float[Tensor, "channel height width"]) -> Inputs:
    """The summands of the vision stream: content of each patch, CLS, a learned position each, and constants."""
    tower = tower_module(model, "vision")
    embeddings = tower.embeddings
    conv = _first(embeddings, "patch_embedding", "patch_embeddings")
    conv = getattr(conv, "projection", conv)
    content = conv2d(pixels[None].to(conv.weight.dtype), conv.weight, stride=conv.stride, padding=conv.padding)
    content = content.detach()[0].flatten(1).T.contiguous()
    cls = _first(embeddings, "class_embedding", "cls_token")
    first = int(cls is not None)
    every = torch.arange(first + len(content))
    kinds: Kinds = {"patch": (every[first:], content)}
    if cls is not None:
        kinds["cls"] = (every[:1], cls.detach().reshape(1, -1))
    kinds["pos"] = (every, _positions(embeddings, content, first, pixels.shape[-2:]))
    if conv.bias is not None:
        kinds["bias"] = (every[first:], conv.bias.detach().expand_as(content).contiguous())
    norm = getattr(tower, "pre_layrnorm", None)
    return Inputs(kinds if norm is None else _folded(norm, kinds, len(every)))


def word_inputs(model: HookedVLM, ids: Int[Tensor, " pos"], words: Int[Tensor, " word"]) -> Inputs:
    """The summands of a text stream: the words at these positions, and the learned positions where there are any."""
    tower = tower_module(model, "text")
    embeddings = getattr(tower, "embeddings", None)
    if embeddings is None:  # a language model: its table scales by itself where the family scales
        return Inputs({"token": (words, tower.get_input_embeddings()(ids[words]).detach())})
    positions = embeddings.position_embedding.weight.detach()[: len(ids)]
    return Inputs(
        {"token": (words, embeddings.token_embedding(ids[words]).detach()), "pos": (torch.arange(len(ids)), positions)}
    )


def image_labels(model: HookedVLM) -> tuple[str, ...]:
    """A name for each position of the vision tower."""
    rows, columns = model.grid_shape
    patches = tuple(f"patch {r},{c}" for r in range(rows) for c in range(columns))
    return patches if model.cls_token is None else ("CLS", *patches)


def words_of(model: HookedVLM, ids: Int[Tensor, " pos"]) -> tuple[str, ...]:
    """The text of each token as a reader would write it."""
    return tuple(
        model.tokenizer.decode([i]).strip() or str(model.tokenizer.convert_ids_to_tokens(i)) for i in ids.tolist()
    )


def _first(module: Any, *names: str) -> Any:
    return next((found for name in names if (found := getattr(module, name, None)) is not None), None)


def _positions(embeddings: Any, content: Tensor, first: int, size: Any) -> Float[Tensor, "pos d"]:
    table = _first(embeddings, "position_embedding", "position_embeddings")
    if isinstance(table, torch.nn.Embedding):
        return table.weight.detach()
    if table.shape[1] == first + len(content) and size[0] == size[1]:
        return table.detach()[0]
    rows = content.new_zeros(1, first + len(content), content.shape[1])  # only its shape is read
    return embeddings.interpolate_pos_encoding(rows, *size).detach()[0]


def _folded(norm: Any, kinds: Kinds, n_pos: int) -> Kinds:
    """Each summand as it stands after a norm over their sum; the norm's shift is a constant at every position."""
    d = kinds["patch"][1].shape[1]
    total = Inputs(kinds).total((n_pos, d))
    frozen = frozen_norm(norm, scale_of(norm, total))
    found: Kinds = {}
    for kind, (positions, vectors) in kinds.items():
        rows = vectors.new_zeros(n_pos, d).index_add_(0, positions, vectors)
        found[kind] = (positions, frozen.linear(rows)[positions])
    constant = frozen.shift.expand(n_pos, d).clone()
    if "bias" in found:
        constant.index_add_(0, *found["bias"])
    return {**found, "bias": (torch.arange(n_pos), constant)}
