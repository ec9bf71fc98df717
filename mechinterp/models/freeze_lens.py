"""`verify_freeze` for a TransformerLens `HookedTransformer`: what is held stays, and what is left is linear.

Each point is held at its clean value while what enters its part is changed, and the part's own output is read. Held
patterns: changed queries change nothing, doubled values double what the heads give. A held scale: three times the input
is three times what the norm gives (left alone, a norm ignores the length of its input). A held gate: gate times input
is the value at `mlp.hook_post`, and what the MLP writes goes with that input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mechinterp.errors import UsageError
from mechinterp.models.freeze import Check, attempt, wave_edit
from mechinterp.models.gates import gate_of

__all__ = ["verify_lens"]

_FREEZES = ("hook_pattern", "hook_scale", "mlp.hook_post")
Hooks = list[tuple[str, Callable[..., Any]]]


@torch.no_grad()
def verify_lens(model: Any, tokens: Any = None, names: Sequence[str] | None = None) -> list[Check]:
    """One check for each `hook_pattern`, `hook_scale` and `mlp.hook_post`, or for `names`.

    `tokens`: ids `[batch, pos]`; default eight random ones (seeded). Raises UsageError for a batch that is no tokens.
    """
    if tokens is None:
        length = min(8, int(model.cfg.n_ctx))
        tokens = torch.randint(int(model.cfg.d_vocab), (1, length), generator=torch.Generator().manual_seed(0))
    if not isinstance(tokens, Tensor) or tokens.ndim != 2:
        raise UsageError("a HookedTransformer reads token ids", where="batch", hint="a tensor [batch, pos]")
    tokens = tokens.to(model.cfg.device)
    before, clean = model.run_with_cache(tokens)
    wanted = [name for name in model.hook_dict if name.endswith(_FREEZES)] if names is None else names
    checks = []
    for name in wanted:
        moved = float((model.run_with_hooks(tokens, fwd_hooks=[(name, wave_edit)]) - before).abs().max())
        ok, detail = attempt(lambda name=name: _held(_Part(model, tokens, dict(clean.items()), name)))
        checks.append(Check(name, moved > 0 and ok, f"an edit moves the output by {moved:.3g}; {detail}"))
    return checks


class _Part:
    """The part of the model that a point is in, ready to be run with other inputs."""

    def __init__(self, model: Any, tokens: Tensor, clean: dict[str, Tensor], name: str):
        self.model, self.tokens, self.clean, self.name = model, tokens, clean, name
        self.path, _, self.point = name.rpartition(".")
        self.module = model.get_submodule(self.path)
        self.limit = 1e-4 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 3e-2

    def hold(self, value: Tensor, hook: Any) -> Tensor:
        """The point's clean value."""
        return self.clean[self.name]

    def read(self, out: str, hooks: Hooks, scaled: float = 1.0) -> Tensor:
        """The value at `out` (a hook name; empty: what the module gives) with these hooks and its input scaled."""
        kept: list[Tensor] = []
        handles = []
        if scaled != 1.0:
            handles.append(self.module.register_forward_pre_hook(lambda _, args: (args[0] * scaled, *args[1:])))
        if out:
            hooks = [*hooks, (out, lambda value, hook: kept.append(value.clone()))]
        else:
            handles.append(self.module.register_forward_hook(lambda _, args, value: kept.append(value.clone())))
        try:
            self.model.run_with_hooks(self.tokens, fwd_hooks=hooks)
        finally:
            for handle in handles:
                handle.remove()
        return kept[0]


def _held(part: _Part) -> tuple[bool, str]:
    match part.point:
        case "hook_pattern":
            return _pattern(part)
        case "hook_scale":
            return _scale(part)
        case _:
            return _gate(part)


def _pattern(part: _Part) -> tuple[bool, str]:
    z, hold = f"{part.path}.hook_z", (part.name, part.hold)
    turned = (f"{part.path}.hook_q", wave_edit)
    doubled = (f"{part.path}.hook_v", lambda value, hook: 2 * value)
    true = part.clean[z]
    alone, held = (_off(part.read(z, hooks), true) for hooks in ([turned], [turned, hold]))
    linear = _off(part.read(z, [doubled, hold]), 2 * true)
    return alone > part.limit and held < part.limit and linear < part.limit, (
        f"changed queries move the heads by {alone:.3g}, held {held:.3g}; off linear in the values by {linear:.3g}"
    )


def _scale(part: _Part) -> tuple[bool, str]:
    given = f"{part.path}.hook_normalized"
    true = part.clean[given]
    alone, held = (part.read(given, hooks, 3.0) for hooks in ([], [(part.name, part.hold)]))
    free, off = _off(alone, 3 * true), _off(held, 3 * true)
    return free > 0.1 and off < part.limit, f"off three times what it gave by {free:.3g}, held {off:.3g}"


def _gate(part: _Part) -> tuple[bool, str]:
    """The input that is doubled: what the activation gets; of a gated MLP, what the up branch gives."""
    mlp, gated = part.module, part.model.cfg.gated_mlp
    pre = part.clean[f"{part.path}.hook_pre"]
    gate = mlp.act_fn(pre) if gated else gate_of(part.model.cfg.act_fn, pre)
    linear = f"{part.path}.hook_pre_linear" if gated else f"{part.path}.hook_pre"
    shift = mlp.b_in if gated else 0.0  # TransformerLens adds b_in after the gate
    off = _off(gate * part.clean[linear] + shift, part.clean[part.name])
    entered: list[Tensor] = []

    def double(value: Tensor, hook: Any) -> Tensor:
        entered.append(2 * value)
        return entered[-1]

    def write(value: Tensor, hook: Any) -> Tensor:
        return gate * entered[-1] + shift

    constant = part.read("", [(part.name, lambda value, hook: torch.zeros_like(value) + shift)])
    wrote = part.read("", []) - constant
    alone, held = (
        part.read("", hooks) - constant for hooks in ([(linear, double)], [(linear, double), (part.name, write)])
    )
    rest, past = _off(alone, 2 * wrote), _off(held, 2 * wrote)
    homogeneous = gated or part.model.cfg.act_fn == "relu"  # an up branch is linear beside its gate, held or not
    return off < part.limit and past < part.limit and (rest > part.limit or homogeneous), (
        f"gate times input is off by {off:.3g}; doubled input off twice what it wrote by {rest:.3g}, held {past:.3g}"
    )


def _off(found: Tensor, true: Tensor) -> float:
    return float((found - true).abs().max() / true.abs().max())
