"""Resume a forward pass at a block boundary of the vision tower: the basis of fast effect sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mechinterp.errors import UsageError
from mechinterp.models import heads
from mechinterp.models.scoring import score_features
from mechinterp.models.wiring import find
from mechinterp.types import ImageTextBatch, Site, Target

if TYPE_CHECKING:
    from mechinterp.models.hooked import HookedVLM

__all__ = ["first_block", "run_from"]

_READS_CLS = ("clip", "dinov2", "vit")


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
    blocks = model.blocks("vision")
    resid = value.to(model.hf.dtype)
    for block in blocks[start:-1]:
        resid = block(resid, attention_mask=None)
    if start < len(blocks):
        # where only the CLS token is read, the last block need not compute the others; hooks want to see them, though
        short = model.family in _READS_CLS and not model.hf.training and not model.hooked("vision.blocks.*")
        resid = _cls_row(model, blocks[-1], resid) if short else blocks[-1](resid, attention_mask=None)
    return score_features(model, heads.readout(model.hf, model.table, resid), batch, targets)


def _cls_row(model: HookedVLM, block: nn.Module, resid: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch 1 d"]:
    """The CLS row of a block's output: all keys and values, one query, one row through the MLP."""
    at = model.table.towers["vision"].block
    attn, cls = find(block, at.attn), resid[:, :1]
    x = find(block, at.ln1)(resid)
    heads_of = (attn.q_proj(x[:, :1]), attn.k_proj(x), attn.v_proj(x))
    q, k, v = (t.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for t in heads_of)
    z = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
    added = find(block, at.out_proj)(z)
    mid = cls + (added if at.attn_out == at.out_proj else find(block, at.attn_out)(added))
    added = find(block, "mlp")(find(block, at.ln2)(mid))
    return mid + (added if at.mlp_out == "mlp" else find(block, at.mlp_out)(added))
