"""Which latents together stand for a concept, and do they follow it when it alone is changed? MATCHScore, TAPAScore."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, assert_never

import numpy as np
from jaxtyping import Bool, Float, Shaped

from saes.metrics.alignment import best_thresholds, f_beta, f_score

__all__ = ["Match", "TapaScore", "Thresholds", "fbmp", "match", "match_at", "match_score", "tapa_score"]

Thresholds = Literal["zero", "val"]


def fbmp(
    fires: Bool[np.ndarray, "image latent"], labels: Shaped[np.ndarray, " image"], k: int = 3, beta: float = 0.5
) -> tuple[int, ...]:
    """F-beta matching pursuit: at most `k` latents whose union is the concept (arXiv:2606.24716).

    Repeat: take the latent with the highest F_beta for what is not yet found, `r`; add it to the union if the F1 of
    the union for the concept rises, else stop; `r = r and not z`. Precision counts more than recall (beta < 1), as
    the union can add recall but never take back a false positive.
    """
    y = np.asarray(labels) > 0.5
    rest, union, chosen, best = y.copy(), np.zeros(len(y), bool), [], 0.0
    table, fired = fires.astype(np.float32), fires.sum(0)  # counts below 2^24 are exact
    for _ in range(min(k, fires.shape[1])):
        if not rest.any():
            break
        score = f_beta(rest.astype(np.float32) @ table, fired, float(rest.sum()), beta)
        score[chosen] = -1.0
        latent = int(score.argmax())
        wider = union | fires[:, latent]
        found = float(f_score(wider, y))
        if not found > best:
            break
        chosen.append(latent)
        union, best = wider, found
        rest &= ~fires[:, latent]
    return tuple(chosen)


@dataclass(frozen=True)
class Match:
    """The latents of one concept, the threshold above which each counts as firing, and F1 of their union on test."""

    latents: tuple[int, ...]
    thresholds: tuple[float, ...]
    f1: float

    def fires(self, acts: Float[np.ndarray, "image latent"]) -> Bool[np.ndarray, " image"]:
        """Whether any of the latents is above its threshold."""
        return np.any(acts[:, list(self.latents)] > np.array(self.thresholds), axis=1)


def match(
    acts: Float[np.ndarray, "image latent"],
    labels: Shaped[np.ndarray, " image"],
    split: Shaped[np.ndarray, " image"],
    k: int = 3,
    beta: float = 0.5,
    thresholds: Thresholds = "zero",
) -> Match:
    """Choose latents by `fbmp` on training patients and score their union on test patients.

    Args:
        acts: image-level activations.
        labels: of one concept; nan is left out.
        split: train, val or test of each image.
        k: most latents.
        beta: of `fbmp`.
        thresholds: "zero" counts `z > 0` as firing, as published; "val" takes the threshold with the highest F_beta
            on validation patients. With many tokens an image almost every latent fires somewhere, and only "val"
            tells images apart.
    """
    known = np.isfinite(np.asarray(labels, np.float64))
    val = (split == "val") & known
    match thresholds:
        case "zero":
            least = np.zeros(acts.shape[1])
        case "val":
            least = best_thresholds(acts[val], labels[val], beta)[0]
        case _:
            assert_never(thresholds)
    return match_at(acts, labels, split, least, k, beta)


def match_at(
    acts: Float[np.ndarray, "image latent"],
    labels: Shaped[np.ndarray, " image"],
    split: Shaped[np.ndarray, " image"],
    least: Float[np.ndarray, " latent"],
    k: int = 3,
    beta: float = 0.5,
) -> Match:
    """`match` with given thresholds."""
    known = np.isfinite(np.asarray(labels, np.float64))
    train, test = ((split == name) & known for name in ("train", "test"))
    chosen = fbmp(acts[train] > least, labels[train], k, beta)
    found = Match(chosen, tuple(float(least[j]) for j in chosen), float("nan"))
    return replace(found, f1=float(f_score(found.fires(acts[test]), labels[test])))


def match_score(
    acts: Float[np.ndarray, "image latent"],
    labels: Shaped[np.ndarray, "image concept"],
    split: Shaped[np.ndarray, " image"],
    k: int = 3,
    beta: float = 0.5,
    thresholds: Thresholds = "zero",
) -> tuple[float, tuple[Match, ...]]:
    """`MATCHScore = mean_a F1(y_a, OR_{j in S_a} z_j > t_j)`, S_a from `fbmp` (arXiv:2606.24716, equation 3).

    The paper prints an AND where its algorithm uses OR; this is the OR. Delta-MATCH is this minus that of the
    untrained twin. Returns the mean over concepts (those that are nan left out) and each concept's match.
    """
    found = tuple(match(acts, column, split, k, beta, thresholds) for column in np.asarray(labels).T)
    values = np.array([m.f1 for m in found])
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan"), found


@dataclass(frozen=True)
class TapaScore:
    """`value = added - removed`; `pairs` holds each pair's `(b(with) - b(without))`, for a bootstrap."""

    value: float
    added: float
    removed: float
    pairs: Float[np.ndarray, " pair"]


def tapa_score(without: Bool[np.ndarray, "pair latent"], present: Bool[np.ndarray, "pair latent"]) -> TapaScore:
    """`TAPA = D_add - D_rem`, `D = mean over pairs of (max_{i in S} b_i(x') - max_{i in S} b_i(x))` (arXiv:2606.24716).

    The arguments hold the concept's matched latents S only: whether each fires on the image without and with the
    concept, all else equal. One rendered pair is both an addition and a removal, so here `removed = -added`, which a
    pair made by an image editor need not obey. 2: always follows; 0: never moves; below 0: goes the wrong way. An
    empty S never moves.
    """
    change = np.any(present, axis=1).astype(np.float64) - np.any(without, axis=1)
    added = float(change.mean()) if len(change) else float("nan")
    return TapaScore(2 * added, added, -added, change)
