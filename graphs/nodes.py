"""The nodes of an attribution graph: one struct of arrays, the only owner of node order.

Sources stand before the targets that read them (inputs and biases of a tower, then layer by layer, outputs last), so an
edge always goes from a smaller to a larger index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int, Int16, Int32, UInt8
from torch import Tensor

from mechinterp.errors import UsageError

__all__ = ["N_TYPES", "Node", "NodeTable", "NodeType", "node_id"]


class NodeType(IntEnum):
    """What a node is. Only outputs and features have in-edges."""

    OUTPUT = 0
    """A number that the model says: a logit, a contrast, a similarity, the pre-activation of a chosen feature."""
    FEATURE = 1
    """An active latent of a dictionary at one layer and position."""
    ERROR = 2
    """What the dictionary of a layer failed to explain at one position."""
    PATCH = 3
    """The content of one image patch."""
    TOKEN = 4
    """A word embedding."""
    POSITION = 5
    """A learned position embedding."""
    CLS = 6
    """The learned class token."""
    BIAS = 7
    """Everything constant that a layer (or the projector) adds to the stream, at all positions together."""


N_TYPES = len(NodeType)
COLUMNS = ("type", "tower", "layer", "pos", "feature", "activation", "pre", "constant", "influence", "effect")
"""The columns of a table, in the order in which they are written."""


@dataclass(frozen=True)
class Node:
    """One row of a NodeTable, as plain Python values."""

    index: int
    id: str
    label: str
    type: NodeType
    tower: str
    layer: int
    pos: int
    feature: int
    activation: float
    pre: float
    constant: float
    influence: float
    effect: float


@dataclass(frozen=True, eq=False)
class NodeTable:
    """Columns over the nodes of one graph; the float columns share one dtype.

    Args:
        type: NodeType of each node.
        tower: index into `towers`.
        layer: block that a feature, error or bias belongs to; -1 for inputs and what enters block 0, the number of
            blocks for outputs.
        pos: token position in its tower, -1 where a node has none.
        feature: latent of the layer's dictionary, -1 where a node is no feature.
        activation: of a feature its activation, of an output its value, 0 elsewhere.
        pre: of a feature its pre-activation in the true forward, of an output its value, 0 elsewhere.
        constant: the part of `pre` that depends on no other node; `pre - constant` is the sum of the in-edges.
        influence: share of the outputs that passes through a node (0 until it is computed).
        effect: signed total effect on the weighted outputs in the graph that this one was pruned from (0 until then).
        towers: names of the towers, such as "vision", "projector", "text".
        ids: unique names, such as "vision.L2.P17.F301".
        labels: what a person reads.
    """

    type: UInt8[Tensor, " node"]
    tower: Int16[Tensor, " node"]
    layer: Int16[Tensor, " node"]
    pos: Int32[Tensor, " node"]
    feature: Int32[Tensor, " node"]
    activation: Float[Tensor, " node"]
    pre: Float[Tensor, " node"]
    constant: Float[Tensor, " node"]
    influence: Float[Tensor, " node"]
    effect: Float[Tensor, " node"]
    towers: tuple[str, ...]
    ids: tuple[str, ...]
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        n = len(self.ids)
        wrong = [name for name in COLUMNS if getattr(self, name).shape != (n,)]
        if wrong or len(self.labels) != n:
            raise UsageError(f"columns {wrong or ['labels']} do not have {n} rows", where="NodeTable")
        if len(set(self.ids)) != n:
            seen: set[str] = set()
            twice = next(name for name in self.ids if name in seen or seen.add(name))
            raise UsageError(f"two nodes are called {twice!r}", where="NodeTable.ids")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Node:
        return Node(
            index=index,
            id=self.ids[index],
            label=self.labels[index],
            type=NodeType(int(self.type[index])),
            tower=self.towers[int(self.tower[index])],
            layer=int(self.layer[index]),
            pos=int(self.pos[index]),
            feature=int(self.feature[index]),
            activation=float(self.activation[index]),
            pre=float(self.pre[index]),
            constant=float(self.constant[index]),
            influence=float(self.influence[index]),
            effect=float(self.effect[index]),
        )

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.ids)}

    def index(self, name: str) -> int:
        """Row of the node called `name`. Raises UsageError when there is none."""
        found = self._index.get(name)
        if found is None:
            raise UsageError(f"no node is called {name!r}", where="NodeTable", hint="ids look like vision.L2.P17.F301")
        return found

    def __contains__(self, name: str) -> bool:
        return name in self._index

    def is_type(self, *types: NodeType) -> Bool[Tensor, " node"]:
        """Mask of the nodes of any of these types."""
        return torch.isin(self.type, torch.tensor([int(t) for t in types], dtype=torch.uint8))

    def take(self, rows: Int[Tensor, " kept"]) -> NodeTable:
        """The table of these rows, in this order."""
        picked = rows.tolist()
        columns = {name: getattr(self, name)[rows] for name in COLUMNS}
        names = {
            "ids": tuple(self.ids[i] for i in picked),
            "labels": tuple(self.labels[i] for i in picked),
        }
        return replace(self, **columns, **names)

    def with_influence(self, influence: Float[Tensor, " node"]) -> NodeTable:
        """The same table with this influence."""
        return replace(self, influence=influence.to(self.activation.dtype))

    def with_effect(self, effect: Float[Tensor, " node"]) -> NodeTable:
        """The same table with this total effect."""
        return replace(self, effect=effect.to(self.activation.dtype))

    def with_labels(self, labels: Mapping[str, str] | Sequence[str]) -> NodeTable:
        """The same table with other labels: one for each node, or a mapping from ids. Raises UsageError otherwise."""
        if not isinstance(labels, Mapping):
            return replace(self, labels=tuple(labels))
        changed = list(self.labels)
        for name, label in labels.items():
            changed[self.index(name)] = label
        return replace(self, labels=tuple(changed))

    def equal(self, other: NodeTable) -> bool:
        """Whether every column, name and label is the same, to the bit."""
        return all(
            torch.equal(mine, theirs) and mine.dtype == theirs.dtype if isinstance(mine, Tensor) else mine == theirs
            for mine, theirs in ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        )


def node_id(kind: NodeType, tower: str, layer: int = -1, pos: int = -1, feature: int = -1) -> str:
    """The name of a node. No two nodes of different kinds share one, which circuit-tracer's names do."""
    match kind:
        case NodeType.FEATURE:
            return f"{tower}.L{layer}.P{pos}.F{feature}"
        case NodeType.ERROR:
            return f"{tower}.err.L{layer}.P{pos}"
        case NodeType.PATCH:
            return f"{tower}.patch.{pos}"
        case NodeType.TOKEN:
            return f"{tower}.tok.{pos}"
        case NodeType.POSITION:
            return f"{tower}.pos.{pos}"
        case NodeType.CLS:
            return f"{tower}.cls"
        case NodeType.BIAS:
            if tower == "projector":
                return "projector.bias"
            return f"{tower}.bias.{'input' if layer < 0 else f'L{layer}'}"
        case NodeType.OUTPUT:
            return f"out.{feature}"
