"""This project's own explanations as element methods, so that they meet the same questions as the post-hoc ones.

`sae_maps` places the ablation effects of dictionary features on patches; `graph_patches` reads the patches' influence
off an attribution graph. Both read a model with features of its own, a dictionary or transcoders. Beside another model
(trained again, on permuted labels, built differently) they explain that one with that one's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.audit.dictionary import dictionary_of, transcoders_of
from mechinterp.audit.graphing import output_of
from mechinterp.data import ImageData
from mechinterp.errors import ModelError, UsageError
from mechinterp.explain.inside import reader, seen_inside, source_of
from mechinterp.explain.methods import BuiltFrom, Method
from mechinterp.explain.question import ElementExplainer, Question, Source
from mechinterp.interventions import effects
from mechinterp.models import HookedVLM
from mechinterp.types import Placed

__all__ = ["Features", "features_of", "graph_patches", "own_methods", "sae_maps", "stored_methods"]

log = logging.getLogger(__name__)

MOST = 64  # features ablated for each image: the largest by |activation times gradient|
ROWS = 32  # images swept together, at most
PAIRS = 256  # of an image and a feature, through the model at once, at most
BUDGET = 300  # features of a graph whose causes are computed


Features = tuple[Placed | None, Sequence[Placed]]
"""What our methods read a model with: a dictionary, and transcoders."""


def features_of(model: HookedVLM, data: ImageData, seed: int) -> Features:
    """The dictionary of a model, stored or trained now on `data`, and the transcoders stored beside it."""
    return dictionary_of(model, data, seed)[0], transcoders_of(model)


def stored_methods(model: HookedVLM, data: ImageData, seed: int) -> dict[str, Method]:
    """Our methods for a model, and for any other that its maps are held beside."""
    placed, transcoders = features_of(model, data, seed)
    return own_methods(model, placed, transcoders, partial(features_of, data=data, seed=seed))


def own_methods(
    model: HookedVLM,
    placed: Placed | None = None,
    transcoders: Sequence[Placed] = (),
    others: Callable[[HookedVLM], Features] | None = None,
) -> dict[str, Method]:
    """`sae_maps` where there is a dictionary in the vision tower, `graph_patches` where there are transcoders.

    `others`: the features of another model, asked for when a map of that model is; without it no other is explained.
    """
    known = _Known([(model, (placed, transcoders))], others)

    def own(name: str, explain: ElementExplainer, of: BuiltFrom, explains: Callable[[HookedVLM], bool]) -> list[Method]:
        if not explains(model):
            return []
        return [Method(name, explain, of, frozenset({"patch"}), needs="model", explains=explains)]

    methods = [
        *own("sae_maps", known.sae_maps, "latent", lambda one: known.sae(one) is not None),
        *own("graph_patches", known.graph_patches, "graph", lambda one: bool(known.of(one)[1])),
    ]
    return {method.name: method for method in methods}


class _Known:
    """Features by model; those of another are found once, when they are first asked for."""

    def __init__(self, known: list[tuple[HookedVLM, Features]], others: Callable[[HookedVLM], Features] | None):
        self.known, self.others = known, others

    def of(self, model: HookedVLM) -> Features:
        for one, features in self.known:
            if one is model:
                return features
        try:
            found: Features = self.others(model) if self.others else (None, ())
        except ModelError as error:  # it has no such site: the other methods can still be held beside it
            log.warning("no features for %s: %s", model.label, error)
            found = (None, ())
        self.known.append((model, found))
        return found

    def sae(self, model: HookedVLM) -> Placed | None:
        placed = self.of(model)[0]
        return placed if placed is not None and placed.reads.tower == "vision" else None

    def sae_maps(self, question: Question, generator: torch.Generator) -> Float[Tensor, "row element"]:
        model = source_of(question, "sae_maps").model
        placed = self.sae(model)
        if placed is None:
            raise UsageError("has no dictionary for this model", where="sae_maps")
        return sae_maps(question, generator, model=model, placed=placed)

    def graph_patches(self, question: Question, generator: torch.Generator) -> Float[Tensor, "row element"]:
        model = source_of(question, "graph_patches").model
        transcoders = self.of(model)[1]
        if not transcoders:
            raise UsageError("has no transcoders for this model", where="graph_patches")
        return graph_patches(question, generator, model=model, transcoders=transcoders)


def sae_maps(
    question: Question, generator: torch.Generator, *, model: HookedVLM, placed: Placed, most: int = MOST
) -> Float[Tensor, "row element"]:
    """What the score loses when a feature is ablated at the patches, shared among them as the feature is active there.

    A feature's contribution to the stream at a patch is its activation times one decoder row, so shares are those of
    the activations. Summed over features; each alone is removed, so interactions between them are counted twice or not
    at all. What the class token's own activations do is left out.

    Args:
        question: about patches, of `model`.
        model, placed: where the features live.
        most: features ablated for each image, by |activation times gradient|; the others count 0.
    """
    source = _source(question, model, "sae_maps")
    found = []
    rows, pairs = min(ROWS, question.chunk), min(PAIRS, question.chunk)
    for start in range(0, len(question), rows):
        piece = question[start : start + rows]
        batch = source.batch[slice(start, start + rows)].with_pixels(piece.values[0])
        active, chosen = _active(piece, model, placed, most)
        features = chosen.any(0).nonzero()[:, 0]
        if not len(features):
            found.append(active.new_zeros(len(piece), question.count))
            continue
        swept = effects(
            model, placed, batch, [source.target], features.tolist(), tokens="patch", image_batch=rows, pair_batch=pairs
        )
        lost = -swept.dense()[..., 0].T * chosen[:, features]
        active = active[..., features]
        share = active / active.sum(1, keepdim=True).clamp(min=torch.finfo(active.dtype).tiny)
        found.append(torch.einsum("rf,ref->re", lost.to(share), share))
    return torch.cat(found)


def graph_patches(
    question: Question,
    generator: torch.Generator,
    *,
    model: HookedVLM,
    transcoders: Sequence[Placed],
    budget: int = BUDGET,
) -> Float[Tensor, "row element"]:
    """Influence of every patch in the attribution graph of each image; not negative.

    A graph is built for every row, one after another: 0.2 to 0.4 seconds each for the bundled models.

    Args:
        question: about patches, of `model`.
        model, transcoders: what the graph is made with.
        budget: features whose causes are computed, best first.
    """
    from graphs.build import build_graph
    from graphs.frozen import freeze
    from graphs.nodes import NodeType

    source = _source(question, model, "graph_patches")
    batch, first = source.batch.with_pixels(question.values[0]), model.patch_tokens().start
    found = question.values[0].new_zeros(len(question), question.count)
    for row in range(len(question)):
        frozen = freeze(model, batch[row : row + 1], [output_of(model, source.target)])
        nodes = build_graph(frozen, transcoders, max_features=budget).nodes
        patches = nodes.is_type(NodeType.PATCH)
        found[row, nodes.pos[patches].long() - first] = nodes.influence[patches].to(found.dtype)
    return found


def _source(question: Question, model: HookedVLM, where: str) -> Source:
    if question.source is None or question.source.model is not model or question.kinds != ("patch",):
        raise UsageError("explains patches of the model it was made for", where=where)
    return question.source


def _active(
    question: Question, model: HookedVLM, placed: Placed, most: int
) -> tuple[Float[Tensor, "row element feature"], Bool[Tensor, "row feature"]]:
    """Activations at the patches, and which features are ablated in each image."""
    kept: dict[str, Tensor] = {}
    names = list(dict.fromkeys((str(placed.reads), str(placed.writes))))
    score = seen_inside(question, [(name, reader(kept)) for name in names])
    at, dictionary = model.patch_tokens(), placed.dictionary
    gradient = torch.autograd.grad(score.sum(), kept[str(placed.writes)])[0][:, at]
    with torch.no_grad():
        active = dictionary.encode(kept[str(placed.reads)].detach().to(dictionary.W_enc.dtype))[:, at]
        size = (active * (gradient.to(active.dtype) @ dictionary.W_dec.T)).sum(1).abs()
        rank = size.argsort(dim=1, descending=True, stable=True).argsort(1)
        return active, (rank < most) & (size > 0)
