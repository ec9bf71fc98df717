"""Is a latent about one thing? Label entropy, and monosemanticity in both published readings, corrected for chance."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Shaped
from scipy.special import rel_entr, xlogy

from mechinterp.errors import UsageError

__all__ = [
    "chance_corrected",
    "label_divergence",
    "label_entropy",
    "label_shares",
    "mean_cosine",
    "monosemanticity",
    "monosemanticity_pairs",
    "weighted_monosemanticity",
]


# ------------------------------------------------------------------------------------------------ label entropy


def label_shares(
    acts: Float[np.ndarray, "image latent"],
    labels: Shaped[np.ndarray, "image label"],
    top: int = 100,
    least: int = 10,
) -> Float[np.ndarray, "latent label"]:
    """`p_c = sum_{i in c} z_i / sum_c sum_{i in c} z_i` over the `top` images of each latent.

    An image with several labels counts for each of them. A latent that fires on fewer than `least` images is nan.
    """
    labels = np.asarray(labels, np.float64)
    shares = np.full((acts.shape[1], labels.shape[1]), np.nan)
    for j, z in enumerate(acts.T):
        if (z > 0).sum() < least:
            continue
        best = np.argsort(-z, kind="stable")[:top]
        mass = z[best] @ labels[best]
        if mass.sum() > 0:
            shares[j] = mass / mass.sum()
    return shares


def label_entropy(
    acts: Float[np.ndarray, "image latent"],
    labels: Shaped[np.ndarray, "image label"],
    top: int = 100,
    least: int = 10,
) -> Float[np.ndarray, " latent"]:
    """`H_j = -sum_c p_c log p_c` in nats, p from `label_shares` (PatchSAE, arXiv:2412.05276).

    It is low for a latent of a common label even when the latent ignores labels: see `label_divergence`.
    """
    p = label_shares(acts, labels, top, least)
    return -xlogy(p, p).sum(1)


def label_divergence(
    acts: Float[np.ndarray, "image latent"],
    labels: Shaped[np.ndarray, "image label"],
    top: int = 100,
    least: int = 10,
) -> Float[np.ndarray, " latent"]:
    """Prior-corrected label entropy: `KL(p || prior) = sum_c p_c log(p_c / prior_c)` in nats.

    The prior is each label's share of all labels given. 0 for a latent whose images are a fair sample of them.
    """
    prior = np.asarray(labels, np.float64).sum(0)
    return rel_entr(label_shares(acts, labels, top, least), prior / prior.sum()).sum(1)


# ---------------------------------------------------------------------------------------------- monosemanticity


def mean_cosine(embeddings: Float[np.ndarray, "image e"]) -> float:
    """`mu_0`: mean cosine of two different images, which a latent that ignores the images has too."""
    unit = _unit(embeddings)
    n = len(unit)
    return float((np.square(unit.sum(0)).sum() - n) / (n * (n - 1)))


def monosemanticity(
    acts: Float[np.ndarray, "image latent"], embeddings: Float[np.ndarray, "image e"]
) -> Float[np.ndarray, " latent"]:
    """MS as the authors' code has it: `sum_{n<m} a_n a_m s_nm / sum_{n<m} a_n a_m` (Pach et al., arXiv:2504.02821).

    `a` is the activation scaled to [0, 1] over the images (min-max), `s` the cosine in an *external* encoder, never
    the one under study. O(N D) for a latent: `(||sum a e||^2 - sum a^2) / ((sum a)^2 - sum a^2)` with unit `e`.

    nan for a latent that does not vary, or that is above its minimum on a single image.
    """
    return weighted_monosemanticity(acts, embeddings, np.ones((1, len(acts))))[0]


def monosemanticity_pairs(
    acts: Float[np.ndarray, "image latent"], embeddings: Float[np.ndarray, "image e"]
) -> Float[np.ndarray, " latent"]:
    """MS read with equation 9's fixed number of pairs: `sum_{n != m} a_n a_m s_nm / (N (N - 1))`.

    Rewards a latent for firing often, whatever on. nan for a latent that does not vary.
    """
    a, unit = _scaled(acts), _unit(embeddings)
    n = len(unit)
    return (np.square(a.T @ unit).sum(1) - np.square(a).sum(0)) / (n * (n - 1))


def chance_corrected(score: Float[np.ndarray, " latent"], chance: float) -> Float[np.ndarray, " latent"]:
    """`(score - chance) / (1 - chance)`: 0 at chance, 1 at the best; for MS, chance is `mean_cosine`."""
    return (score - chance) / (1 - chance)


def weighted_monosemanticity(
    acts: Float[np.ndarray, "image latent"],
    embeddings: Float[np.ndarray, "image e"],
    weights: Float[np.ndarray, "draw image"],
) -> Float[np.ndarray, "draw latent"]:
    """`monosemanticity` with image weights, for a bootstrap; copies of one image make no pair with one another."""
    a, unit = _scaled(acts), _unit(embeddings)
    out = np.full((len(weights), a.shape[1]), np.nan)
    for draw, w in enumerate(np.asarray(weights, np.float64)):
        wa = a * w[:, None]
        own = np.square(wa).sum(0)
        pairs = np.square(wa.sum(0)) - own
        agreement = np.square(wa.T @ unit).sum(1) - own
        np.divide(agreement, pairs, out=out[draw], where=pairs > 1e-9 * np.maximum(own, 1e-30))
    return out


def _scaled(acts: Float[np.ndarray, "image latent"]) -> Float[np.ndarray, "image latent"]:
    """Min-max scaled columns in float64; a constant column is nan."""
    acts = np.asarray(acts, np.float64)
    low, high = acts.min(0), acts.max(0)
    reach = np.where(high > low, high - low, np.nan)
    return (acts - low) / reach


def _unit(embeddings: Float[np.ndarray, "image e"]) -> Float[np.ndarray, "image e"]:
    """Rows of unit length in float64. Raises UsageError for fewer than two rows or a zero row."""
    embeddings = np.asarray(embeddings, np.float64)
    norm = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if len(embeddings) < 2 or not (norm > 0).all():
        raise UsageError("needs at least two embeddings, none of them zero", where="embeddings")
    return embeddings / norm
