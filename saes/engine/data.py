"""The training rows of a store in order: which rows, at which step, scaled how, and from which images."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mechinterp.activations import ActivationStore
from mechinterp.activations.order import permutation
from mechinterp.errors import NonFiniteError, UsageError
from mechinterp.types import Site

__all__ = ["Rows", "TrainingData", "token_kinds"]

MEASURED_ROWS = 2**16
"""The mean and the scale are measured on at most so many rows of the training split."""

Rows = Int64[np.ndarray, " row"]


def token_kinds(store: ActivationStore, site: Site, tokens: str) -> dict[str, int]:
    """How many rows of each kind (cls, patch, text, pooled, register) a choice of tokens takes from a site.

    Raises UsageError when the store holds none: a dictionary for patch tokens cannot come from a store of CLS tokens.
    """
    counts = store.index_of(site)["kind"].value_counts().sort_index()
    found = {str(kind): int(n) for kind, n in counts.items() if n and tokens in ("all", kind)}
    held = store.request.tokens
    if not found or (tokens == "all" and held not in ("all", *found)):
        raise UsageError(
            f"holds no {tokens} token at {site}", where=str(store.folder), hint=f"it holds {', '.join(counts.index)}"
        )
    return found


class TrainingData:
    """Batches of one site, or of two that are read and written at once.

    Rows are multiplied by `scale`, which brings their mean norm to sqrt(d), so that one learning rate suits every
    site. What a transcoder reads is centred before.

    Args:
        store: the activations.
        reads, writes: sites; the same for an SAE.
        tokens: which kind of rows to train on; "all" for every row of the store.
        batch_size, epochs, seed: of the order.
        least_share: token kinds below this share of the rows are repeated (`TranscoderConfig`).
    """

    def __init__(
        self,
        store: ActivationStore,
        reads: Site,
        writes: Site,
        tokens: str,
        batch_size: int,
        epochs: int,
        seed: int,
        least_share: float = 0.0,
    ):
        self.least_share = least_share
        self.store, self.reads, self.writes, self.tokens, self.seed = store, reads, writes, tokens, seed
        self.source, self.target = store.site(reads), store.site(writes)
        self.kinds = token_kinds(store, reads, tokens)
        if reads != writes and not store.index_of(reads).equals(store.index_of(writes)):
            raise UsageError(
                f"{reads} and {writes} have different rows", where=str(store.folder), hint="extract both at once"
            )
        count = len(self.order(0))
        if count == 0:
            raise UsageError("has no row in the training split", where=str(store.folder))
        self.batch_size = min(batch_size, count)
        self.steps_per_epoch = count // self.batch_size
        self.steps = self.steps_per_epoch * epochs
        self.rows: Rows = np.empty(0, np.int64)

    def order(self, epoch: int) -> Rows:
        """Row numbers in the order of one epoch."""
        if self.least_share:
            return self._repeated[permutation(len(self._repeated), self.seed, epoch)]
        order = self.store.order(self.reads, seed=self.seed, epoch=epoch, split="train")
        return order if self._wanted is None else order[self._wanted[order]]

    @cached_property
    def _wanted(self) -> np.ndarray | None:
        """Which rows are of the kind; None where all are."""
        index = self.store.index_of(self.reads)
        return None if sum(self.kinds.values()) == len(index) else (index["kind"] == self.tokens).to_numpy()

    @cached_property
    def _repeated(self) -> Rows:
        """Training rows in increasing order, those of rare kinds as often as `least_share` asks."""
        rows = self.store.rows(self.reads, "train")
        rows = rows if self._wanted is None else rows[self._wanted[rows]]
        kinds = self.store.index_of(self.reads)["kind"].to_numpy()[rows]
        times = np.ones(len(rows), np.int64)
        for kind in np.unique(kinds):
            of_kind = kinds == kind
            others = self.least_share / (1 - self.least_share) * (len(rows) - of_kind.sum())
            times[of_kind] = max(1, round(others / of_kind.sum()))
        return np.repeat(rows, times)

    @property
    def transcodes(self) -> bool:
        """Whether what is written is not what is read."""
        return self.reads != self.writes

    @cached_property
    def _read(self) -> tuple[Float[Tensor, " d"], float]:
        return self._measure(self.source, centred=self.transcodes)

    @cached_property
    def _written(self) -> tuple[Float[Tensor, " d"], float]:
        return self._measure(self.target, centred=True) if self.transcodes else self._read

    @property
    def mean(self) -> Float[Tensor, " d_in"]:
        """Mean of the rows that are read."""
        return self._read[0]

    @property
    def scale(self) -> float:
        """What the rows that are read are multiplied by."""
        return self._read[1]

    @property
    def mean_out(self) -> Float[Tensor, " d_out"]:
        """Mean of the rows that are written."""
        return self._written[0]

    @property
    def scale_out(self) -> float:
        """What the rows that are written are multiplied by."""
        return self._written[1]

    def _measure(self, activations: Any, centred: bool) -> tuple[Float[Tensor, " d"], float]:
        """Mean of the rows, and what brings their mean norm (from the mean, if centred) to sqrt(d)."""
        rows = np.sort(self.order(0)[:MEASURED_ROWS])
        total, norm = torch.zeros(activations.d, dtype=torch.float64), 0.0
        for x in self._chunks(activations, rows):
            total += x.double().sum(0)
        mean = total / len(rows)
        for x in self._chunks(activations, rows):
            norm += (x.double() - (mean if centred else 0.0)).norm(dim=-1).sum().item()
        if norm == 0:
            raise UsageError("every row is zero", where=str(activations.site), hint="choose another site")
        return mean.float(), activations.d**0.5 * len(rows) / norm

    def _chunks(self, activations: Any, rows: Rows) -> Iterator[Float[Tensor, "chunk d"]]:
        for start in range(0, len(rows), 8192):
            self.rows = rows[start : start + 8192]
            yield self._checked(activations[self.rows], activations.site)

    def _checked(self, x: Tensor, site: Site) -> Tensor:
        """The rows, or NonFiniteError naming the images when one is not finite."""
        finite = torch.isfinite(x).all(-1)
        if not finite.all():
            bad = self.rows[~finite.numpy()]
            raise NonFiniteError("activations are not finite", images=self.store.images_of(site, bad), where=str(site))
        return x

    def images(self) -> list[str]:
        """Names of the images in the current batch."""
        return self.store.images_of(self.reads, self.rows)

    def batches(self, start: int) -> Iterator[tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]]:
        """What is read and what is to be written, from global step `start` on.

        The batch at a step never depends on where one began.
        """
        order, epoch = np.empty(0, np.int64), -1
        for step in range(start, self.steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self.order(epoch)
            first = (step % self.steps_per_epoch) * self.batch_size
            self.rows = order[first : first + self.batch_size]
            x = self._checked(self.source[self.rows], self.reads)
            if not self.transcodes:
                x = x * self.scale
                yield x, x
                continue
            y = self._checked(self.target[self.rows], self.writes)
            yield (x - self.mean) * self.scale, y * self.scale_out
