"""Which token positions an intervention touches."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from mechinterp.errors import UsageError
from mechinterp.interventions.edits import Tokens
from mechinterp.models import HookedVLM
from mechinterp.types import Site

__all__ = ["token_mask"]


def token_mask(model: HookedVLM, site: Site, n_tokens: int, tokens: Tokens) -> Bool[Tensor, " token"]:
    """Mask of the chosen positions among the `n_tokens` at `site`.

    "patch" and "cls" exist in the vision tower only.
    Raises UsageError when the choice does not exist at this site.
    """
    mask = torch.zeros(n_tokens, dtype=torch.bool)
    if not isinstance(tokens, str):
        wrong = [t for t in tokens if not 0 <= t < n_tokens]
        if wrong or not len(tokens):
            raise UsageError(f"no token {wrong[0] if wrong else tokens!r}", where=str(site), hint=f"it has {n_tokens}")
        mask[torch.tensor([int(t) for t in tokens])] = True
        return mask
    if tokens == "all":
        return ~mask
    if site.tower != "vision" or (site.layer is None and site.point != "hook_embed"):
        raise UsageError(f"{tokens!r} tokens do not exist at this site", where=str(site), hint="use 'all' or positions")
    if tokens == "patch":
        mask[model.patch_tokens()] = True
        return mask
    if tokens == "cls":
        if model.cls_token is None:
            raise UsageError("this vision tower has no class token", where=str(site), hint="use 'patch' or 'all'")
        mask[model.cls_token] = True
        return mask
    raise UsageError(f"unknown tokens {tokens!r}", where=str(site), hint="all, patch, cls, or a list of positions")
