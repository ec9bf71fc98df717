"""How far a map moves when the input hardly does (Yeh et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mechinterp.explain.question import ElementExplainer, Question
from mechinterp.metrics.scored import Scored, ScoreStatus, flat, numpy_of

__all__ = ["Sensitivity", "sensitivity"]

RADIUS, DRAWS = 0.02, 10


@dataclass(frozen=True)
class Sensitivity:
    """Greatest and mean relative move of the map over the draws. Low is called good, and a constant map is perfect at
    it: it has a status instead."""

    greatest: Scored
    mean: Scored


def sensitivity(
    question: Question,
    explain: ElementExplainer,
    radius: float = RADIUS,
    draws: int = DRAWS,
    seed: int = 0,
    noise: tuple[Tensor, ...] | None = None,
) -> Sensitivity:
    """|explain(x + d) - explain(x)| / |explain(x)| in L2, d uniform in the L-infinity ball (Yeh et al. 2019, eq. 3).

    Their definition has no denominator; captum's has it, so that maps in other units can be compared. These scores do
    not flag random maps as such: a random map that repeats its draw for every input has sensitivity 0.

    Args:
        radius: of the ball, in the units of the input (preprocessed pixels, embeddings); 0.02 is captum's default.
        draws: inputs tried around each row. One call explains them all, so sampled coalitions are shared where the
            explainer shares them.
        noise: the d of each part, `[row * draw, ...]` with the draws of a row in a row, in place of random ones.
    """
    generator = torch.Generator().manual_seed(seed)
    many = question.repeated(draws + 1)
    values = []
    for at, (part, value) in enumerate(zip(many.parts, many.values, strict=True)):
        rows = value.unflatten(0, (len(question), draws + 1)).clone()
        if part.kind != "still":
            moved = rows[:, 1:]
            d = noise[at] if noise is not None else radius * (2 * _uniform(moved, generator) - 1)
            rows[:, 1:] = moved + d.reshape(moved.shape)
        values.append(rows.flatten(0, 1))
    a = numpy_of(explain(many.at(tuple(values)), generator)).reshape(len(question), draws + 1, -1)
    size = np.linalg.norm(a[:, 0], axis=1)
    moved = np.linalg.norm(a[:, 1:] - a[:, :1], axis=2)
    relative = np.divide(moved, size[:, None], out=np.full(moved.shape, np.nan), where=size[:, None] > 0)
    broken: dict[ScoreStatus, np.ndarray] = {
        "nonfinite": np.any(~np.isfinite(a), axis=(1, 2)),
        "const_attr": flat(a[:, 0], question.eps),
    }
    return Sensitivity(Scored.of(relative.max(1), broken), Scored.of(relative.mean(1), broken))


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=like.dtype)
