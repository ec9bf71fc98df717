"""The doctor finds a healthy model healthy, and each way of breaking one is found by the check that is for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, tiny

from mechinterp.cli import main
from mechinterp.models import HookedVLM, attention, heads, resume, taps, verify_freeze
from mechinterp.models.doctor import doctor, example_batch
from mechinterp.models.freeze import Check
from mechinterp.types import ImageTextBatch


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.ok}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_healthy_model_is_found_healthy(family: str) -> None:
    model = HookedVLM(*tiny(family))
    pixels = np.random.default_rng(0).random((3, 40, 40), dtype=np.float32)
    checks = doctor(model, model.preprocess(pixels))
    assert not failed(checks), checks
    assert len(checks) == 8 and all(check.detail for check in checks)


@pytest.mark.parametrize("name", ["phantom-clip", "phantom-llava", "cxr-clip"])
def test_the_command_finds_a_bundled_model_healthy(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Loaded models want no gradient at their weights, and are asked about the data's own target."""
    assert main(["doctor", name]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.count("ok  ") == 8


def test_a_healthy_model_in_half_precision_and_without_images() -> None:
    assert not failed(doctor(HookedVLM(*tiny("clip", dtype=torch.bfloat16))))


def swap_attn_and_mlp(model: HookedVLM) -> None:
    """The names of two points exchanged: each still reads and edits, but the residual stream no longer adds up."""
    attn, mlp = "vision.blocks.1.hook_attn_out", "vision.blocks.1.hook_mlp_out"
    a, m = model.hook_dict[attn], model.hook_dict[mlp]
    other = {a: m, m: a}
    model._taps = tuple(replace(t, points=(other[t.points[0]],)) if t.points[0] in other else t for t in model._taps)


def unplug(model: HookedVLM) -> None:
    """A point that hangs on a module which never runs."""
    point = model.hook_dict["vision.blocks.1.hook_mlp_out"]
    model._taps = tuple(replace(t, module=torch.nn.Identity()) if point in t.points else t for t in model._taps)


def noisy(model: HookedVLM) -> None:
    """A model that never gives the same output twice."""
    layer = model.hf.vit.layers[0]
    layer.register_forward_hook(lambda module, args, output: output + 0.1 * torch.randn_like(output))


def shifted_grid(model: HookedVLM) -> None:
    """A grid that forgot the CLS token."""
    model._grid = replace(model._grid, cls=None)


BREAKS: dict[str, tuple[str, Callable[[HookedVLM], None]]] = {
    "swapped": ("residual sums", swap_attn_and_mlp),
    "unplugged": ("edits", unplug),
    "noisy": ("parity", noisy),
    "noisy again": ("restore", noisy),
    "grid": ("patch grid", shifted_grid),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_model_is_found(case: str) -> None:
    model = HookedVLM(*tiny("vit"))
    check, damage = BREAKS[case]
    damage(model)
    assert check in failed(doctor(model))


def test_pixels_that_were_never_normalised_are_found() -> None:
    model = HookedVLM(*tiny("vit"))
    batch = example_batch(model)
    assert failed(doctor(model, batch.with_pixels(batch.pixel_values * 255))) >= {"pixel range"}


def test_a_hook_that_stays_behind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.watch, "remove", lambda self: None)
    assert "restore" in failed(doctor(HookedVLM(*tiny("vit"))))


def test_a_scale_that_is_recomputed_is_no_freeze(monkeypatch: pytest.MonkeyPatch) -> None:
    """The silent kind of failure: the edit is accepted, and the norm then takes its own scale after all."""
    real = taps.normalise
    monkeypatch.setattr(taps, "normalise", lambda norm, x, scale: real(norm, x, taps.scale_of(norm, x)))
    model = HookedVLM(*tiny("vit"))
    found = verify_freeze(model, example_batch(model))
    assert {c.name for c in found if c.ok} == {*model.sites("*.hook_pattern"), *model.sites("*.mlp.hook_post")}


def test_a_pattern_that_is_only_shown_is_no_freeze(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hook_pattern of other libraries does on vision towers: the edit moves the output by exactly 0."""
    real = attention.watch.__init__

    def deaf(self: Any, module: torch.nn.Module, look: Callable) -> None:
        real(self, module, lambda pattern: (look(pattern)[0], False))

    monkeypatch.setattr(attention.watch, "__init__", deaf)
    model = HookedVLM(*tiny("vit"))
    found = verify_freeze(model, example_batch(model))
    assert {c.name for c in found if c.ok} == {*model.sites("*.hook_scale"), *model.sites("*.mlp.hook_post")}


@pytest.mark.parametrize("family", ["vit", "llava", "gemma3"])
def test_every_gate_holds(family: str) -> None:
    model = HookedVLM(*tiny(family))
    found = verify_freeze(model, example_batch(model), model.sites("*.mlp.hook_post"))
    assert len(found) == sum(model.n_layers(t) for t in model.towers) and not failed(found), found


def other_activation(mlp: Any) -> None:
    """Still called GELU, no longer GELU: a gate that is computed from its name is not the model's."""
    mlp.activation_fn.forward = lambda z: torch.nn.functional.gelu(z) + 0.1


def no_up_branch(mlp: Any) -> None:
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x).sigmoid())


@pytest.mark.parametrize(
    ("family", "tower", "damage"), [("vit", "vision", other_activation), ("llava", "text", no_up_branch)]
)
def test_a_gate_that_is_not_the_models_is_no_freeze(family: str, tower: str, damage: Callable[[Any], None]) -> None:
    model = HookedVLM(*tiny(family))
    damage(model.blocks(tower)[1].mlp)
    found = verify_freeze(model, example_batch(model), model.sites(f"{tower}.*.mlp.hook_post"))
    assert failed(found) == {f"{tower}.blocks.1.mlp.hook_post"}, found


def test_a_gate_point_that_is_only_shown_is_no_freeze(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HookedVLM(*tiny("vit"))
    point = model.hook_dict["vision.blocks.1.mlp.hook_post"]
    real = taps.through
    monkeypatch.setattr(
        taps, "through", lambda p, v: (real(p, v)[0], False) if p is not point else (real(p, v) and v, False)
    )
    found = verify_freeze(model, example_batch(model), model.sites("*.mlp.hook_post"))
    assert failed(found) == {"vision.blocks.1.mlp.hook_post"}


def test_a_resume_that_forgets_the_final_norm_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume.heads, "readout", lambda hf, family, resid: resid[:, 0])
    assert heads.readout is resume.heads.readout
    assert failed(doctor(HookedVLM(*tiny("vit")))) == {"score"}


def test_a_failure_inside_a_check_is_a_failed_check() -> None:
    model = HookedVLM(*tiny("vit"))
    batch = example_batch(model)
    small = ImageTextBatch(batch.pixel_values[..., :24, :24], batch.input_ids, batch.attention_mask)
    checks = doctor(model, small)
    assert failed(checks) >= {"parity", "edits"}
    assert "24" in next(check.detail for check in checks if check.name == "parity")
