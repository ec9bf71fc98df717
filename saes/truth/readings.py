"""One dictionary on a phantom: the latents of every factor, how well they find it, and what ablating them does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor

from mechinterp.activations import ActivationStore
from mechinterp.interventions import Resample, set_effects, token_mask
from mechinterp.interventions.edits import How, Tokens, donors, edited
from mechinterp.models import HookedVLM
from mechinterp.progress import progress
from mechinterp.types import Placed, Site, Target
from saes.metrics.disentanglement import interchange
from saes.metrics.images import image_activations
from saes.metrics.matching import Match, Thresholds, match
from saes.truth.asking import generative, resumer
from saes.truth.cohort import BATCH, Cohort, batch_of

__all__ = ["Acts", "Overlap", "effect_of_sets", "image_acts", "matches", "overlaps", "site_values", "swapped"]

CHUNK = 32
"""Images that are finished at once from a site."""


@dataclass(frozen=True, eq=False)
class Acts:
    """Image-level activations (maximum over tokens) of fitting and test images, and each image's split."""

    values: Float[np.ndarray, "image latent"]
    split: Shaped[np.ndarray, " image"]

    def of(self, split: str) -> Float[np.ndarray, "some latent"]:
        """Rows of one split."""
        return self.values[self.split == split]


def image_acts(placed: Placed, fitting: ActivationStore, held_out: ActivationStore) -> Acts:
    """Activations on the train and val images of one store and the test images of another."""
    parts = [(s, image_activations(placed, fitting, s)[0]) for s in ("train", "val")]
    parts.append(("test", image_activations(placed, held_out, "test")[0]))
    return Acts(np.concatenate([a for _, a in parts]), np.concatenate([np.full(len(a), s) for s, a in parts]))


def matches(
    acts: Acts, labels: dict[str, Float[np.ndarray, " image"]], k: int = 3, thresholds: Thresholds = "val"
) -> dict[str, Match]:
    """At most `k` latents for every factor, chosen on train, thresholds from val, F1 on test (`match`)."""
    return {name: match(acts.values, y, acts.split, k=k, thresholds=thresholds) for name, y in labels.items()}


SPLIT, GENUINE, ABSORBED, FEW = 0.05, 0.1, 0.3, 10


@dataclass(frozen=True)
class Overlap:
    """How a factor's latents stand to the factor and to other factors, on test images.

    Fields:
        split: the union of the matched latents beats the best single one by more than 0.05 of F1: parts of the factor.
        merged: factors with which it shares a matched latent; both matches must beat F1 of always saying yes by 0.1.
        absorbed: factors in whose presence its latents find it less often, by 0.3 of recall or more: others take over.
    """

    split: bool
    merged: tuple[str, ...]
    absorbed: tuple[str, ...]


def overlaps(
    found: dict[str, Match],
    single: dict[str, Match],
    acts: Float[np.ndarray, "image latent"],
    has: dict[str, Bool[np.ndarray, " image"]],
) -> dict[str, Overlap]:
    """Splitting, merging and absorption, from matches with up to k latents (`found`) and with one (`single`).

    `acts` and `has` are of the test images. Absorption is looked for where 10 images or more have both factors, and
    10 the one alone.
    """
    genuine = {name for name, m in found.items() if m.f1 >= _always(has[name]) + GENUINE}
    out = {}
    for name, mine in found.items():
        others = [o for o in found if o != name]
        shared = [o for o in others if {name, o} <= genuine and set(found[o].latents) & set(mine.latents)]
        fires = mine.fires(acts)
        silent = [o for o in others if name in genuine and _lost(fires, has[name], has[o]) >= ABSORBED]
        split = len(mine.latents) > 1 and mine.f1 > single[name].f1 + SPLIT
        out[name] = Overlap(split, tuple(shared), tuple(silent))
    return out


def _always(there: Bool[np.ndarray, " image"]) -> float:
    """F1 of saying yes to every image."""
    return float(2 * there.mean() / (1 + there.mean()))


def _lost(
    fires: Bool[np.ndarray, " image"], there: Bool[np.ndarray, " image"], other: Bool[np.ndarray, " image"]
) -> float:
    """Recall where the other factor is absent minus where it is present; 0 with too few images."""
    both, alone = there & other, there & ~other
    if min(both.sum(), alone.sum()) < FEW:
        return 0.0
    return float(fires[alone].mean() - fires[both].mean())


