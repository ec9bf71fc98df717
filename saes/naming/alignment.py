"""Which words a feature moves the model towards, by its own text tower.

The feature is removed from images in which it fires, the rest of the vision tower runs, and the change of the image
embedding is read against pairs of prompts: A[j, phrase] = mean over those images of score(as it is) - score(without j),
where score is the scaled cosine with "a chest x-ray with X" minus that with "a chest x-ray without X".

Why removal and not the decoder direction itself: a direction in the middle of the tower has no place in the embedding
space before the blocks after it have acted, and what they do to it depends on the image. Removal at the tokens where
the feature fires, in images where it fires, stays on the data; adding a direction where it never fires does not.
(Pushing decoder directions through the last projection alone, as in Discover-then-Name, arXiv:2407.14499, is right
only for dictionaries of the embedding itself; there the two agree to first order.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from mechinterp.interventions import Tokens, effects
from mechinterp.models import HookedVLM
from mechinterp.types import ImageTextBatch, Placed, Target

__all__ = ["alignment", "standardised"]

LEAST_IMAGES = 3


def alignment(
    model: HookedVLM,
    placed: Placed,
    batch: ImageTextBatch,
    targets: Sequence[Target],
    features: Sequence[int],
    tokens: Tokens = "all",
) -> Float[np.ndarray, "feature target"]:
    """A of the module text, in standard deviations of each score over `batch`; nan where a feature fires too rarely."""
    swept = effects(model, placed, batch, targets, features, tokens=tokens)
    fired = swept.n_images().double().cpu().numpy()
    total = -swept.mean().double().cpu().numpy() * len(batch)
    spread = swept.clean.double().std(0).cpu().numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / fired[:, None] / spread
    mean[fired < LEAST_IMAGES] = np.nan
    return mean


def standardised(aligned: Float[np.ndarray, "feature target"]) -> Float[np.ndarray, "feature target"]:
    """Each phrase's column centred at its median over features and divided by its robust spread (1.4826 MAD).

    Removing any feature moves all scores of the kind "with X against without X" a little in the same direction; what
    names a feature is the phrase that it moves more than other features do.
    """
    centre = np.nanmedian(aligned, axis=0)
    spread = 1.4826 * np.nanmedian(np.abs(aligned - centre), axis=0)
    return (aligned - centre) / np.where(spread > 0, spread, 1.0)
