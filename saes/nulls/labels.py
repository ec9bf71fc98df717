"""Labels that mean nothing, with the clusters that real ones have."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64, Num, Shaped

__all__ = ["permuted_labels", "permuted_rows"]


def permuted_rows(patients: Shaped[np.ndarray, " image"], seed: int) -> Int64[np.ndarray, " image"]:
    """A permutation of the images that moves patients as blocks: image i takes the label of image `out[i]`.

    Both sides are laid out patient by patient in a random order and joined end to end, so that every label is used
    once and images of one patient mostly go on sharing theirs (a block of another length is cut).
    """
    chance = np.random.default_rng(seed)
    _, owner = np.unique(patients, return_inverse=True)
    count = int(owner.max()) + 1
    takes, gives = (np.argsort(chance.permutation(count)[owner], kind="stable") for _ in range(2))
    out = np.empty(len(owner), np.int64)
    out[takes] = gives
    return out


def permuted_labels(
    labels: Shaped[np.ndarray, "image concept"],
    patients: Shaped[np.ndarray, " image"],
    split: Shaped[np.ndarray, " image"],
    seed: int = 0,
) -> Num[np.ndarray, "image concept"]:
    """Labels moved among the patients of each split; whole rows move, so that concepts keep their associations."""
    out = np.array(labels)
    for number, name in enumerate(np.unique(split)):
        rows = np.flatnonzero(split == name)
        out[rows] = labels[rows[permuted_rows(patients[rows], seed * 7919 + number)]]
    return out
