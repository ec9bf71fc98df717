"""Does a child's latent swallow its parent's? Absorption as SAEBench measures it, and exactly where truth is known.

A general concept's latent may stay silent where a more specific one fires, which then carries both (Chanin et al.,
arXiv:2409.14507). Splitting: one concept needs several latents. Merging: one latent is the best for several concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from saes.metrics.alignment import f_score
from saes.metrics.matching import fbmp

__all__ = ["ExactAbsorption", "ProbeAbsorption", "absorption", "exact_absorption", "merging_rate", "splitting_rate"]

SILENT = 1e-8


@dataclass(frozen=True)
class ProbeAbsorption:
    """Rows of one concept: `full` is whether one latent replaces the silent main ones, `fraction` how much."""

    full: Bool[Tensor, " row"]
    fraction: Float[Tensor, " row"]

    @property
    def full_rate(self) -> float:
        """Mean of `full`; nan without rows."""
        return self.full.double().mean().item()

    @property
    def mean_fraction(self) -> float:
        """Mean of `fraction`; nan without rows."""
        return self.fraction.double().mean().item()


@torch.no_grad()
def absorption(
    x: Float[Tensor, "row d"],
    acts: Float[Tensor, "row latent"],
    W_dec: Float[Tensor, "latent d"],
    probe: Float[Tensor, " d"],
    main: Sequence[int],
    *,
    least_cosine_full: float = 0.025,
    least_cosine: float = 0.1,
    least_share: float = 0.4,
    absorbers: int = 3,
) -> ProbeAbsorption:
    """SAEBench's absorption (arXiv:2503.09532; `feature_absorption_calculator.py` of sae-bench 0.6.0).

    With the unit probe p, `proj_j = z_j cos(D_j, p)`:

    - full: every main latent is silent, `x . p >= 0`, the latent with the largest projection has cos >= 0.025 and
      its projection is at least 0.4 of `x . p`.
    - fraction: A is the sum of the `absorbers` largest projections of other latents with cos >= 0.1 and projection
      above 0, M that of the main latents. 0 if `A / (x . p) < 0.4` or `M >= x . p`; 1 if M <= 0; else
      `B / (B + M)` with `B = min(A, x . p - M)`.

    Args:
        x: rows on which the concept is there.
        acts: their latents.
        W_dec: decoder rows.
        probe: direction that reads the concept in x; scaled to unit length here.
        main: latents of the concept, from a k-sparse probe on other rows.
    """
    probe = probe / probe.norm()
    cosine = torch.nn.functional.cosine_similarity(probe, W_dec, dim=-1)
    there, proj = x @ probe, acts * cosine
    mine = torch.zeros(len(cosine), dtype=torch.bool)
    mine[list(main)] = True
    kept = proj[:, mine].sum(1)
    others = torch.where((~mine & (cosine >= least_cosine)) & (proj > 0), proj, torch.zeros_like(proj))
    taken = others.topk(min(absorbers, proj.shape[1]), dim=1).values.sum(1)
    moved = torch.minimum(taken, there - kept)
    fraction = torch.where(kept <= 0, torch.ones_like(kept), (moved / (moved + kept)).clamp(0, 1))
    fraction = torch.where((kept >= there) | (taken / there < least_share), torch.zeros_like(kept), fraction)
    best, top = proj.max(1)
    full = (acts[:, mine] < SILENT).all(1) & (cosine[top] >= least_cosine_full) & (there >= 0)
    return ProbeAbsorption(full & (best / there >= least_share), fraction)


@dataclass(frozen=True)
class ExactAbsorption:
    """Absorption of a parent concept by one child, from true labels; no probe.

    `rate` is the share of images with the child on which the parent's latents are silent while the child's fire,
    `recall_with` and `recall_without` the parent latents' recall on images of the parent with and without the child.
    """

    rate: float
    recall_with: float
    recall_without: float

    @property
    def gap(self) -> float:
        """`recall_without - recall_with`: what the child costs. A latent that is weak everywhere has none."""
        return self.recall_without - self.recall_with


def exact_absorption(
    parent_fires: Bool[np.ndarray, " image"],
    child_fires: Bool[np.ndarray, " image"],
    parent: Shaped[np.ndarray, " image"],
    child: Shaped[np.ndarray, " image"],
) -> ExactAbsorption:
    """Absorption with known truth (the definition of arXiv:2409.14507 with labels in the place of probes).

    Args:
        parent_fires: whether any latent of the parent concept fires (`Match.fires`).
        child_fires: whether any latent of the child fires.
        parent: truth; the child implies it (images with the child and without the parent are left out).
        child: truth.
    """
    has, special = np.asarray(parent) > 0.5, np.asarray(child) > 0.5
    both, plain = has & special, has & ~special
    rate = float((~parent_fires & child_fires)[both].mean()) if both.any() else float("nan")
    with_it = float(parent_fires[both].mean()) if both.any() else float("nan")
    return ExactAbsorption(rate, with_it, float(parent_fires[plain].mean()) if plain.any() else float("nan"))


def splitting_rate(
    fires: Bool[np.ndarray, "image latent"], labels: Shaped[np.ndarray, "image concept"], k: int = 3, gain: float = 0.03
) -> tuple[float, tuple[int, ...]]:
    """Share of the concepts that need several latents, and how many each needs.

    A concept is split when the union of two or more latents (`fbmp`) has an F1 at least `gain` above the best single
    one; 0.03 is SAEBench's threshold of feature splitting. The number is the smallest after which F1 no longer
    rises by `gain`.
    """
    needed = []
    for column in np.asarray(labels).T:
        known = np.isfinite(np.asarray(column, np.float64))
        chosen = fbmp(fires[known], column[known], k)
        on, y = fires[known], column[known]
        scores = [f_score(np.any(on[:, list(chosen[:n])], axis=1), y) for n in range(1, len(chosen) + 1)]
        count = min(len(scores), 1)
        while count and count < len(scores) and scores[count] - scores[count - 1] >= gain:
            count += 1
        needed.append(count)
    return float(np.mean([n > 1 for n in needed])), tuple(needed)


def merging_rate(best: Sequence[int | None]) -> tuple[float, tuple[tuple[int, ...], ...]]:
    """Share of the matched concepts whose best latent is also the best of another, and those groups of concepts.

    Args:
        best: the best latent of every concept; None for a concept without one (not counted).
    """
    owners: dict[int, list[int]] = {}
    for concept, latent in enumerate(best):
        if latent is not None:
            owners.setdefault(int(latent), []).append(concept)
    groups = tuple(tuple(group) for group in owners.values() if len(group) > 1)
    matched = sum(len(group) for group in owners.values())
    return (sum(map(len, groups)) / matched if matched else float("nan")), groups
