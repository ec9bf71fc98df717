"""Does this model hook, restore, freeze and score as it should? The contract of the library on a user's own weights.

Each check can fail, and says by how much. `doctor` runs them all; `verify_freeze` is the one that attribution rests on:
a point that is said to freeze a nonlinearity must move the output when edited, and stop the gradient when detached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechinterp.models.freeze import (
    Check,
    attempt,
    example_batch,
    example_target,
    moves,
    primary,
    verify_freeze,
    with_text,
)
from mechinterp.models.freeze_words import freezes_in_words
from mechinterp.models.heads import inputs_of
from mechinterp.models.tables import Features
from mechinterp.types import ImageTextBatch

if TYPE_CHECKING:
    from mechinterp.models.hooked import HookedVLM
    from mechinterp.types import Target

__all__ = ["Check", "doctor", "example_batch", "parity"]


def doctor(
    model: HookedVLM, batch: ImageTextBatch | None = None, thorough: bool = False, target: Target | None = None
) -> list[Check]:
    """Run every check on a batch of the user's images (or on seeded noise). Never raises on a failing check.

    `thorough` edits the points of every block; otherwise of the first, the middle and the last block of each tower.
    `target` is what is scored: for a generative model it must be what the batch asks. Default an example.
    """
    batch = example_batch(model) if batch is None else with_text(model, batch[:2])
    # transformers installs hooks of its own on a first run; what is there after it is what must be there in the end
    attempt(lambda: (True, str(_plain(model, batch).shape)))
    state = _state(model)
    checks: list[tuple[str, Callable[[], tuple[bool, str]]]] = [
        ("pixel range", lambda: _pixel_range(model, batch)),
        ("parity", lambda: _parity(model, batch)),
        ("residual sums", lambda: _residual_sums(model, batch)),
        ("edits", lambda: _edits(model, batch, thorough)),
        ("restore", lambda: _restore(model, batch, state)),
        ("patch grid", lambda: _patch_grid(model, batch)),
        ("freeze", lambda: _freezes(model, batch, thorough)),
        ("score", lambda: _score(model, batch, target or example_target(model))),
    ]
    return [Check(name, *attempt(check)) for name, check in checks]


def parity(model: HookedVLM, batch: ImageTextBatch) -> dict[str, Any]:
    """The plain transformers output against ours: with no hook, and with every hook point being read."""
    batch = with_text(model, batch)
    with torch.no_grad():
        plain = _plain(model, batch)
        bare = primary(model, model(batch))
        read, cache = model.run_with_cache(batch)
    read = primary(model, read)
    return {
        "equal_without_hooks": torch.equal(plain, bare),
        "equal_while_reading": torch.equal(plain, read),
        "max_abs_difference": float((plain - read).abs().max()),
        "points_read": len(cache),
        "points": len(model.hook_dict),
        "dtype": str(plain.dtype).removeprefix("torch."),
    }


# ------------------------------------------------------------------------------------------------------- the checks


def _pixel_range(model: HookedVLM, batch: ImageTextBatch) -> tuple[bool, str]:
    table = model.image_processor.table()
    low, high = float(table.min()), float(table.max())
    at = float(batch.pixel_values.min()), float(batch.pixel_values.max())
    ok = low - 1e-3 <= at[0] and at[1] <= high + 1e-3 and at[1] - at[0] > 0.01 * (high - low)
    return ok, f"values in [{at[0]:.3g}, {at[1]:.3g}], the preprocessor makes [{low:.3g}, {high:.3g}]"


def _parity(model: HookedVLM, batch: ImageTextBatch) -> tuple[bool, str]:
    found = parity(model, batch)
    ok = found["equal_without_hooks"] and found["equal_while_reading"] and found["points_read"] == found["points"]
    return ok, (
        f"{found['points_read']} of {found['points']} points read in {found['dtype']}, output differs by "
        f"{found['max_abs_difference']:.3g}"
    )


def _residual_sums(model: HookedVLM, batch: ImageTextBatch) -> tuple[bool, str]:
    """resid_pre + attn_out = resid_mid, resid_mid + mlp_out = resid_post, and the next block starts there."""
    with torch.no_grad():
        _, cache = model.run_with_cache(batch)
    worst = 0.0
    for tower in model.towers:
        for layer in range(model.n_layers(tower)):
            at = {
                p: cache[f"{tower}.blocks.{layer}.hook_{p}"].float() for p in ("resid_pre", "resid_mid", "resid_post")
            }
            added = {p: cache[f"{tower}.blocks.{layer}.hook_{p}"].float() for p in ("attn_out", "mlp_out")}
            for left, right in (
                (at["resid_pre"] + added["attn_out"], at["resid_mid"]),
                (at["resid_mid"] + added["mlp_out"], at["resid_post"]),
            ):
                worst = max(worst, float((left - right).abs().max() / right.abs().max().clamp_min(1e-9)))
    return worst <= 4 * torch.finfo(model.hf.dtype).eps, f"largest relative gap {worst:.3g}"


def _edits(model: HookedVLM, batch: ImageTextBatch, thorough: bool) -> tuple[bool, str]:
    names = _chosen(model, "*", thorough)
    with torch.no_grad():
        before = primary(model, model(batch))
    still = [name for name in names if moves(model, batch, name, before) == 0]
    return not still, f"{len(names)} points edited" + (f"; no effect at {', '.join(still[:5])}" if still else "")


def _restore(model: HookedVLM, batch: ImageTextBatch, state: dict[str, Any]) -> tuple[bool, str]:
    """The model is as it was: after an edit, and after a hook that raises."""

    class Stop(Exception):
        pass

    def raising(value: Tensor, hook: Any) -> Tensor:
        raise Stop

    with torch.no_grad():
        before = _plain(model, batch)
        for name in _chosen(model, "*", thorough=False):
            try:
                model.run_with_hooks(batch, fwd_hooks=[(name, raising)])
            except Stop:
                continue
            return False, f"a hook at {name} was not called"
        model.run_with_hooks(batch, fwd_hooks=[(lambda _: True, lambda value, hook: value * 0.5)])
        after, now = _plain(model, batch), _state(model)
    changed = [key for key in state if state[key] != now[key]]
    same = torch.equal(before, after)
    return (
        same and not changed,
        "as before" if same and not changed else f"changed: {', '.join(changed) or 'the output'}",
    )


def _patch_grid(model: HookedVLM, batch: ImageTextBatch) -> tuple[bool, str]:
    """A brighter patch moves the embedding of the token that owns it, and no other."""
    (rows, columns), (high, wide) = model.grid_shape, model._grid.patch
    step = model.image_processor.table().std()
    wrong = []
    for row, column in {(0, 0), (0, columns - 1), (rows - 1, 0), (rows // 2, columns // 3)}:
        pixels = batch.pixel_values[:1].clone()
        patch = pixels[:, :, row * high : (row + 1) * high, column * wide : (column + 1) * wide]
        patch += step * torch.linspace(0.5, 1.5, patch.numel()).view_as(patch)
        with torch.no_grad():
            name = "vision.hook_embed"
            _, old = model.run_with_cache(batch[:1], names_filter=name)
            _, new = model.run_with_cache(batch[:1].with_pixels(pixels), names_filter=name)
        moved = (new[name] != old[name]).any(-1)[0].nonzero().flatten().tolist()
        if moved != [model.patch_tokens().start + row * columns + column]:
            wrong.append(f"patch ({row}, {column}) moves tokens {moved[:5]}")
    return not wrong, "; ".join(wrong) or f"{rows} x {columns} patches, CLS token {model.cls_token}"


def _freezes(model: HookedVLM, batch: ImageTextBatch, thorough: bool) -> tuple[bool, str]:
    kinds = ("*.hook_pattern", "*.hook_scale", "*.mlp.hook_post")
    names = [name for kind in kinds for name in _chosen(model, kind, thorough)]
    names += freezes_in_words(model.family)
    found = verify_freeze(model, batch[:1], names)
    failed = [check for check in found if not check.ok]
    return not failed, f"{len(found)} freezes hold" if not failed else f"{failed[0].name}: {failed[0].detail}"


def _score(model: HookedVLM, batch: ImageTextBatch, target: Target) -> tuple[bool, str]:
    """Scores are finite, have a gradient at the pixels, and resume from every vision block."""
    if isinstance(model.table.head, Features):
        return True, "nothing to score: no text and no classes"
    pixels = batch.pixel_values.clone().requires_grad_()
    score = model.score(batch.with_pixels(pixels), [target])
    (gradient,) = torch.autograd.grad(score.sum(), pixels)
    worst = 0.0
    with torch.no_grad():
        for layer in range(model.n_layers()):
            name = f"vision.blocks.{layer}.hook_resid_post"
            _, cache = model.run_with_cache(batch, names_filter=name)
            worst = max(worst, float((model.run_from(name, cache[name], batch, [target]) - score).abs().max()))
    finite = bool(torch.isfinite(score).all() and torch.isfinite(gradient).all())
    bound = 1e-4 * max(1.0, float(score.detach().abs().max())) * (torch.finfo(model.hf.dtype).eps / 1.2e-7)
    steep = float(gradient.abs().max())
    return finite and steep > 0 and worst <= bound, (
        f"{'finite' if finite else 'not finite'}, largest gradient {steep:.3g}, resuming differs by {worst:.3g}"
    )


# ------------------------------------------------------------------------------------------------------------ tools


def _plain(model: HookedVLM, batch: ImageTextBatch) -> Tensor:
    """The transformers model's output, without us."""
    inputs = inputs_of(model.hf, model.table, batch)
    return primary(model, model.hf(**inputs))


def _chosen(model: HookedVLM, pattern: str, thorough: bool) -> list[str]:
    """Points that match, of the first, middle and last block of each tower (and of no block)."""
    keep = {t: {0, model.n_layers(t) // 2, model.n_layers(t) - 1} for t in model.towers}
    names = []
    for name in model.sites(pattern):
        tower, rest = name.split(".", 1)
        if thorough or not rest.startswith("blocks.") or int(rest.split(".")[1]) in keep[tower]:
            names.append(name)
    return names


def _state(model: HookedVLM) -> dict[str, Any]:
    """Everything that a hook could leave behind on the transformers model."""
    modules = list(model.hf.modules())
    return {
        "forward hooks": [len(m._forward_hooks) for m in modules],
        "forward pre-hooks": [len(m._forward_pre_hooks) for m in modules],
        "backward hooks": [len(m._backward_hooks) for m in modules],
        "training": [m.training for m in modules],
        "requires_grad": [p.requires_grad for p in model.hf.parameters()],
        "attention": [getattr(getattr(m, "config", None), "_attn_implementation", None) for m in modules],
        "hook points": [len(p.fwd_hooks) + len(p.bwd_hooks) for p in model.hook_points()],
    }
