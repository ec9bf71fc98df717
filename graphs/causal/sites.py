"""The hooks of one intervention run: what holds values, what keeps them, and what edits them at one dictionary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from graphs.causal.changes import Change, FeatureAt
from graphs.frozen.parts import Bridge, FrozenMLP
from mechinterp.types import Placed

__all__ = [
    "Edit",
    "Hooks",
    "Mode",
    "by_block",
    "edits_of",
    "hold",
    "keep",
    "leaves",
    "linear_bridge",
    "linear_mlp",
    "only_hooks",
    "site_hooks",
    "spread",
]

Mode = Literal["direct", "replacement", "frozen_attn", "free"]
Hooks = list[tuple[str | Callable[..., Any], Callable[..., Any]]]


class Edit(NamedTuple):
    """In row `row` a feature takes `value`."""

    row: int
    feature: FeatureAt
    value: float


def keep(names: Iterable[str], into: dict[str, Tensor], gradient: bool = False) -> Hooks:
    """Hooks that store values as they come by (after edits, if these were put on before)."""

    def store(value: Tensor, hook: Any) -> None:
        into[hook.name] = value if gradient else value.detach()

    return [(name, store) for name in names]


def leaves(names: Iterable[str], into: dict[str, Tensor]) -> Hooks:
    """Hooks that add a zero to each value, at which gradients can be taken."""

    def add(value: Tensor, hook: Any) -> Tensor:
        into[hook.name] = torch.zeros_like(value, requires_grad=True)
        return value + into[hook.name]

    return [(name, add) for name in names]


def only_hooks(name: str, placed: Placed, kept: Bool[Tensor, "row pos d_sae"], other: Tensor | None) -> Hooks:
    """Hooks that ablate every feature outside of `kept`: to 0, or to the activations `other [pos, d_sae]`.

    Errors and biases stay as they are in each pass.
    """
    d = placed.dictionary
    seen: list[Tensor] = []

    def write(value: Tensor, hook: Any) -> Tensor:
        now = d.encode(seen.pop().to(d.W_enc.dtype))
        wanted = torch.zeros_like(now) if other is None else other.expand_as(now)
        moved = torch.where(kept, 0.0, wanted - now) @ d.W_dec
        return value + moved.to(value.dtype)

    return [(str(placed.reads), lambda value, hook: seen.append(value)), (name, write)]


def hold(value: Tensor, n: int) -> Callable[..., Tensor]:
    """A hook that puts a clean value in the place of every row."""

    def put(new: Tensor, hook: Any) -> Tensor:
        return value.to(new.dtype).expand(n, *value.shape[1:])

    return put


def edits_of(changes: Sequence[Change], towers: Sequence[str], tower: str, layer: int) -> list[Edit]:
    """The edits that fall on one block of a leg; `tower` is the name in hooks ("text" for "text.1")."""
    return [
        Edit(row, feature, value)
        for row, change in enumerate(changes)
        for feature, value in zip(change.features, change.values, strict=True)
        if feature.layer == layer and feature.tower in towers and feature.tower.split(".")[0] == tower
    ]


@dataclass
class _Site:
    """The MLP of one block, or its stream: what its dictionary reads in this pass, and what it writes."""

    placed: Placed | None
    edits: list[Edit]
    mode: Mode
    clean_in: Tensor
    clean_out: Tensor
    seen: Tensor | None = None

    def read(self, value: Tensor, hook: Any) -> None:
        self.seen = value

    def write(self, value: Tensor, hook: Any) -> Tensor:
        if self.mode == "direct":
            base = self.clean_out.expand_as(value)
        elif self.mode == "replacement":
            base = self._replaced(value)
        else:
            base = value
        return base + self._delta(value) if self.edits else base

    def _replaced(self, value: Tensor) -> Tensor:
        """Recomputed features, the clean error."""
        clean = self.clean_out.expand_as(value)
        if self.placed is None:
            return clean
        assert self.seen is not None
        return clean + (_said(self.placed, self.seen) - _said(self.placed, self.clean_in)).to(value.dtype)

    def _delta(self, value: Tensor) -> Tensor:
        """`(v - a) d` of every edit, `a` from what is read in this pass (the clean one where all is held)."""
        assert self.placed is not None
        dictionary = self.placed.dictionary
        reads = self.clean_in.expand(len(value), -1, -1) if self.mode == "direct" else self.seen
        reads = value if reads is None else reads
        rows = torch.tensor([e.row for e in self.edits])
        pos = torch.tensor([e.feature.pos for e in self.edits])
        index = torch.tensor([e.feature.index for e in self.edits])
        wanted = torch.tensor([e.value for e in self.edits], dtype=dictionary.W_dec.dtype)
        places, which = torch.unique(rows * value.shape[1] + pos, return_inverse=True)
        x = reads[places // value.shape[1], places % value.shape[1]]
        now = dictionary.encode(x.to(dictionary.W_enc.dtype))[which, index]
        moved = (wanted - now)[:, None] * dictionary.W_dec[index]
        return torch.zeros_like(value).index_put_((rows, pos), moved.to(value.dtype), accumulate=True)


def linear_mlp(block: str, mlp: FrozenMLP, clean: Mapping[str, Tensor]) -> Hooks:
    """Hooks that put the MLP of a block (`vision.blocks.2`), norm scale and gate held, in the place of the model's.

    It writes its clean output and the linear map of what has changed in the stream below it.
    """
    below, out = f"{block}.hook_resid_mid", f"{block}.hook_mlp_out"
    moved: dict[str, Tensor] = {}

    def write(value: Tensor, hook: Any) -> Tensor:
        change = (moved[below] - clean[below]).to(mlp.W_in.dtype)
        return clean[out].to(value.dtype) + mlp.apply(change).to(value.dtype)

    return [*keep([below], moved), (out, write)]


def linear_bridge(bridge: Bridge, clean: Mapping[str, Tensor]) -> Hooks:
    """Hooks that hold a projector's gate: its clean output plus the linear map of what changed below."""
    last = [n for n in clean if n.startswith("vision.") and n.endswith("hook_resid_post")][-1]
    moved: dict[str, Tensor] = {}

    def cross(value: Tensor, hook: Any) -> Tensor:
        change = (moved[last] - clean[last]).to(bridge.bias.dtype)
        brought = torch.stack([bridge.apply(row)[bridge.slots] for row in change]).to(value.dtype)
        kept = clean["projector.hook_out"]
        return (kept.view(1, *brought.shape[1:]) + brought).view(value.shape)

    return [*keep([last], moved), ("projector.hook_out", cross)]


