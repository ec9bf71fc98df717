"""One pass over the images: how strongly, and where, every feature fires; the model's scores; two untrained twins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor

from mechinterp.data import ImageData
from mechinterp.errors import NonFiniteError
from mechinterp.interventions import Tokens, token_mask
from mechinterp.models import HookedVLM
from mechinterp.models.prompts import image_mask
from mechinterp.progress import progress
from mechinterp.types import ImageTextBatch, Placed, Site, Target
from saes.dictionary import SparseDictionary
from saes.naming.twin import random_twin

__all__ = ["Observed", "batch_of", "choose_rows", "observe", "patch_positions"]

BATCH = 64
MOST_IMAGES = 3000


@dataclass(frozen=True, eq=False)
class Observed:
    """What the model and a dictionary made of n images.

    Fields (f features, P patches):
        rows: rows of the data folder. test: True for images of test patients. patients: patient of each image.
        strongest: activation of each feature in each image, the largest over the chosen tokens.
        closest: the largest pre-activation over patches, and `closest_at` the patch; None where the dictionary does not
            tell pre-activations.
        patches: activation `[n * P, f]` at every patch, sparse; None where the site has no place in the image.
        twins: `strongest` of two untrained twins.
        scores: `[n, target]` of every target asked for.
        grid: rows and columns of patches.
    """

    rows: Int[np.ndarray, " n"]
    test: Bool[np.ndarray, " n"]
    patients: np.ndarray
    strongest: Float[np.ndarray, "n f"]
    closest: Float[np.ndarray, "n f"] | None
    closest_at: Int[np.ndarray, "n f"] | None
    patches: Any
    twins: tuple[Float[np.ndarray, "n f"], Float[np.ndarray, "n f"]]
    scores: Float[np.ndarray, "n target"]
    grid: tuple[int, int]

    def heat(self, feature: int, images: Sequence[int]) -> Float[np.ndarray, "image rows columns"]:
        """Activation of one feature at each patch of some of the n images; zeros where it has no place."""
        size = self.grid[0] * self.grid[1]
        if self.patches is None:
            return np.zeros((len(images), *self.grid), dtype=np.float32)
        column = self.patches[:, [feature]].toarray().reshape(-1, size)
        return column[list(images)].reshape(len(images), *self.grid)


def choose_rows(data: ImageData, seed: int, most: int = MOST_IMAGES) -> Int[np.ndarray, " n"]:
    """All rows, or those of as many whole patients, drawn at random, as make up at most `most` images."""
    patients = np.asarray(data.patients)
    if len(data) <= most:
        return np.arange(len(data))
    names = np.unique(patients)
    place = dict(zip(names, np.random.default_rng(seed).permutation(len(names)), strict=True))
    rank = np.array([place[patient] for patient in patients])
    order = np.argsort(rank, kind="stable")
    last = rank[order[most]]  # the patient who no longer fits whole
    return np.flatnonzero(rank < last)


def batch_of(
    model: HookedVLM, data: ImageData, rows: Sequence[int] | np.ndarray, target: Target | None
) -> ImageTextBatch:
    """Images of `data` as a batch, with the target's question where the model asks one."""
    pixels = data.pixels(np.asarray(rows))
    ids = [data.images[int(row)] for row in rows]
    return model.preprocess(pixels, ids=ids) if target is None else model.prepare(pixels, [target], ids=ids)


