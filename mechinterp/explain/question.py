"""What is asked of an explainer: a score, the inputs it depends on, and the elements that share the responsibility.

Patches of an image, words of a prompt, both together and columns of a table are one thing here: *elements* that divide
continuous inputs (`Part`), each of which can be set to its reference. An `ElementExplainer` gives every element a
number: `explain(question, generator) -> [row, element]`. Everything that the IQ metrics do (perturb, remove, inject) is
done to a Question, so that all explainers meet the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import UsageError
from mechinterp.models import HookedVLM
from mechinterp.types import ImageTextBatch, Target

__all__ = ["ElementExplainer", "Inner", "Kind", "Part", "Question", "Source"]

Kind = Literal["column", "patch", "word", "still"]  # still: no element, travels along
Values = tuple[Tensor, ...]
CHUNK = 256  # rows through the model at once


@dataclass(frozen=True)
class Part:
    """One continuous input and its division into elements.

    Args:
        kind: what its elements are.
        value: `[row, ...]`, as the model reads it.
        reference: what replaced elements become, same shape.
        owner: element of every position, -1 where there is none; broadcasts against `value[0]`. Elements are numbered
            over all parts of a question.
    """

    kind: Kind
    value: Float[Tensor, "row *shape"]
    reference: Float[Tensor, "row *shape"]
    owner: Int[Tensor, "*owner"]

    def __post_init__(self):
        if self.value.shape != self.reference.shape:
            raise UsageError(f"{tuple(self.reference.shape)} for values {tuple(self.value.shape)}", where="reference")

    def mixed(self, member: Float[Tensor, "n element"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n *shape"]:
        """The values of `rows`, each position kept by the weight of its element: 1 the value, 0 the reference."""
        weight = self.spread(member)
        value = self.value[rows]
        # not reference + w (value - reference): at weight 1 the value must come back to the last bit
        return value * weight + self.reference[rows] * (1 - weight)

    def spread(self, of_element: Float[Tensor, "n element"], rest: float = 1.0) -> Float[Tensor, "n *#shape"]:
        """A number per element at the positions it owns; `rest` where no element does. Broadcasts against values."""
        padded = torch.cat([of_element, of_element.new_full((len(of_element), 1), rest)], dim=1)
        found = padded[:, self.owner.flatten()].unflatten(1, self.owner.shape)
        missing = self.value.ndim - found.ndim
        return found.reshape(len(found), *(1,) * missing, *self.owner.shape)

    def gathered(self, relevance: Float[Tensor, "row *shape"], count: int) -> Float[Tensor, "row element"]:
        """Sums over the positions of each of `count` elements."""
        owner = self.owner.expand(relevance.shape[1:]).flatten()
        sums = relevance.new_zeros(len(relevance), count + 1)
        return sums.index_add_(1, owner.where(owner >= 0, count), relevance.flatten(1))[:, :count]


@runtime_checkable
class Inner(Protocol):
    """What Grad-CAM needs of a function that is not a HookedVLM."""

    def __call__(self, values: Values) -> tuple[Float[Tensor, "row element d"], Float[Tensor, " row"]]:
        """Features at the elements, part of the autograd graph of the scores, and the scores."""
        ...


@dataclass(frozen=True)
class Source:
    """The model, the batch and the target that a question was made of."""

    model: HookedVLM
    batch: ImageTextBatch
    target: Target


@dataclass(frozen=True)
class Question:
    """A score of some rows, as a function of parts that are divided into `count` elements.

    Args:
        parts: the inputs that are explained.
        function: `function(values) -> [n]`, values in the order of `parts`, any number of rows; differentiable.
        count: number of elements.
        names: of the elements.
        shape: rows and columns where all elements are patches of one grid.
        source: where it came from a HookedVLM; methods that read attention or features of a model need it.
        inner: features at the elements, for functions without a source.
        chunk: rows through `function` at once.
        fill: the name of what removed elements become, several joined by "+" (see `Removal`); "": nobody said.
    """

    parts: tuple[Part, ...]
    function: Callable[[Values], Float[Tensor, " n"]]
    count: int
    names: tuple[str, ...]
    shape: tuple[int, int] | None = None
    source: Source | None = None
    inner: Inner | None = None
    chunk: int = CHUNK
    fill: str = ""

    def __len__(self) -> int:
        return len(self.parts[0].value)

    def __getitem__(self, rows: slice | Int[Tensor, " n"]) -> Question:
        parts = tuple(replace(part, value=part.value[rows], reference=part.reference[rows]) for part in self.parts)
        source = self.source
        if source is not None:
            source = replace(source, batch=_rows(source.batch, rows))
        return replace(self, parts=parts, source=source)

    @property
    def values(self) -> Values:
        """The inputs as they are."""
        return tuple(part.value for part in self.parts)

    @property
    def eps(self) -> float:
        """To what the inputs, and with them scores and attributions, are rounded; whatever they are kept in later."""
        return float(torch.finfo(self.parts[-1].value.dtype).eps)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kind of every part."""
        return tuple(part.kind for part in self.parts)

    def at(self, values: Values) -> Question:
        """The same question about other inputs; references stay those of the old ones, row by row."""
        parts = tuple(replace(part, value=value) for part, value in zip(self.parts, values, strict=True))
        source = self.source
        if source is not None and self.parts[0].kind == "patch":
            source = replace(source, batch=source.batch.with_pixels(values[0]))
        return replace(self, parts=parts, source=source)

    def repeated(self, times: int) -> Question:
        """Every row `times` times in a row."""
        return self[torch.arange(len(self)).repeat_interleave(times)]

    def chunks(self) -> Iterator[Question]:
        """The question in pieces of at most `chunk` rows."""
        for start in range(0, len(self), self.chunk):
            yield self[start : start + self.chunk]

    @torch.no_grad()
    def score(self) -> Float[Tensor, " row"]:
        """The score of every row."""
        return torch.cat([self.function(part.values).detach() for part in self.chunks()])

    @torch.no_grad()
    def mixed(self, member: Float[Tensor, "n element"] | Bool[Tensor, "n element"], rows: Int[Tensor, " n"]) -> Tensor:
        """Scores `[n]` of `rows` with the elements outside `member` at their reference; weights in between mix."""
        weight = member.to(self.parts[0].value.dtype)
        if weight.shape != (len(rows), self.count):
            raise UsageError(f"{tuple(weight.shape)} for {len(rows)} rows of {self.count} elements", where="member")
        found = []
        for start in range(0, len(rows), self.chunk):
            here = slice(start, start + self.chunk)
            found.append(self.function(tuple(part.mixed(weight[here], rows[here]) for part in self.parts)))
        return torch.cat(found)

    def shared(self, member: Float[Tensor, "coalition element"] | Bool[Tensor, "coalition element"]) -> Tensor:
        """Scores `[row, coalition]` of the same coalitions for every row."""
        rows = torch.arange(len(self)).repeat_interleave(len(member))
        return self.mixed(member.repeat(len(self), 1), rows).view(len(self), len(member))

    def gradients(self, values: Values) -> tuple[Values, Float[Tensor, " n"]]:
        """Gradients of the scores with respect to every part, at any values, and the scores."""
        gradients: list[list[Tensor]] = [[] for _ in self.parts]
        scores = []
        for start in range(0, len(values[0]), self.chunk):
            leaves = tuple(v[start : start + self.chunk].detach().requires_grad_() for v in values)
            with torch.enable_grad():
                score = self.function(leaves)
                found = torch.autograd.grad(score.sum(), leaves, allow_unused=True)
            for kept, gradient, leaf in zip(gradients, found, leaves, strict=True):
                kept.append(torch.zeros_like(leaf) if gradient is None else gradient)
            scores.append(score.detach())
        return tuple(torch.cat(kept) for kept in gradients), torch.cat(scores)

    def gathered(self, relevance: Values) -> Float[Tensor, "row element"]:
        """Sums of position-wise relevance over the elements of all parts."""
        return sum(
            (part.gathered(r, self.count) for part, r in zip(self.parts, relevance, strict=True)),
            start=relevance[0].new_zeros(len(relevance[0]), self.count),
        )


@runtime_checkable
class ElementExplainer(Protocol):
    """What every explainer is, seen from the metrics: a number for every row and element."""

    def __call__(self, question: Question, generator: torch.Generator) -> Float[Tensor, "row element"]:
        """Attribution of the score to the elements; all randomness from `generator`."""
        ...


def _rows(batch: ImageTextBatch, rows: slice | Int[Tensor, " n"]) -> ImageTextBatch:
    return batch[rows]
