"""Attributions of one image and 30 near copies of it, as IQ and RBP need them: ours in one call, captum in a loop.

captum is called once an input with its default batch settings, and as fast as its settings allow: the best of several
batch settings, and all inputs in one call where a method takes them. Both explain the same frozen model, share its text
side, use the same reference, steps and coalitions. captum solves KernelSHAP's regression in float32 with the constraint
as a weight of 1e6, so ours is compared with the exact solution for the scores that captum has collected. All inputs are
compared with captum at its defaults; slow settings are timed on a few of the inputs and scaled to all. CPU seconds are
of the whole process; wall clock depends on who else uses the machine. `python -m benchmarks explainers`.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from captum._utils.models.linear_model import SkLearnLinearRegression
from captum.attr import IntegratedGradients, KernelShap, LayerGradCam, Occlusion
from torch import Tensor, nn

from benchmarks import subject
from benchmarks.common import Row
from mechinterp.explain import cam, coalitions, gradients
from mechinterp.explain.ask import about_image
from mechinterp.explain.question import Question
from mechinterp.models import HookedVLM

NAME = "explainers"
COPIES, NOISE, STEPS, SAMPLES = 30, 0.05, 50, 96
TOLERANCE = 1e-5


@dataclass
class Setting:
    """One way to call captum: what it is called, how many inputs it explains, the call, what is exact if not that."""

    name: str
    inputs: int
    call: Callable[[], Tensor]
    exact: Callable[[], Tensor] | None = None


class Scored(nn.Module):
    """The contrast of a CLIP as a function of pixels, text embedded before: what one would hand to captum."""

    def __init__(self, model: HookedVLM):
        super().__init__()
        self.clip, target = model.hf, subject.TARGETS[0]
        with torch.no_grad():
            text = model.encode_text([target.positive, str(target.negative)])
            unit = text / text.norm(dim=1, keepdim=True)
            self.direction = (unit[0] - unit[1]) * model.hf.logit_scale.exp()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.clip.get_image_features(pixel_values=pixels).pooler_output)

    def head(self, features: Tensor) -> Tensor:
        return features / features.norm(dim=1, keepdim=True) @ self.direction


class Grid(Scored):
    """The same with the patch tokens before the last block passing `cells` as `[batch, d, row, column]`."""

    def __init__(self, model: HookedVLM):
        super().__init__(model)
        self.cells, self.shape = nn.Identity(), model.grid_shape

    def forward(self, pixels: Tensor) -> Tensor:
        tower = self.clip.vision_model
        x = tower.pre_layrnorm(tower.embeddings(pixels))
        for layer in tower.encoder.layers[:-1]:
            x = layer(x, attention_mask=None)
        cells = self.cells(x[:, 1:].transpose(1, 2).unflatten(2, self.shape))
        x = torch.cat([x[:, :1], cells.flatten(2).transpose(1, 2)], dim=1)
        x = tower.encoder.layers[-1](x, attention_mask=None)
        return self.head(self.clip.visual_projection(tower.post_layernorm(x[:, 0])))


def question_of(copies: int) -> tuple[HookedVLM, Question]:
    """One phantom image and its copies, each pixel moved by 5 %."""
    model = HookedVLM.from_pretrained(str(subject.BUNDLED / "phantom-clip"))
    model.hf.requires_grad_(False)
    batch = model.prepare(subject.images(1), subject.TARGETS[:1])
    noise = torch.randn(1 + copies, *batch.pixel_values.shape[1:], generator=torch.Generator().manual_seed(0))
    noise[0] = 0
    pixels = batch.pixel_values * (1 + NOISE * noise)
    return model, about_image(model, type(batch)(pixels), subject.TARGETS[0])


def loop(question: Question, inputs: int, explain: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """The first inputs, one after another; sums over the pixels of each patch."""

    def call() -> Tensor:
        return torch.cat([explain(question.values[0][i : i + 1]) for i in range(inputs)])

    return call


def by_patch(question: Question, relevance: Tensor, mean: bool = False) -> Tensor:
    """Pixels to patches: sums, or the number that all pixels of a patch share."""
    part = question.parts[0]
    if mean:
        return torch.stack([relevance[:, 0][:, part.owner == element].mean(1) for element in range(question.count)], 1)
    return part.gathered(relevance, question.count)


def settings(method: str, model: HookedVLM, question: Question, few: int, quick: bool) -> list[Setting]:
    """The default setting of captum for a method first, then all that may be its best."""
    net, n = Scored(model), len(question)
    sizes = (65,) if quick else (16, 65, 200)
    match method.split(",")[0]:
        case "integrated gradients":
            explain = IntegratedGradients(net).attribute

            def integrated(x: Tensor, size: int | None = None) -> Tensor:
                return by_patch(question, explain(x, 0.0, n_steps=STEPS, internal_batch_size=size))

            found = [Setting("default", few, loop(question, few, integrated))]
            for size in sizes:
                found.append(Setting(f"batch {size}", few, loop(question, few, partial(integrated, size=size))))
            whole = partial(integrated, question.values[0][:few], sizes[-1])
            return [*found, Setting(f"{few} in one call, batch {sizes[-1]}", few, whole)]
        case "occlusion":
            side = tuple(question.values[0].shape[i] // question.shape[i - 2] for i in (2, 3))  # type: ignore[index]
            window = (question.values[0].shape[1], *side)

            def occluded(x: Tensor, size: int = 1) -> Tensor:
                found = Occlusion(net).attribute(x, window, strides=window, baselines=0.0, perturbations_per_eval=size)
                return by_patch(question, found, mean=True)

            found = [Setting("default", few, loop(question, few, occluded))]
            for size in sizes[:2]:
                found.append(Setting(f"{size} at once", few, loop(question, few, partial(occluded, size=size))))
            return [*found, Setting("all inputs in one call", n, partial(occluded, question.values[0]))]
        case "KernelSHAP":
            return shap(net, question, few, sizes)
        case _:
            grid = Grid(model)

            def camera(x: Tensor) -> Tensor:
                return LayerGradCam(grid, grid.cells).attribute(x, relu_attributions=True).flatten(1)

            return [
                Setting("default", n, loop(question, n, camera)),
                Setting("all inputs in one call", n, partial(camera, question.values[0])),
            ]


def shap(net: nn.Module, question: Question, few: int, sizes: tuple[int, ...]) -> list[Setting]:
    """captum's KernelShap on the coalitions that ours draws."""
    part = question.parts[0]
    ends = torch.tensor([[True], [False]]).expand(2, question.count)
    member = coalitions.kernel_shap_members(question.count, SAMPLES, torch.Generator().manual_seed(0))
    rows = torch.cat([ends, member])[:, None].long()

    scores: list[Tensor] = []

    class Kept(SkLearnLinearRegression):
        def fit(self, train_data, **kwargs):
            scores.append(next(iter(train_data))[1].double().flatten())
            return super().fit(train_data, **kwargs)

    def given(*args: object, **kwargs: object):
        yield from rows

    def explained(x: Tensor, size: int = 1) -> Tensor:
        peer = KernelShap(net)
        peer.perturb_func, peer.interpretable_model = given, Kept()
        return peer.attribute(
            x,
            0.0,
            feature_mask=part.owner[None, None],
            n_samples=len(rows),
            perturbations_per_eval=size,
            return_input_shape=False,
        )

    def exact() -> Tensor:
        return torch.stack([constrained(member.double(), one) for one in scores[-few:]])

    found = [Setting("default", few, loop(question, few, explained), exact)]
    return found + [
        Setting(f"{size} at once", few, loop(question, few, partial(explained, size=size)), exact) for size in sizes
    ]


