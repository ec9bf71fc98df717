"""From tokens to images: what a latent does on an image is its largest activation over the image's tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, assert_never

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from mechinterp.activations import ActivationStore
from mechinterp.errors import UsageError
from mechinterp.types import Placed, Site
from saes.tokens import rows_for

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Pool", "image_activations", "image_errors", "image_table", "pooled_site"]

Pool = Literal["max", "mean", "min"]

CHUNK = 8192
"""Rows that are encoded at once."""


def image_table(store: ActivationStore, site: str | Site, split: str | None = None) -> pd.DataFrame:
    """One line an image that has rows at `site`: `image`, `patient`, `split`, in the order of the store."""
    import pandas as pd

    index = store.index_of(site)
    index = index if split is None else index[index["split"] == split]
    first = ~pd.Index(index["image"]).duplicated()
    found = index.loc[first, ["image", "patient", "split"]].reset_index(drop=True)
    if len(found) == 0:
        raise UsageError(f"has no row in split {split!r}", where=str(store.folder))
    return found.astype(str)


@torch.no_grad()
def image_activations(
    placed: Placed, store: ActivationStore, split: str | None = "test", pool: Pool = "max"
) -> tuple[Float[np.ndarray, "image latent"], Shaped[np.ndarray, " image"], Shaped[np.ndarray, " image"]]:
    """Activation of every latent on every image: the maximum over the image's tokens (or the mean).

    Args:
        placed: the dictionary; rows come from the site that it reads.
        store: the activations.
        split: train, val, test; None for all images.
        pool: how tokens become one number (the minimum is for signed activations).

    Returns:
        float32 activations `[image, latent]`, the images' names and their patients, in the order of the store.

    Raises:
        UsageError: the store lacks the site, or the split has no row.
    """
    table = image_table(store, placed.reads, split)
    rows, image = _rows_of_images(store, placed.reads, split, placed)
    out, width = None, len(table)
    for start, x in _chunks(store, placed.reads, rows):
        acts = placed.dictionary.encode(x).detach().float()
        if out is None:
            out = torch.full((width, acts.shape[1]), _START[pool])
        _pool_into(out, acts, image[start : start + len(x)], pool)
    assert out is not None
    return _finish(out, image, pool), table["image"].to_numpy(str), table["patient"].to_numpy(str)


def pooled_site(
    store: ActivationStore, site: str | Site, split: str | None = None, pool: Pool = "mean"
) -> Float[np.ndarray, "image d"]:
    """What the model itself holds of an image at a site: mean, maximum or minimum over its tokens, for probes."""
    table = image_table(store, site, split)
    rows, image = _rows_of_images(store, site, split)
    out = torch.full((len(table), store.site(site).d), _START[pool])
    for start, x in _chunks(store, site, rows):
        _pool_into(out, x, image[start : start + len(x)], pool)
    return _finish(out, image, pool)


@torch.no_grad()
def image_errors(
    placed: Placed, store: ActivationStore, split: str | None = "test"
) -> tuple[Float[np.ndarray, " image"], Float[np.ndarray, " image"], Float[np.ndarray, " image"]]:
    """Summed over each image's tokens: `||x - x_hat||^2`, `||x - mean(x)||^2` (mean of the split), number of latents.

    R2 of any weighting of images is 1 minus the ratio of the first two (mean held), L0 the third over the tokens.

    Raises UsageError for a transcoder, which does not reconstruct what it reads.
    """
    if placed.reads != placed.writes:
        raise UsageError("does not reconstruct what it reads", where=str(placed.reads), hint="see evaluate()")
    table = image_table(store, placed.reads, split)
    rows, image = _rows_of_images(store, placed.reads, split, placed)
    activations = store.site(placed.reads)
    mean = sum(chunk.double().sum(0) for chunk in activations.chunks(rows)) / len(rows)
    sums = np.zeros((3, len(table)))
    for start, x in _chunks(store, placed.reads, rows):
        acts = placed.dictionary.encode(x)
        error = (x - placed.dictionary.decode(acts)).double().square().sum(1)
        spread = (x.double() - mean).square().sum(1)
        fired = (acts > 0).double().sum(1)
        at = image[start : start + len(x)]
        for line, values in zip(sums, (error, spread, fired), strict=True):
            line += np.bincount(at, weights=values.numpy(), minlength=len(table))
    return sums[0], sums[1], sums[2]


_START = {"max": -torch.inf, "min": torch.inf, "mean": 0.0}


def _finish(
    out: Float[Tensor, "image latent"], image: Int64[np.ndarray, " row"], pool: Pool
) -> Float[np.ndarray, "image latent"]:
    values = out.numpy()
    return values / np.bincount(image)[:, None].astype(np.float32) if pool == "mean" else values


def _rows_of_images(
    store: ActivationStore, site: str | Site, split: str | None, placed: Placed | None = None
) -> tuple[Int64[np.ndarray, " row"], Int64[np.ndarray, " row"]]:
    """Rows of a split, of the token kinds that a dictionary reads, and the number of the image that each is of."""
    import pandas as pd

    rows = store.rows(site, split) if placed is None else rows_for(placed, store, split)
    codes, _ = pd.factorize(store.index_of(site)["image"].iloc[rows])
    return rows, codes.astype(np.int64)


def _chunks(store: ActivationStore, site: str | Site, rows: Int64[np.ndarray, " row"]):
    yield from zip(range(0, len(rows), CHUNK), store.site(site).chunks(rows, CHUNK), strict=True)


def _pool_into(
    out: Float[Tensor, "image latent"], acts: Float[Tensor, "row latent"], image: Int64[np.ndarray, " row"], pool: Pool
) -> None:
    """Fold rows into their images, in place. Rows of an image may come in several calls."""
    at = torch.from_numpy(image)
    match pool:
        case "max":
            out.scatter_reduce_(0, at[:, None].expand_as(acts), acts, "amax")
        case "min":
            out.scatter_reduce_(0, at[:, None].expand_as(acts), acts, "amin")
        case "mean":
            out.index_add_(0, at, acts)
        case _:
            assert_never(pool)
