"""Resume a forward pass at a block boundary of the vision tower: the basis of fast effect sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import UsageError
from mechinterp.models import heads
from mechinterp.models.scoring import score_features
from mechinterp.types import ImageTextBatch, Site, Target

if TYPE_CHECKING:
    from mechinterp.models.hooked import HookedVLM

__all__ = ["first_block", "run_from"]


def first_block(model: HookedVLM, site: str | Site) -> int:
    """The first vision block that still has to run when `site` is given. Raises UsageError for other sites."""
    where = Site.parse(site)
    model.point(str(where))
    if where.tower == "vision" and where.layer is not None:
        if where.point == "hook_resid_pre":
            return where.layer
        if where.point == "hook_resid_post":
            return where.layer + 1
    raise UsageError(
        f"cannot resume at {where}", hint="resume at hook_resid_pre or hook_resid_post of a block of the vision tower"
    )


def run_from(
    model: HookedVLM,
    site: str | Site,
    value: Float[Tensor, "batch pos d_model"],
    batch: ImageTextBatch,
    targets: Sequence[Target],
) -> Float[Tensor, "batch target"]:
    """Scores with the residual stream set to `value` at `site`. Call it inside `model.attached()`."""
    start = first_block(model, site)
    if len(value) != len(batch):
        raise UsageError(f"{len(value)} values for a batch of {len(batch)}", hint="pass batch[rows]")
    resid = value.to(model.hf.dtype)
    for block in model.blocks("vision")[start:]:
        resid = block(resid, attention_mask=None)
    return score_features(model, heads.readout(model.hf, model.table, resid), batch, targets)
