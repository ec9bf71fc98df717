"""Which tokens of a site are stored, and what each one is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.activations.layout import KINDS, Tokens
from mechinterp.activations.shards import Rows
from mechinterp.errors import UsageError
from mechinterp.types import ImageTextBatch, Site

__all__ = ["TokenMap", "rows_of", "token_map"]

CLS, PATCH, TEXT, POOLED, REGISTER = (KINDS.index(kind) for kind in ("cls", "patch", "text", "pooled", "register"))


@dataclass(frozen=True)
class TokenMap:
    """What each token of a site is, for one batch: kind number, patch number (-1: none), and whether it is real."""

    kind: Int[np.ndarray, "batch token"]
    patch: Int[np.ndarray, "batch token"]
    real: Bool[np.ndarray, "batch token"]


def token_map(model: Any, batch: ImageTextBatch, site: Site, tokens: int) -> TokenMap:
    """Describe the `tokens` tokens of a site.

    Vision tower: the model says which tokens own a patch; the first other one is CLS, the rest are registers. After
    the projector every token is a patch. Language tower: image positions are patches, padding is not real.
    """
    n = len(batch)
    kind, patch = np.full((n, tokens), PATCH), np.full((n, tokens), -1)
    real = np.ones((n, tokens), bool)
    if site.tower == "vision":
        owners = np.arange(tokens)[_as_index(model.patch_tokens(batch))]
        kind[:] = REGISTER
        kind[:, owners] = PATCH
        others = np.setdiff1d(np.arange(tokens), owners)
        kind[:, others[:1]] = CLS
    elif site.tower == "text":
        ids = np.full((n, tokens), -1) if batch.input_ids is None else batch.input_ids.cpu().numpy()
        if ids.shape != (n, tokens):
            raise UsageError(f"has {tokens} tokens, the text {ids.shape[1]}", where=str(site))
        image_token = _image_token(model)
        kind[:] = TEXT
        if image_token is not None:
            kind[ids == image_token] = PATCH
        if batch.attention_mask is not None:
            real = batch.attention_mask.cpu().numpy().astype(bool)
    patches = (kind == PATCH) & real
    patch[patches] = (np.cumsum(patches, axis=1) - 1)[patches]
    return TokenMap(kind, patch, real)


def rows_of(value: Tensor, known: TokenMap | None, tokens: Tokens, first_image: int) -> Rows:
    """The rows to store of a captured `value` (`[batch, token, d]`, or `[batch, d]` for a site without tokens).

    `first_image` is the number of the batch's first image in the data folder.
    """
    images = np.arange(first_image, first_image + len(value))
    if known is None:
        return _one_per_image(value, images)
    if tokens == "pooled":
        return _one_per_image(_pooled(value, known), images)
    chosen = _chosen(known, tokens)
    image, token = np.nonzero(chosen)
    if chosen.all():
        activations = value.flatten(0, 1)
    elif (chosen == chosen[0]).all():  # the same tokens in every image: one strided copy
        activations = value[:, torch.from_numpy(np.flatnonzero(chosen[0]))].flatten(0, 1)
    else:
        activations = value[torch.from_numpy(chosen)]
    return Rows(
        activations=activations.float().cpu().numpy(),
        image=images[image].astype(np.int32),
        token=token.astype(np.int32),
        patch=known.patch[chosen].astype(np.int32),
        kind=known.kind[chosen].astype(np.uint8),
    )


def _chosen(known: TokenMap, tokens: Tokens) -> Bool[np.ndarray, "batch token"]:
    match tokens:
        case "all" | "pooled":
            return known.real
        case "patch":
            return known.real & (known.kind == PATCH)
        case "cls":
            return known.real & (known.kind == CLS)
        case "text":
            return known.real & (known.kind == TEXT)
        case _:
            assert_never(tokens)


def _pooled(value: Float[Tensor, "batch token d"], known: TokenMap) -> Float[Tensor, "batch d"]:
    """Mean over the patch tokens; over the text tokens of a batch that has no patches."""
    weights = _chosen(known, "patch")
    if not weights.any():
        weights = _chosen(known, "text")
    mask = torch.from_numpy(weights).to(value.device, torch.float32)
    return torch.einsum("btd,bt->bd", value.float(), mask / mask.sum(1, keepdim=True))


def _one_per_image(value: Float[Tensor, "batch d"], images: Int[np.ndarray, " batch"]) -> Rows:
    none = np.full(len(images), -1, np.int32)
    kind = np.full(len(images), POOLED, np.uint8)
    return Rows(value.float().cpu().numpy(), images.astype(np.int32), none, none, kind)


def _as_index(where: Any) -> Any:
    """Slices, lists, arrays and tensors all select patch tokens."""
    return where.cpu().numpy() if isinstance(where, Tensor) else where


def _image_token(model: Any) -> int | None:
    config = getattr(getattr(model, "hf", None), "config", None)
    for name in ("image_token_id", "image_token_index"):
        if isinstance(number := getattr(config, name, None), int):
            return number
    return None
