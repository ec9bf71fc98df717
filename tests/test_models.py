"""One contract, one table: what must hold for every family of models, on small random configurations."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, tiny

from mechinterp.errors import ModelError, UsageError
from mechinterp.models import HookedVLM, families
from mechinterp.models.doctor import _state
from mechinterp.models.freeze import moves, primary
from mechinterp.types import ImageTextBatch, Target

TARGET = Target("pneumonia", "a chest x-ray with pneumonia", "a chest x-ray without pneumonia", "is there pneumonia ?")
OTHER = Target("effusion", "a chest x-ray with effusion", None, "is there pneumonia ?", yes="left", no="right")
TEXTS = ["a chest x-ray with pneumonia", "no finding", "a portable marker"]
DUAL, GENERATIVE = ("clip", "siglip"), ("llava", "gemma3")
SCORED = [f for f in FAMILIES if f != "dinov2"]

every_family = pytest.mark.parametrize("family", FAMILIES)
every_scored = pytest.mark.parametrize("family", SCORED)


@cache
def hooked(family: str, dtype: torch.dtype = torch.float32) -> HookedVLM:
    return HookedVLM(*tiny(family, dtype=dtype))


def images(n: int = 3, size: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, size, size), dtype=np.float32)


def batch_for(model: HookedVLM, n: int = 3) -> ImageTextBatch:
    """A batch that reaches every hook point of the family."""
    if model.family in DUAL:
        return model.preprocess(images(n), TEXTS[:n])
    return model.prepare(images(n), [TARGET])


def plain_inputs(model: HookedVLM, batch: ImageTextBatch) -> dict[str, Any]:
    """What a user of transformers would pass, written out here once more."""
    found: dict[str, Any] = {"pixel_values": batch.pixel_values.to(model.hf.dtype)}
    if batch.input_ids is not None:
        found["input_ids"] = batch.input_ids
        if batch.attention_mask is not None:
            found["attention_mask"] = batch.attention_mask
        if model.family == "gemma3":
            found["token_type_ids"] = (batch.input_ids == model.hf.config.image_token_id).long()
    return found


# ------------------------------------------------------------------------------------------------ the contract table


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_output_is_the_plain_models_bit_for_bit_bare_and_while_reading(family: str, dtype: torch.dtype) -> None:
    model = hooked(family, dtype)
    plain, _ = tiny(family, dtype=dtype)  # built a second time: nothing of ours ever touched it
    batch = batch_for(model)
    want = primary(model, plain(**plain_inputs(model, batch)))
    assert want.isfinite().all()
    assert torch.equal(primary(model, model(batch)), want)
    output, cache = model.run_with_cache(batch)
    assert torch.equal(primary(model, output), want)
    assert set(cache) == set(model.sites())
    assert all(value.isfinite().all() for value in cache.values())


@every_family
@torch.no_grad()
def test_an_edit_at_every_point_moves_the_output(family: str) -> None:
    model = hooked(family)
    batch = batch_for(model)
    before = primary(model, model(batch))
    still = [name for name in model.sites() if not moves(model, batch, name, before) > 1e-7]
    assert not still


@every_family
@torch.no_grad()
def test_writing_into_the_value_is_an_edit_too(family: str) -> None:
    """The idiom of TransformerLens users: change the tensor in place, and return it or nothing."""
    model = hooked(family)
    batch = batch_for(model)

    def returned(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value * 1.5

    def in_place(value: torch.Tensor, hook: Any) -> None:
        value *= 1.5

    for name in (
        model.sites("vision.blocks.1.*") + model.sites("*.hook_pooled") + model.sites("text.*.1.hook_resid_mid")
    ):
        want = primary(model, model.run_with_hooks(batch, fwd_hooks=[(name, returned)]))
        assert torch.equal(primary(model, model.run_with_hooks(batch, fwd_hooks=[(name, in_place)])), want), name
        with torch.inference_mode():
            found = primary(model, model.run_with_hooks(batch, fwd_hooks=[(name, in_place)]))
        assert torch.allclose(found, want, atol=1e-5), name


@every_family
@torch.no_grad()
def test_the_residual_stream_adds_up(family: str) -> None:
    model = hooked(family)
    _, at = model.run_with_cache(batch_for(model))
    for tower in model.towers:
        assert torch.equal(at[f"{tower}.hook_embed"], at[f"{tower}.blocks.0.hook_resid_pre"])
        for layer in range(model.n_layers(tower)):
            block = f"{tower}.blocks.{layer}"
            mid = at[f"{block}.hook_resid_pre"] + at[f"{block}.hook_attn_out"]
            post = at[f"{block}.hook_resid_mid"] + at[f"{block}.hook_mlp_out"]
            assert torch.allclose(mid, at[f"{block}.hook_resid_mid"], atol=1e-6)
            assert torch.allclose(post, at[f"{block}.hook_resid_post"], atol=1e-6)
            assert at[f"{block}.hook_resid_post"].shape[-1] == model.d_model(tower)
            if layer:
                assert torch.equal(at[f"{block}.hook_resid_pre"], at[f"{tower}.blocks.{layer - 1}.hook_resid_post"])


@every_family
def test_everything_is_restored_also_after_an_exception(family: str) -> None:
    model = hooked(family)
    batch = batch_for(model)
    with torch.no_grad():
        model.hf(**plain_inputs(model, batch))  # transformers installs some hooks of its own on the first run
        want, before = primary(model, model(batch)), _state(model)

        def failing(value: torch.Tensor, hook: Any) -> torch.Tensor:
            raise KeyError(hook.name)

        for name in model.sites("*.blocks.1.*") + model.sites("*r.hook_out") + model.sites("*.hook_[ple]*"):
            with pytest.raises(KeyError, match=name):
                model.run_with_hooks(batch, fwd_hooks=[(name, failing)])
        with pytest.raises(ZeroDivisionError), model.hooks(fwd_hooks=[(lambda _: True, lambda v, hook: v * 0)]):
            model(batch)
            raise ZeroDivisionError
        assert _state(model) == before
        assert not model.hooked()
        assert torch.equal(primary(model, model(batch)), want)


@every_family
@torch.no_grad()
def test_a_bright_patch_moves_the_token_that_owns_it_and_no_other(family: str) -> None:
    model = hooked(family)
    crops = model.image_processor.crop is not None
    for height, width in [(32, 32), (64, 64), *([(48, 64), (80, 64)] if crops else [])]:
        owners = model.grid(height, width)
        dark = np.full((1, height, width), 0.25, np.float32)
        seen = set()
        for row in range(model.grid_shape[0]):
            for column in range(model.grid_shape[1]):
                token = model.patch_tokens().start + row * model.grid_shape[1] + column
                where = (owners == token).nonzero()
                bright = dark.copy()
                # away from the border of the patch, which a resize smears over its neighbours
                (top, left), (bottom, right) = where.min(0).values.tolist(), where.max(0).values.tolist()
                edge = 0 if height == 32 else 5
                bright[0, top + edge : bottom + 1 - edge, left + edge : right + 1 - edge] = 0.75
                embedded = []
                for image in (dark, bright):
                    batch = model.preprocess(image)
                    cache: list[torch.Tensor] = []
                    with model.hooks(fwd_hooks=[("vision.hook_embed", lambda v, hook, c=cache: c.append(v.clone()))]):
                        model.encode_image(batch)
                    embedded += cache
                moved = (embedded[0] != embedded[1]).any(-1)[0].nonzero().flatten().tolist()
                assert moved == [token], (height, width, row, column)
                seen.add(token)
        tokens = model.patch_tokens()
        assert seen == set(range(tokens.start, tokens.stop))
        assert model.cls_token is None or model.cls_token not in seen


@every_family
@torch.no_grad()
def test_the_pattern_is_what_eager_attention_computes(family: str) -> None:
    """Also: the causal and sliding masks stand while the pattern is being read, and grouped heads are repeated."""
    model = hooked(family)
    batch = batch_for(model)
    _, cache = model.run_with_cache(batch, names_filter="*.hook_pattern")
    eager, _ = tiny(family)
    eager.set_attn_implementation("eager")
    output = eager(**plain_inputs(model, batch), output_attentions=True)
    attentions = {"text": getattr(output, "attentions", None)}
    if family in DUAL:
        attentions = {"text": output.text_model_output.attentions, "vision": output.vision_model_output.attentions}
    elif family in ("dinov2", "vit"):
        attentions = {"vision": output.attentions}
    for tower, patterns in attentions.items():
        for layer in range(model.n_layers(tower)):
            found = cache[f"{tower}.blocks.{layer}.attn.hook_pattern"]
            assert found.shape == patterns[layer].shape
            assert torch.allclose(found, patterns[layer], atol=1e-5), (tower, layer)


@pytest.mark.parametrize("family", ["clip", "llava", "gemma3"])
@torch.no_grad()
def test_no_token_sees_a_later_one_while_hooks_are_in_use(family: str) -> None:
    model = hooked(family)
    batch = batch_for(model)
    assert batch.input_ids is not None
    other = batch.input_ids.clone()
    other[:, -1] = 8
    changed = ImageTextBatch(batch.pixel_values, other, batch.attention_mask)
    site = "text.blocks.1.hook_resid_post"
    hooks = [("text.*" and (lambda name: name.startswith("text")), lambda value, hook: value.clone())]
    found = []
    for each in (batch, changed):
        kept: list[torch.Tensor] = []
        with model.hooks(fwd_hooks=[*hooks, (site, lambda v, hook, k=kept: k.append(v.clone()))]):
            model(each)
        found += kept
    assert torch.allclose(found[0][:, :-1], found[1][:, :-1], atol=1e-6)
    assert not torch.allclose(found[0][:, -1], found[1][:, -1], atol=1e-3)


@every_family
@torch.no_grad()
def test_scales_are_what_the_norms_divide_by(family: str) -> None:
    """Putting back an equal copy recomputes the norm from its scale, and changes next to nothing."""
    model = hooked(family)
    batch = batch_for(model)
    want = primary(model, model(batch))
    name = "vision.blocks.1.ln2.hook_scale"
    _, cache = model.run_with_cache(batch, names_filter=[name, "vision.blocks.1.hook_resid_mid"])
    resid = cache["vision.blocks.1.hook_resid_mid"]
    assert torch.allclose(cache[name][..., 0], (resid.var(-1, correction=0) + 1e-6).sqrt(), rtol=1e-3)
    for name in model.sites("*.[1n]*.hook_scale") + model.sites("*.1.attn.hook_pattern"):
        found = primary(model, model.run_with_hooks(batch, fwd_hooks=[(name, lambda value, hook: value.clone())]))
        assert torch.allclose(found, want, atol=2e-5), name


# ---------------------------------------------------------------------------------------------------------- scoring


@every_scored
@torch.no_grad()
def test_scores_are_the_plain_models_own_logits(family: str) -> None:
    model = hooked(family)
    batch = model.prepare(images(), [TARGET])
    plain, _ = tiny(family)
    if family in DUAL:
        scores = model.score(batch, [TARGET, OTHER])
        texts = model.preprocess(images(), [TARGET.positive, TARGET.negative or "", OTHER.positive])
        logits = plain(**plain_inputs(model, texts)).logits_per_image
        want = torch.stack([logits[:, 0] - logits[:, 1], logits[:, 2]], dim=1)
    elif family in GENERATIVE:
        scores = model.score(batch, [TARGET, OTHER])
        logits = plain(**plain_inputs(model, batch)).logits[:, -1]
        ids = model.tokenizer.convert_tokens_to_ids(["yes", "no", "left", "right"])
        want = torch.stack([logits[:, ids[0]] - logits[:, ids[1]], logits[:, ids[2]] - logits[:, ids[3]]], dim=1)
    else:
        scores = model.score(batch, [Target("effusion", "x"), Target("lung", "No Finding")])
        want = plain(**plain_inputs(model, batch)).logits[:, [2, 0]]
    assert scores.shape == (3, 2)
    assert torch.allclose(scores, want, atol=1e-5)


@every_scored
def test_resuming_at_a_block_equals_editing_there_and_is_differentiable(family: str) -> None:
    model = hooked(family)
    batch = model.prepare(images(), [TARGET])
    targets = [TARGET, OTHER] if family != "vit" else [Target("pneumonia", "x")]
    for layer in range(model.n_layers()):
        for point in ("hook_resid_pre", "hook_resid_post"):
            site = f"vision.blocks.{layer}.{point}"
            value = torch.randn(3, model.patch_tokens().stop, model.d_model(), requires_grad=True)
            with model.hooks(fwd_hooks=[(site, lambda _, hook, v=value: v)]):
                want = model.score(batch, targets)
            found = model.run_from(site, value, batch, targets)
            assert torch.allclose(found, want, atol=1e-5), site
            gradients = [torch.autograd.grad(s.sum(), value)[0] for s in (found, want)]
            assert torch.allclose(*gradients, atol=1e-5)
            assert gradients[0].abs().max() > 0
            # hooks further on are heard
            last = f"vision.blocks.{model.n_layers() - 1}.mlp.hook_post"
            if layer < model.n_layers() - 1:
                with model.hooks(fwd_hooks=[(last, lambda v, hook: v * 0)]):
                    assert not torch.allclose(model.run_from(site, value, batch, targets), want, atol=1e-5)


def test_resuming_elsewhere_is_refused() -> None:
    model = hooked("clip")
    batch, value = model.preprocess(images()), torch.zeros(3, 17, 32)
    for site in ("text.blocks.0.hook_resid_post", "vision.blocks.0.hook_mlp_out", "vision.hook_pooled"):
        with pytest.raises(UsageError, match="resume"):
            model.run_from(site, value, batch, [TARGET])
    with pytest.raises(UsageError, match="batch"):
        model.run_from("vision.blocks.0.hook_resid_post", value[:2], batch, [TARGET])
    with pytest.raises(ModelError, match=r"vision\.blocks\.7"):
        model.run_from("vision.blocks.7.hook_resid_post", value, batch, [TARGET])


@pytest.mark.parametrize("family", DUAL)
def test_the_text_side_is_kept_but_never_stale(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = HookedVLM(*tiny(family))
    batch = model.preprocess(images())
    with torch.inference_mode():
        before = model.score(batch, [TARGET]).clone()
    calls: list[int] = []
    real = model.hf.get_text_features
    monkeypatch.setattr(model.hf, "get_text_features", lambda **kw: (calls.append(1), real(**kw))[1])
    pixels = batch.pixel_values.clone().requires_grad_()
    score = model.score(batch.with_pixels(pixels), [TARGET])  # kept from inference mode, and differentiable still
    score.sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().max() > 0
    assert torch.allclose(score, before, atol=1e-5) and not calls
    with model.hooks(fwd_hooks=[("text.blocks.0.hook_resid_post", lambda v, hook: v + torch.randn_like(v))]):
        assert not torch.allclose(model.score(batch, [TARGET]), before, atol=1e-5)
    assert torch.allclose(model.score(batch, [TARGET]), before, atol=1e-5)
    with torch.no_grad():
        model.hf.text_model.final_layer_norm.weight[0] += 3.0
    assert not torch.allclose(model.score(batch, [TARGET]), before, atol=1e-5)


def test_a_target_that_cannot_be_scored_says_why() -> None:
    llava, vit = hooked("llava"), hooked("vit")
    with pytest.raises(UsageError, match="one question"):
        llava.prepare(images(), [TARGET, Target("effusion", "x")])
    with pytest.raises(UsageError, match="does not ask"):
        llava.score(llava.prepare(images(), [TARGET]), [Target("effusion", "x")])
    with pytest.raises(UsageError, match="does not ask"):
        llava.score(llava.preprocess(images()), [TARGET])
    asked = Target("pneumonia", "x", question=TARGET.question, yes="perhaps")
    with pytest.raises(UsageError, match="perhaps"):
        llava.score(llava.prepare(images(), [asked]), [asked])
    same = Target("pneumonia", "x", question=TARGET.question, yes="left view", no="left")
    with pytest.raises(UsageError, match="same token"):
        llava.score(llava.prepare(images(), [same]), [same])
    with pytest.raises(UsageError, match="classes"):
        vit.score(vit.preprocess(images()), [Target("hernia", "x")])
    with pytest.raises(UsageError, match="no text and no classes"):
        hooked("dinov2").score(hooked("dinov2").preprocess(images()), [TARGET])
    with pytest.raises(UsageError, match="no targets"):
        vit.score(vit.preprocess(images()), [])


@pytest.mark.parametrize("family", GENERATIVE)
@torch.no_grad()
def test_a_report_is_the_plain_models_greedy_text(family: str) -> None:
    model = hooked(family)
    plain, _ = tiny(family)
    batch = model.prepare(images(), [TARGET])
    assert batch.input_ids is not None
    ids = plain.generate(**plain_inputs(model, batch), max_new_tokens=5, do_sample=False)
    want = model.tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    assert model.generate_report(batch, max_new_tokens=5) == [text.strip() for text in want]
    assert len(model.generate_report(model.preprocess(images()), max_new_tokens=2)) == 3
    with pytest.raises(UsageError, match="writes no text"):
        hooked("clip").generate_report(hooked("clip").preprocess(images()))


@every_family
@torch.no_grad()
def test_image_embeddings(family: str) -> None:
    model = hooked(family)
    batch = batch_for(model)
    plain, _ = tiny(family)
    found = model.encode_image(batch)
    if family in DUAL:
        want = plain.get_image_features(batch.pixel_values).pooler_output
        texts = model.encode_text([TEXTS[0]])
        assert texts.shape == (1, found.shape[1])
    elif family in GENERATIVE:
        output = plain(**plain_inputs(model, batch)).image_hidden_states
        want = output.view(3, -1, output.shape[-1]).mean(1)
    elif family == "dinov2":
        want = plain(batch.pixel_values).pooler_output
    else:
        want = plain.vit(batch.pixel_values).last_hidden_state[:, 0]
    assert torch.allclose(found, want, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- smaller things


def test_a_llava_has_no_points_where_its_projector_does_not_look() -> None:
    model = hooked("llava")
    assert model.n_layers("vision") == 2  # of three: it reads hidden_states[-2]
    assert not model.sites("vision.blocks.2.*") and not model.sites("vision.ln_final.*")
    hf, processor = tiny("llava")
    hf.config.vision_feature_layer = [-2, -1]
    with pytest.raises(ModelError, match="several vision layers"):
        HookedVLM(hf, processor)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    model = hooked("clip")
    batch = model.preprocess(images())
    with pytest.raises(ModelError, match=r"vision\.blocks\.1\.hook_resid_post"):
        model.run_with_cache(batch, names_filter="vision.blocks.1.hook_resid_pots")
    with pytest.raises(ModelError, match="hook_mpl_out"):
        model.run_with_hooks(batch, fwd_hooks=[("vision.blocks.1.hook_mpl_out", lambda v, hook: v)])
    with pytest.raises(ModelError, match="nothing"):
        model.run_with_cache(batch, names_filter=["nothing.*"])
    with pytest.raises(UsageError, match=r"text\.hook_embed"):
        model.run_with_cache(batch, names_filter=["text.hook_embed"])
    with pytest.raises(UsageError, match="no text tower"):
        hooked("vit").n_layers("text")


def test_names_filters_and_nested_hooks() -> None:
    model = hooked("clip")
    batch = model.preprocess(images())
    names = ["vision.blocks.*.hook_resid_post", "projector.hook_out"]
    _, cache = model.run_with_cache(batch, names_filter=names)
    assert list(cache) == [*(f"vision.blocks.{i}.hook_resid_post" for i in range(3)), "projector.hook_out"]
    site = "vision.blocks.1.hook_resid_post"
    with model.hooks(fwd_hooks=[(site, lambda v, hook: v * 0)]):
        _, inner = model.run_with_cache(batch, names_filter=site)
        assert inner[site].abs().max() == 0
        assert model.hooked("vision.*") and not model.hooked("text*")
    assert not model.hooked()


def test_gradients_can_be_read_at_a_point() -> None:
    model = hooked("clip")
    batch = model.preprocess(images())
    for name in model.sites("vision.blocks.1.*"):
        seen: list[torch.Tensor] = []
        with model.hooks(bwd_hooks=[(name, lambda g, hook, s=seen: s.append(g.clone()))]):
            model.score(batch, [TARGET]).sum().backward()
        assert len(seen) == 1 and seen[0].abs().max() > 0, name
    model.hf.zero_grad()


def test_a_hook_may_keep_and_differentiate_what_it_is_given() -> None:
    """resid_mid is written back in place: the value that a hook saw must not change under it."""
    model = hooked("clip")
    batch = model.preprocess(images())
    name, kept = "vision.blocks.1.hook_resid_mid", []

    def edit(value: torch.Tensor, hook: Any) -> torch.Tensor:
        kept.extend([value, value.detach().clone()])
        return value + 0.1 * value.pow(2)

    pixels = batch.pixel_values.clone().requires_grad_()
    with model.hooks(fwd_hooks=[(name, edit)]):
        model.score(batch.with_pixels(pixels), [TARGET]).sum().backward()
    assert torch.equal(kept[0], kept[1])
    assert pixels.grad is not None and pixels.grad.abs().max() > 0


@pytest.mark.parametrize("family", GENERATIVE)
def test_prompts_are_those_of_the_transformers_processor(family: str) -> None:
    import transformers

    model = hooked(family)
    words = model.tokenizer
    template = (
        "{{ bos_token }} {% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}IMG {% else %}"
    )
    template += "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} report"
    template = template.replace("IMG", "<boi>" if family == "gemma3" else "<image>")
    processor = HookedVLM(*tiny(family)).processor
    images_only = processor.image_processor
    if family == "llava":
        theirs = transformers.LlavaProcessor(
            images_only, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    else:
        words.boi_token, words.eoi_token, words.image_token = "<boi>", "<eoi>", "<image>"
        words.boi_token_id, words.eoi_token_id, words.image_token_id = 5, 6, 4
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

        images_only = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
        theirs = transformers.Gemma3Processor(images_only, words, image_seq_length=4)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is there effusion ?"}]}]
    text = theirs.apply_chat_template(turns, chat_template=template, tokenize=False)
    picture = np.zeros((3, 32, 32), np.uint8)
    want = theirs(images=[picture], text=[text], add_special_tokens=False, return_tensors="pt")["input_ids"]
    fresh = HookedVLM(*tiny(family))
    fresh.tokenizer.chat_template = template
    found = fresh.prepare(images(1), [Target("effusion", "x", question="is there effusion ?")]).input_ids
    assert torch.equal(found, want)


def test_what_a_model_cannot_be_wrapped_with() -> None:
    hf, processor = tiny("clip")
    with pytest.raises(ModelError, match=r"no known family.*known families: clip"):
        HookedVLM(torch.nn.Linear(2, 2), processor)
    with pytest.raises(ModelError, match="preprocessor"):
        HookedVLM(hf, processor.tokenizer)
    with pytest.raises(ModelError, match="no tokenizer"):
        HookedVLM(hf, processor.image_processor)
    hf.set_attn_implementation("eager")
    with pytest.raises(ModelError, match="set_attn_implementation"):
        HookedVLM(hf, processor)
    moved, processor = tiny("clip")
    moved.vision_model.encoder.layers[0].add_module("norm9", torch.nn.Identity())
    del moved.vision_model.encoder.layers[0].layer_norm2
    with pytest.raises(ModelError, match=r"layer_norm2.*norm9"):
        HookedVLM(moved, processor)


def test_the_hash_is_of_the_weights() -> None:
    model = HookedVLM(*tiny("vit"))
    before = model.sha256
    assert before == HookedVLM(*tiny("vit")).sha256 != HookedVLM(*tiny("vit", seed=1)).sha256
    with torch.no_grad():
        model.hf.classifier.bias[0] += 1
    assert model.sha256 != before


def test_verify_compares_with_the_plain_model() -> None:
    model = hooked("clip")
    found = model.verify(model.preprocess(images()))
    assert found["equal_without_hooks"] and found["equal_while_reading"] and found["points_read"] == found["points"]


def test_every_family_names_the_medical_models_it_opens() -> None:
    assert [family.name for family in families()] == list(FAMILIES)
    released = " ".join(name for family in families() for name in family.released)
    for name in ("PubMedCLIP", "PLIP", "MedSigLIP", "LLaVA-Med", "MedGemma", "RAD-DINO"):
        assert name in released
