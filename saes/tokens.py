"""Which rows of a store a dictionary may be applied to: those of the token kinds that it was trained on."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

from mechinterp.activations import ActivationStore
from mechinterp.errors import UsageError
from mechinterp.types import Placed

__all__ = ["kinds_of", "rows_for"]


def kinds_of(placed: Placed) -> frozenset[str] | None:
    """Token kinds that a dictionary was trained on (cls, patch, text, pooled, register); None where it does not say."""
    info = getattr(placed.dictionary, "info", None) or {}
    if "token_kinds" in info:
        return frozenset(info["token_kinds"])
    tokens = info.get("tokens", "all")
    return None if tokens == "all" else frozenset({tokens})


def rows_for(placed: Placed, store: ActivationStore, split: str | None = None) -> Int64[np.ndarray, " row"]:
    """Rows of a split that are of the dictionary's token kinds, in increasing order.

    A dictionary of patch tokens takes the patch rows out of a store of all tokens. Raises UsageError when the store
    holds none of its kinds: features of one kind of token mean nothing on another.
    """
    rows, kinds = store.rows(placed.reads, split), kinds_of(placed)
    if kinds is None:
        return rows
    held = store.index_of(placed.reads)["kind"]
    fits = held.isin(sorted(kinds)).to_numpy()
    if not fits.any():
        raise UsageError(
            f"holds {', '.join(sorted(held.unique()))} tokens, the dictionary reads {', '.join(sorted(kinds))}",
            where=str(store.folder),
            hint="extract the tokens that it was trained on",
        )
    return rows[fits[rows]]
