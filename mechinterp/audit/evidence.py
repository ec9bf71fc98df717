"""One pass over the data: scores, embeddings, and how strongly every feature fires in every image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.data import ImageData
from mechinterp.errors import DataError, NonFiniteError
from mechinterp.interventions import Activity
from mechinterp.interventions.edits import Tokens
from mechinterp.interventions.tokens import token_mask
from mechinterp.models import HookedVLM
from mechinterp.progress import progress
from mechinterp.types import ImageTextBatch, Placed, Target

__all__ = ["Evidence", "activations", "collect", "prepare"]

BATCH = 64


@dataclass(frozen=True)
class Evidence:
    """What the model made of every image that has a label for the target.

    Fields (n images, f features):
        rows: their rows in the data folder.
        labels: 1 or 0.
        score: the model's score; `sd` is its standard deviation over the test images.
        embedding: pooled image embedding `[n, d]`.
        strongest, average: activation of each feature `[n, f]`, largest and mean over the tokens.
        test: True for images of test patients; the rest (train and val) choose features and fit probes.
        patients: patient of each image.
        activity: how often and how strongly each feature fires over all these images, for matching random sets.
    """

    rows: Int[np.ndarray, " n"]
    labels: Float[np.ndarray, " n"]
    score: Float[np.ndarray, " n"]
    embedding: Float[np.ndarray, "n d"]
    strongest: Float[np.ndarray, "n f"]
    average: Float[np.ndarray, "n f"]
    test: Bool[np.ndarray, " n"]
    patients: np.ndarray
    activity: Activity

    @property
    def sd(self) -> float:
        """Standard deviation of the score over the test images: the unit of every effect."""
        return float(self.score[self.test].std())


def prepare(model: HookedVLM, data: ImageData, rows: Sequence[int] | np.ndarray, target: Target) -> ImageTextBatch:
    """Images of `data` as a batch that the model can score."""
    pixels = data.pixels(np.asarray(rows))
    return model.prepare(pixels, [target], ids=[data.images[int(row)] for row in rows])


@torch.no_grad()
def activations(
    model: HookedVLM, placed: Placed, tokens: Tokens, batch: ImageTextBatch, targets: Sequence[Target]
) -> tuple[Float[Tensor, "batch token f"], Float[Tensor, "batch target"]]:
    """Feature activations at the chosen tokens (zero elsewhere) and scores of a batch, in one forward pass."""
    seen: list[Tensor] = []
    with model.hooks(fwd_hooks=[(str(placed.reads), lambda value, hook: seen.append(value))]):
        scores = model.score(batch, targets)
    value = seen[0] if seen[0].ndim == 3 else seen[0][:, None]
    acts = placed.dictionary.encode(value.to(placed.dictionary.W_enc.dtype)).float()
    mask = token_mask(model, placed.reads, acts.shape[1], tokens)
    return acts * mask[None, :, None].to(acts.device), scores


def collect(model: HookedVLM, data: ImageData, target: Target, placed: Placed, tokens: Tokens) -> Evidence:
    """Run the model once over every labelled image. Raises NonFiniteError naming images, DataError without labels."""
    labels = data.labels(target.name)
    rows = np.flatnonzero(np.isfinite(labels))
    if len(rows) == 0:
        raise DataError(f"no image has a label for {target.name!r}", where=data.name, hint="see dataset.json, targets")
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("score", "embedding", "strongest", "average", "fired")}
    for start in progress(range(0, len(rows), BATCH), "score images", unit="batch"):
        batch = prepare(model, data, rows[start : start + BATCH], target)
        acts, scores = activations(model, placed, tokens, batch, [target])
        with torch.no_grad():
            embedding = model.encode_image(batch)
        parts["score"].append(_finite(scores[:, 0], batch, "score"))
        parts["embedding"].append(_finite(embedding, batch, "image embedding"))
        parts["strongest"].append(_finite(acts.amax(1), batch, str(placed.reads)))
        parts["average"].append(acts.mean(1).cpu().numpy())
        parts["fired"].append((acts > 0).float().mean(1).cpu().numpy())
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    return Evidence(
        rows=rows,
        labels=labels[rows],
        test=np.asarray(data.split[rows] == "test"),
        patients=np.asarray(data.patients)[rows],
        score=joined["score"].astype(np.float64),
        embedding=joined["embedding"],
        strongest=joined["strongest"],
        average=joined["average"],
        activity=_activity(joined["average"], joined["fired"], placed),
    )


def _activity(average: Float[np.ndarray, "n f"], fired: Float[np.ndarray, "n f"], placed: Placed) -> Activity:
    """`mechinterp.interventions.activity` from numbers already at hand: no second pass."""
    share = fired.mean(0)
    mean_active = np.divide(average.mean(0), share, out=np.zeros_like(share), where=share > 0)
    return Activity(
        frequency=torch.from_numpy((fired > 0).mean(0).astype(np.float32)),
        mean=torch.from_numpy(average.mean(0)),
        mean_active=torch.from_numpy(mean_active),
        decoder_norm=placed.dictionary.W_dec.detach().float().norm(dim=1).cpu(),
    )


def _finite(value: Tensor, batch: ImageTextBatch, where: str) -> np.ndarray:
    array = value.float().cpu().numpy()
    bad = ~np.isfinite(array.reshape(len(array), -1)).all(1)
    if bad.any():
        raise NonFiniteError("is not finite", images=[batch.ids[i] for i in np.flatnonzero(bad)], where=where)
    return array
