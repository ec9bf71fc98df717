"""Grad-CAM on the patch tokens of a vision transformer.

captum's LayerGradCam expects channels before space and no class token, so the formula is written out here.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from mechinterp.errors import ModelError
from mechinterp.explain.maps import finite, grid
from mechinterp.models import HookedVLM
from mechinterp.types import ImageTextBatch, Site, Target

__all__ = ["grad_cam"]


def grad_cam(
    model: HookedVLM,
    batch: ImageTextBatch,
    target: Target,
    *,
    site: Site | str | None = None,
    chunk: int = 32,
    smooth: bool = True,
) -> Float[Tensor, "batch height width"]:
    """Grad-CAM (Selvaraju et al. 2017, eqs. 1 and 2): non-negative, one value a patch, upsampled to pixels.

    1. Activations `A` and gradients of the score at the patch tokens of `site`.
    2. Weight of a channel: its mean gradient over the patches of the image.
    3. Map: the positive part of the weighted sum of channels.

    The weights of step 2 are shared by all patches, so a patch that the score does not read can still be marked when it
    shares channels with one that it does.

    Args:
        model, batch, target: see Explainer.
        site: a residual-stream site of the vision tower; default the input of the last block whose patch tokens the
            score depends on (a model that reads only its class token does not depend on those of the last output).
        chunk: images held in memory at once.
        smooth: bilinear upsampling; otherwise each patch is one flat square.

    Raises ModelError when the score does not depend on the patch tokens of the site.
    """
    rows, columns, _, _ = grid(model, batch)
    names = (
        [str(Site.parse(site))]
        if site is not None
        else [f"vision.blocks.{layer}.hook_resid_pre" for layer in reversed(range(model.n_layers("vision")))]
    )
    parts = []
    for start in range(0, len(batch), chunk):
        part = batch[start : start + chunk]
        values, gradients = _values_and_gradients(model, part, target, names)
        value, gradient = _last_used(values, gradients, names, rows * columns)
        weight = gradient.mean(1, keepdim=True)
        parts.append((weight * value).sum(-1).clamp(min=0).unflatten(1, (rows, columns)))
    coarse = torch.cat(parts).float()[:, None]
    size = batch.pixel_values.shape[-2:]
    full = interpolate(coarse, size, mode="bilinear", align_corners=False) if smooth else interpolate(coarse, size)
    return finite(full[:, 0], batch, "grad_cam")


def _values_and_gradients(
    model: HookedVLM, batch: ImageTextBatch, target: Target, names: list[str]
) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
    """Values at the sites, and the gradient of the summed score with respect to each (None: not used)."""
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: object) -> Tensor:
        value = value if value.requires_grad else value.detach().requires_grad_(True)
        kept[hook.name] = value  # type: ignore[attr-defined]
        return value

    with torch.enable_grad(), model.hooks(fwd_hooks=[(name, keep) for name in names]):
        score = model.score(batch, [target]).sum()
        values = [kept[name] for name in names]
        if not score.requires_grad:
            return values, (None,) * len(values)
        return values, torch.autograd.grad(score, values, allow_unused=True)


def _last_used(
    values: list[Tensor], gradients: tuple[Tensor | None, ...], names: list[str], n_patches: int
) -> tuple[Float[Tensor, "batch patch d"], Float[Tensor, "batch patch d"]]:
    """Value and gradient at the patch tokens of the first named site whose patch tokens matter to every image."""
    for value, gradient in zip(values, gradients, strict=True):
        if gradient is not None and gradient[:, -n_patches:].flatten(1).any(1).all():
            return value[:, -n_patches:].detach(), gradient[:, -n_patches:]
    raise ModelError(
        "the score does not depend on the patch tokens here",
        where=" or ".join(names[:2]),
        hint="choose an earlier site, such as vision.blocks.0.hook_resid_pre",
    )
