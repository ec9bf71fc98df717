"""What is left of a forward pass after a site: the part that an edit at the site can change.

Two ways to finish a pass from an edited site value, both equal to the full forward:

- `Resumed` hands the value to `HookedVLM.run_from`, which runs every later block on every token.
- `Rerun` runs the whole model with a hook; for sites that no pass can be resumed from (text tower, inside a block).

`mechinterp.interventions.sparse_tail.SparseTail` is the third, and the fast one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.models import HookedVLM
from mechinterp.types import ImageTextBatch, Site, Target

__all__ = ["Change", "Rerun", "Resumed", "Tail", "close", "resume_site"]


@dataclass(frozen=True)
class Change:
    """What is added to a site value, at the tokens that change and nowhere else.

    `delta[i]` is added at token `token[i]` of pair `pair[i]`; each (pair, token) comes at most once.
    """

    pair: Int[Tensor, " changed"]
    token: Int[Tensor, " changed"]
    delta: Float[Tensor, "changed d"]

    def added_to(self, value: Float[Tensor, "pair token d"]) -> Float[Tensor, "pair token d"]:
        """The value with the change."""
        return value.index_put((self.pair, self.token), self.delta.to(value.dtype), accumulate=True)


@runtime_checkable
class Tail(Protocol):
    """Finishes forward passes of one chunk of images at a time."""

    def start(self, rows: slice, value: Float[Tensor, "image token d"]) -> Float[Tensor, "image target"]:
        """Take a chunk of images with their clean value at the site; return their clean scores."""
        ...

    def scores(self, images: Int[Tensor, " pair"], change: Change) -> Float[Tensor, "pair target"]:
        """Scores of `images` (positions in the chunk, one for each pair) after `change` of their site values."""
        ...


def _rows(batch: ImageTextBatch, images: Int[Tensor, " pair"], *, pixels: bool) -> ImageTextBatch:
    """The batch of these images, one row a pair. Pixels that nothing will read are one image seen many times."""
    if pixels:
        return batch[images]
    return replace(
        batch,
        pixel_values=batch.pixel_values[:1].expand(len(images), -1, -1, -1),
        input_ids=None if batch.input_ids is None else batch.input_ids[images],
        attention_mask=None if batch.attention_mask is None else batch.attention_mask[images],
        ids=(),
    )


class Resumed:
    """Resume at a block boundary of the vision tower, with every token of every later block."""

    def __init__(self, model: HookedVLM, site: Site, batch: ImageTextBatch, targets: Sequence[Target]):
        self.model, self.site, self.batch, self.targets = model, site, batch, targets

    def start(self, rows: slice, value: Float[Tensor, "image token d"]) -> Float[Tensor, "image target"]:
        """See Tail."""
        self.chunk, self.value = self.batch[rows], value
        return self.model.run_from(str(self.site), value, self.chunk, self.targets)

    def scores(self, images: Int[Tensor, " pair"], change: Change) -> Float[Tensor, "pair target"]:
        """See Tail."""
        return self.finish(self.site, images, change.added_to(self.value[images]))

    def finish(
        self, site: Site, images: Int[Tensor, " pair"], value: Float[Tensor, "pair token d"]
    ) -> Float[Tensor, "pair target"]:
        """Scores of `images` from their value at `site`, which may lie further on."""
        return self.model.run_from(str(site), value, _rows(self.chunk, images, pixels=False), self.targets)


class Rerun:
    """Run the whole model, with the edit as a hook: right for any site, and saves only what does not fire."""

    def __init__(self, model: HookedVLM, site: Site, batch: ImageTextBatch, targets: Sequence[Target]):
        self.model, self.site, self.batch, self.targets = model, site, batch, targets

    def start(self, rows: slice, value: Float[Tensor, "image token d"]) -> Float[Tensor, "image target"]:
        """See Tail."""
        self.chunk = self.batch[rows]
        return self.model.score(self.chunk, self.targets)

    def scores(self, images: Int[Tensor, " pair"], change: Change) -> Float[Tensor, "pair target"]:
        """See Tail."""

        def add(value: Tensor, hook: object) -> Tensor:
            pooled = value.ndim == 2
            return change.added_to(value[:, None])[:, 0] if pooled else change.added_to(value)

        with self.model.hooks(fwd_hooks=[(str(self.site), add)]):
            return self.model.score(_rows(self.chunk, images, pixels=True), self.targets)


def resume_site(writes: Site, cache: dict[str, Tensor] | None = None) -> Site | None:
    """The block boundary of the vision tower where adding to `writes` has the same effect, or None.

    The MLP output of a block is added to its residual stream last, so a change of it is the same change of
    `hook_resid_post`; with a `cache` that holds both and `hook_resid_mid` this is checked rather than believed.
    """
    if writes.tower != "vision" or writes.layer is None:
        return None
    post = Site("vision", writes.layer, "hook_resid_post")
    if writes == post:
        return post
    if writes.point == "hook_resid_pre" and writes.layer > 0:
        return Site("vision", writes.layer - 1, "hook_resid_post")
    if writes.point == "hook_mlp_out" and cache is not None:
        middle = Site("vision", writes.layer, "hook_resid_mid")
        return post if close(cache[str(middle)] + cache[str(writes)], cache[str(post)]) else None
    return None


def close(value: Tensor, truth: Tensor) -> bool:
    """Equal up to the rounding of the dtype: 1e-5 of the largest number in float32 (3e-2 in bfloat16)."""
    tolerance = max(1e-5, 4 * torch.finfo(truth.dtype).eps) * max(1.0, float(truth.abs().max()))
    return value.shape == truth.shape and bool((value - truth).abs().max() <= tolerance)
