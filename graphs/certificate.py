"""Does a graph add up? For every row: pre-activation minus constant against the sum of its in-edges.

The pre-activations are those of the model's own forward pass, so one number finds a pattern or scale that was not held,
a forgotten bias or position, a wrong hook point, and a mistake in the sweep.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from graphs.graph import AttributionGraph
from graphs.nodes import NodeType
from mechinterp.errors import MechInterpError

__all__ = ["LIMITS", "Certificate", "CertificateError", "Residuals", "certify", "relative_residuals"]

LIMITS = {"float32": 1e-5, "float64": 1e-10}
"""Largest relative residual that is let through, by dtype."""


class CertificateError(MechInterpError):
    """A graph whose rows do not add up: what is said to be held on this input is not."""


@dataclass(frozen=True)
class Residuals:
    """Residuals of the rows of one node type: largest and median relative, largest absolute, number of rows."""

    max_relative: float
    median_relative: float
    max_absolute: float
    rows: int


@dataclass(frozen=True)
class Certificate:
    """The residuals of a graph by type of target, the largest of all, the node it stands at, and the limit."""

    features: Residuals | None
    outputs: Residuals
    max_relative_residual: float
    worst: str
    limit: float

    @property
    def holds(self) -> bool:
        """Whether every row adds up within the limit. A residual that is not a number does not."""
        return self.max_relative_residual <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self), "holds": self.holds}


def relative_residuals(
    graph: AttributionGraph, residuals: Float[Tensor, " target"] | None = None
) -> Float[Tensor, " target"]:
    """`|row sum + rest + constant - pre| / scale` of each row, in float64.

    The scale of a feature is `|pre - constant|`, or the root mean square of that over the expanded features of its
    layer and tower where it is larger: a feature close to zero is held to its layer's size. (The sum of absolute
    in-edges would flatter a row with much cancellation.) The scale of an output is `|value - constant|`, or where it is
    larger what a random direction of its length would read in that stream (`meta["output_scales"]`): two logits may be
    equal.
    """
    nodes = graph.nodes
    size = (nodes.pre[graph.targets].double() - nodes.constant[graph.targets].double()).abs()
    is_output = nodes.type[graph.targets] == int(NodeType.OUTPUT)
    level = nodes.tower[graph.targets].long() * 2**16 + nodes.layer[graph.targets].long()
    _, group = level.unique(return_inverse=True)
    n_groups = int(group.max()) + 1 if len(group) else 0
    total = torch.zeros(n_groups, dtype=torch.float64).index_add_(0, group, torch.where(is_output, 0, size**2))
    count = torch.zeros(n_groups, dtype=torch.float64).index_add_(0, group, (~is_output).double())
    typical = (total / count.clamp_min(1)).sqrt()[group]
    typical[is_output] = 0.0
    for output, scale in zip(graph.outputs, graph.meta.get("output_scales", []), strict=False):
        typical[graph.row_of[output.node]] = float(scale)
    scale = torch.maximum(size, typical).clamp_min(torch.finfo(torch.float64).tiny)
    return (graph.residuals() if residuals is None else residuals).abs() / scale


def certify(graph: AttributionGraph, limit: float | None = None) -> Certificate:
    """Measure a graph. `limit`: default by the dtype of its edges.

    Raises CertificateError, naming the worst row, when the graph does not add up.
    """
    if limit is None:
        limit = LIMITS[str(graph.rest.dtype).removeprefix("torch.")]
    residuals = graph.residuals()
    relative, absolute = relative_residuals(graph, residuals), residuals.abs()
    is_output = graph.nodes.type[graph.targets] == int(NodeType.OUTPUT)

    def summary(rows: Tensor) -> Residuals:
        found = relative[rows]
        return Residuals(float(found.max()), float(found.median()), float(absolute[rows].max()), int(rows.sum()))

    worst = int(torch.where(relative.isnan(), torch.inf, relative).argmax())
    certificate = Certificate(
        features=None if is_output.all() else summary(~is_output),
        outputs=summary(is_output),
        max_relative_residual=float(relative[worst]),
        worst=graph.nodes.ids[int(graph.targets[worst])],
        limit=limit,
    )
    if not certificate.holds:
        node = graph.nodes[int(graph.targets[worst])]
        raise CertificateError(
            f"its in-edges and constant sum to {node.pre + float(residuals[worst]):.9g}, "
            f"the model says {node.pre:.9g}: relative residual {certificate.max_relative_residual:.2g} > {limit:g}",
            where=node.id,
            hint="something that is said to be held is not, or a part is missing; `mechinterp doctor` checks a model",
        )
    return certificate
