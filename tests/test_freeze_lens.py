"""`verify_freeze` without a batch, and on TransformerLens models: sound ones pass, each broken freeze is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_graphs_frozen_lens import KINDS, lens
from tiny_models import tiny

from mechinterp.errors import ModelError, UsageError
from mechinterp.models import HookedVLM, verify_freeze

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")


@pytest.mark.parametrize("kind", KINDS)
def test_the_freezes_of_a_sound_model_hold(kind: str) -> None:
    """Every pattern, scale and gate of a HookedTransformer is checked, and holds, on tokens of its own."""
    model = lens(**KINDS[kind])
    found = verify_freeze(model)
    norms = {"GPT-2": 5, "GPT-2 folded": 5, "Llama": 5, "Gemma": 9, "no norms": 0}[kind]
    assert len(found) == 2 + 2 + norms and all(check.ok for check in found), [c for c in found if not c.ok]


def rescaled(model: Any) -> None:
    """A norm that shows its scale, and divides by one of its own."""
    norm = model.blocks[1].ln1

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        scale = (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        return norm.hook_normalized(x / (scale + 0 * norm.hook_scale(scale))) * norm.w + norm.b

    norm.forward = forward


def only_shown(model: Any) -> None:
    """Attention that shows its pattern, and uses one of its own."""
    attn, seen = model.blocks[1].attn, []
    attn.hook_attn_scores.register_forward_hook(lambda _, args, scores: seen.append(scores))
    real = attn.calculate_z_scores
    attn.calculate_z_scores = lambda v, pattern: real(
        v, seen[-1].softmax(-1) + 0.01 * (pattern - pattern.detach() + pattern)
    )


def other_activation(model: Any) -> None:
    """Still called by its old name, no longer it."""
    model.blocks[1].mlp.act_fn = lambda z: torch.nn.functional.gelu(z) + 0.1


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (rescaled, "blocks.1.ln1.hook_scale"),
        (only_shown, "blocks.1.attn.hook_pattern"),
        (other_activation, "blocks.1.mlp.hook_post"),
    ],
)
def test_a_broken_freeze_is_found(damage: Callable[[Any], None], name: str) -> None:
    """The one freeze that a damage undoes is the one that fails."""
    model = lens(**KINDS["GPT-2"])
    damage(model)
    assert [check.name for check in verify_freeze(model) if not check.ok] == [name]


def test_a_model_needs_no_batch() -> None:
    """Without a batch a vision-language model is verified on noise that fits it, the same each time."""
    model = HookedVLM(*tiny("vit"))
    first, again = verify_freeze(model), verify_freeze(model)
    assert first == again and len(first) == len(model.sites("*.hook_pattern")) * 4 + 1
    assert all(check.ok for check in first)


def test_what_is_no_model_of_ours_says_so() -> None:
    """Any other module, and images for a language model, are one typed error."""
    with pytest.raises(ModelError, match=r"Linear has no freezes.*HookedTransformer"):
        verify_freeze(torch.nn.Linear(1, 1))
    with pytest.raises(UsageError, match="token ids"):
        verify_freeze(lens(**KINDS["GPT-2"]), "words")
