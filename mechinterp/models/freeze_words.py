"""`verify_freeze` for what has no hook point and is named in words: norms, projectors, pooling, lengths.

The model's own modules are run, on what reaches them and on multiples and sums of it. What is said to be held must be
all that is not linear in them: a norm times its denominator, attention with its keys left alone, an MLP with its gate
held, a similarity times the length of an embedding. And the part must not be linear before, or nothing is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mechinterp.models.freeze import Check, attempt, primary, wave_edit
from mechinterp.models.gates import gate_of
from mechinterp.models.norms import scale_of
from mechinterp.models.wiring import find
from mechinterp.types import ImageTextBatch

if TYPE_CHECKING:
    from mechinterp.models.hooked import HookedVLM

__all__ = ["freezes_in_words", "verify_words"]

Findings = list[tuple[bool, str]]
_HOMOGENEOUS = {"ReLU"}  # homogeneous by itself: nothing of it is left once its gate is taken out


def freezes_in_words(family: str) -> tuple[str, ...]:
    """What a frozen pass of a family holds without a hook point, in words; empty where all of it has hooks."""
    return tuple(_WORDS.get(family, ()))


@torch.no_grad()
def verify_words(model: HookedVLM, batch: ImageTextBatch, name: str) -> Check:
    """Whether a freeze in words holds on the first row of a batch (with text, where the model reads any)."""
    ok, detail = attempt(lambda: _joined(_WORDS[model.family][name](model, batch[:1])))
    return Check(name, ok, detail)


def _joined(findings: Findings) -> tuple[bool, str]:
    return all(ok for ok, _ in findings), "; ".join(detail for _, detail in findings)


# ----------------------------------------------------------------------------------------------- what a family has


def _input_norm(model: HookedVLM, batch: ImageTextBatch) -> Findings:
    tower = find(model.hf, model.table.towers["vision"].module)
    return [_norm(model, batch, getattr(tower, "vision_model", tower).pre_layrnorm)]


def _projector_norm(model: HookedVLM, batch: ImageTextBatch) -> Findings:
    return [_norm(model, batch, model.hf.model.multi_modal_projector.mm_soft_emb_norm)]


def _projector_gate(model: HookedVLM, batch: ImageTextBatch) -> Findings:
    projector = model.hf.model.multi_modal_projector
    return [_gate(model, batch, projector, (projector.linear_1, projector.act, projector.linear_2))]


def _pooling(model: HookedVLM, batch: ImageTextBatch) -> Findings:
    """The pattern and the sum of the parts here; the norm and the MLP as anywhere."""
    head, mlp = model.hf.vision_model.head, model.hf.vision_model.head.mlp
    x, out = _seen(model, batch, head)
    probe = head.probe.expand(len(x), -1, -1)

    def held(value: Tensor) -> Tensor:
        return head.attention(probe, x, value)[0]

    pooled = held(x)
    parts = (pooled + mlp(head.layernorm(pooled)))[:, 0]
    alone, bent = _bent(lambda v: head.attention(probe, v, v)[0], x), _bent(held, x)
    moved, limit, off = _moves(model, batch, head.attention), _limit(model), _off(parts, out)
    pattern = (
        moved > 0 and alone > limit and bent < limit and off < limit,
        f"an edit of what is pooled moves the output by {moved:.3g}; pooling is off linear by {alone:.3g}, with its "
        f"pattern held {bent:.3g}; its parts add up to it within {off:.3g}",
    )
    return [
        pattern,
        _norm(model, batch, head.layernorm),
        _gate(model, batch, mlp, (mlp.fc1, mlp.activation_fn, mlp.fc2)),
    ]


def _lengths(model: HookedVLM, batch: ImageTextBatch) -> Findings:
    """The similarity as a function of each embedding: the value that we say, and linear once a length is held."""
    image = "projector.hook_out" if model.family == "clip" else "vision.hook_pooled"
    names = {"image": image, "text": "text_projector.hook_out"}
    _, at = model.run_with_cache(batch, names_filter=list(names.values()))
    scale = model.hf.logit_scale.double().exp()
    bias = model.hf.logit_bias.double() if hasattr(model.hf, "logit_bias") else 0.0

    def cosine(side: str, value: Tensor) -> Tensor:
        hooks: list[Any] = [(names[side], lambda _, hook: value)]
        return (model.run_with_hooks(batch, fwd_hooks=hooks).logits_per_image.double() - bias) / scale

    return [_length(lambda v, side=side: cosine(side, v), side, at, names, _limit(model)) for side in names]


def _length(
    cosine: Callable[[Tensor], Tensor], side: str, at: Mapping[str, Tensor], names: Mapping[str, str], limit: float
) -> tuple[bool, str]:
    x, y = (at[names[s]].double() for s in ("image", "text"))
    own = at[names[side]]
    length = float(own.double().norm())
    true = cosine(own)
    off, moved = _off(true, x @ y.T / x.norm() / y.norm(), 1.0), _off(cosine(wave_edit(own, None)), true, 1.0)
    alone, bent = _bent(cosine, own, 0.0), _bent(lambda v: cosine(v) * v.double().norm(), own, 0.0, length)
    return moved > 0 and off < limit and alone > 0.1 and bent < limit, (
        f"an edit of the {side} embedding moves the cosine by {moved:.3g}; its value is off by {off:.3g}; it is off "
        f"linear by {alone:.3g}, with the length held {bent:.3g}"
    )


_WORDS: dict[str, dict[str, Callable[[HookedVLM, ImageTextBatch], Findings]]] = {
    "clip": {"scale of the norm before the vision blocks": _input_norm, "lengths of both embeddings": _lengths},
    "siglip": {
        "pattern, scale and gate of the vision pooling head": _pooling,
        "lengths of both embeddings": _lengths,
    },
    "llava": {"scale of the norm before the vision blocks": _input_norm, "gate of the projector": _projector_gate},
    "gemma3": {"scale of the projector's norm": _projector_norm},
}
"""By family, what is held without a hook point, and its check."""


# ---------------------------------------------------------------------------------------------------- kinds of part


def _norm(model: HookedVLM, batch: ImageTextBatch, norm: Any) -> tuple[bool, str]:
    """A norm times its denominator is linear; by itself it ignores the length of its input."""
    x, _ = _seen(model, batch, norm)
    shift = 0.0 if getattr(norm, "bias", None) is None else norm.bias

    def held(value: Tensor) -> Tensor:
        return (norm(value) - shift) * scale_of(norm, value)

    moved, alone, bent = _moves(model, batch, norm), _bent(norm, x, shift), _bent(held, x, 0.0)
    return moved > 0 and alone > 0.1 and bent < _limit(model), (
        f"an edit of the norm moves the output by {moved:.3g}; it is off linear by {alone:.3g}, with its scale held "
        f"{bent:.3g}"
    )


def _gate(model: HookedVLM, batch: ImageTextBatch, whole: Any, parts: tuple[Any, Any, Any]) -> tuple[bool, str]:
    """Two layers around an activation: with gate times input in its place they give the same, and are linear."""
    into, activation, after = parts
    x, out = _seen(model, batch, whole)
    gate = gate_of(activation, into(x))

    def held(value: Tensor) -> Tensor:
        return after(gate * into(value))

    moved, off, limit = _moves(model, batch, whole), _off(held(x), out), _limit(model)
    alone, bent = _bent(whole, x), _bent(held, x)
    return moved > 0 and off < limit and bent < limit and (
        alone > limit or type(activation).__name__ in _HOMOGENEOUS
    ), (
        f"an edit of the MLP moves the output by {moved:.3g}; gate times input gives its output within {off:.3g}; it "
        f"is off linear by {alone:.3g}, with the gate held {bent:.3g}"
    )


def _bent(f: Callable[[Tensor], Tensor], x: Tensor, zero: Any = None, size: float | None = None) -> float:
    """How far `f - f(0)` is from linear about `x`: of three times `x`, and of a sum; relative to the values.

    `zero` is `f(0)`, where it is known or has no value; `size` is what to be relative to, where values can vanish.
    """
    zero = f(torch.zeros_like(x)) if zero is None else zero
    other = wave_edit(x, None) - x
    one, sum_ = f(x) - zero, f(x + other) - zero
    return max(_off(f(3 * x) - zero, 3 * one, size), _off(sum_, one + f(other) - zero, size))


def _off(found: Tensor, true: Tensor, size: float | None = None) -> float:
    return float((found - true).abs().max() / (true.abs().max() if size is None else size))


def _limit(model: HookedVLM) -> float:
    return 1e-4 if model.hf.dtype in (torch.float32, torch.float64) else 3e-2


# ---------------------------------------------------------------------------------------------------------- running


@contextmanager
def _on_output(module: nn.Module, look: Callable[[Tensor, Any], Any]) -> Iterator[None]:
    """While held, `look(input, output)` sees a module run, and may give another output."""
    handle = module.register_forward_hook(lambda _, args, output: look(args[0], output))
    try:
        yield
    finally:
        handle.remove()


def _seen(model: HookedVLM, batch: ImageTextBatch, module: nn.Module) -> tuple[Tensor, Tensor]:
    """What a module reads and gives in a true pass."""
    kept: list[tuple[Tensor, Tensor]] = []
    with _on_output(module, lambda x, y: kept.append((x, y))):
        model(batch)
    return kept[-1]


def _moves(model: HookedVLM, batch: ImageTextBatch, module: nn.Module) -> float:
    """How far a fixed edit of what a module gives moves the output."""
    before = primary(model, model(batch))

    def edit(x: Tensor, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        new = wave_edit(first, None)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with _on_output(module, edit):
        after = primary(model, model(batch))
    return float((after.float() - before.float()).abs().max())
