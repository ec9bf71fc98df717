"""Explainers of rows as explainers of Questions whose elements are the columns of one table."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import UsageError
from mechinterp.explain.ask import about_function
from mechinterp.explain.question import ElementExplainer, Question
from mechinterp.explain.tabular import Function, TabularExplainer

__all__ = ["about_rows", "of_rows"]


def about_rows(f: Function, x: Float[Tensor, "row column"], reference: Float[Tensor, " column"]) -> Question:
    """Which columns does f rest on? Removed columns go to `reference`."""
    return about_function(f, x, reference, torch.arange(x.shape[1]))


def of_rows(explain: TabularExplainer) -> ElementExplainer:
    """An explainer of rows, asked through a Question. Raises UsageError for one that is not about columns."""

    def explained(question: Question, generator: torch.Generator) -> Float[Tensor, "row element"]:
        if question.kinds != ("column",):
            raise UsageError(f"elements are {question.kinds}", where="of_rows", hint="ask about the columns of a table")
        part = question.parts[0]
        # one reference serves all rows, as a TabularExplainer takes one
        return explain(lambda rows: question.function((rows,)), part.value, part.reference[0], generator)

    return explained
