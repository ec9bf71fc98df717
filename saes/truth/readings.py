"""One dictionary on a phantom: the latents of every factor, how well they find it, and what ablating them does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped

from mechinterp.activations import ActivationStore
from mechinterp.interventions import set_effects, token_mask
from mechinterp.interventions.edits import How, Tokens
from mechinterp.models import HookedVLM
from mechinterp.types import Placed, Target
from saes.metrics.images import image_activations
from saes.metrics.matching import Match, Thresholds, match
from saes.truth.cohort import BATCH, Cohort, Removal, batch_of

__all__ = ["Acts", "Overlap", "effect_of_sets", "image_acts", "matches", "overlaps", "patched"]


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


def effect_of_sets(
    model: HookedVLM,
    placed: Placed,
    cohort: Cohort,
    targets: Sequence[Target],
    sets: Sequence[Sequence[int]],
    how: How,
    tokens: Tokens,
) -> Float[np.ndarray, "set image target"]:
    """`f(x) - f(x with the set ablated)`: what the set's latents contribute; an empty set contributes 0."""
    filled = [i for i, members in enumerate(sets) if len(members)]
    out = np.zeros((len(sets), len(cohort), len(targets)))
    if filled:
        batch = batch_of(model, cohort.rendered, targets)
        found = set_effects(model, placed, batch, targets, [sets[i] for i in filled], how, tokens)
        out[filled] = -found.double().numpy()
    return out


@torch.no_grad()
def patched(
    model: HookedVLM,
    placed: Placed,
    cohort: Cohort,
    removal: Removal,
    targets: Sequence[Target],
    sets: Sequence[Sequence[int]],
    tokens: Tokens,
) -> Float[np.ndarray, "set row target"]:
    """As `effect_of_sets`, with the latents set to what they are when the factor is removed, not to 0.

    With all latents as the set this is the most that any choice of latents can do: what is missing to the true effect
    sits in the dictionary's error term, or at other tokens. The dictionary stands after a block of the vision tower.
    """
    site, out = str(placed.reads), np.zeros((len(sets), len(removal.rows), len(targets)))
    for start in range(0, len(removal.rows), BATCH):
        part = slice(start, start + BATCH)
        before = batch_of(model, cohort.rendered[removal.rows[part]], targets)
        x, y = (
            model.run_with_cache(batch, names_filter=site)[1][site]
            for batch in (before, batch_of(model, removal.rendered[part], targets))
        )
        mask = token_mask(model, placed.reads, x.shape[1], tokens)[:, None]
        change = (placed.dictionary.encode(y) - placed.dictionary.encode(x)) * mask
        clean = model.run_from(site, x, before, targets)
        for number, members in enumerate(sets):
            chosen = list(members)
            new = x + change[..., chosen] @ placed.dictionary.W_dec[chosen]
            out[number, part] = (clean - model.run_from(site, new, before, targets)).double().numpy()
    return out
