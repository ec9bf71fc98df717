"""Random weights in a model, stage by stage from the head down, and the old ones back to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor, nn

from mechinterp.errors import UsageError
from mechinterp.models import HookedVLM
from mechinterp.models.tables import Classifier, Dual, Features, Generative
from mechinterp.models.wiring import find

__all__ = ["Stage", "Weights", "randomising", "stages"]


@dataclass(frozen=True)
class Stage:
    """One step of the cascade: its name and the names of its parameters in the transformers model."""

    name: str
    parameters: tuple[str, ...]


def stages(model: HookedVLM, tower: str = "vision") -> tuple[Stage, ...]:
    """The stages of a tower from its head down: head, blocks from the last to the first, embeddings.

    "Head" is what the tower feeds alone (final norm, pooling, projection, classifier, language-model head; for the
    vision tower of a generative model its projector). Every parameter of the tower is in exactly one stage; a scalar
    such as the logit scale is in none, as it only stretches the score. Weights that two modules share are in the first.

    Raises UsageError for a tower that the model lacks.
    """
    blocks = model.blocks(tower)
    names = {id(p): name for name, p in model.hf.named_parameters()}
    seen: set[int] = set()

    def stage(name: str, *modules: nn.Module) -> Stage:
        found = [p for module in modules for p in module.parameters() if id(p) not in seen and p.ndim > 0]
        found = list({id(p): p for p in found}.values())
        seen.update(map(id, found))
        return Stage(name, tuple(names[id(p)] for p in found))

    root = find(model.hf, model.table.towers[tower].module)
    below = [stage(f"block {layer}", block) for layer, block in reversed(list(enumerate(blocks)))]
    embeddings = [m for n, m in root.named_children() if "embed" in n or n.startswith("pre_")]
    # the head is named before the embeddings, so that a tied matrix is randomised with it
    head = stage("head", *_head(model, tower), *(m for m in root.children() if not _holds(m, blocks, embeddings)))
    rest = stage("embeddings", root)
    return tuple(s for s in (head, *below, rest) if s.parameters)


class Weights:
    """The weights of a model while they are being randomised."""

    def __init__(self, model: HookedVLM, seed: int):
        self._parameters = dict(model.hf.named_parameters())
        self._kept: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def randomise(self, stage: Stage) -> None:
        """Draw the stage's matrices from a normal with their own mean and deviation; shuffle its vectors.

        So a random network is of the size of the trained one: with the weights of a fresh initialisation activations
        may fade, and a map could change for that alone. Written in place, so that what the model kept is dropped.
        """
        for name in stage.parameters:
            p = self._parameters[name]
            self._kept.setdefault(name, p.detach().clone())
            values = self._kept[name]
            if p.ndim > 1:
                drawn = torch.randn(p.shape, generator=self._generator).to(p)
                p.copy_(values.mean() + values.std() * drawn)
            else:
                p.copy_(values[torch.randperm(len(values), generator=self._generator).to(p.device)])

    @torch.no_grad()
    def restore(self) -> None:
        """Every bit back."""
        for name, value in self._kept.items():
            self._parameters[name].copy_(value)
        self._kept.clear()


@contextmanager
def randomising(model: HookedVLM, seed: int = 0) -> Iterator[Weights]:
    """`with randomising(model) as weights: weights.randomise(stage)`; on the way out, error or not, all is restored."""
    weights = Weights(model, seed)
    try:
        yield weights
    finally:
        weights.restore()


def _head(model: HookedVLM, tower: str) -> list[nn.Module]:
    hf, head = model.hf, model.table.head
    match head:
        case Dual():
            name = {"vision": "visual_projection", "text": "text_projection"}[tower]
            return [getattr(hf, name)] if hasattr(hf, name) else []
        case Generative():
            return [hf.lm_head] if tower == "text" else [find(hf, head.projector)]
        case Classifier():
            return [find(hf, head.module)]
        case Features():
            raise UsageError(f"a {model.family} model gives no score to explain", where="stages")
        case _:
            assert_never(head)


def _holds(module: nn.Module, *others: object) -> bool:
    """Whether the module is, or contains, one of the others."""
    wanted = {id(m) for group in others for m in group}  # type: ignore[attr-defined]
    return any(id(m) in wanted for m in module.modules())
