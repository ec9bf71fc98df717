"""Explainers of questions against known answers, and against captum given the same samples."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from test_explain import COLUMN, ROW, TARGET, images, one_patch_model

from mechinterp.errors import UsageError
from mechinterp.explain import ELEMENT_METHODS, applies, occlusion, tabular
from mechinterp.explain.anchors import edges
from mechinterp.explain.ask import about_function, about_image, patch_owner
from mechinterp.explain.cam import grad_cam, grad_cam_plus_plus
from mechinterp.explain.coalitions import (
    kernel_shap,
    kernel_shap_members,
    kernel_shap_solve,
    lime,
    lime_solve,
    rise_masks,
    rise_solve,
)
from mechinterp.explain.gradients import (
    gradient_shap_values,
    integrated_gradients,
    integrated_gradients_values,
    mirrored,
    noisy_references,
)
from mechinterp.explain.question import Question

W = torch.tensor([2.0, -1.0, 0.5, 0.0, 3.0, 0.0])
ADDITIVE = ("occlusion", "kernel_shap", "integrated_gradients", "gradient_times_input", "gradient_shap", "oracle")


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def columns(f, rows: int = 3, count: int = 6, dtype: torch.dtype = torch.float32) -> Question:
    """A question about a function of `count` columns."""
    x = torch.randn(rows, count, generator=draw(1), dtype=dtype)
    return about_function(f, x, torch.full((count,), 0.3, dtype=dtype), torch.arange(count))


def curved(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x[:, 0] * x[:, 1]) + x[:, 2:].square().prod(1) + x[:, -1]


def linear(question: Question) -> torch.Tensor:
    return (question.parts[0].value - question.parts[0].reference) * W.to(question.parts[0].value)


@pytest.mark.parametrize("name", ADDITIVE)
def test_a_linear_score_is_its_coefficients_times_the_distance_from_the_reference(name):
    question = columns(lambda x: x @ W + 7)
    found = ELEMENT_METHODS[name].explain(question, draw())
    torch.testing.assert_close(found, linear(question), atol=1e-5, rtol=0)


def test_lime_and_rise_find_a_linear_score_as_samples_suffice():
    question = columns(lambda x: x @ W + 7)
    assert torch.allclose(lime(question, draw(), ridge=1e-9), linear(question), atol=1e-5)
    every = torch.tensor(list(product([0.0, 1.0], repeat=6)))
    assert torch.allclose(rise_solve(every, question.shared(every)), linear(question), atol=1e-5)


def test_kernel_shap_is_shapley_on_all_coalitions_in_the_kernels_proportions():
    """Four players: sizes 1 and 3 weigh twice what size 2 does (Lundberg and Lee 2017, theorem 2)."""
    question = columns(lambda x: torch.sin(x[:, 0] * x[:, 1]) + x[:, 2] * x[:, 3].exp(), count=4)
    every = torch.tensor(list(product([False, True], repeat=4)))
    member = torch.cat([every[every.sum(1) == size].repeat(times, 1) for size, times in ((1, 2), (2, 1), (3, 2))])
    ends = question.shared(every[[0, -1]])
    found = kernel_shap_solve(member, question.shared(member), ends[:, 0], ends[:, 1])
    part = question.parts[0]
    exact = tabular.shapley(lambda x: question.function((x,)), part.value, part.reference[0], draw())
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=0)


def test_kernel_shap_treats_symmetric_players_alike_and_adds_up():
    question = columns(lambda x: x[:, :3].prod(1) + x[:, 3])
    part = question.parts[0]
    alike = replace(part, value=part.value.clone().index_copy(1, torch.arange(3), part.value[:, :1].expand(-1, 3)))
    question = replace(question, parts=(alike,))
    member = torch.tensor(list(product([False, True], repeat=6)))[1:-1]
    ends = question.shared(torch.tensor([[False] * 6, [True] * 6]))
    found = kernel_shap_solve(member, question.shared(member), *ends.unbind(1))
    torch.testing.assert_close(found[:, :3], found[:, :1].expand(-1, 3), atol=1e-5, rtol=1e-5)
    few = kernel_shap(columns(curved), draw(), samples=2)  # fewer equations than elements
    total = columns(curved).shared(torch.tensor([[False] * 6, [True] * 6])).diff(dim=1)[:, 0]
    torch.testing.assert_close(few.sum(1), total, atol=1e-5, rtol=1e-5)
    assert few.isfinite().all() and few.abs().max() < 10 * total.abs().max() + 10


def test_kernel_shap_draws_coalitions_and_complements_with_the_kernels_sizes():
    member = kernel_shap_members(6, 4000, draw())
    assert torch.equal(member[:4000], ~member[4000:])
    share = torch.bincount(member[:4000].sum(1), minlength=7) / 4000
    size = torch.arange(1, 6)
    kernel = 1.0 / (size * (6 - size))
    assert torch.allclose(share[1:6], kernel / kernel.sum(), atol=0.03) and share[0] == share[6] == 0


def test_integrated_gradients_add_up():
    question = columns(curved)
    found = integrated_gradients(question, draw())
    total = question.shared(torch.tensor([[False] * 6, [True] * 6])).diff(dim=1)[:, 0]
    torch.testing.assert_close(found.sum(1), total, atol=1e-4, rtol=0)


def test_one_column_and_two_are_explained():
    for count in (1, 2):
        question = columns(lambda x: x.sum(1), count=count)
        for name in (*ADDITIVE, "lime", "rise"):
            assert ELEMENT_METHODS[name].explain(question, draw()).isfinite().all(), (name, count)


NOT_CAM = [name for name, method in ELEMENT_METHODS.items() if not method.anchor and "grad_cam" not in name]


@pytest.mark.parametrize("name", NOT_CAM)
def test_every_method_finds_the_only_patch_that_matters(name):
    """Grad-CAM cannot: its weights are shared by patches, and all patches hold the same channels."""
    model = one_patch_model()
    question = about_image(model, images(model), TARGET)
    found = ELEMENT_METHODS[name].explain(question, draw()).abs()
    assert (found.argmax(1) == ROW * 4 + COLUMN).all()


def test_smooth_masks_cover_the_grid_evenly_and_hang_together():
    mask = rise_masks(64, (8, 8), 2000, draw()).unflatten(1, (8, 8))
    assert mask.min() == 0 and mask.max() == 1
    assert torch.allclose(mask.mean(0), torch.full((8, 8), 0.5), atol=0.05)
    near, far = mask[:, 3, 3] - 0.5, mask[:, 3, 7] - 0.5
    assert (near * (mask[:, 3, 4] - 0.5)).mean() > 0.05 > 0.02 > (near * far).mean().abs()


def test_anchors_say_what_they_say():
    question = about_image(one_patch_model(), images(one_patch_model()), TARGET)
    bright = torch.zeros(2, 3, 32, 32)
    bright[:, :, 10:14, 18:22] = 1.0
    assert (edges(question.at((bright,)), draw()).argmax(1) == 4 * 1 + 2).all()
    centre = ELEMENT_METHODS["centre"].explain(question, draw())[0].view(4, 4)
    assert centre.argmax() in (5, 6, 9, 10) and centre[0, 0] == centre[3, 3] == 0
    echo = ELEMENT_METHODS["echo"].explain(question, draw())
    torch.testing.assert_close(echo[:, -1], question.score())
    assert not torch.equal(*(ELEMENT_METHODS["random"].explain(question, draw(seed)) for seed in (0, 1)))


def test_what_cannot_be_asked_is_refused_in_one_line():
    question = columns(curved)
    for name in ("centre", "grad_cam", "attention_rollout", "attention_flow", "transmm"):
        assert not applies(ELEMENT_METHODS[name], question)
        with pytest.raises(UsageError):
            ELEMENT_METHODS[name].explain(question, draw())
    assert not applies(ELEMENT_METHODS["transmm"], small()[1])  # patches, but of a function


# ------------------------------------------------------------------------------------------------------- captum


class Small(torch.nn.Module):
    """Two convolutions on 8 x 8 images of one channel; 16 features at a 4 x 4 grid."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = torch.nn.Sequential(torch.nn.Conv2d(1, 16, 2, 2), torch.nn.Tanh())
        self.head = torch.nn.Sequential(torch.nn.Conv2d(16, 4, 3), torch.nn.Tanh(), torch.nn.Flatten())

    def forward(self, x):
        return self.head(self.features(x)).square().sum(1)


