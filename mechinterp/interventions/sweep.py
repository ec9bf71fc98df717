"""The engine of effect sweeps: many (feature set, image) pairs, recomputing only what each can change.

1. One pass over the images caches the value that the dictionary reads and the value at which passes are resumed.
2. For a chunk of images, the dictionary encodes once; `new - old` activations follow for all features at once.
3. A pair counts only if a member of its set changes at a chosen token of its image. Every other effect is exactly 0.
4. Pairs are finished many at a time by a tail (see tails.py) from the image's clean value plus `(new - old) @ W_dec`.

Nothing is stored for pairs that do not count. Step 4 takes the fastest tail that is right: each is first run on some
unedited images and compared with the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import NonFiniteError, UsageError
from mechinterp.interventions.edits import How, Resample, Tokens, donors, edited
from mechinterp.interventions.sparse_tail import SparseTail
from mechinterp.interventions.tails import Change, Rerun, Resumed, Tail, close, resume_site
from mechinterp.interventions.tokens import token_mask
from mechinterp.models import HookedVLM
from mechinterp.progress import progress
from mechinterp.types import ImageTextBatch, Placed, Site, Target

__all__ = ["Pairs", "Sweep"]


@dataclass(frozen=True)
class Pairs:
    """Effects of some (set, image) pairs: `score(edited) - score(clean)`."""

    sets: Int[Tensor, " pair"]
    images: Int[Tensor, " pair"]
    effect: Float[Tensor, "pair target"]


class Sweep:
    """Everything about a sweep that does not depend on which sets are swept.

    Args:
        model, placed: where the features live.
        batch: the images, with what `model.score` needs.
        targets: what is scored.
        how, tokens: what is done to the features, and where.
        image_batch: images encoded at once (memory: image_batch * tokens * d_sae floats, twice).
        pair_batch: pairs finished at once (memory: about ten times pair_batch * tokens * d_model floats).
    """

    @torch.no_grad()
    def __init__(
        self,
        model: HookedVLM,
        placed: Placed,
        batch: ImageTextBatch,
        targets: Sequence[Target],
        how: How,
        tokens: Tokens,
        *,
        image_batch: int = 32,
        pair_batch: int = 256,
    ):
        if not len(batch) or not targets:
            raise UsageError("a sweep needs at least one image and one target", where="batch, targets")
        self.model, self.placed, self.batch, self.targets = model, placed, batch, list(targets)
        self.how, self.image_batch, self.pair_batch = how, image_batch, pair_batch
        self.ids = batch.ids or tuple(str(i) for i in range(len(batch)))
        self.site, self.reads, self.base = self._collect()
        self.mask = token_mask(model, placed.reads, self.reads.shape[1], tokens).to(self.reads.device)
        self.W_dec = _linear_decoder(placed, self.reads[:1])
        self.donor = donors(len(batch), how.seed) if isinstance(how, Resample) else None
        self.tail: Tail = self._tail()
        self.clean = torch.cat([self.tail.start(rows, self.base[rows]) for rows in self._chunks()]).float()
        self._check(self.clean, torch.arange(len(batch)), "clean scores")

    def run(self, sets: Int[Tensor, "set member"], valid: Bool[Tensor, "set member"]) -> Iterator[Pairs]:
        """Effects of every pair that counts, chunk by chunk. `valid` marks the true members of padded sets."""
        used, columns = torch.unique(sets[valid], return_inverse=True)
        members = torch.zeros_like(sets)
        members[valid] = columns
        for rows in progress(list(self._chunks()), "effects", unit="chunk"):
            delta = self._delta(rows, used)
            fires = (delta != 0).any(1)
            counts = (fires[:, members] & valid).any(2)
            clean = self.tail.start(rows, self.base[rows]).float()
            images, which = counts.nonzero(as_tuple=True)
            for some in torch.arange(len(images)).split(self.pair_batch):
                image, number = images[some], which[some]
                change = self._change(delta, image, members[number], valid[number], used)
                effect = self.tail.scores(image, change).float() - clean[image]
                image = image + rows.start
                self._check(effect, image, f"effects at {self.placed.writes}")
                yield Pairs(number, image, effect)

    def _chunks(self) -> Iterator[slice]:
        n = len(self.batch)
        return (slice(start, min(start + self.image_batch, n)) for start in range(0, n, self.image_batch))

    def _collect(self) -> tuple[Site | None, Tensor, Tensor]:
        """The site to resume at (None: none), the read values `[image, token, d]`, and the values to resume from."""
        placed = self.placed
        reads, writes = str(placed.reads), str(placed.writes)
        names = {reads, writes}
        if placed.writes.tower == "vision" and placed.writes.layer is not None:
            block = f"vision.blocks.{placed.writes.layer}"
            names |= {f"{block}.hook_resid_post", f"{block}.hook_resid_mid"} & set(self.model.sites())
        site: Site | None = None
        kept: tuple[list[Tensor], list[Tensor]] = ([], [])
        for number, rows in enumerate(self._chunks()):
            _, cache = self.model.run_with_cache(self.batch[rows], names_filter=lambda name: name in names)
            if number == 0:
                site = resume_site(placed.writes, cache)
                base = writes if site is None or placed.writes.point == "hook_resid_pre" else str(site)
            for values, name in zip(kept, (reads, base), strict=True):
                value = cache[name]
                self._check(value, torch.arange(rows.start, rows.stop), f"activations at {name}")
                values.append(value if value.ndim == 3 else value[:, None])
        return site, torch.cat(kept[0]), torch.cat(kept[1])

    def _tail(self) -> Tail:
        """The fastest tail whose clean scores of the first images are those of the whole model."""
        rerun = Rerun(self.model, self.placed.writes, self.batch, self.targets)
        if self.site is None:
            return rerun
        rows = slice(0, min(4, len(self.batch)))
        truth, value = rerun.start(rows, self.base[rows]), self.base[rows]
        resumed = Resumed(self.model, self.site, self.batch, self.targets)
        for tail in (SparseTail.of(resumed, value), resumed):
            if tail is not None and close(tail.start(rows, value), truth):
                return tail
        return rerun

    def _encode(self, rows: slice | Tensor) -> Tensor:
        dictionary = self.placed.dictionary
        return dictionary.encode(self.reads[rows].to(dictionary.W_enc.dtype))

    def _delta(self, rows: slice, used: Int[Tensor, " used"]) -> Float[Tensor, "image token used"]:
        """`new - old` activations of the used features; 0 outside the chosen tokens."""
        old = self._encode(rows)[..., used]
        images = torch.arange(rows.start, rows.stop)
        donor = None if self.donor is None else self._encode(self.donor[images])[..., used]
        return edited(self.how, old, used, self.mask, donor=donor, rows=images) - old

    def _change(
        self,
        delta: Float[Tensor, "image token used"],
        image: Int[Tensor, " pair"],
        members: Int[Tensor, "pair member"],
        valid: Bool[Tensor, "pair member"],
        used: Int[Tensor, " used"],
    ) -> Change:
        """What each pair adds to the site value: the sum over its members of their change times decoder row."""
        amount = delta[image[:, None], :, members] * valid[..., None]  # [pair, member, token]
        pair, token = (amount != 0).any(1).nonzero(as_tuple=True)
        amount = amount.transpose(1, 2)[pair, token]  # [changed, member]
        rows = self.W_dec[used[members]]  # [pair, member, d]
        if members.shape[1] == 1:
            return Change(pair, token, amount * rows[pair, 0])
        return Change(pair, token, torch.einsum("cm,cmd->cd", amount, rows[pair]))

    def _check(self, value: Tensor, images: Int[Tensor, " row"], what: str) -> None:
        """Stop at once on anything that is not finite, and say in which images."""
        bad = ~torch.isfinite(value).flatten(1).all(1)
        if bad.any():
            names = [self.ids[i] for i in images[bad.cpu()].tolist()]
            raise NonFiniteError(f"{what} are not finite", images=sorted(set(names)), where="effects")


def _linear_decoder(placed: Placed, value: Float[Tensor, "image token d"]) -> Float[Tensor, "d_sae d"]:
    """`W_dec`, after checking on real activations that `decode` is linear in it.

    Raises UsageError for a dictionary whose decoder does more (for example undoes a normalisation per input).
    """
    dictionary = placed.dictionary
    acts = dictionary.encode(value.to(dictionary.W_enc.dtype))
    written = dictionary.decode(acts) - dictionary.decode(torch.zeros_like(acts))
    linear = acts @ dictionary.W_dec
    if not torch.allclose(written, linear, rtol=1e-3, atol=1e-4 * float(linear.abs().max() + 1e-6)):
        raise UsageError(
            "decode(acts) is not acts @ W_dec + constant",
            where=f"dictionary at {placed.reads}",
            hint="sweeps need a linear decoder; fold the normalisation into the weights, or use intervene(...)",
        )
    return dictionary.W_dec.detach()
