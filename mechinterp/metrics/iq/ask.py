"""Measure explainers of a Question: perturb it, explain all copies at once, remove elements one by one.

The perturbation is that of `iq-reading-1` for blocks: every element gets one normal number eps_j and its values become
value * (1 + noise * eps_j), so that the embedding of a patch or a word moves by `noise` of its norm. An element whose
size is below a floor moves as if it had the floor's size.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import UsageError
from mechinterp.explain.question import ElementExplainer, Question
from mechinterp.explain.shake import shaken
from mechinterp.metrics.iq.measure import DRAWS, NOISE
from mechinterp.metrics.iq.scores import Measurement

__all__ = ["Bench", "effects_of", "measure_question", "perturbed", "stage", "staged"]

SMALL = 1e-2  # of the largest effect of a row: on a trained model, nothing is exactly without effect


def perturbed(question: Question, draws: int = DRAWS, noise: float = NOISE, seed: int = 0) -> Question:
    """Every row followed by `draws` perturbed copies of it: `row * (1 + draws)` rows. References stay those of x."""
    return shaken(question, draws, noise, torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Bench:
    """One set of inputs on which explainers are compared: the same rows, draws and removals for all of them.

    Args:
        near: rows and their perturbed copies (see `perturbed`).
        output: `[row, 1 + draw]`; x first.
        effect: `[row, 1 + draw, element]` or, without co-movement, `[row, 1, element]`.
        tolerance: see Measurement.
    """

    near: Question
    output: Float[np.ndarray, "row copy"]
    effect: Float[np.ndarray, "row effects element"]
    tolerance: float = SMALL

    def explain(self, explain: ElementExplainer, seed: int = 0) -> tuple[Float[np.ndarray, "row copy element"], float]:
        """Attributions at all copies, explained in one call, and the seconds it took for each."""
        start = time.perf_counter()
        found = explain(self.near, torch.Generator().manual_seed(seed))
        seconds = (time.perf_counter() - start) / len(self.near)
        return _numpy(found).reshape(*self.output.shape, self.near.count), seconds

    def measurement(self, attributions: Float[np.ndarray, "row copy element"]) -> Measurement:
        """What `iq` scores, of attributions at all copies."""
        return Measurement(
            attributions[:, 0],
            self.output[:, 0],
            attributions[:, 1:],
            self.output[:, 1:],
            self.effect[:, 0],
            self.effect[:, 1:] if self.effect.shape[1] > 1 else None,
            self.tolerance,
            self.near.eps,
        )


def stage(
    question: Question,
    judge: Question | None = None,
    draws: int = DRAWS,
    noise: float = NOISE,
    seed: int = 0,
    tolerance: float = SMALL,
    co_movement: bool = True,
) -> Bench:
    """Inputs, outputs and removal effects for a comparison.

    Args:
        question: about some rows; its references are those that explainers use.
        judge: the same question with other references, for the effects that F compares with; default the question. An
            explainer that removes elements must not be judged by its own removal.
        draws, noise: of the perturbation.
        seed: of the perturbation.
        tolerance: share of a row's largest effect below which an element has none (R_null).
        co_movement: whether effects are also measured at the perturbed inputs, which R_excess needs. Without it the
            cost falls by `draws` times the elements.

    Raises UsageError when `judge` is about other inputs.
    """
    near = perturbed(question, draws, noise, seed)
    return staged(near, len(question), judge, tolerance, co_movement)


def staged(
    near: Question, rows: int, judge: Question | None = None, tolerance: float = SMALL, co_movement: bool = True
) -> Bench:
    """A Bench of copies that stand already: `near` holds `rows` groups, the unperturbed copy first in each."""
    copies = len(near) // rows
    removing = near
    if judge is not None:
        if judge.count != near.count or len(judge) != rows:
            raise UsageError(f"{len(judge)} rows of {judge.count} elements, not {rows} of {near.count}", where="judge")
        removing = judge.repeated(copies).at(near.values)
    output = _numpy(near.score()).reshape(rows, copies)
    if not co_movement:
        removing = removing[torch.arange(rows) * copies]
    effect = effects_of(removing)
    return Bench(near, output, _numpy(effect).reshape(rows, -1, near.count), tolerance)


def effects_of(question: Question) -> Float[Tensor, "row element"]:
    """What setting each element alone to its reference takes from the score."""
    without = question.shared(~torch.eye(question.count, dtype=torch.bool))
    return question.score()[:, None] - without


def measure_question(
    question: Question,
    explainers: Mapping[str, ElementExplainer],
    judge: Question | None = None,
    draws: int = DRAWS,
    noise: float = NOISE,
    seed: int = 0,
) -> dict[str, Measurement]:
    """A Measurement for each explainer, on the same rows, draws and removals."""
    bench = stage(question, judge, draws, noise, seed)
    return {name: bench.measurement(bench.explain(explain, seed)[0]) for name, explain in explainers.items()}


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().double().cpu().numpy()
