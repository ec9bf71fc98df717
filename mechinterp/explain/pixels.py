"""Every explainer as a map on the pixels of the model's input: `METHODS[name](model, batch, target)`.

Methods that follow the gradient speak of single pixels; the others say one number a patch, and the map shows it at all
of the patch's pixels (Grad-CAM's are enlarged smoothly, as is usual).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import interpolate

from mechinterp.explain import cam, gradients
from mechinterp.explain.ask import about_image
from mechinterp.explain.maps import Explainer, finite, grid
from mechinterp.explain.methods import ELEMENT_METHODS, Method
from mechinterp.explain.question import CHUNK, Question
from mechinterp.models import HookedVLM
from mechinterp.types import ImageTextBatch, Site, Target

__all__ = [
    "METHODS",
    "PatchMap",
    "grad_cam",
    "grad_cam_plus_plus",
    "gradient_shap",
    "gradient_times_input",
    "integrated_gradients",
    "occlusion",
    "patch_pixels",
    "seeded",
]


def integrated_gradients(
    model: HookedVLM,
    batch: ImageTextBatch,
    target: Target,
    *,
    steps: int = 32,
    baseline: float | Float[Tensor, "1 channel height width"] = 0.0,
    chunk: int = 64,
) -> Float[Tensor, "batch height width"]:
    """Integrated gradients (Sundararajan et al. 2017, eq. 1) of the score, channels summed, signed.

    The sum over an image's pixels is its score minus that of the baseline, up to the error of `steps`
    Gauss-Legendre points.

    Args:
        model, batch, target: see Explainer.
        steps: points of the path integral.
        baseline: in preprocessed units; 0 is the preprocessor's mean grey.
        chunk: forward-backward passes held in memory at once.
    """
    question = _about(model, batch, target, baseline, chunk)
    pieces = gradients.pieces(question, steps)
    found = torch.cat([gradients.integrated_gradients_values(piece, steps)[0] for piece in pieces])
    return finite(found.sum(1), batch, "integrated_gradients")


def gradient_times_input(
    model: HookedVLM, batch: ImageTextBatch, target: Target, *, baseline: float = 0.0, chunk: int = 64
) -> Float[Tensor, "batch height width"]:
    """Gradient times distance from the baseline (Shrikumar et al. 2017), channels summed, signed."""
    question = _about(model, batch, target, baseline, chunk)
    return finite(gradients.gradient_times_input_values(question)[0].sum(1), batch, "gradient_times_input")


def gradient_shap(
    model: HookedVLM, batch: ImageTextBatch, target: Target, *, samples: int = 8, chunk: int = 64, seed: int = 0
) -> Float[Tensor, "batch height width"]:
    """GradientSHAP (Erion et al. 2021, eq. 3) from noisy mean grey, channels summed, signed; see explain.gradients."""
    question = _about(model, batch, target, 0.0, chunk)
    alpha, noise = gradients.mirrored(question, samples, torch.Generator().manual_seed(seed))

    def relevance(piece: Question) -> Tensor:
        return gradients.gradient_shap_values(piece, alpha, gradients.noisy_references(piece, noise))[0]

    return finite(
        torch.cat([relevance(piece) for piece in gradients.pieces(question, len(alpha))]).sum(1), batch, "gradient_shap"
    )


def occlusion(
    model: HookedVLM,
    batch: ImageTextBatch,
    target: Target,
    *,
    patches: int = 1,
    fill: float = 0.0,
    chunk: int = 64,
) -> Float[Tensor, "batch height width"]:
    """Occlusion (Zeiler and Fergus 2014): the drop of the score when a square is filled, signed.

    Args:
        model, batch, target: see Explainer.
        patches: side of the square in patches of the model; it moves by one patch, and overlaps are averaged.
        fill: in preprocessed units; 0 is the preprocessor's mean grey.
        chunk: occluded images held in memory at once.
    """
    question = _about(model, batch, target, fill, chunk)
    squares = _squares(*grid(model, batch)[:2], patches).to(batch.pixel_values.device)
    drop = question.score()[:, None] - question.shared(~squares)
    found = drop @ squares.to(drop) / squares.sum(0)
    return finite(patch_pixels(question, found), batch, "occlusion")


def grad_cam(
    model: HookedVLM,
    batch: ImageTextBatch,
    target: Target,
    *,
    site: Site | str | None = None,
    chunk: int = 32,
    smooth: bool = True,
) -> Float[Tensor, "batch height width"]:
    """Grad-CAM (Selvaraju et al. 2017, eqs. 1 and 2): non-negative, one value a patch; see explain.cam.

    Args:
        model, batch, target: see Explainer.
        site: a residual-stream site of the vision tower; default the input of the last block whose patch tokens the
            score depends on (a model that reads only its class token does not depend on those of the last output).
        chunk: images held in memory at once.
        smooth: bilinear upsampling; otherwise each patch is one flat square.

    Raises ModelError when the score does not depend on the patch tokens of the site.
    """
    return _cam(model, batch, target, cam.mean_gradient, "grad_cam", site, chunk, smooth)


def grad_cam_plus_plus(
    model: HookedVLM,
    batch: ImageTextBatch,
    target: Target,
    *,
    site: Site | str | None = None,
    chunk: int = 32,
    smooth: bool = True,
) -> Float[Tensor, "batch height width"]:
    """Grad-CAM++ (Chattopadhay et al. 2018, eq. 19); arguments and errors as `grad_cam`."""
    return _cam(model, batch, target, cam.plus_plus, "grad_cam_plus_plus", site, chunk, smooth)


class PatchMap:
    """A method of elements as an Explainer: its number for each patch, at all pixels of the patch.

    Args:
        method: what explains.
    """

    def __init__(self, method: Method):
        self.method = method

    def __call__(
        self, model: HookedVLM, batch: ImageTextBatch, target: Target, *, seed: int = 0, chunk: int = CHUNK
    ) -> Float[Tensor, "batch height width"]:
        """See Explainer. `seed`: of a method that draws; `chunk`: images through the model at once."""
        question = about_image(model, batch, target, chunk=chunk)
        found = self.method.explain(question, torch.Generator().manual_seed(seed))
        return finite(patch_pixels(question, found), batch, self.method.name)


def patch_pixels(question: Question, relevance: Float[Tensor, "row element"]) -> Float[Tensor, "row height width"]:
    """A number for each patch at all pixels of the patch."""
    return relevance[:, question.parts[0].owner]


METHODS: dict[str, Explainer] = {name: PatchMap(method) for name, method in ELEMENT_METHODS.items()}
"""Every method, anchors (`ELEMENT_METHODS[name].anchor`) included."""
METHODS |= {
    "integrated_gradients": integrated_gradients,
    "gradient_times_input": gradient_times_input,
    "gradient_shap": gradient_shap,
    "occlusion": occlusion,
    "grad_cam": grad_cam,
    "grad_cam_plus_plus": grad_cam_plus_plus,
}


def seeded(name: str, seed: int) -> Explainer:
    """`METHODS[name]` with a seed, where the method draws anything."""
    if not ELEMENT_METHODS[name].stochastic:
        return METHODS[name]
    return partial(gradient_shap if name == "gradient_shap" else PatchMap(ELEMENT_METHODS[name]), seed=seed)


def _about(model: HookedVLM, batch: ImageTextBatch, target: Target, baseline: float | Tensor, chunk: int) -> Question:
    """The question about the image, with a baseline in preprocessed units as reference."""
    question = about_image(model, batch, target, chunk=chunk)
    part = question.parts[0]
    reference = torch.as_tensor(baseline).to(part.value).expand_as(part.value)
    return replace(question, parts=(replace(part, reference=reference),), fill="")


def _squares(rows: int, columns: int, side: int) -> Bool[Tensor, "square patch"]:
    """Every square of `side` patches that lies on the grid."""
    down, across = (torch.arange(n)[:, None] - torch.arange(n - side + 1) for n in (rows, columns))
    inside = [(one >= 0) & (one < side) for one in (down, across)]
    return torch.einsum("rs,ct->strc", inside[0].float(), inside[1].float()).flatten(0, 1).flatten(1) > 0


def _cam(
    model: HookedVLM,
    batch: ImageTextBatch,
    target: Target,
    weigh: cam.Weigh,
    name: str,
    site: Site | str | None,
    chunk: int,
    smooth: bool,
) -> Float[Tensor, "batch height width"]:
    question = about_image(model, batch, target, chunk=chunk)
    assert question.shape is not None
    coarse = cam.cam(question, weigh, site, where=name).float().unflatten(1, question.shape)[:, None]
    size = batch.pixel_values.shape[-2:]
    full = interpolate(coarse, size, mode="bilinear", align_corners=False) if smooth else interpolate(coarse, size)
    return finite(full[:, 0], batch, name)
