"""Grad-CAM and Grad-CAM++ on the tokens of a transformer (or on a function's inner features), over any Question.

captum's LayerGradCam expects channels before space and no class token, so the formulas are written out here. Patches
are read in the vision tower, words in the text tower; each tower's channels are weighed over its own elements, so
patches and words of one question are on one scale only as far as their gradients are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import ModelError, UsageError
from mechinterp.explain.inside import places_of, reader, seen_inside, source_of
from mechinterp.explain.patches import CHUNK
from mechinterp.explain.question import Question
from mechinterp.models.embedded import features_of
from mechinterp.types import Site

__all__ = ["cam", "grad_cam", "grad_cam_plus_plus", "mean_gradient", "plus_plus"]

Weigh = Callable[[Tensor, Tensor], Tensor]
"""Value and gradient `[row, element, d]` to the weight of every channel `[row, d]`."""


def grad_cam(question: Question, generator: torch.Generator) -> Float[Tensor, "row element"]:
    """Grad-CAM (Selvaraju et al. 2017, eqs. 1 and 2): non-negative.

    1. Activations `A` and gradients of the score at the elements' tokens, before the last block whose tokens there the
       score depends on (a model that reads only its class token does not depend on those of the last output).
    2. Weight of a channel: its mean gradient over the elements.
    3. Relevance: the positive part of the weighted sum of channels.

    The weights of step 2 are shared by all elements, so an element that the score does not read can still be marked
    when it shares channels with one that it does.
    """
    return cam(question, mean_gradient, where="grad_cam")


def grad_cam_plus_plus(question: Question, generator: torch.Generator) -> Float[Tensor, "row element"]:
    """Grad-CAM++ (Chattopadhay et al. 2018, eqs. 10, 11 and 19): as Grad-CAM, with its own weights of channels.

    The weights were made for activations that are not negative; a residual stream has both signs, so denominators may
    come near 0 and one element may outweigh all others.
    """
    return cam(question, plus_plus, where="grad_cam_plus_plus")


def mean_gradient(value: Float[Tensor, "row element d"], gradient: Float[Tensor, "row element d"]) -> Tensor:
    """Weights `[row, d]` of Grad-CAM: the mean gradient of each channel."""
    return gradient.mean(1)


def plus_plus(value: Float[Tensor, "row element d"], gradient: Float[Tensor, "row element d"]) -> Tensor:
    """Weights `[row, d]` of Grad-CAM++: positive gradients, weighted by `g^2 / (2 g^2 + sum A g^3)`.

    The class score is taken through an exponential, so that higher derivatives are powers of g (eq. 18); the factor
    exp(score), the same for all elements of a row, is left out. A weight whose denominator is 0 counts 0.
    """
    square = gradient.square()
    below = 2 * square + value.sum(1, keepdim=True) * square * gradient
    alpha = torch.where(below != 0, square / torch.where(below != 0, below, 1.0), 0.0)
    return (alpha * gradient.clamp(min=0)).sum(1)


def cam(question: Question, weigh: Weigh, site: Site | str | None = None, where: str = "cam") -> Tensor:
    """Positive part of the weighted sum of channels `[row, element]`.

    Args:
        weigh: weights of the channels.
        site: a residual-stream site; default the input of the last block that matters, for each tower.
        where: name of the method, for errors.

    Raises ModelError where the score does not depend on the tokens of the elements, UsageError for a question that has
    neither a model nor inner features.
    """
    found = []
    for piece in replace(question, chunk=min(question.chunk, CHUNK)).chunks():
        pairs = _pairs(piece, None if site is None else str(Site.parse(site)), where)
        found.append(torch.cat([_map(value, gradient, weigh) for value, gradient in pairs], dim=1))
    return torch.cat(found)


def _map(value: Tensor, gradient: Tensor, weigh: Weigh) -> Float[Tensor, "row element"]:
    value, gradient = value.detach(), gradient.detach()
    return torch.einsum("red,rd->re", value, weigh(value, gradient)).clamp(min=0)


def _pairs(question: Question, site: str | None, where: str) -> list[tuple[Tensor, Tensor]]:
    """Value and gradient `[row, element, d]` at the elements, tower by tower."""
    if question.source is None and question.inner is not None:
        leaves = tuple(value.detach().requires_grad_() for value in question.values)
        with torch.enable_grad():
            features, score = question.inner(leaves)
            return [(features, torch.autograd.grad(score.sum(), features)[0])]
    places = places_of(question, where)
    if site is not None and [tower for tower, _ in places] != [Site.parse(site).tower]:
        raise UsageError(f"{site} does not hold the elements of the question", where=where)
    model = source_of(question, where).model
    names = {
        tower: [site]
        if site
        else [f"{tower}.blocks.{layer}.hook_resid_pre" for layer in reversed(range(model.n_layers(tower)))]
        for tower, _ in places
    }
    if question.kinds == ("patch",) and (resumed := _resumed(question, names["vision"], places[0][1])):
        return [resumed]
    kept: dict[str, Tensor] = {}
    score = seen_inside(question, [(name, reader(kept)) for group in names.values() for name in group])
    gradients = torch.autograd.grad(score.sum(), list(kept.values()), allow_unused=True)
    by_name = dict(zip(kept, zip(kept.values(), gradients, strict=True), strict=True))
    return [_last_used([by_name[name] for name in names[tower]], names[tower], at) for tower, at in places]


class _Reached(Exception):
    """A pass has come as far as it has to."""


def _resumed(question: Question, names: list[str], at: Int[Tensor, " element"]) -> tuple[Tensor, Tensor] | None:
    """The same for patches alone at the first site, from a pass without gradient and one from the site on.

    None where some image does not depend on the site, or no pass can be resumed there.
    """
    source, kept = source_of(question, "cam"), list[Tensor]()

    def stop(value: Tensor, hook: object) -> None:
        kept.append(value)
        raise _Reached

    model, name = source.model, names[0]
    if not name.endswith(("hook_resid_pre", "hook_resid_post")) or not name.startswith("vision."):
        return None
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, stop)]), suppress(_Reached):
        features_of(model, question.values[0])
    value = kept[0].detach().requires_grad_()
    with torch.enable_grad():
        score = model.run_from(name, value, source.batch, [source.target])[:, 0]
        gradient = torch.autograd.grad(score.sum(), value)[0]
    used = bool(gradient[:, at].flatten(1).any(1).all())
    return (value[:, at], gradient[:, at]) if used else None


def _last_used(
    pairs: list[tuple[Tensor, Tensor | None]], names: list[str], at: Int[Tensor, " element"]
) -> tuple[Float[Tensor, "row element d"], Float[Tensor, "row element d"]]:
    """Value and gradient at the elements of the first site whose elements matter to every row."""
    for value, gradient in pairs:
        if gradient is not None and gradient[:, at].flatten(1).any(1).all():
            return value[:, at], gradient[:, at]
    raise ModelError(
        "the score does not depend on the tokens of the elements here",
        where=" or ".join(names[:2]),
        hint=f"choose an earlier site, such as {names[-1].split('.')[0]}.blocks.0.hook_resid_pre",
    )
