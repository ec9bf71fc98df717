"""Are the freezes real? A point that is said to freeze a nonlinearity must move the output when edited, and take the
nonlinearity out of the gradient when detached. Attribution rests on this, so it is measured, not assumed.

Patterns and scales are frozen at their own points. The gate of an MLP has no point: it is frozen at `mlp.hook_post`, by
writing gate times input there, so what is proven is that this product is what the model itself has there. What is held
beside the blocks has no point either and is named in words (`mechinterp.models.freeze_words`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, assert_never

import numpy as np
import torch
from torch import Tensor, nn

from mechinterp.errors import ModelError
from mechinterp.models import scoring
from mechinterp.models.gates import activation_of, gate_of
from mechinterp.models.tables import Classifier, Dual, Features, Generative
from mechinterp.models.taps import Input, Norm, Pattern, Tap
from mechinterp.models.wiring import find
from mechinterp.types import ImageTextBatch, Site, Target

if TYPE_CHECKING:
    from mechinterp.models.hooked import HookedVLM

__all__ = [
    "Check",
    "attempt",
    "example_batch",
    "example_target",
    "moves",
    "primary",
    "verify_freeze",
    "wave_edit",
    "with_text",
]

_FREEZES = ("hook_pattern", "hook_scale", "mlp.hook_post")


@dataclass(frozen=True)
class Check:
    """One finding: what was checked, whether it held, and the numbers."""

    name: str
    ok: bool
    detail: str


def verify_freeze(model: Any, batch: Any = None, names: Sequence[str] | None = None) -> list[Check]:
    """For each freeze, those in words too: an edit moves the output, and what is held makes the part linear.

    The hook points are every `hook_pattern`, `hook_scale` and `mlp.hook_post`.

    A detached pattern: the gradient at the queries is zero (and is not, when it is left alone).
    A detached scale: the norm is homogeneous in its centred input, so `grad(v . y) . x = v . (y - bias)`; left alone,
    the norm ignores the length of its input and that product is near zero.
    A detached gate: gate times input is the value at `mlp.hook_post` (the model's activation is the one whose gate we
    know), and with the gate detached it is homogeneous in that input; of a gated MLP, the gradient at the gate branch
    is zero when it is detached (and is not, when it is left alone).
    A freeze without a hook point (the norm before the blocks, a projector's gate or norm, SigLIP's pooling, the lengths
    of a dual encoder's embeddings): the model's own module, run on other inputs too, is linear but for what is held.

    `model` is a HookedVLM, or a TransformerLens HookedTransformer (`mechinterp.models.freeze_lens`), whose batch is
    token ids `[batch, pos]`. Without a batch: seeded noise, or seeded tokens. `names` are hook names, and names in
    words as `graph.json` has them. Raises ModelError for any other model.
    """
    from mechinterp.models.freeze_words import freezes_in_words, verify_words
    from mechinterp.models.hooked import HookedVLM

    if type(model).__name__ == "HookedTransformer":
        from mechinterp.models.freeze_lens import verify_lens

        return verify_lens(model, batch, names)
    if not isinstance(model, HookedVLM):
        hint = "a HookedVLM (HookedVLM.from_pretrained(folder)) or a HookedTransformer"
        raise ModelError(f"{type(model).__name__} has no freezes to verify", where="verify_freeze", hint=hint)
    batch = example_batch(model, rows=1) if batch is None else with_text(model, batch)
    words = freezes_in_words(model.family)
    wanted = [*(n for n in model.hook_dict if n.endswith(_FREEZES)), *words] if names is None else names
    with torch.no_grad():
        before = primary(model, model(batch))
    checks = []
    for name in wanted:
        if name in words:
            checks.append(verify_words(model, batch, name))
            continue
        moved = moves(model, batch, name, before)
        tap = next(t for t in model._taps if model.point(name) in t.points)
        ok, detail = attempt(lambda tap=tap: _detached(model, batch, tap))
        checks.append(Check(name, moved > 0 and ok, f"an edit moves the output by {moved:.3g}; {detail}"))
    return checks


def primary(model: HookedVLM, output: Any) -> Tensor:
    """All that a transformers output says in the end, as one row of numbers: logits, and embeddings where it has them.

    The embeddings are part of it because a cosine, rounded to 16 bits, hides small changes.
    """
    match model.table.head:
        case Dual() | Features():
            names = ("logits_per_image", "image_embeds", "text_embeds", "pooler_output")
        case Generative() | Classifier():
            names = ("logits",)
        case _:
            assert_never(model.table.head)
    found = [getattr(output, name).flatten() for name in names if getattr(output, name, None) is not None]
    return torch.cat(found) if found else output.flatten()


def with_text(model: HookedVLM, batch: ImageTextBatch) -> ImageTextBatch:
    """The batch with an example caption or question, where the model reads text and the batch holds none."""
    if batch.input_ids is not None or not isinstance(model.table.head, Dual | Generative):
        return batch
    if isinstance(model.table.head, Generative):
        return scoring.with_prompt(model, batch, example_target(model).asked())
    found = scoring.text_inputs(model, [example_target(model).positive] * len(batch))
    return replace(batch, input_ids=found["input_ids"], attention_mask=found.get("attention_mask"))


def example_target(model: HookedVLM) -> Target:
    """A target that the model can score, for checks that need one."""
    if isinstance(model.table.head, Classifier):
        return Target(str(model.hf.config.id2label[0]), "")
    return Target("pneumonia", "a chest x-ray with pneumonia", "a chest x-ray without pneumonia")


def example_batch(model: HookedVLM, rows: int = 2, seed: int = 0) -> ImageTextBatch:
    """Seeded smooth noise at the size of the model's input, with a caption or a question."""
    rng = np.random.default_rng(seed)
    side = [s * p for s, p in zip(model.grid_shape, model._grid.patch, strict=True)]
    coarse = torch.from_numpy(rng.random((rows, 1, 7, 7), dtype=np.float32))
    pixels = nn.functional.interpolate(coarse, size=side, mode="bilinear")[:, 0].clamp(0.02, 0.98)
    return with_text(model, model.preprocess(pixels))


def moves(model: HookedVLM, batch: ImageTextBatch, name: str, before: Tensor) -> float:
    """How far a fixed edit at a point moves the output."""
    with torch.no_grad():
        after = primary(model, model.run_with_hooks(batch, fwd_hooks=[(name, wave_edit)]))
    return float((after.float() - before.float()).abs().max())


def wave_edit(value: Tensor, hook: Any) -> Tensor:
    """A hook: the value stretched, with a wave of its own size on top."""
    wave = torch.sin(torch.arange(value.numel(), device=value.device, dtype=torch.float32)).view(value.shape)
    return value * 1.25 + (0.25 * wave * value.float().std(correction=0)).to(value.dtype)


def attempt(check: Callable[[], tuple[bool, str]]) -> tuple[bool, str]:
    """Run a check; a failure inside it is a failed check that says what happened."""
    try:
        return check()
    except Exception as error:  # whatever it is, it is what the user wants to read
        return False, f"{type(error).__name__}: {error}"


@contextmanager
def _as_leaf(module: nn.Module, side: str) -> Iterator[list[Tensor]]:
    """Make the input or output of a module a leaf that gradients can be taken at."""
    leaves: list[Tensor] = []

    def leaf(value: Tensor) -> Tensor:
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1].clone()

    if side == "input":
        handle = module.register_forward_pre_hook(lambda _, args: (leaf(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda *call: leaf(call[-1]))
    try:
        yield leaves
    finally:
        handle.remove()


def _detached(model: HookedVLM, batch: ImageTextBatch, tap: Tap) -> tuple[bool, str]:
    """Whether detaching a pattern, a scale or a gate freezes it, and leaving it alone does not."""
    if isinstance(tap, Input):
        return _gate(model, batch, Site.parse(tap.points[0].name or ""))
    if isinstance(tap, Pattern):
        gradients = [_query_gradient(model, batch, tap, d) for d in (False, True)]
        return gradients[0] > 0 and gradients[1] == 0, (
            f"gradient at the queries {gradients[0]:.3g}, detached {gradients[1]:.3g}"
        )
    assert isinstance(tap, Norm)
    alone, detached = (_homogeneity(model, batch, tap, d) for d in (False, True))
    return abs(detached - 1) < 0.02 and abs(alone) < 0.5, (
        f"share of the output that scales with the input {alone:.3g}, detached {detached:.3g}"
    )


def _query_gradient(model: HookedVLM, batch: ImageTextBatch, tap: Pattern, detach: bool) -> float:
    hook = (lambda value, hook: value.detach()) if detach else (lambda value, hook: value.clone())
    with _as_leaf(find(tap.module, "q_proj"), "output") as leaves, torch.enable_grad():
        output = primary(model, model.run_with_hooks(batch, fwd_hooks=[(tap.points[0].name or "", hook)]))
        if not output.requires_grad:  # weights that want no gradient, and no way left from the queries
            return 0.0
        (gradient,) = torch.autograd.grad(output.float().pow(2).sum(), leaves[-1], allow_unused=True)
    return 0.0 if gradient is None else float(gradient.abs().max())


def _homogeneity(model: HookedVLM, batch: ImageTextBatch, tap: Norm, detach: bool) -> float:
    kept: list[Tensor] = []
    hooks = [
        (
            tap.points[0].name or "",
            (lambda value, hook: value.detach()) if detach else (lambda value, hook: value.clone()),
        ),
        (tap.points[1].name or "", lambda value, hook: kept.append(value)),
    ]
    with _as_leaf(tap.module, "input") as leaves, torch.enable_grad():
        model.run_with_hooks(batch, fwd_hooks=hooks)
        x, y = leaves[-1], kept[-1]
        bias = getattr(tap.module, "bias", None)
        linear = (y if bias is None else y - bias).detach()
        (gradient,) = torch.autograd.grad((y * linear).sum(), x)
    centred = x - x.mean(-1, keepdim=True) if isinstance(tap.module, nn.LayerNorm) else x
    return float((gradient * centred.detach()).double().sum() / linear.double().pow(2).sum())


def _gate(model: HookedVLM, batch: ImageTextBatch, site: Site) -> tuple[bool, str]:
    """Whether gate times input is what an MLP has before its output, and writing it with the gate held is linear.

    The input is what the activation gets; of a gated MLP, what the up branch gives.
    """
    block, table = model.blocks(site.tower)[site.layer or 0], model.table.towers[site.tower].block
    mlp, into = find(block, "mlp"), find(block, table.mlp_pre)
    up, activation = getattr(mlp, "up_proj", None), activation_of(mlp)

    def run(held: bool) -> tuple[float, float]:
        """How far gate times input is from the value; what of the gradient does not go through it as a linear map."""
        kept: list[Tensor] = []

        def write(value: Tensor, hook: Any) -> Tensor:
            at_gate, linear = gates[-1], inputs[-1]
            gate = (gate_of(activation, at_gate) if up is None else activation(at_gate)).detach()
            kept.extend([gate, (gate * linear if held else value).clone(), value.detach() - gate * linear.detach()])
            return kept[1]

        with _as_leaf(into, "output") as gates, _as_leaf(into if up is None else up, "output") as others:
            inputs = gates if up is None else others
            with torch.enable_grad():
                output = primary(model, model.run_with_hooks(batch, fwd_hooks=[(str(site), write)]))
                found = [gates[-1], kept[1]]
                at_gate, at_value = torch.autograd.grad(output.float().pow(2).sum(), found, allow_unused=True)
        if at_value is None:
            return float("nan"), float("nan")
        through = kept[0] * at_value if up is None else torch.zeros_like(gates[-1])
        rest = -through if at_gate is None else at_gate - through
        return float(kept[2].abs().max() / kept[1].detach().abs().max()), float(rest.abs().max() / at_value.abs().max())

    (off, alone), (_, held) = run(False), run(True)
    limit = 1e-4 if model.hf.dtype in (torch.float32, torch.float64) else 3e-2
    homogeneous = type(activation).__name__ == "ReLU"  # nothing of it is left once its gate is taken out
    return off < limit and held < limit and (alone > limit or homogeneous), (
        f"gate times input is off by {off:.3g}, gradient past it {alone:.3g}, detached {held:.3g}"
    )
