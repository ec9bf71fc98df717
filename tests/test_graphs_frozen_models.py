"""Every family of models, frozen: walking the parts gives back all that the true forward pass had, and its outputs.

The same check must find each way of getting a model wrong; `WRONG` lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from graph_toys import pairing_errors
from tiny_models import FAMILIES, tiny
from torch import Tensor, nn

from graphs.frozen import check, freeze, in_dtype, report_of, worst
from graphs.frozen.parts import FrozenBlock, FrozenPass, Inputs
from graphs.targets import Contrast, Feature, Logit, Output, ReportToken, Similarity, TokenLogit
from mechinterp.errors import ModelError, UsageError
from mechinterp.models import HookedVLM
from mechinterp.models.gates import gate_of
from mechinterp.types import ImageTextBatch, Placed, Site, Target

FLOAT, DOUBLE = torch.float32, torch.float64
LIMIT = {FLOAT: 1e-5, DOUBLE: 1e-10}
TARGET = Target("pneumonia", "a chest x-ray with pneumonia", "a chest x-ray without pneumonia", "is there pneumonia ?")
OUTPUTS: dict[str, list[Output]] = {
    "clip": [Contrast(TARGET), Similarity(TARGET)],
    "siglip": [Contrast(TARGET), Similarity(TARGET)],
    "llava": [Contrast(TARGET), Logit(TARGET, demeaned=True), TokenLogit("effusion", 3)],
    "gemma3": [Contrast(TARGET), Logit(TARGET, demeaned=True), TokenLogit("effusion", 3)],
    "dinov2": [],
    "vit": [Contrast(TARGET), Logit(TARGET, demeaned=True)],
}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_dtype = pytest.mark.parametrize("dtype", [FLOAT, DOUBLE], ids=str)


def lively(hf: nn.Module) -> nn.Module:
    """No parameter at a start value that hides a mistake: embeddings as large as the rest, no bias of 0."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "embed" in name or "token" in name:
                parameter.normal_(std=0.5, generator=generator)
            if name in ("logit_scale", "logit_bias"):
                parameter.fill_(1.3)
            assert parameter.numel() == 1 or float(parameter.std()) > 0.01, name
    return hf


@cache
def model_of(family: str, dtype: torch.dtype = FLOAT, **changes: Any) -> HookedVLM:
    hf, processor = tiny(family, **changes)
    return in_dtype(HookedVLM(lively(hf), processor), dtype)


def image() -> np.ndarray:
    return np.random.default_rng(0).random((1, 32, 32), dtype=np.float32)


def batch_of(model: HookedVLM) -> ImageTextBatch:
    return model.preprocess(image()) if model.family in ("dinov2", "vit") else model.prepare(image(), [TARGET])


def dictionary(width: int, dtype: torch.dtype, centred: bool = False) -> Any:
    draw = torch.Generator().manual_seed(1)
    W_enc, W_dec = torch.randn(width, 5, generator=draw).to(dtype), torch.randn(5, width, generator=draw).to(dtype)
    b_enc, b_dec = torch.randn(5, generator=draw).to(dtype), torch.randn(width, generator=draw).to(dtype)

    def pre(x: Tensor) -> Tensor:
        return (x - b_dec if centred else x) @ W_enc + b_enc

    return SimpleNamespace(
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=b_enc,
        b_dec=b_dec,
        pre_activations=pre,
        encode=lambda x: pre(x).relu(),
        decode=lambda f: f @ W_dec + b_dec,
    )


def features(dtype: torch.dtype) -> list[Feature]:
    """One of a transcoder, one of a centred SAE."""
    reads, writes = (Site("vision", 1, point) for point in ("ln2.hook_normalized", "hook_mlp_out"))
    transcoder = Placed(dictionary(32, dtype), reads, writes)
    sae = Placed.sae(dictionary(32, dtype, centred=True), "vision.blocks.0.hook_resid_post")
    return [Feature("vision", 1, 2, 3, transcoder), Feature("vision", 0, -1, 4, sae)]


@cache
def frozen_of(family: str, dtype: torch.dtype = FLOAT) -> FrozenPass:
    model = model_of(family, dtype)
    return freeze(model, batch_of(model), [*OUTPUTS[family], *features(dtype)], dtype)


# ------------------------------------------------------------------------------------------------------- it is true


