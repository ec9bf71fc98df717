"""Where each source stands in the node table: made once, used by the sweep and by the builder."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from graphs.frozen.parts import Stack
from graphs.nodes import NodeTable, NodeType, node_id
from graphs.replace import Replacement

__all__ = ["INPUT_TYPES", "Layout"]

INPUT_TYPES = {
    "patch": NodeType.PATCH,
    "token": NodeType.TOKEN,
    "cls": NodeType.CLS,
    "pos": NodeType.POSITION,
    "bias": NodeType.BIAS,
}
"""Node type of each kind of summand of a stack's input, in node order."""


@dataclass
class _Rows:
    """Columns of a table that is being filled."""

    dtype: torch.dtype
    kinds: list[int] = field(default_factory=list)
    towers: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    pos: list[int] = field(default_factory=list)
    features: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    scalars: list[tuple[int, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def add(
        self,
        kind: NodeType,
        tower: tuple[int, str],
        layer: int,
        pos: list[int],
        labels: list[str],
        features: list[int] | None = None,
        ids: list[str] | None = None,
    ) -> int:
        """Append nodes of one kind; the index of the first."""
        start = len(self.ids)
        n = len(pos)
        features = features or [-1] * n
        self.kinds += [int(kind)] * n
        self.towers += [tower[0]] * n
        self.layers += [layer] * n
        self.pos += pos
        self.features += features
        self.ids += ids or [node_id(kind, tower[1], layer, p, f) for p, f in zip(pos, features, strict=True)]
        self.labels += labels
        return start

    def table(self, towers: tuple[str, ...]) -> NodeTable:
        """The table."""
        n = len(self.ids)
        activation, pre, constant = (torch.zeros(n, dtype=self.dtype) for _ in range(3))
        for start, *values in self.scalars:
            for column, value in zip((activation, pre, constant), values, strict=True):
                column[start : start + len(value)] = value
        return NodeTable(
            type=torch.tensor(self.kinds, dtype=torch.uint8),
            tower=torch.tensor(self.towers, dtype=torch.int16),
            layer=torch.tensor(self.layers, dtype=torch.int16),
            pos=torch.tensor(self.pos, dtype=torch.int32),
            feature=torch.tensor(self.features, dtype=torch.int32),
            activation=activation,
            pre=pre,
            constant=constant,
            influence=torch.zeros(n, dtype=self.dtype),
            effect=torch.zeros(n, dtype=self.dtype),
            towers=towers,
            ids=tuple(self.ids),
            labels=tuple(self.labels),
        )


class Layout:
    """The node table of a replacement, and where its parts begin.

    Order: for each stack the projector's bias, inputs (patch, token, cls, pos, bias), then for each block its bias, its
    errors by position, its features by position and latent; outputs last.

    Attributes:
        nodes: the table.
        bridge_bias: node of the projector's bias, by stack.
        inputs: first node of each kind of input, by (stack, kind).
        bias: node of each block's bias, by (stack, layer).
        errors: first error node of each level; features: its feature nodes.
        outputs: first output node.
        stack_of: number of the stack that each node belongs to.
    """

    def __init__(self, replacement: Replacement):
        frozen = replacement.frozen
        rows = _Rows(replacement.dtype)
        towers: list[str] = []
        self.bridge_bias: dict[int, int] = {}
        self.inputs: dict[tuple[int, str], int] = {}
        self.bias: dict[tuple[int, int], int] = {}
        self.errors: dict[tuple[int, int], int] = {}
        self.features: dict[tuple[int, int], range] = {}
        self.causal = [stack.causal for stack in frozen.stacks]
        self.bridged_from = {n: s.bridge_from for n, s in enumerate(frozen.stacks) if s.bridge_from is not None}
        self.sae_layers = list(replacement.levels) if replacement.mode == "sae" else None
        self.chain_start: list[int] = []
        bounds = []
        for number, stack in enumerate(frozen.stacks):
            bounds.append(len(rows.ids))
            below = self.bridged_from.get(number)
            self.chain_start.append(len(rows.ids) if below is None else self.chain_start[below])
            if stack.bridge is not None:
                towers.append(stack.bridge.name)
                tower = (len(towers) - 1, stack.bridge.name)
                self.bridge_bias[number] = rows.add(NodeType.BIAS, tower, -1, [-1], [f"{stack.bridge.name} bias"])
            towers.append(stack.tower)
            tower = (len(towers) - 1, stack.tower)
            self._inputs(rows, number, stack, tower)
            for block in stack.blocks:
                self._block(rows, number, stack, block.layer, tower, replacement)
        self.outputs = len(rows.ids)
        for k, readout in enumerate(frozen.readouts):
            stack = frozen.stacks[readout.stack]
            tower = (towers.index(stack.tower), stack.tower)
            read = readout.seed.abs().sum(-1).nonzero()[:, 0].tolist()
            pos = read[0] if len(read) == 1 else -1
            rows.add(NodeType.OUTPUT, tower, len(stack.blocks), [pos], [readout.name], ids=[f"out.{k}"])
            value, constant = (torch.tensor([v], dtype=replacement.dtype) for v in (readout.value, readout.constant))
            rows.scalars.append((self.outputs + k, value, value, constant))
        self.nodes = rows.table(tuple(towers))
        ends = [*bounds[1:], self.outputs]
        counts = torch.tensor([end - start for start, end in zip(bounds, ends, strict=True)])
        of_outputs = torch.tensor([r.stack for r in frozen.readouts], dtype=torch.long)
        self.stack_of = torch.cat([torch.arange(len(counts)).repeat_interleave(counts), of_outputs])
        self._by_pos: dict[tuple[int, int], Int[np.ndarray, " source"]] = {}

    def _inputs(self, rows: _Rows, number: int, stack: Stack, tower: tuple[int, str]) -> None:
        for kind, of_type in INPUT_TYPES.items():
            if kind not in stack.inputs.kinds:
                continue
            pos = [-1] if kind == "bias" else stack.inputs.kinds[kind][0].tolist()
            names = [stack.labels[p] for p in pos]
            ids = None
            if kind == "cls":  # a model with several such tokens numbers the later ones
                ids = [f"{tower[1]}.cls" + (f".{p}" if i else "") for i, p in enumerate(pos)]
            elif kind == "pos":
                names = [f"position of {name}" for name in names]
            elif kind == "bias":
                names = [f"input bias of {tower[1]}"]
            self.inputs[number, kind] = rows.add(of_type, tower, -1, pos, names, ids=ids)

    def _block(
        self, rows: _Rows, number: int, stack: Stack, layer: int, tower: tuple[int, str], replacement: Replacement
    ) -> None:
        key = (number, layer)
        self.bias[key] = rows.add(NodeType.BIAS, tower, layer, [-1], [f"bias of {tower[1]} block {layer}"])
        level = replacement.levels.get(key)
        if level is None:
            return
        pos = list(range(len(level.error)))
        self.errors[key] = rows.add(NodeType.ERROR, tower, layer, pos, [f"error at {stack.labels[p]}" for p in pos])
        pos, index = level.pos.tolist(), level.index.tolist()
        names = [f"feature {f} at {stack.labels[p]}" for p, f in zip(pos, index, strict=True)]
        start = rows.add(NodeType.FEATURE, tower, layer, pos, names, index)
        self.features[key] = range(start, start + len(pos))
        rows.scalars.append((start, level.activation, level.pre, level.constant))

    def level_of(self, nodes: Int[Tensor, " target"]) -> list[tuple[tuple[int, int], Int[Tensor, " _row"]]]:
        """Feature nodes (ascending) as rows of their levels, level by level."""
        found = []
        for key, span in self.features.items():
            mine = nodes[(nodes >= span.start) & (nodes < span.stop)]
            if len(mine):
                found.append((key, mine - span.start))
        return found

    def columns(self, number: int, layer: int, pos: int) -> slice | Int[np.ndarray, " source"]:
        """The sources that can have an edge to a feature: below it, in its tower or one that feeds it, not after it.

        The order of the table makes this one slice, unless the tower is causal; then it is a part of `_early`.
        """
        below, stop = self.floor(number, layer), self.bias[number, layer] + 1
        if not self.causal[number]:
            return slice(below, stop)
        early = self._early(number, pos)
        return early[slice(*np.searchsorted(early, (below, stop)).tolist())]

    def _early(self, number: int, pos: int) -> Int[np.ndarray, " source"]:
        """The sources of a causal stack, and of those that feed it, that do not stand after a position."""
        if (number, pos) not in self._by_pos:
            late = (self.nodes.pos[: self.outputs] > pos) & (self.stack_of[: self.outputs] == number)
            self._by_pos[number, pos] = (~late).numpy().nonzero()[0]
        return self._by_pos[number, pos]

    def floor(self, number: int, layer: int) -> int:
        """First node that a feature of a layer can read: of the nearest SAE below, or of its chain of towers."""
        if self.sae_layers is not None:
            under = [at for stack, at in self.sae_layers if stack == number and at < layer]
            if under:
                return self.bias[number, max(under)]
            if number in self.bridged_from:
                below = [at for stack, at in self.sae_layers if stack == self.bridged_from[number]]
                if below:
                    return self.bias[self.bridged_from[number], max(below)]
        return self.chain_start[number]

    def input_vectors(self, stack: Stack) -> list[tuple[str, Int[Tensor, " _n"], Float[Tensor, "_n d"]]]:
        """The summands of a stack's input in node order."""
        return [(kind, *stack.inputs.kinds[kind]) for kind in INPUT_TYPES if kind in stack.inputs.kinds]