def small(dtype: torch.dtype = torch.float32) -> tuple[Small, Question]:
    net = Small().to(dtype)
    x, reference = (torch.randn(n, 1, 8, 8, generator=draw(n), dtype=dtype) for n in (2, 1))

    def inner(values):
        cells = net.features(values[0]).flatten(2).transpose(1, 2)
        return cells, net.head(cells.transpose(1, 2).unflatten(2, (4, 4))).square().sum(1)

    owner = patch_owner(8, 8, 4, 4)
    return net, about_function(net, x, reference[0], owner, "patch", (4, 4), inner)


def test_integrated_gradients_are_captums():
    from captum.attr import IntegratedGradients

    net, question = small()
    part = question.parts[0]
    peer = IntegratedGradients(net).attribute(part.value, part.reference, n_steps=16)
    torch.testing.assert_close(integrated_gradients_values(question, 16)[0], peer, atol=1e-5, rtol=1e-5)


def test_occlusion_of_pixels_is_captums_with_windows_that_overlap():
    from captum.attr import Occlusion

    model = one_patch_model()
    batch = images(model)
    peer = Occlusion(lambda pixels: model.score(batch.with_pixels(pixels), [TARGET])[:, 0])
    found = peer.attribute(batch.pixel_values, (3, 16, 16), strides=(3, 8, 8), baselines=0.25)
    ours = occlusion(model, batch, TARGET, patches=2, fill=0.25)
    torch.testing.assert_close(ours, found[:, 0], atol=1e-5, rtol=1e-5)