@every_family
@every_dtype
def test_walking_the_parts_gives_back_the_true_pass(family: str, dtype: torch.dtype) -> None:
    residuals = check(frozen_of(family, dtype))
    assert worst(residuals).relative < LIMIT[dtype], worst(residuals)
    names = {r.name for r in residuals}
    model = model_of(family, dtype)
    for tower in model.towers:
        stacks = [s.tower for s in frozen_of(family, dtype).stacks if s.tower.split(".")[0] == tower]
        assert stacks
        for stack in stacks:
            for layer in range(model.n_layers(tower)):
                for point in ("resid_pre", "resid_mid", "resid_post", "mlp_out"):
                    assert f"{stack}.blocks.{layer}.hook_{point}" in names


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "SwiGLU with layer scale": ("dinov2", {"use_swiglu_ffn": True}),
    "positions interpolated": ("dinov2", {"image_size": 48}),
    "ReLU": ("clip", {"hidden_act": "relu"}),
    "one head": ("vit", {"num_attention_heads": 1}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_families(name: str) -> None:
    family, changes = VARIANTS[name]
    model = model_of(family, DOUBLE, **changes)
    frozen = freeze(model, batch_of(model), [*OUTPUTS[family], *features(DOUBLE)], DOUBLE)
    assert worst(check(frozen)).relative < 1e-10


def test_a_projector_that_reads_cls_too() -> None:
    hf, processor = tiny("llava")
    hf.config.vision_feature_select_strategy = "full"
    model = in_dtype(HookedVLM(lively(hf), processor), DOUBLE)
    frozen = freeze(model, batch_of(model), [Contrast(TARGET)], DOUBLE)
    assert worst(check(frozen)).relative < 1e-10
    labels = frozen.stacks[1].labels
    first = labels.index("image CLS")
    assert labels[first + 1 : first + 17] == tuple(f"image {r},{c}" for r in range(4) for c in range(4))


@every_family
def test_the_adjoints_are_transposes(family: str) -> None:
    errors = pairing_errors(frozen_of(family, DOUBLE), 0)
    assert max(errors.values()) < 1e-12, errors


@every_dtype
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_each_half_of_a_similarity_sums_to_it(family: str, dtype: torch.dtype) -> None:
    model = model_of(family, dtype)
    batch = batch_of(model)
    alone = replace(TARGET, negative=None)
    with torch.no_grad():
        contrast, similarity = model.score(batch, [TARGET, alone])[0].tolist()
    frozen = frozen_of(family, dtype)
    by_kind: dict[tuple[str, bool], float] = {}
    for readout in frozen.readouts:
        if readout.kind != "feature":
            total = float((readout.seed * frozen.stream_of(readout)).sum()) + readout.constant
            key = (readout.kind, readout.stack == 0)
            by_kind[key] = by_kind.get(key, 0.0) + total
            assert readout.weight == 0.5
    for kind, want in (("contrast", contrast), ("similarity", similarity)):
        for half in (True, False):
            assert by_kind[kind, half] == pytest.approx(want, abs=20 * LIMIT[dtype]), (kind, half)
    assert [s.tower for s in frozen.stacks] == ["vision", "text.0", "text.1"]


@pytest.mark.parametrize("family", ["llava", "gemma3", "vit"])
def test_values_are_the_models_own_scores(family: str) -> None:
    model, frozen = model_of(family), frozen_of(family)
    with torch.no_grad():
        want = float(model.score(batch_of(model), [TARGET])[0, 0])
        logits = model(batch_of(model)).logits[0]
    assert frozen.readouts[0].value == pytest.approx(want, abs=1e-5)
    if family == "vit":
        assert frozen.readouts[1].value == pytest.approx(float(logits[1] - logits.mean()), abs=1e-5)
    else:
        ids = model.tokenizer.convert_tokens_to_ids(["yes", "effusion"])
        assert frozen.readouts[1].value == pytest.approx(float(logits[-1, ids[0]] - logits[-1].mean()), abs=1e-5)
        assert frozen.readouts[2].value == pytest.approx(float(logits[3, ids[1]]), abs=1e-5)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_tokens_of_a_report_share_one_pass(family: str) -> None:
    model = model_of(family)
    asked = model.preprocess(image())
    said = ("no", "effusion", "is", "there", "and")
    ids = tuple(model.tokenizer.convert_tokens_to_ids(list(said)))
    tokens = [ReportToken(i, tokens=ids) for i in (4, 1)] + [ReportToken(2, tokens=ids, versus="effusion")]
    frozen = freeze(model, asked, tokens)
    assert worst(check(frozen)).relative < 1e-5
    prompt = len(frozen.stacks[1].labels) - 4  # the prompt and what was said before token 4
    assert frozen.stacks[1].labels[prompt:] == said[:4]
    assert [int(r.seed.abs().sum(-1).argmax()) - prompt for r in frozen.readouts] == [3, 0, 1]
    alone = freeze(model, asked, [ReportToken(1, tokens=ids)]).readouts[0]
    assert alone.value == pytest.approx(frozen.readouts[1].value, abs=1e-4)
    greedy, words = report_of(model, asked, max_new_tokens=3)
    (first,) = freeze(model, asked, [ReportToken(0)]).readouts
    assert len(greedy) == len(words) and first.name == words[0]


def test_features_as_outputs_are_the_dictionaries_own_pre_activations() -> None:
    frozen = frozen_of("dinov2", DOUBLE)
    transcoder, sae = features(DOUBLE)
    first, second = frozen.readouts
    blocks = frozen.stacks[0].blocks
    pre = [f.placed.dictionary.pre_activations for f in (transcoder, sae)]  # type: ignore[attr-defined]
    assert first.value == pytest.approx(float(pre[0](blocks[1].mlp_in)[2, 3]), rel=1e-12)
    assert second.value == pytest.approx(float(pre[1](blocks[0].resid_post)[-1, 4]), rel=1e-12)


@every_family
def test_everything_held_is_named_and_labelled(family: str) -> None:
    frozen, model = frozen_of(family), model_of(family)
    hooks = {name for name in model.sites() if name.endswith(("hook_pattern", "hook_scale"))}
    held = {name for name in frozen.freezes if "hook_" in name}
    assert {name.replace("text.0.", "text.").replace("text.1.", "text.") for name in held} == hooks
    for stack in frozen.stacks:
        assert len(stack.labels) == len(stack.final)
        assert all(t.is_contiguous() for _, t in stack.inputs.kinds.values())
    assert frozen.model["family"] == family and len(frozen.model["sha256"]) == 64
    assert [s.causal for s in frozen.stacks] == [
        {"vision": False, "text": family != "gemma3"}.get(s.tower.split(".")[0], False) and family != "siglip"
        for s in frozen.stacks
    ]


ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "gelu_new", "quick_gelu", "silu", "relu")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gate_times_its_input_is_the_activation(name: str) -> None:
    from transformers.activations import ACT2FN

    z = torch.cat([torch.linspace(-12, 12, 101), torch.tensor([0.0, 1e-30, -1e-30])]).double()
    gate = gate_of(ACT2FN[name], z)
    assert torch.allclose(gate * z, ACT2FN[name](z), atol=1e-12) and gate.isfinite().all()
    with pytest.raises(ModelError, match="Tanh"):
        gate_of(nn.Tanh(), z)


