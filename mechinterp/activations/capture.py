"""Run a model over images by number and keep the chosen tokens at the chosen sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mechinterp.activations.layout import Request
from mechinterp.activations.shards import Rows
from mechinterp.activations.tokens import TokenMap, rows_of, token_map
from mechinterp.errors import DataError, ModelError, NonFiniteError, UsageError
from mechinterp.types import ImageTextBatch, Site, Target

__all__ = ["Capture", "Images", "Reader"]


@runtime_checkable
class Reader(Protocol):
    """What extraction needs of a model; `HookedVLM` fits."""

    @property
    def sha256(self) -> str:
        """Hash of the weights."""
        ...

    @property
    def family(self) -> str:
        """Name of the family's table."""
        ...

    def sites(self, pattern: str = "*") -> list[str]:
        """Names of the hook points."""
        ...

    def hooks(self, fwd_hooks: Any) -> Any:
        """Context manager in which each hook function sees its value."""
        ...


@runtime_checkable
class Images(Protocol):
    """What extraction needs of a data folder; `ImageData` fits."""

    @property
    def sha256(self) -> str:
        """Hash of the images and tables."""
        ...

    @property
    def images(self) -> tuple[str, ...]:
        """Name of each image."""
        ...

    @property
    def patients(self) -> tuple[str, ...]:
        """Patient of each image."""
        ...

    @property
    def split(self) -> np.ndarray:
        """train, val or test for each image."""
        ...

    def __len__(self) -> int: ...

    def pixels(self, rows: Any, size: int | None = None) -> np.ndarray:
        """Grey pixels in [0, 1]."""
        ...


class _Captured(Exception):
    """Every site has been seen; nothing after it need be computed."""


class Capture:
    """One extraction: loads batches, runs the model, hands back the rows of each site."""

    def __init__(
        self, model: Any, data: Any, request: Request, target: Target | None, texts: Sequence[str] | None = None
    ):
        self.model, self.data, self.request, self.target, self.texts = model, data, request, target, texts
        self.reads_text = request.reads_text
        self.generates = "text.hook_logits" in model.sites()
        self._maps: dict[str, TokenMap] = {}

    def load(self, images: range) -> ImageTextBatch:
        """Read and preprocess images by number."""
        rows = np.arange(images.start, images.stop)
        try:
            return self._prepared(self.data.pixels(rows), rows)
        except DataError:  # images of several sizes go through the model's own resize one by one
            batches = [self._prepared(self.data.pixels(rows[i : i + 1]), rows[i : i + 1]) for i in range(len(rows))]
        return _stacked(batches)

    def images_of(self, batch: int) -> range:
        """The images of a batch."""
        size = self.request.batch_size
        return range(batch * size, min((batch + 1) * size, len(self.data)))

    @torch.inference_mode()
    def capture(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """Values at the requested sites, with any head axis flattened; the forward stops at the last one."""
        seen: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any) -> None:
            seen.setdefault(hook.name, value)
            if len(seen) == len(self.request.sites):
                raise _Captured

        try:
            with self.model.hooks(fwd_hooks=[(site, keep) for site in self.request.sites]):
                self._forward(batch)
        except _Captured:
            pass
        missing = set(self.request.sites) - set(seen)
        if missing:
            raise ModelError(f"the forward pass never reached {sorted(missing)}", where="sites")
        return {site: _flat(site, value) for site, value in seen.items()}

    def rows(self, number: int, batch: ImageTextBatch) -> dict[str, Rows]:
        """The rows to store of batch `number`, per site. Raises NonFiniteError naming the images."""
        images = self.images_of(number)
        made = {}
        for site, value in self.capture(batch).items():
            rows = rows_of(value, self._map(site, batch, value), self.request.tokens, images.start)
            if not np.isfinite(rows.activations).all():
                bad = np.unique(rows.image[~np.isfinite(rows.activations).all(1)])
                names = [self.data.images[image] for image in bad]
                raise NonFiniteError("activations are not finite", images=names, where=site)
            made[site] = rows
        return made

    def _map(self, site: str, batch: ImageTextBatch, value: Tensor) -> TokenMap | None:
        """What the tokens of a site are; without text it is the same for every batch of one size."""
        if value.ndim == 2:
            return None
        parsed = Site.parse(site)
        if parsed.tower == "text":
            return token_map(self.model, batch, parsed, value.shape[1])
        known = self._maps.get(site)
        if known is None or known.kind.shape != value.shape[:2]:
            known = self._maps[site] = token_map(self.model, batch, parsed, value.shape[1])
        return known

    def _prepared(self, pixels: np.ndarray, rows: np.ndarray) -> ImageTextBatch:
        """The batch that reaches the requested sites: with a question or a report only where language is read."""
        names = [self.data.images[row] for row in rows]
        if not self.reads_text:
            return self.model.preprocess(pixels, ids=names)
        if self.texts is not None:
            said = [self.texts[row] for row in rows]
            alone = [
                self.model.preprocess(pixels[i : i + 1], [said[i]], ids=names[i : i + 1]) for i in range(len(rows))
            ]
            return _stacked(_padded(alone, getattr(self.model.tokenizer, "pad_token_id", None) or 0))
        if self.generates:
            asked = self.target or next(iter(self.data.targets.values()), None)
            if asked is None:
                raise UsageError("a language site needs a question", where="target", hint="pass a Target")
            return self.model.prepare(pixels, [asked], ids=names)
        texts = [self.data.reports[row] for row in rows]
        if not all(texts):
            raise UsageError("has no report for every image", where="reports.csv", hint="text sites need reports")
        return self.model.preprocess(pixels, texts, ids=names)

    def _forward(self, batch: ImageTextBatch) -> None:
        if self.generates and not self.reads_text:
            self.model.encode_image(batch)  # no prompt is needed
        else:
            self.model.forward(batch)


