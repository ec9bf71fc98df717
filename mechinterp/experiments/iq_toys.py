"""What iq-image and iq-text share: toy models with a slot that meant nothing in training, and trials on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mechinterp.experiments.iq_judges import Judges
from mechinterp.experiments.iq_references import Second, explained_to
from mechinterp.experiments.iq_study import PLAIN, TREATMENTS, Study, arms, shuffled, trial
from mechinterp.explain.bounds import Check
from mechinterp.explain.inject import Injected, Scale, injected
from mechinterp.explain.methods import ELEMENT_METHODS, Method, applies
from mechinterp.explain.question import ElementExplainer, Question
from mechinterp.progress import progress

__all__ = [
    "ANCHORS",
    "CIRCULAR",
    "Sizes",
    "Toy",
    "TrainingSet",
    "dealt",
    "explainers_for",
    "fit",
    "following",
    "toy_study",
]

ANCHORS = ("random", "constant", "centre", "edges", "echo", "oracle")
CIRCULAR = ("occlusion",)  # removes single elements, as F does, though with another fill
SAMPLES = 64  # of LIME, KernelSHAP and RISE: the toys have about 16 elements
FEW = ("lime", "integrated_gradients", "occlusion", "grad_cam", "random", "oracle")


@dataclass(frozen=True)
class Sizes:
    """How much of everything; `few` takes a handful of explainers."""

    rows: int = 16
    seeds: int = 6
    draws: int = 30
    steps: int = 600
    psi: tuple[float, ...] = (0.2, 0.5, 0.8)
    few: bool = False


TrainingSet = Callable[[int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Toy:
    """A trained model and rows of it to explain.

    Args:
        question: the rows, with the references that explainers use.
        judges: the same with other references, with which F is scored.
        slot: the element that is injected.
        scale: of the output over `question`.
        skill: share of unseen rows classified rightly.
        second: the same rows with another reference for the explainers, and who judges F then.
    """

    question: Question
    judges: Judges
    slot: int
    scale: Scale
    skill: float
    second: Second


Inject = Callable[[Toy, Question, int], Injected]
"""The toy, rows and copies to inject into, a seed."""


def following(psi: float) -> Inject:
    """The slot set to psi * z + noise (see `injected`)."""
    return lambda toy, near, seed: injected(near, (toy.slot,), psi, toy.scale, seed)


def dealt(psi: float) -> Inject:
    """The same values, shuffled over inputs: the control."""
    return lambda toy, near, seed: shuffled(near, (toy.slot,), psi, toy.scale, seed)


def fit(net: nn.Module, draw: TrainingSet, seed: int, steps: int, batch: int = 96, rate: float = 3e-3) -> None:
    """Adam on fresh examples at every step, binary cross-entropy."""
    generator = torch.Generator().manual_seed(50_000 + seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, label = draw(batch, generator)
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(net(x), label).backward()
        optimizer.step()
        schedule.step()
    net.requires_grad_(False)


def explainers_for(question: Question, few: bool = False) -> dict[str, ElementExplainer]:
    """Every method that can answer the question, by name (a handful, if `few`); those that sample take few samples."""
    found = {}
    for name, method in ELEMENT_METHODS.items():
        if (name in FEW or not few) and applies(method, question):
            found[name] = _fewer(method)
    return found


def _fewer(method: Method) -> ElementExplainer:
    if method.built_from != "subset_fill":
        return method.explain
    return lambda question, generator: method.explain(question, generator, samples=SAMPLES)  # type: ignore[call-arg]


def toy_study(
    toys: Sequence[Toy],
    conditions: Mapping[str, Inject | None],
    treated: Sequence[str],
    explainers: Mapping[str, ElementExplainer],
    draws: int,
    seed: int,
    twice: Sequence[str] = (),
) -> Study:
    """Every explainer on every toy under every condition; treatments only where `treated` names the condition.

    Conditions in `twice` are measured once more with the toy's second reference (see `explained_to`), untreated.
    """
    study = Study()
    for t, toy in enumerate(progress(toys, "models", unit="model")):
        check = Check(seed=seed + t)
        for condition, inject in conditions.items():
            treatments = (PLAIN, *TREATMENTS) if condition in treated else (PLAIN,)
            wanted = arms(explainers, treatments, check, toy.scale.sd)

            def change(near: Question, inject=inject, toy=toy, t=t) -> Injected:
                if inject is None:
                    return Injected(near, torch.zeros(len(near)), toy.scale.sd)
                return inject(toy, near, seed + 7 * t + 1)

            study.add(trial(condition, toy.question, wanted, toy.judges, change, (toy.slot,), draws, seed=seed + t))
            if condition in twice:
                again, name = toy.second, explained_to(condition, toy.second.name)
                plain, at = arms(explainers, (PLAIN,)), (toy.slot,)
                study.add(
                    trial(name, again.question, plain, again.judges, change, at, draws, seed=seed + t, own_fill=False)
                )
    return study