def constrained(member: Tensor, score: Tensor) -> Tensor:
    """Least squares under the sum, by its Lagrangian; `score`: of all elements, of none, then of each coalition."""
    n = member.shape[1]
    system = torch.ones(n + 1, n + 1, dtype=member.dtype)
    system[:n, :n], system[n, n] = member.T @ member, 0.0
    right = torch.cat([member.T @ (score[2:] - score[1]), score[:1] - score[1]])
    return torch.linalg.solve(system, right)[:n]


FEWER = (16, 20)
"""Points put where the score turns, and a correction by twice as many of the first copy (`path_points`)."""
OURS: dict[str, Callable[[Question], Tensor]] = {
    f"integrated gradients, {STEPS} points": lambda q: gradients.integrated_gradients(
        q, torch.Generator(), steps=STEPS
    ),
    **{
        f"integrated gradients, {fewer} points for {STEPS}": partial(
            gradients.integrated_gradients_of_copies, generator=torch.Generator(), steps=fewer
        )
        for fewer in FEWER
    },
    "occlusion": lambda q: coalitions.occlusion(q, torch.Generator()),
    "KernelSHAP": lambda q: coalitions.kernel_shap(q, torch.Generator().manual_seed(0), samples=SAMPLES),
    "Grad-CAM": lambda q: cam.grad_cam(q, torch.Generator()),
}


