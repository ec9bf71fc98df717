"""How active each feature is, and random sets of features that are as active as a given set.

An effect of a feature set means little until sets that fire as often and write as strongly, but were picked at
random, have been ablated too (the null of every ablation claim here).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import NonFiniteError, UsageError
from mechinterp.interventions.edits import Tokens
from mechinterp.interventions.tokens import token_mask
from mechinterp.models import HookedVLM
from mechinterp.progress import progress
from mechinterp.types import ImageTextBatch, Placed

__all__ = ["Activity", "activity", "matched_random_sets"]


@dataclass(frozen=True)
class Activity:
    """How often and how strongly each feature of a dictionary fires over a set of images.

    Fields:
        frequency: fraction of images in which the feature fires at any chosen token.
        mean: mean activation over all chosen tokens of all images, zeros included (the values of mean ablation).
        mean_active: mean activation over the tokens where it fires; 0 for a feature that never fires.
        decoder_norm: Euclidean norm of its row of `W_dec`.
    """

    frequency: Float[Tensor, " d_sae"]
    mean: Float[Tensor, " d_sae"]
    mean_active: Float[Tensor, " d_sae"]
    decoder_norm: Float[Tensor, " d_sae"]

    @property
    def strength(self) -> Float[Tensor, " d_sae"]:
        """Mean size of what the feature writes where it fires: mean activation times decoder norm."""
        return self.mean_active * self.decoder_norm


@torch.no_grad()
def activity(
    model: HookedVLM, placed: Placed, batch: ImageTextBatch, tokens: Tokens = "all", *, image_batch: int = 32
) -> Activity:
    """Measure the Activity of every feature of `placed` over the images of `batch`.

    Raises NonFiniteError naming the images whose activations are not finite.
    """
    dictionary, site = placed.dictionary, str(placed.reads)
    width = dictionary.W_dec.shape[0]
    images, total, fired = (torch.zeros(width, dtype=torch.float64) for _ in range(3))
    n_tokens = 0
    starts = range(0, len(batch), image_batch)
    for start in progress(starts, "feature activity", unit="batch"):
        rows = batch[start : start + image_batch]
        _, cache = model.run_with_cache(rows, names_filter=site)
        value = cache[site].to(dictionary.W_enc.dtype)
        acts = dictionary.encode(value if value.ndim == 3 else value[:, None])
        bad = ~torch.isfinite(acts).flatten(1).all(1)
        if bad.any():
            names = rows.ids or [str(i) for i in range(start, start + len(rows))]
            raise NonFiniteError(
                "feature activations are not finite",
                where=site,
                images=[names[i] for i in bad.nonzero()[:, 0].tolist()],
            )
        acts = acts[:, token_mask(model, placed.reads, acts.shape[1], tokens)]
        n_tokens += acts.shape[0] * acts.shape[1]
        images += (acts != 0).any(1).sum(0).cpu()
        fired += (acts != 0).sum((0, 1)).cpu()
        total += acts.sum((0, 1)).cpu().double()
    return Activity(
        frequency=(images / max(len(batch), 1)).float(),
        mean=(total / max(n_tokens, 1)).float(),
        mean_active=(total / fired.clamp(min=1)).float(),
        decoder_norm=dictionary.W_dec.detach().float().norm(dim=1).cpu(),
    )


def matched_random_sets(
    activity: Activity, features: Sequence[int], n: int = 100, seed: int = 0, exclude: Iterable[int] = ()
) -> list[tuple[int, ...]]:
    """`n` distinct random sets, each of the size of `features` and matched to it feature by feature.

    1. Candidates are the features that fire at all, less `features` and `exclude`.
    2. Each member of `features` ranks the candidates by distance in (log frequency, log strength), each divided by its
       standard deviation over the candidates. A member that never fires takes the floor of the candidates.
    3. Its pool is the nearest candidates: as many as are needed for `n` different sets, at least 20 and twice the set
       (members that resemble each other share a pool), and never more than half of the candidates (or 20), beyond which
       a set could not be called matched.
    4. A set draws one candidate from each member's pool, without repetition within the set.

    Raises UsageError when fewer than `n` different sets can be drawn; the caller then has too few live features to
    test against, and says so.
    """
    chosen = torch.tensor([int(f) for f in features], dtype=torch.long)
    taken = torch.zeros(len(activity.frequency), dtype=torch.bool)
    taken[chosen] = True
    taken[torch.tensor(sorted(exclude), dtype=torch.long)] = True
    candidates = ((activity.frequency > 0) & (activity.strength > 0) & ~taken).nonzero()[:, 0]
    where = f"{len(candidates)} live features outside the set of {len(chosen)}"
    if not len(chosen) or len(candidates) <= len(chosen):
        raise UsageError(f"cannot draw {n} matched sets", where=where)
    size = min(max(20, 2 * len(chosen), -(-n // len(chosen))), max(20, len(candidates) // 2))
    pools = _pools(activity, chosen, candidates, size).tolist()
    if math.comb(len({f for pool in pools for f in pool}), len(chosen)) < n:
        raise UsageError(f"cannot draw {n} matched sets", where=where, hint="ask for fewer sets")
    draws = random.Random(seed)
    sets: dict[tuple[int, ...], None] = {}
    for _ in range(20 * n):
        drawn = _draw(pools, draws)
        if drawn is not None:
            sets[tuple(sorted(drawn))] = None
        if len(sets) == n:
            return list(sets)
    raise UsageError(f"found only {len(sets)} of {n} matched sets", where=where, hint="ask for fewer sets")


def _pools(
    activity: Activity, chosen: Int[Tensor, " member"], candidates: Int[Tensor, " candidate"], size: int
) -> Int[Tensor, "member pool"]:
    """The nearest candidates of each member, by standardised log frequency and log strength."""
    traits = torch.stack([activity.frequency, activity.strength], dim=1).double()
    floor = traits[candidates].amin(0)
    logs = torch.maximum(traits, floor).log()
    scale = logs[candidates].std(0, correction=0).clamp(min=1e-9)
    distance = torch.cdist(logs[chosen] / scale, logs[candidates] / scale, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distance.argsort(dim=1, stable=True)[:, : min(size, len(candidates))]
    return candidates[nearest]


def _draw(pools: list[list[int]], draws: random.Random) -> list[int] | None:
    """One candidate from each pool, members in random order; None when a pool is exhausted."""
    drawn: dict[int, None] = {}
    for pool in draws.sample(pools, len(pools)):
        picked = draws.choice(pool)
        if picked in drawn:  # seldom: only then look through the pool
            free = [f for f in pool if f not in drawn]
            if not free:
                return None
            picked = draws.choice(free)
        drawn[picked] = None
    return list(drawn)