# --------------------------------------------------------------------------------------------- it would be found out


def in_block(frozen: FrozenPass, stack: int, layer: int, change: Callable[[FrozenBlock], FrozenBlock]) -> FrozenPass:
    """The pass with one block changed."""
    stacks = list(frozen.stacks)
    blocks = list(stacks[stack].blocks)
    blocks[layer] = change(blocks[layer])
    stacks[stack] = replace(stacks[stack], blocks=tuple(blocks))
    return replace(frozen, stacks=tuple(stacks))


def attention(**changes: Callable[[Any], Any]) -> Callable[[FrozenBlock], FrozenBlock]:
    """Change fields of the attention, each from the attention as it is."""
    return lambda b: replace(b, attention=replace(b.attention, **{k: f(b.attention) for k, f in changes.items()}))


def scores(**changes: Callable[[Any], Any]) -> Callable[[FrozenBlock], FrozenBlock]:
    return attention(scores=lambda a: replace(a.scores, **{k: f(a.scores) for k, f in changes.items()}))


def mlp(**changes: Callable[[Any], Any]) -> Callable[[FrozenBlock], FrozenBlock]:
    return lambda b: replace(b, mlp=replace(b.mlp, **{k: f(b.mlp) for k, f in changes.items()}))


def zero(name: str) -> Callable[[Any], Any]:
    return lambda part: torch.zeros_like(getattr(part, name))