def given(member: torch.Tensor):
    """A captum perturbation generator that yields these coalitions."""

    def samples(*args, **kwargs):
        yield from member[:, None].long()

    return samples


def test_kernel_shap_is_captums_on_the_same_coalitions():
    from captum.attr import KernelShap

    net, question = small(torch.float64)
    part, member = question.parts[0], kernel_shap_members(16, 48, draw())
    ends = torch.tensor([[True], [False]]).expand(2, 16)
    peer = KernelShap(net)
    peer.inf_weight = 1e9
    peer.perturb_func = given(torch.cat([ends, member]))
    found = [
        peer.attribute(
            part.value[i : i + 1],
            part.reference[i : i + 1],
            feature_mask=part.owner[None, None],
            n_samples=98,
            return_input_shape=False,
        )
        for i in range(2)
    ]
    value = question.shared(member)
    full, empty = question.shared(ends).unbind(1)
    ours = kernel_shap_solve(member, value, empty, full)
    torch.testing.assert_close(ours, torch.cat(found).to(ours), atol=1e-5, rtol=1e-5)


def test_lime_is_captums_on_the_same_samples():
    from captum._utils.models.linear_model import SkLearnRidge
    from captum.attr import Lime

    net, question = small(torch.float64)
    part = question.parts[0]
    member = torch.rand(96, 16, generator=draw()) < 0.5

    def near(original, perturbed, sample, **kwargs):
        distance = 1 - torch.nn.functional.cosine_similarity(sample.double(), torch.ones(1, 16).double())
        return torch.exp(-distance.square() / 0.25**2).sqrt()

    peer = Lime(net, SkLearnRidge(alpha=1.0), near, given(member))
    found = peer.attribute(
        part.value[:1],
        part.reference[:1],
        feature_mask=part.owner[None, None],
        n_samples=96,
        return_input_shape=False,
    )
    ours = lime_solve(member, question[:1].shared(member))
    torch.testing.assert_close(ours, found.to(ours), atol=1e-5, rtol=1e-5)


def test_gradient_shap_is_captums_on_the_same_draws(monkeypatch):
    from captum.attr._core.gradient_shap import InputBaselineXGradient

    net, question = small()
    alpha, noise = mirrored(question, 8, draw())
    assert torch.allclose(alpha.sum(), torch.tensor(4.0)) and noise[0].sum(0).abs().max() < 1e-5  # mirrored
    references = noisy_references(question, noise)
    monkeypatch.setattr(np.random, "uniform", lambda *args, **kwargs: alpha.numpy())
    peer = InputBaselineXGradient(net)
    found = [
        peer.attribute(question.values[0][i : i + 1].expand(8, -1, -1, -1), references[0][i]).mean(0) for i in range(2)
    ]
    ours = gradient_shap_values(question, alpha, references)[0]
    torch.testing.assert_close(ours, torch.stack(found), atol=1e-5, rtol=1e-5)


def test_grad_cam_is_captums_on_a_convolution():
    from captum.attr import LayerGradCam

    net, question = small()
    peer = LayerGradCam(net, net.features).attribute(question.values[0], relu_attributions=True)
    ours = grad_cam(question, draw())
    assert ours.any()
    torch.testing.assert_close(ours, peer.flatten(1).detach(), atol=1e-5, rtol=1e-5)


def test_grad_cam_plus_plus_by_hand():
    """Two elements, three channels: alpha = g^2 / (2 g^2 + sum A g^3), weights .2, .5 and 0, map 0 and 1.9."""
    features = torch.tensor([[[1.0, -1.0, 5.0], [2.0, 3.0, 5.0]]])
    slopes = torch.tensor([[[1.0, 2.0, 0.0], [-1.0, 0.5, 0.0]]])

    def inner(values):
        read = values[0] * 1
        return read, (read * slopes).sum((1, 2))

    asked = about_function(lambda x: (x * slopes).sum((1, 2)), features, torch.zeros(2, 3), torch.arange(2)[:, None])
    asked = replace(asked, inner=inner)
    # channel 0: g 1, sum A 3: 1 / 5; a negative g counts 0. channel 1: g 2 and .5, sum A 2: 2 (4 / 24) + .5 (.25 / .75)
    torch.testing.assert_close(grad_cam_plus_plus(asked, draw()), torch.tensor([[0.0, 2 * 0.2 + 3 * 0.5]]))
    torch.testing.assert_close(grad_cam(asked, draw()), torch.tensor([[0.0, 3 * 1.25]]))
