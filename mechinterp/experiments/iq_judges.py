"""Who may judge F in the IQ experiments, and which of RBP's perturbations leave the prediction as it was.

A judge is the explained rows with other references. It is compared with the explainers' question by value and refused
where it removes to the same thing: bounds, occlusion, LIME, KernelSHAP and Shapley values are made of such removals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mechinterp.explain.inject import GATE
from mechinterp.explain.question import Question
from mechinterp.explain.rbp import NOISE, PERTURBATIONS
from mechinterp.explain.shake import shaken
from mechinterp.metrics.faithfulness import Removal, check_held_out

__all__ = ["OWN_FILL", "RBP_SAME", "Judges", "by", "check_judges", "left_out", "left_out_note"]

RBP_SAME = "RBP, prediction unchanged"
OWN_FILL = "the explainers' own fill"
Judges = Mapping[str, Question]
"""The explained rows with other references than the explainers', by the name of the reference; the first leads."""


def by(column: str, judge: str) -> str:
    """The name of a score by another judge than the first."""
    return f"{column} by {judge}"


def check_judges(question: Question, judges: Judges) -> None:
    """Raise UsageError for a judge that removes, in any part and row, to what the explainers remove to.

    References are compared by value: a judge under another name is no other judge. Without any judge, F would be by
    the explainers' own reference, so that is refused too.
    """
    own = "own reference"
    for name, judge in (judges or {"none": question}).items():
        fills = []
        for ours, theirs in zip(question.parts, judge.parts, strict=True):
            same = (ours.reference == theirs.reference).flatten(1).all(1).any() and ours.kind != "still"
            fills.append(own if same else name)
        check_held_out(f"judge {name}", "subset_fill", Removal(own), Removal("+".join(fills)))


def left_out(question: Question, sd: float, seed: int = 0, noise: float = NOISE) -> float:
    """Share of RBP's perturbations of the rows that move the output by more than GATE times `sd`."""
    near = shaken(question, PERTURBATIONS, noise, torch.Generator().manual_seed(seed))
    y = near.score().view(len(question), 1 + PERTURBATIONS)
    return float(((y[:, 1:] - y[:, :1]).abs() > GATE * sd).double().mean())


def left_out_note(asked: Sequence[tuple[Question, float]], seed: int) -> str:
    """What a tolerance would leave out, for each model's question and the sd of its output."""
    share = np.mean([left_out(question, sd, seed + i) for i, (question, sd) in enumerate(asked)])
    return (
        f"'{RBP_SAME}' leaves out perturbations that move the output by over {GATE:g} sd, {share:.0%} of all here "
        "(without injection); the other forms of RBP use all three, as the published description does."
    )