@torch.no_grad()
def observe(
    model: HookedVLM,
    data: ImageData,
    placed: Placed,
    rows: Int[np.ndarray, " n"],
    targets: Sequence[Target],
    tokens: Tokens = "all",
    seed: int = 0,
) -> Observed:
    """Run the model once over the images `rows`; see `Observed`.

    Args:
        targets: what is scored; may be empty (a model without text or classes). A generative model takes one.
        tokens: where the dictionary is read: "all", "patch", "cls" or positions.

    Raises NonFiniteError naming the images.
    """
    twins: tuple[SparseDictionary, SparseDictionary] | None = None
    grid = model.grid_shape
    size = grid[0] * grid[1]
    parts: dict[str, list[Any]] = {
        name: [] for name in ("strongest", "scores", "closest", "at", "patches", "twin", "decoy")
    }
    for start in progress(range(0, len(rows), BATCH), "features", unit="batch"):
        batch = batch_of(model, data, rows[start : start + BATCH], targets[0] if targets else None)
        value, scores = _run(model, placed.reads, batch, targets)
        mask = token_mask(model, placed.reads, value.shape[1], tokens).to(value.device)
        value = value.to(placed.dictionary.W_enc.dtype)
        if twins is None:
            seen = value[:, mask].flatten(0, 1)
            twins = (
                random_twin(placed.dictionary, seen, 2 * seed + 1),
                random_twin(placed.dictionary, seen, 2 * seed + 2),
            )
        acts = placed.dictionary.encode(value).float() * mask[None, :, None]
        parts["strongest"].append(_finite(acts.amax(1), batch, str(placed.reads)))
        parts["scores"].append(_finite(scores, batch, "score"))
        for name, twin in zip(("twin", "decoy"), twins, strict=True):
            parts[name].append((twin.encode(value.cpu()) * mask[None, :, None].cpu()).amax(1).numpy())
        where = patch_positions(model, placed.reads, value.shape[1], batch)
        if where is None or not bool(mask[where].all()):
            continue
        parts["patches"].append(sparse.csr_matrix(acts[:, where].flatten(0, 1).cpu().numpy()))
        before = getattr(placed.dictionary, "pre_activations", None)
        if before is not None:
            best, at = before(value[:, where]).float().max(1)
            parts["closest"].append(best.cpu().numpy())
            parts["at"].append(at.cpu().numpy().astype(np.int32))
    joined = {name: np.concatenate(v) if v and name != "patches" else None for name, v in parts.items()}
    assert joined["strongest"] is not None and joined["scores"] is not None
    assert joined["twin"] is not None and joined["decoy"] is not None
    patches: Any = sparse.vstack(parts["patches"]).tocsc() if parts["patches"] else None
    assert patches is None or patches.shape[0] == len(rows) * size
    return Observed(
        rows=rows,
        test=np.asarray(data.split[rows] == "test"),
        patients=np.asarray(data.patients)[rows],
        strongest=joined["strongest"],
        closest=joined["closest"],
        closest_at=joined["at"],
        patches=patches,
        twins=(joined["twin"], joined["decoy"]),
        scores=joined["scores"].astype(np.float64),
        grid=grid,
    )


def patch_positions(model: HookedVLM, site: Site, n_tokens: int, batch: ImageTextBatch) -> Int[Tensor, " patch"] | None:
    """Which tokens at `site` are the image's patches, in the grid's order; None where that cannot be said."""
    size = model.grid_shape[0] * model.grid_shape[1]
    found = torch.arange(n_tokens)
    if site.tower == "vision":
        found = found[model.patch_tokens()]
    elif site.tower == "text":
        if batch.input_ids is None or model.family not in ("llava", "gemma3"):
            return None
        found = image_mask(model.hf, batch.input_ids[:1])[0].nonzero()[:, 0].cpu()
    elif n_tokens == size + 1:  # a projector that keeps the class token
        found = found[1:]
    return found if len(found) == size else None


def _run(
    model: HookedVLM, reads: Site, batch: ImageTextBatch, targets: Sequence[Target]
) -> tuple[Float[Tensor, "batch token d"], Float[Tensor, "batch target"]]:
    """The value at a site and the scores, in one forward pass."""
    seen: list[Tensor] = []
    with model.hooks(fwd_hooks=[(str(reads), lambda value, hook: seen.append(value))]):
        if targets:
            scores = model.score(batch, targets)
        else:
            model.encode_image(batch)
            scores = torch.zeros(len(batch), 0)
    return (seen[0] if seen[0].ndim == 3 else seen[0][:, None]), scores


def _finite(value: Tensor, batch: ImageTextBatch, where: str) -> np.ndarray:
    array = value.float().cpu().numpy()
    bad = ~np.isfinite(array.reshape(len(array), -1)).all(1)
    if bad.any():
        raise NonFiniteError("is not finite", images=[batch.ids[i] for i in np.flatnonzero(bad)], where=where)
    return array