def site_hooks(
    name: str, placed: Placed | None, edits: list[Edit], mode: Mode, clean_in: Tensor, clean_out: Tensor
) -> Hooks:
    """Hooks that edit the output `name` of one MLP, or the stream at one SAE; none where nothing is to be done."""
    if not edits and mode in ("free", "frozen_attn"):
        return []
    site = _Site(placed, edits, mode, clean_in, clean_out)
    reads: Hooks = [] if placed is None or mode == "direct" else [(str(placed.reads), site.read)]
    return [*reads, (name, site.write)]


def _said(placed: Placed, x: Tensor) -> Tensor:
    """What a dictionary makes of its input."""
    d: Any = placed.dictionary
    x = x.to(d.W_enc.dtype)
    said = d.decode(d.encode(x))
    skip = getattr(d, "W_skip", None)
    return said if skip is None else said + x @ skip


def spread(clean: Tensor, changed: Tensor | None, rows: list[int], n: int) -> Tensor:
    """One value a row: the clean one, and the changed ones in their rows."""
    if changed is not None and len(rows) == n:
        return changed
    found = clean.expand(n, *clean.shape[1:])
    return found if changed is None else found.clone().index_copy_(0, torch.tensor(rows), changed)


def by_block(watch: Iterable[FeatureAt]) -> dict[tuple[str, int], list[int]]:
    """Numbers of the features of each tower and layer."""
    groups: dict[tuple[str, int], list[int]] = {}
    for i, feature in enumerate(watch):
        groups.setdefault((feature.tower, feature.layer), []).append(i)
    return groups