def _stacked(batches: list[ImageTextBatch]) -> ImageTextBatch:
    """Batches of one image as one batch; text of several lengths cannot be stacked."""
    first = batches[0]
    if first.input_ids is not None and len({b.input_ids.shape for b in batches if b.input_ids is not None}) > 1:
        raise DataError("images differ in size and their texts in length", where="data", hint="resize the images")

    def joined(name: str) -> Tensor | None:
        parts = [getattr(batch, name) for batch in batches]
        return None if parts[0] is None else torch.cat(parts)

    ids = tuple(name for batch in batches for name in batch.ids)
    return ImageTextBatch(
        torch.cat([b.pixel_values for b in batches]), joined("input_ids"), joined("attention_mask"), ids
    )


def _padded(batches: list[ImageTextBatch], pad: int) -> list[ImageTextBatch]:
    """Batches of one image with their texts brought to one length, on the right, where a causal model is not moved."""
    rows = [batch.input_ids for batch in batches if batch.input_ids is not None]
    longest, made = max(ids.shape[1] for ids in rows), []
    if all(ids.shape[1] == longest for ids in rows):
        return batches  # SigLIP's captions are of one length and have no mask: their padding is read
    for batch, ids in zip(batches, rows, strict=True):
        mask = torch.ones_like(ids) if batch.attention_mask is None else batch.attention_mask
        more = (0, longest - ids.shape[1])
        made.append(replace(batch, input_ids=F.pad(ids, more, value=pad), attention_mask=F.pad(mask, more)))
    return made


def _flat(site: str, value: Tensor) -> Tensor:
    """`[batch, token, d]` or `[batch, d]`, heads flattened into d."""
    if site.endswith(("hook_pattern", "hook_attn_scores")):
        raise UsageError("is an attention matrix, not a vector per token", where=site, hint="use run_with_cache")
    if value.ndim == 4:
        return value.flatten(2)
    if value.ndim not in (2, 3):
        raise UsageError(f"has shape {tuple(value.shape)}, which cannot be stored", where=site)
    return value
