"""From a family's table and a transformers model to taps and named HookPoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformer_lens.hook_points import HookPoint

from mechinterp.errors import ModelError
from mechinterp.models.norms import check_norm
from mechinterp.models.tables import Block, Family, Tower, Wire, families
from mechinterp.models.taps import Heads, Input, Norm, Output, Pattern, Residual, Row, Tap

__all__ = ["Wiring", "family_of", "find", "wire_up"]


@dataclass(frozen=True)
class Wiring:
    """The HookPoints by name, the taps that feed them, and the blocks of each tower that can matter."""

    points: dict[str, HookPoint]
    taps: tuple[Tap, ...]
    blocks: dict[str, Sequence[nn.Module]]


def family_of(hf: nn.Module) -> Family:
    """The table for a transformers model. Raises ModelError when there is none."""
    for family in families():
        if type(hf).__name__ == family.architecture:
            return family
    known = ", ".join(f"{f.name} ({f.architecture})" for f in families())
    raise ModelError(f"{type(hf).__name__} belongs to no known family", hint=f"known families: {known}")


def find(root: nn.Module, path: str) -> Any:
    """The submodule at `path` (`a|b`: the first that exists). Raises ModelError listing what exists there."""
    step, children = path, {}
    for choice in path.split("|"):
        module: Any = root
        for step in choice.split("."):
            children = dict(module.named_children())
            if step not in children:
                break
            module = children[step]
        else:
            return module
    # report where the last choice left the model
    raise ModelError(
        f"has no module {path!r}: at {step!r} it has {', '.join(children) or 'nothing'}",
        where=type(root).__name__,
        hint="this version of transformers lays the model out in another way",
    )


def wire_up(hf: nn.Module, family: Family) -> Wiring:
    """Resolve the whole table. Every HookPoint knows its name; nothing is registered on the model."""
    board = _Board({}, [])
    blocks = {}
    for name, tower in family.towers.items():
        blocks[name] = _used_blocks(hf, name, find(hf, tower.layers))
        _wire_tower(board, hf, name, tower, blocks[name])
    for name, wire in family.wires.items():
        board.wire(name, hf, wire)
    return Wiring(board.points, tuple(board.taps), blocks)


@dataclass
class _Board:
    points: dict[str, HookPoint]
    taps: list[Tap]

    def point(self, name: str) -> HookPoint:
        made = HookPoint()
        made.name = name
        self.points[name] = made
        return made

    def wire(self, name: str, hf: nn.Module, wire: Wire) -> None:
        module = find(hf, wire.path)
        kind = {"input": Input, "output": Output, "cls": Row}[wire.side]
        self.taps.append(kind(module, (self.point(name),)))

    def norm(self, name: str, module: nn.Module, path: str) -> None:
        check_norm(module, path)
        self.taps.append(Norm(module, (self.point(f"{name}.hook_scale"), self.point(f"{name}.hook_normalized"))))


def _wire_tower(board: _Board, hf: nn.Module, name: str, tower: Tower, blocks: Sequence[nn.Module]) -> None:
    for layer, block in enumerate(blocks):
        first = (board.point(f"{name}.hook_embed"),) if layer == 0 else ()
        _wire_block(board, f"{name}.blocks.{layer}", block, tower.block, first)
    if tower.ln_final is not None:
        board.norm(f"{name}.ln_final", find(hf, tower.ln_final), tower.ln_final)
    for point, wire in tower.wires.items():
        board.wire(f"{name}.{point}", hf, wire)


def _wire_block(board: _Board, name: str, block: nn.Module, at: Block, first: tuple[HookPoint, ...]) -> None:
    """One block, its points in the order in which a value meets them."""
    attn, out_proj = find(block, at.attn), find(block, at.out_proj)
    head_width = getattr(attn, "head_dim", None)
    if not isinstance(head_width, int) or not hasattr(attn, "config"):
        raise ModelError(f"{type(attn).__name__} does not say its head_dim and config", where=f"{name}.{at.attn}")
    board.taps.append(Input(block, (*first, board.point(f"{name}.hook_resid_pre"))))
    board.norm(f"{name}.ln1", find(block, at.ln1), f"{name}.{at.ln1}")
    board.taps.append(Pattern(attn, (board.point(f"{name}.attn.hook_pattern"),)))
    board.taps.append(Heads(out_proj, (board.point(f"{name}.attn.hook_z"),), head_width))
    if at.ln1_post is not None:
        board.norm(f"{name}.ln1_post", find(block, at.ln1_post), f"{name}.{at.ln1_post}")
    board.taps.append(Output(find(block, at.attn_out), (board.point(f"{name}.hook_attn_out"),)))
    board.taps.append(Residual(find(block, at.ln2), (board.point(f"{name}.hook_resid_mid"),)))
    board.norm(f"{name}.ln2", find(block, at.ln2), f"{name}.{at.ln2}")
    board.taps.append(Output(find(block, at.mlp_pre), (board.point(f"{name}.mlp.hook_pre"),)))
    board.taps.append(Input(find(block, at.mlp_post), (board.point(f"{name}.mlp.hook_post"),)))
    if at.ln2_post is not None:
        board.norm(f"{name}.ln2_post", find(block, at.ln2_post), f"{name}.{at.ln2_post}")
    board.taps.append(Output(find(block, at.mlp_out), (board.point(f"{name}.hook_mlp_out"),)))
    # first in line, so that transformers' own hooks, which collect hidden states, see the edited value
    board.taps.append(Output(block, (board.point(f"{name}.hook_resid_post"),), first=True))


def _used_blocks(hf: Any, tower: str, layers: Any) -> Sequence[nn.Module]:
    """The blocks whose output can matter: a LLaVA projector reads an inner hidden state and the rest is idle."""
    layer = getattr(hf.config, "vision_feature_layer", None) if tower == "vision" else None
    if layer is None:
        return list(layers)
    if not isinstance(layer, int):
        raise ModelError(
            f"reads several vision layers at once ({layer})",
            where="config.json, vision_feature_layer",
            hint="models whose projector reads one layer can be opened",
        )
    used = layer if layer >= 0 else len(layers) + 1 + layer
    if not 1 <= used <= len(layers):
        raise ModelError(f"{layer} is outside the {len(layers)} layers", where="config.json, vision_feature_layer")
    return list(layers)[:used]