@torch.no_grad()
def effect_of_sets(
    model: HookedVLM,
    placed: Placed,
    cohort: Cohort,
    targets: Sequence[Target],
    sets: Sequence[Sequence[int]],
    how: How,
    tokens: Tokens,
) -> Float[np.ndarray, "set image target"]:
    """`f(x) - f(x with the set ablated)`: what the set's latents contribute; an empty set contributes 0.

    A generative model is asked all targets at once (`saes.truth.asking`).
    """
    filled = [i for i, members in enumerate(sets) if len(members)]
    out = np.zeros((len(sets), len(cohort), len(targets)))
    if filled and generative(model):
        out[filled] = _asked_of_sets(model, placed, cohort, targets, [sets[i] for i in filled], how, tokens)
    elif filled:
        batch = batch_of(model, cohort.rendered, targets)
        found = set_effects(model, placed, batch, targets, [sets[i] for i in filled], how, tokens)
        out[filled] = -found.double().numpy()
    return out


def _asked_of_sets(
    model: HookedVLM,
    placed: Placed,
    cohort: Cohort,
    targets: Sequence[Target],
    sets: Sequence[Sequence[int]],
    how: How,
    tokens: Tokens,
) -> Float[np.ndarray, "set image target"]:
    x = site_values(model, placed.reads, cohort.rendered)
    resume, out = resumer(model, placed.writes, targets), np.zeros((len(sets), len(x), len(targets)))
    clean = torch.cat([resume(part) for part in x.split(CHUNK)])
    mask, donor = token_mask(model, placed.reads, x.shape[1], tokens), None
    acts = placed.dictionary.encode(x)
    if isinstance(how, Resample):
        donor = acts[donors(len(x), how.seed)]
    for number, members in enumerate(progress(sets, "effects of sets", unit="set")):
        which = torch.tensor(list(members))
        old, given = acts[..., which], None if donor is None else donor[..., which]
        delta = edited(how, old, which, mask, donor=given, rows=torch.arange(len(x))) - old
        for rows in (delta != 0).any(2).any(1).nonzero()[:, 0].split(CHUNK):
            if not len(rows):  # where nothing changes the effect is exactly 0
                continue
            after = resume(x[rows] + delta[rows] @ placed.dictionary.W_dec[which])
            out[number, rows.numpy()] = (clean[rows] - after).double().numpy()
    return out


@torch.no_grad()
def site_values(model: HookedVLM, site: Site, rendered: UInt8[np.ndarray, "n size size"]) -> Float[Tensor, "n pos d"]:
    """What passes a site of the vision tower."""
    kept: list[Tensor] = []
    with model.hooks(fwd_hooks=[(str(site), lambda value, hook: kept.append(value))]):
        for start in range(0, len(rendered), BATCH):
            model.encode_image(model.preprocess(rendered[start : start + BATCH].astype(np.float32) / 255))
    return torch.cat(kept) if kept else torch.zeros(0, 1, 1)


@torch.no_grad()
def swapped(
    model: HookedVLM,
    placed: Placed,
    targets: Sequence[Target],
    base: Float[Tensor, "pair pos d"],
    source: Float[Tensor, "pair pos d"],
    sets: Sequence[Sequence[int]],
    tokens: Tokens,
) -> Float[np.ndarray, "set pair target"]:
    """Scores after the latents of each set take, in the base, the values they have in the source (`interchange`).

    With all latents as the set this is the most that any choice of latents can do: what is missing to the source sits
    in the dictionary's error term, or at other tokens. The empty set gives the base's own scores.

    Args:
        model, placed: a dictionary after a block of the vision tower.
        targets: what is scored.
        base, source: values at the dictionary's site (`site_values`).
        sets: latents that are swapped together.
        tokens: where.
    """
    resume, out = resumer(model, placed.writes, targets), np.zeros((len(sets), len(base), len(targets)))
    mask = token_mask(model, placed.reads, base.shape[1], tokens)[:, None]
    for start in range(0, len(base), CHUNK):
        part = slice(start, start + CHUNK)
        x = base[part]
        mine = placed.dictionary.encode(x)
        theirs = torch.where(mask, placed.dictionary.encode(source[part]), mine)
        for number, members in enumerate(sets):
            value = interchange(x, mine, theirs, placed.dictionary.W_dec, members) if len(members) else x
            out[number, part] = resume(value).double().numpy()
    return out
