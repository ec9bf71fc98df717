"""Do decoder directions recover true directions, or those of another seed? MCC with its floor, stability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import UsageError

__all__ = [
    "Reappearance",
    "Recovery",
    "Stability",
    "mcc",
    "mcc_floor",
    "reappearance",
    "recovery",
    "stability",
    "uniqueness",
]


def mcc(directions: Float[Tensor, "latent d"], truth: Float[Tensor, "feature d"]) -> float:
    """`mean |cos(D_pi(i), g_i)|` over the best one-to-one matching (Hungarian), as many as the smaller set has.

    arXiv:2505.20254; `sae_lens.synthetic.mean_correlation_coefficient`. It is far above 0 for random
    directions: see `mcc_floor`.
    """
    cosine = _cosines(directions, truth).abs()
    rows, columns = _matched(cosine)
    return cosine[rows, columns].mean().item()


def mcc_floor(latents: int, features: int, d: int, draws: int = 3, seed: int = 0) -> float:
    """MCC of random unit directions of the same numbers and width: 0.64 to 0.76 at d = 16, 0.10 to 0.13 at d = 768."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [(torch.randn(latents, d, generator=generator), torch.randn(features, d, generator=generator))]
    pairs += [
        (torch.randn(latents, d, generator=generator), torch.randn(features, d, generator=generator))
        for _ in range(draws - 1)
    ]
    return sum(mcc(a, b) for a, b in pairs) / draws


def uniqueness(directions: Float[Tensor, "latent d"], truth: Float[Tensor, "feature d"]) -> float:
    """Number of different true directions that are some latent's nearest, over the number of latents (sae-lens)."""
    return len(_cosines(directions, truth).abs().argmax(1).unique()) / len(directions)


@dataclass(frozen=True)
class Recovery:
    """`corrected = (mcc - floor) / (1 - floor)`; recall, split and merge rates at stated cosines."""

    mcc: float
    floor: float
    corrected: float
    recall: float
    split: float
    merge: float


def recovery(
    directions: Float[Tensor, "latent d"],
    truth: Float[Tensor, "feature d"],
    found: float = 0.9,
    mixed: float = 0.6,
    seed: int = 0,
) -> Recovery:
    """Recovery of true directions by decoder rows.

    Args:
        directions: decoder rows; rows of zero are left out.
        truth: true directions, close to orthogonal (else "merge" means little).
        found: a true direction is recalled when a latent has |cos| of at least this, split when two or more have.
        mixed: a latent merges when two or more true directions have at least this |cos| with it (the even mix of two
            orthogonal directions has 0.71 with each); the rate is among the latents that have one.
        seed: of the floor.
    """
    directions = directions[directions.norm(dim=-1) > 0]
    cosine = _cosines(directions, truth).abs()
    value = mcc(directions, truth)
    floor = mcc_floor(len(directions), len(truth), truth.shape[1], seed=seed)
    count, mixture = (cosine >= found).sum(0), (cosine >= mixed).sum(1)
    recalled, related = count >= 1, mixture >= 1
    return Recovery(
        mcc=value,
        floor=floor,
        corrected=(value - floor) / (1 - floor),
        recall=recalled.double().mean().item(),
        split=(count[recalled] >= 2).double().mean().item(),
        merge=(mixture[related] >= 2).double().mean().item(),
    )


@dataclass(frozen=True)
class Stability:
    """Two seeds: mean cosine of matched latents, and the share of them that is at least `threshold`."""

    mean_cosine: float
    shared: float
    per_latent: Float[Tensor, " latent"]


def stability(first: Float[Tensor, "latent d"], second: Float[Tensor, "other d"], threshold: float = 0.7) -> Stability:
    """Cosine of decoder rows under the best one-to-one matching (Paulo and Belrose, arXiv:2501.16615).

    Signed: a decoder row and its negative are different features. Unmatched latents of a wider `first` get nan and
    are left out.
    """
    cosine = _cosines(first, second)
    rows, columns = _matched(cosine)
    matched = torch.full((len(first),), torch.nan, dtype=torch.float64)
    matched[rows] = cosine[rows, columns]
    kept = matched[matched.isfinite()]
    return Stability(kept.mean().item(), (kept >= threshold).double().mean().item(), matched)


@dataclass(frozen=True)
class Reappearance:
    """For each latent of each seed, the share of the other seeds that have it (`per_seed[s][latent]`)."""

    per_seed: tuple[Float[Tensor, " _"], ...]
    threshold: float

    @property
    def mean(self) -> float:
        """Mean over all latents of all seeds."""
        return torch.cat(self.per_seed).mean().item()

    @property
    def always(self) -> float:
        """Share of all latents that every seed has."""
        return (torch.cat(self.per_seed) > 1 - 1e-9).double().mean().item()


def reappearance(decoders: Sequence[Float[Tensor, "_ d"]], threshold: float = 0.7) -> Reappearance:
    """Probability that a latent comes back with another seed: some decoder row there has cosine >= `threshold`.

    (arXiv:2606.12138.) Compare with an untrained dictionary of the same width: chance grows with width and
    falls with d. Raises UsageError for fewer than three seeds, from which no probability can be told.
    """
    if len(decoders) < 3:
        raise UsageError(f"{len(decoders)} seeds", where="decoders", hint="train at least three")
    found = []
    for i, mine in enumerate(decoders):
        others = [other for k, other in enumerate(decoders) if k != i]
        hits = torch.stack([_cosines(mine, other).max(1).values >= threshold for other in others])
        found.append(hits.double().mean(0))
    return Reappearance(tuple(found), threshold)


def _cosines(a: Float[Tensor, "row d"], b: Float[Tensor, "column d"]) -> Float[Tensor, "row column"]:
    """Cosines in float64; those of a zero row are 0."""
    a, b = a.detach().double(), b.detach().double()
    return torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).T


def _matched(cosine: Float[Tensor, "row column"]) -> tuple[Tensor, Tensor]:
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cosine.numpy(), maximize=True)
    return torch.from_numpy(rows), torch.from_numpy(columns)