def timed(call: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
    """The result, CPU seconds and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = call()
    return found, time.process_time() - cpu, time.perf_counter() - wall


def run(quick: bool = False) -> list[Row]:
    """Every method with one thread and with two."""
    copies, few, repeats = (2, 1, 1) if quick else (COPIES, 2, 3)
    model, question = question_of(copies)
    before, rows = torch.get_num_threads(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum's advice on many inputs, which is not about speed
        try:
            for threads in (1,) if quick else (1, 2):
                torch.set_num_threads(threads)
                for method in OURS:
                    rows += _compare(method, model, question, few, repeats, threads, quick)
        finally:
            torch.set_num_threads(before)
    return rows


def _compare(
    method: str, model: HookedVLM, question: Question, few: int, repeats: int, threads: int, quick: bool
) -> list[Row]:
    """Ours against captum's default and against the best of its settings, taking turns."""
    peers, n = settings(method, model, question, few, quick), len(question)
    ours = OURS[method](question)  # warms up, and is compared
    times: dict[str, list[tuple[float, float]]] = {peer.name: [] for peer in peers} | {"ours": []}
    differ, far = _apart(method, model, question, ours, quick)
    for _ in range(repeats):
        _, cpu, wall = timed(partial(OURS[method], question))
        times["ours"].append((cpu, wall))
        for peer in peers:
            _, cpu, wall = timed(peer.call)
            times[peer.name].append((cpu * n / peer.inputs, wall * n / peer.inputs))
    median = {name: [statistics.median(one[i] for one in values) for i in range(2)] for name, values in times.items()}
    default = peers[0].name
    rows = []
    for unit, name in ((0, "CPU s"), (1, "s")):
        best = min((peer.name for peer in peers), key=lambda one: median[one][unit])
        for which, peer in (("default", default), ("at its best", best)):
            mine, theirs = median["ours"][unit], median[peer][unit]
            label = f"captum, {which}" + (f": {best}" if which != "default" else "")
            case = f"{method}; {n} near-identical images, phantom-clip, {threads} thread{'s' * (threads > 1)}"
            rows.append(Row(case, mine, theirs, label, name, theirs / mine, differ, far))
    return rows


def _apart(method: str, model: HookedVLM, question: Question, ours: Tensor, quick: bool) -> tuple[float, float]:
    """Largest difference from captum at its defaults over all inputs, in units of the score and of 1e-5 (1 + |captum|).

    The second is at most 1 where `allclose(rtol=1e-5, atol=1e-5)` holds.
    """
    peer = settings(method, model, question, len(question), quick)[0]
    found = peer.call().detach()
    truth = found if peer.exact is None else peer.exact()
    away = (truth - ours).abs()
    return float(away.max()), float((away / (TOLERANCE * (1 + truth.abs()))).max())
