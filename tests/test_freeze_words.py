"""Freezes that have no hook point: each is proven on the model's own modules, and each way of breaking one is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_graphs_frozen_lens import KINDS, MORE, TOKENS, lens
from test_graphs_frozen_models import OUTPUTS, batch_of, model_of
from tiny_models import FAMILIES, tiny
from torch import Tensor

from graphs.frozen import freeze, from_transformer_lens, verify
from graphs.replace import Replacement
from graphs.targets import TokenLogit
from mechinterp.models import HookedVLM, verify_freeze
from mechinterp.models.freeze_words import freezes_in_words

INPUT_NORM, LENGTHS = "scale of the norm before the vision blocks", "lengths of both embeddings"
POOLING, GATE, NORM = (
    "pattern, scale and gate of the vision pooling head",
    "gate of the projector",
    "scale of the projector's norm",
)
WORDS = {
    "clip": {INPUT_NORM, LENGTHS},
    "siglip": {POOLING, LENGTHS},
    "llava": {INPUT_NORM, GATE},
    "gemma3": {NORM},
    "dinov2": set(),
    "vit": set(),
}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "dinov2"])
def test_every_freeze_of_a_graph_has_a_proof(family: str) -> None:
    """All that a pass of a family names as held, gates too, is proven for its model, in the order of the names."""
    model = model_of(family)
    frozen = freeze(model, batch_of(model), OUTPUTS[family])
    held = Replacement(frozen, [], mode="sae").freezes
    assert WORDS[family] == {name for name in frozen.freezes if "hook_" not in name}
    found = verify(model, held)
    assert [check.name for check in found] == list(held) and all(c.ok for c in found), [c for c in found if not c.ok]


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", [*KINDS, *MORE])
def test_every_freeze_of_a_language_models_graph_has_a_proof(kind: str) -> None:
    """The same for TransformerLens models, whose hook names have no tower."""
    model = lens(**{**KINDS, **MORE}[kind])
    held = Replacement(from_transformer_lens(model, TOKENS, [TokenLogit(7)]), [], mode="sae").freezes
    found = verify(model, held)
    assert [check.name for check in found] == list(held) and all(c.ok for c in found), [c for c in found if not c.ok]


def test_a_freeze_that_nothing_proves_is_a_failed_check() -> None:
    """A name that the model does not have, in words or as a point, is never taken on trust."""
    found = verify(model_of("vit"), ["lengths of both embeddings", "vision.ln_final.hook_scale", "vision.nowhere"])
    assert [check.ok for check in found] == [False, True, False] and "nothing" in found[0].detail


@pytest.mark.parametrize("family", FAMILIES)
def test_freezes_in_words_hold_in_half_precision(family: str) -> None:
    """Rounding to 16 bits is no broken freeze."""
    found = verify_freeze(HookedVLM(*tiny(family, dtype=torch.bfloat16)), None, freezes_in_words(family))
    assert {check.name for check in found} == WORDS[family] and all(check.ok for check in found), found


def test_freezes_in_words_need_no_asking() -> None:
    """`verify_freeze` without names proves them too."""
    assert {check.name for check in verify_freeze(model_of("llava")) if "hook_" not in check.name} == WORDS["llava"]


def other_scale(norm: Any) -> None:
    """A norm that divides by the mean size, not by the root of the mean square."""

    def forward(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True) if hasattr(norm, "bias") else x
        return norm.weight * centred / centred.abs().mean(-1, keepdim=True) + getattr(norm, "bias", 0.0)

    norm.forward = forward


def no_scale(norm: Any) -> None:
    """A norm that divides by nothing: there is no scale to hold."""
    norm.forward = lambda x: norm.weight * x + norm.bias


def other_activation(activation: Any) -> None:
    """Still called by its old name, no longer it."""
    activation.forward = lambda z: torch.nn.functional.gelu(z) + 0.1


def bent_after(projector: Any) -> None:
    """Another nonlinearity, behind the one whose gate is held."""
    real = projector.forward
    projector.forward = lambda x: real(x).tanh()


def pattern_of_values(attention: Any) -> None:
    """Attention whose weights come from what it averages: a held key does not hold them."""
    real = attention.forward
    attention.forward = lambda query, key, value: real(query, value, value)


def residual_twice(head: Any) -> None:
    """Pooling that adds what its parts do not make."""
    real = head.forward
    head.forward = lambda x: real(x) + x[:, 0]


def similarity(change: Callable[[Any, Any], Tensor]) -> Callable[[Any], None]:
    """A model that makes its logits in another way from its output."""

    def damage(hf: Any) -> None:
        real = hf.forward

        def forward(**inputs: Any) -> Any:
            output = real(**inputs)
            output.logits_per_image = change(hf, output)
            return output

        hf.forward = forward

    return damage


def unnormalised(hf: Any, output: Any) -> Tensor:
    image, text = (getattr(output, f"{tower}_model_output").pooler_output for tower in ("vision", "text"))
    return image @ text.T * hf.logit_scale.exp()


squashed = similarity(lambda hf, output: 3 * (output.logits_per_image / 3).tanh())
without_lengths = similarity(unnormalised)

BROKEN: dict[str, tuple[str, str, Callable[[Any], None], str]] = {
    # what is broken: family, module (empty: the whole model), the damage, the freeze that fails
    "input norm, another scale": ("clip", "vision_model.pre_layrnorm", other_scale, INPUT_NORM),
    "input norm, no scale": ("llava", "model.vision_tower.pre_layrnorm", no_scale, INPUT_NORM),
    "similarity squashed": ("clip", "", squashed, LENGTHS),
    "similarity squashed, SigLIP": ("siglip", "", squashed, LENGTHS),
    "lengths not taken off": ("clip", "", without_lengths, LENGTHS),
    "lengths not taken off, SigLIP": ("siglip", "", without_lengths, LENGTHS),
    "pooling, pattern": ("siglip", "vision_model.head.attention", pattern_of_values, POOLING),
    "pooling, scale": ("siglip", "vision_model.head.layernorm", other_scale, POOLING),
    "pooling, gate": ("siglip", "vision_model.head.mlp.activation_fn", other_activation, POOLING),
    "pooling, a part more": ("siglip", "vision_model.head", residual_twice, POOLING),
    "projector, gate": ("llava", "model.multi_modal_projector.act", other_activation, GATE),
    "projector, bent after": ("llava", "model.multi_modal_projector", bent_after, GATE),
    "projector, norm": ("gemma3", "model.multi_modal_projector.mm_soft_emb_norm", other_scale, NORM),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_freeze_in_words_is_found(case: str) -> None:
    """The one freeze that a damage undoes is the one that fails."""
    family, path, damage, fails = BROKEN[case]
    model = HookedVLM(*tiny(family))
    damage(model.hf.get_submodule(path))
    found = verify_freeze(model, None, freezes_in_words(family))
    assert [check.name for check in found if not check.ok] == [fails], found
