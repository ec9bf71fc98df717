"""Two renderings that differ in one factor, as the model holds them: perfect pairs for TAPAScore."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from mechinterp.data.phantom import FACTORS, Phantom
from mechinterp.errors import UsageError
from mechinterp.models import HookedVLM
from mechinterp.types import Placed, Site

__all__ = ["RenderedPairs", "rendered_pairs"]


@dataclass(frozen=True)
class RenderedPairs:
    """Activations of one site on images without and with each factor: `factor -> (without, present)`.

    They do not depend on a dictionary, so that every null is asked about the same pairs.
    """

    site: Site
    activations: Mapping[str, tuple[Float[Tensor, "image token d"], Float[Tensor, "image token d"]]]
    patients: Shaped[np.ndarray, " image"]

    @torch.no_grad()
    def encode(
        self, placed: Placed, factor: str
    ) -> tuple[Float[np.ndarray, "image latent"], Float[np.ndarray, "image latent"]]:
        """Largest activation of every latent over the tokens, without and with the factor.

        Raises UsageError when the dictionary reads another site.
        """
        if placed.reads != self.site:
            raise UsageError(f"reads {placed.reads}", where="placed", hint=f"the pairs are of {self.site}")
        without, present = (
            torch.stack([placed.dictionary.encode(image).amax(0) for image in side]).float().numpy()
            for side in self.activations[factor]
        )
        return without, present


@torch.no_grad()
def rendered_pairs(
    model: HookedVLM,
    site: str | Site,
    phantom: Phantom,
    factors: Sequence[str],
    tokens: str = "patch",
    batch_size: int = 32,
) -> RenderedPairs:
    """Render `do(factor=0)` and `do(factor=1)` of the same patients and noise, and keep what passes `site`.

    Args:
        model: the model.
        site: a site of its vision tower, or of its projector, where every token is a patch.
        phantom: patients unseen in training (a few dozen are enough).
        factors: binary factors of the phantom.
        tokens: those the dictionary reads: "patch", "cls" (the first token), or "all".
        batch_size: images per forward pass.
    """
    where = Site.parse(site)
    if tokens not in ("patch", "cls", "all"):
        raise UsageError(f"no tokens {tokens!r}", where="tokens", hint="patch, cls or all")
    unknown = [name for name in factors if name not in FACTORS or FACTORS[name].rate is None]
    if unknown:
        raise UsageError(f"{unknown[0]!r} is not a binary factor", where="factors")
    found = {}
    for name in factors:
        sides = []
        for value in (0, 1):
            pixels = phantom.do(**{name: value}).render().astype(np.float32) / 255
            sides.append(_at(model, str(where), pixels, tokens, batch_size))
        found[name] = (sides[0], sides[1])
    return RenderedPairs(where, found, np.asarray(phantom.patients))


def _at(model: HookedVLM, site: str, pixels: np.ndarray, tokens: str, batch_size: int) -> Tensor:
    kept = []
    for start in range(0, len(pixels), batch_size):
        batch, seen = model.preprocess(pixels[start : start + batch_size]), []
        with model.hooks(fwd_hooks=[(site, lambda value, hook, seen=seen: seen.append(value))]):
            model.encode_image(batch)  # no prompt is needed, also by a generative model
        patches = slice(0, None) if Site.parse(site).tower == "projector" else model.patch_tokens(batch)
        if tokens == "cls" and not patches.start:
            raise UsageError("has no class token", where=site)
        kept.append({"patch": seen[0][:, patches], "cls": seen[0][:, :1], "all": seen[0]}[tokens])
    return torch.cat(kept).float()
