"""What is measured of each feature beside its name: when it fires and for whom, what it does, whether it recurs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from mechinterp.data import Attribute, ImageData
from mechinterp.errors import UsageError
from mechinterp.interventions import Tokens, effects
from mechinterp.models import HookedVLM
from mechinterp.types import Placed, Target
from saes.gallery.observe import Observed, batch_of
from saes.stability import SAME, seed_stability

__all__ = ["Push", "pushes", "sample", "stability", "subgroup_rates"]


@dataclass(frozen=True, eq=False)
class Push:
    """What features do to the score of the target: score as it is minus score without the feature, in its sd.

    Fields:
        images: the sampled test images. sd: of the score over them.
        mean: over all sampled images, 0 where the feature is silent.
        active: over those in which it fires (nan where there is none).
        size: mean absolute value over all.
    """

    images: int
    sd: float
    mean: Float[np.ndarray, " f"]
    active: Float[np.ndarray, " f"]
    size: Float[np.ndarray, " f"]


def sample(observed: Observed, among: Bool[np.ndarray, " n"], most: int, seed: int) -> Int[np.ndarray, " k"]:
    """At most `most` images, whole patients at random."""
    chosen = np.flatnonzero(among)
    if len(chosen) <= most:
        return chosen
    names = np.unique(observed.patients[chosen])
    place = dict(zip(names, np.random.default_rng(seed).permutation(len(names)), strict=True))
    rank = np.array([place[patient] for patient in observed.patients[chosen]])
    return np.sort(chosen[np.argsort(rank, kind="stable")[:most]])


def pushes(
    model: HookedVLM,
    data: ImageData,
    placed: Placed,
    target: Target,
    observed: Observed,
    images: Int[np.ndarray, " k"],
    features: Sequence[int],
    tokens: Tokens,
) -> Push:
    """Remove each feature, one at a time, from the sampled images; features not asked for stay nan."""
    width = observed.strongest.shape[1]
    swept = effects(
        model, placed, batch_of(model, data, observed.rows[images], target), [target], features, tokens=tokens
    )
    sd = float(swept.clean[:, 0].double().std())
    unit = sd if sd > 0 else float("nan")
    fired = swept.n_images().numpy()
    mean, active, size = (np.full(width, np.nan) for _ in range(3))
    picked = np.asarray(features)
    mean[picked] = -swept.mean()[:, 0].double().cpu().numpy() / unit
    size[picked] = swept.mean_abs()[:, 0].double().cpu().numpy() / unit
    with np.errstate(invalid="ignore", divide="ignore"):
        active[picked] = np.where(fired > 0, mean[picked] * len(images) / fired, np.nan)
    return Push(len(images), sd, mean, active, size)


def subgroup_rates(
    fires: Bool[np.ndarray, "n f"], attributes: Sequence[Attribute], rows: Int[np.ndarray, " n"]
) -> dict[str, tuple[Float[np.ndarray, " f"], Float[np.ndarray, " f"]]]:
    """For each attribute, the share of images with it, and without it, in which each feature fires."""
    rates = {}
    for attribute in attributes:
        values = attribute.values[rows]
        rates[attribute.name] = tuple(
            fires[values == v].mean(0) if (values == v).any() else np.full(fires.shape[1], np.nan) for v in (1, 0)
        )
    return rates


def stability(placed: Placed, others: Sequence[Placed]) -> Float[np.ndarray, " f"] | None:
    """In what share of other seeds' dictionaries a feature comes back: a decoder direction of cosine 0.7 or more.

    The line is that of Paulo and Belrose 2025 (arXiv:2501.16615). Without other dictionaries, what was kept with this
    one (`saes.stability`); None where nothing was.
    Raises UsageError for one of another site.
    """
    if not others:
        return seed_stability(placed.dictionary)
    mine = placed.dictionary.W_dec.detach().double()
    mine = mine / mine.norm(dim=1, keepdim=True).clamp(min=1e-12)
    found = np.zeros(len(mine))
    for other in others:
        if other.writes != placed.writes or other.dictionary.W_dec.shape[1] != mine.shape[1]:
            raise UsageError(f"stands at {other.writes}", where="others", hint=f"give dictionaries at {placed.writes}")
        theirs = other.dictionary.W_dec.detach().double()
        theirs = theirs / theirs.norm(dim=1, keepdim=True).clamp(min=1e-12)
        found += ((mine @ theirs.T).amax(1) >= SAME).cpu().numpy()
    return found / len(others)
