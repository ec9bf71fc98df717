"""Post-hoc explainers against known answers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image
from tiny_models import PATCH, tiny

from mechinterp.errors import ModelError, NonFiniteError
from mechinterp.explain import ELEMENT_METHODS, METHODS, check_map, grad_cam, integrated_gradients, occlusion
from mechinterp.explain.picture import save_map
from mechinterp.models import HookedVLM
from mechinterp.storage import load_tensors
from mechinterp.types import Target

TARGET = Target("pneumonia", "a chest x-ray with pneumonia", "a chest x-ray without pneumonia")
EXPLAINERS = [name for name in METHODS if not ELEMENT_METHODS[name].anchor]
PIXELS = ("integrated_gradients", "grad_cam", "occlusion")
FAMILIES = ("clip", "siglip", "vit", "llava", "gemma3")
ROW, COLUMN = 2, 1


@pytest.fixture(scope="module")
def models() -> dict[str, HookedVLM]:
    return {family: HookedVLM(*tiny(family)) for family in FAMILIES}


def images(model: HookedVLM, n: int = 2):
    pixels = torch.rand(n, 32, 32, generator=torch.Generator().manual_seed(1))
    return model.prepare(pixels, [TARGET], ids=[f"image-{i}" for i in range(n)])


def one_patch_model() -> HookedVLM:
    """A CLIP of one block in which every token attends to the patch at (ROW, COLUMN) alone, and the MLP is silent."""
    hf, processor = tiny("clip", num_hidden_layers=1)
    vision = hf.vision_model
    block = vision.encoder.layers[0]
    with torch.no_grad():
        position = vision.embeddings.position_embedding.weight
        position.zero_()
        position[1 + ROW * 4 + COLUMN, 0] = 20.0
        vision.pre_layrnorm.weight.fill_(1.0)
        vision.pre_layrnorm.bias.zero_()
        block.layer_norm1.weight.fill_(1.0)
        block.layer_norm1.bias.zero_()
        for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.mlp.fc2):
            part.weight.zero_()
            part.bias.zero_()
        block.self_attn.q_proj.bias.fill_(30.0)
        block.self_attn.k_proj.weight[:, 0] = 1.0  # reads the dimension that marks the position
    return HookedVLM(hf, processor)


def patch_means(relevance: torch.Tensor) -> torch.Tensor:
    """Mean over each patch: [batch, row, column]."""
    return torch.nn.functional.avg_pool2d(relevance[:, None], PATCH)[:, 0]


@pytest.mark.parametrize("method", [integrated_gradients, occlusion])
def test_finds_the_only_patch_that_matters(method):
    model = one_patch_model()
    batch = images(model)
    share = patch_means(method(model, batch, TARGET).abs())
    share = share / share.sum((1, 2), keepdim=True)
    assert (share[:, ROW, COLUMN] > 0.99).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_are_complete(models, family):
    """Sundararajan et al. 2017, proposition 1: they sum to the difference of the score from the baseline's."""
    model = models[family]
    batch = images(model)
    with torch.no_grad():
        grey = batch.with_pixels(torch.zeros_like(batch.pixel_values))
        difference = (model.score(batch, [TARGET]) - model.score(grey, [TARGET]))[:, 0]
    assert difference.abs().max() > 1e-3
    found = integrated_gradients(model, batch, TARGET, steps=64, chunk=40).sum((1, 2))
    torch.testing.assert_close(found, difference, atol=0.02 * float(difference.abs().max()), rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_occlusion_is_the_drop_of_the_score(models, family):
    model = models[family]
    batch = images(model)
    pixels = batch.pixel_values.clone()
    pixels[:, :, 8:16, 24:32] = 0.0
    with torch.no_grad():
        drop = (model.score(batch, [TARGET]) - model.score(batch.with_pixels(pixels), [TARGET]))[:, 0]
    found = occlusion(model, batch, TARGET, chunk=5)
    torch.testing.assert_close(found[:, 8:16, 24:32], drop[:, None, None].expand(-1, 8, 8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_grad_cam_is_its_formula_on_the_grid_of_the_model(models, family):
    """Value of patch (r, c): the positive part of mean gradient times activation, at that patch's pixels."""
    model = models[family]
    batch = images(model)
    site = "vision.blocks.1.hook_resid_pre"
    kept = {}

    def keep(value, hook):
        kept["value"] = value.detach().requires_grad_(True)
        return kept["value"]

    with model.hooks(fwd_hooks=[(site, keep)]):
        score = model.score(batch, [TARGET]).sum()
    gradient = torch.autograd.grad(score, kept["value"])[0]
    tokens = model.patch_tokens()
    weight = gradient[:, tokens].mean(1)
    expected = torch.einsum("btd,bd->bt", kept["value"].detach()[:, tokens], weight).relu()
    found = grad_cam(model, batch, TARGET, site=site, smooth=False)
    for row, column in ((0, 0), (1, 3), (3, 2)):
        square = found[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
        wanted = expected[:, row * 4 + column, None, None].expand_as(square)
        torch.testing.assert_close(square, wanted, atol=1e-6, rtol=1e-4)
    assert expected.any()


def test_grad_cam_looks_before_the_last_attention_of_a_class_token_model(models):
    """After it, the patch tokens no longer matter to the score: that site is refused, and not chosen."""
    model = models["clip"]
    last = model.n_layers("vision") - 1
    default = grad_cam(model, images(model), TARGET)
    assert torch.equal(default, grad_cam(model, images(model), TARGET, site=f"vision.blocks.{last}.hook_resid_pre"))
    with pytest.raises(ModelError, match="does not depend"):
        grad_cam(model, images(model), TARGET, site=f"vision.blocks.{last}.hook_resid_post")


@pytest.mark.parametrize(
    ("name", "family"),
    [(name, family) for name in EXPLAINERS for family in FAMILIES if name in PIXELS or family == "clip"],
)
def test_one_signature_for_every_method_and_family(models, name, family):
    """The right shape, some relevance, the same bytes twice, and a model that is left as it was."""
    model = models[family]
    batch = images(model)
    method = METHODS[name] if name != "integrated_gradients" else partial(integrated_gradients, steps=4)
    with torch.no_grad():
        before = model.score(batch, [TARGET])
    first, again = (method(model, batch, TARGET) for _ in range(2))
    assert first.shape == (2, 32, 32) and first.dtype == torch.float32 and not first.requires_grad
    statuses = {check_map(one) for one in first}
    assert "ok" in statuses and statuses <= {"ok", "all_zero"}
    assert torch.equal(first, again)
    with torch.no_grad():
        assert torch.equal(model.score(batch, [TARGET]), before)
    assert all(parameter.grad is None for parameter in model.hf.parameters()) and not model.hooked()


@pytest.mark.parametrize("name", EXPLAINERS)
def test_an_image_is_explained_alike_alone_and_in_a_batch(models, name):
    model = models["llava" if name in PIXELS else "clip"]
    batch = images(model, 3)
    together, alone = METHODS[name](model, batch, TARGET), METHODS[name](model, batch[1:2], TARGET)
    torch.testing.assert_close(together[1:2], alone, atol=1e-5 * float(alone.abs().max()), rtol=1e-3)


def test_bad_maps_are_flagged():
    ramp = torch.arange(16.0).view(4, 4)
    maps = torch.stack([ramp, torch.zeros(4, 4), torch.full((4, 4), -3.0), ramp.log(), 1e-20 * ramp])
    assert [check_map(one) for one in maps] == ["ok", "all_zero", "constant", "non_finite", "ok"]


@pytest.mark.parametrize("name", EXPLAINERS)
def test_what_is_not_finite_names_the_images(models, name):
    model = models["clip"]
    batch = images(model)
    pixels = batch.pixel_values.clone()
    pixels[1, 0, 4, 4] = torch.nan
    with pytest.raises(NonFiniteError) as caught:
        METHODS[name](model, replace(batch, pixel_values=pixels), TARGET)
    assert caught.value.images == ["image-1"]


def test_a_map_is_saved_as_a_picture_and_as_numbers(tmp_path):
    relevance = torch.zeros(32, 32)
    relevance[8:16, 16:24] = 2.0
    save_map(relevance, torch.rand(64, 64).numpy(), tmp_path, title="<occlusion> $of$ effusion")
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.width > 400
        first = picture.tobytes()
    assert torch.equal(load_tensors(tmp_path / "map.safetensors")["relevance"], relevance)
    save_map(relevance, torch.rand(64, 80).numpy(), tmp_path, title="another shape is shown beside, not over")
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.tobytes() != first