def norm_with(**changes: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda part: replace(part.norm, **{k: f(part.norm) for k, f in changes.items()})


def unmasked(a: Any) -> Tensor:
    return a.scores.values.softmax(-1)


def wrong_order(a: Any) -> Tensor:
    """Grouped heads repeated as 0 1 0 1 where the model has 0 0 1 1."""
    return a.W_V[::2].repeat(2, 1, 1)


def without_rope(s: Any) -> Tensor:
    """Turn back by the inverse rotation."""
    first, second = s.q.chunk(2, dim=-1)
    return s.q * s.rotate.cos - torch.cat([-second, first], dim=-1) * s.rotate.sin


def derivative_gate(m: Any) -> Tensor:
    return m.gate * (1 + 0.1 * (m.gate < 0.5))


def inputs(kind: str, change: Callable[[Tensor], Tensor]) -> Callable[[FrozenPass, int], FrozenPass]:
    def damage(frozen: FrozenPass, stack: int) -> FrozenPass:
        kinds = dict(frozen.stacks[stack].inputs.kinds)
        kinds[kind] = (kinds[kind][0], change(kinds[kind][1]))
        stacks = list(frozen.stacks)
        stacks[stack] = replace(stacks[stack], inputs=Inputs(kinds))
        return replace(frozen, stacks=tuple(stacks))

    return damage


def bridge(**changes: Callable[[Any], Any]) -> Callable[[FrozenPass, int], FrozenPass]:
    def damage(frozen: FrozenPass, stack: int) -> FrozenPass:
        stacks = list(frozen.stacks)
        was = stacks[1].bridge
        stacks[1] = replace(stacks[1], bridge=replace(was, **{k: f(was) for k, f in changes.items()}))
        return replace(frozen, stacks=tuple(stacks))

    return damage


def readout(**changes: Callable[[Any], Any]) -> Callable[[FrozenPass, int], FrozenPass]:
    def damage(frozen: FrozenPass, stack: int) -> FrozenPass:
        was = frozen.readouts[stack]
        return replace(frozen, readouts=(replace(was, **{k: f(was) for k, f in changes.items()}),))

    return damage


WRONG: dict[str, tuple[str, int, Any, str]] = {
    # what is wrong: family, stack (or readout), the damage, where it must show first
    "scale of ln1": ("clip", 0, attention(norm=norm_with(scale=lambda n: n.scale * 1.01)), "hook_resid_mid"),
    "scale of ln2": ("clip", 0, mlp(norm=norm_with(scale=lambda n: n.scale * 1.01)), "ln2.hook_normalized"),
    "no centring": ("vit", 0, attention(norm=norm_with(centres=lambda n: False)), "hook_resid_mid"),
    "centring an RMSNorm": ("llava", 1, attention(norm=norm_with(centres=lambda n: True)), "hook_resid_mid"),
    "no shift of ln1": ("siglip", 1, attention(norm=norm_with(shift=zero("shift"))), "hook_resid_mid"),
    "no b_O": ("clip", 1, attention(b_O=zero("b_O")), "hook_resid_mid"),
    "no b_V": ("dinov2", 0, attention(b_V=zero("b_V")), "hook_resid_mid"),
    "no b_in": ("vit", 0, mlp(b_in=zero("b_in")), "hook_mlp_out"),
    "no b_out": ("clip", 0, mlp(b_out=zero("b_out")), "hook_mlp_out"),
    "no causal mask": ("llava", 1, attention(pattern=unmasked), "hook_resid_mid"),
    "no causal mask in captions": ("clip", 1, attention(pattern=unmasked), "hook_resid_mid"),
    "no sliding window": ("gemma3", 1, attention(pattern=unmasked), "hook_resid_mid"),
    "grouped heads in another order": ("llava", 1, attention(W_V=wrong_order), "hook_resid_mid"),
    "grouped heads of Gemma": ("gemma3", 1, attention(W_V=wrong_order), "hook_resid_mid"),
    "queries not turned": ("llava", 1, scores(q=without_rope), "attn.hook_pattern"),
    "rotation forgotten": ("llava", 1, scores(rotate=lambda s: None), "attn.q"),
    "query norm forgotten": ("gemma3", 1, scores(q_norm=lambda s: ()), "attn.q"),
    "scaling of scores": ("gemma3", 1, scores(scaling=lambda s: 1.1 * s.scaling), "attn.hook_pattern"),
    "gain without its 1": ("gemma3", 1, attention(norm=norm_with(gain=lambda n: n.gain - 1)), "hook_resid_mid"),
    "no norm after attention": ("gemma3", 1, attention(post=lambda a: None), "hook_resid_mid"),
    "no norm after the MLP": ("gemma3", 1, mlp(post=lambda m: None), "hook_mlp_out"),
    "no layer scale": ("dinov2", 0, attention(post=lambda a: None), "hook_resid_mid"),
    "wrong gate": ("clip", 0, mlp(gate=derivative_gate), "hook_mlp_out"),
    "gate branch instead of up branch": ("llava", 1, mlp(gate=lambda m: m.gate.sigmoid()), "hook_mlp_out"),
    "words not scaled": ("gemma3", 1, inputs("token", lambda v: v / 32**0.5), "blocks.0.hook_resid_pre"),
    "no learned positions": ("clip", 0, inputs("pos", torch.zeros_like), "blocks.0.hook_resid_pre"),
    "no input bias": ("clip", 0, inputs("bias", torch.zeros_like), "blocks.0.hook_resid_pre"),
    "no CLS": ("dinov2", 0, inputs("cls", torch.zeros_like), "blocks.0.hook_resid_pre"),
    "patches in another order": ("siglip", 0, inputs("patch", lambda v: v.flip(0)), "blocks.0.hook_resid_pre"),
    "gate of the projector": ("llava", 1, bridge(gate=lambda b: b.gate * 1.01), "text.blocks.0.hook_resid_pre"),
    "bias of the projector": ("llava", 1, bridge(bias=zero("bias")), "text.blocks.0.hook_resid_pre"),
    "projector reads CLS": ("llava", 1, bridge(mix=lambda b: b.mix.roll(-1, 1)), "text.blocks.0.hook_resid_pre"),
    "image at other slots": ("llava", 1, bridge(slots=lambda b: b.slots.flip(0)), "text.blocks.0.hook_resid_pre"),
    "projector norm": ("gemma3", 1, bridge(inner=lambda b: None), "text.blocks.0.hook_resid_pre"),
    "pooling": ("gemma3", 1, bridge(mix=lambda b: b.mix.flip(1)), "text.blocks.0.hook_resid_pre"),
    "seed": ("llava", 0, readout(seed=lambda r: r.seed * 1.01), "out: "),
    "constant of a half": ("siglip", 0, readout(constant=lambda r: 0.0), "out: "),
    "row of a readout": ("clip", 1, readout(seed=lambda r: r.seed.roll(1, 0)), "out: "),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_check_finds_what_is_wrong(case: str) -> None:
    family, index, damage, shows = WRONG[case]
    frozen = frozen_of(family)
    broken = damage(frozen, index) if damage.__code__.co_argcount == 2 else in_block(frozen, index, 1, damage)
    bad = [r for r in check(broken) if not r.relative < 1e-4]
    assert bad and shows in bad[0].name, bad[:3]


def test_a_residual_that_is_no_number_is_the_worst() -> None:
    frozen = in_block(frozen_of("vit"), 0, 1, mlp(b_out=lambda m: m.b_out * float("nan")))
    assert worst(check(frozen)).relative != worst(check(frozen)).relative


# ------------------------------------------------------------------------------------------------- what is refused


def test_what_cannot_be_frozen_says_why() -> None:
    clip, llava, vit = model_of("clip"), model_of("llava"), model_of("vit")
    two = clip.preprocess(np.zeros((2, 32, 32), np.float32) + 0.5)
    asked = batch_of(llava)
    with pytest.raises(UsageError, match="2 images"):
        freeze(clip, two, [Contrast(TARGET)])
    with pytest.raises(UsageError, match="nothing to explain"):
        freeze(clip, two[:1], [])
    with pytest.raises(UsageError, match=r"a clip model has no Logit.*Similarity"):
        freeze(clip, two[:1], [Logit(TARGET)])
    with pytest.raises(UsageError, match="negative caption"):
        freeze(clip, two[:1], [Contrast(replace(TARGET, negative=None))])
    with pytest.raises(UsageError, match="does not ask"):
        freeze(llava, asked, [Contrast(Target("effusion", "x"))])
    with pytest.raises(UsageError, match="different prompts"):
        freeze(llava, asked, [Contrast(TARGET), ReportToken(0, prompt="no finding", tokens=(9,))])
    with pytest.raises(UsageError, match="report has 1 token"):
        freeze(llava, asked, [ReportToken(3, tokens=(9,))])
    with pytest.raises(UsageError, match="outside the prompt"):
        freeze(llava, asked, [TokenLogit("yes", 99)])
    with pytest.raises(UsageError, match="no stack 'text'"):
        freeze(vit, batch_of(vit), [Feature("text", 0, 0, 0, features(FLOAT)[0].placed)])
    with pytest.raises(UsageError, match="position 99"):
        freeze(vit, batch_of(vit), [Feature("vision", 0, 99, 0, features(FLOAT)[0].placed)])
    training = HookedVLM(*tiny("vit"))
    training.hf.train()
    with pytest.raises(UsageError, match="training mode"):
        freeze(training, batch_of(vit), [Logit(TARGET)])
