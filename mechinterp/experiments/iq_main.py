"""iq-main: every explainer on every bundled model, held beside removal effects, truth masks, weights and prompts.

1. phantom-clip, phantom-llava and their twins that learnt a shortcut (a drain, for pneumothorax); cxr-clip on real
   radiographs where their folder is given (`--data`). The same test images of a model for all methods.
2. R, F, IS, R_null and R_excess of `iq-reading-1`, AUPRC in the finding's mask, relevance in the drain's mask over its
   area, likeness of the map after random weights and after a nonsense prompt, seconds; anchors in every table. Where a
   model has controls: likeness to the maps of the same trained on permuted labels, trained again, built differently.
3. On 24 images with a drain: do maps lie on it more in the models that learnt it than in their clean twins (paired)?
4. A corner patch that follows the output at test time (phantom-clip): do Grad-CAM, rollout and flow turn around as LIME
   and SHAP do?

About 75 minutes on one core: phantom-llava 27, its twin about 15, the others and the injection 7 to 8.5 each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mechinterp.audit.defaults import default_data
from mechinterp.audit.evidence import prepare
from mechinterp.audit.explainers import Compared, Effort, compare_explainers, methods_of
from mechinterp.audit.explainers.choose import chosen_rows
from mechinterp.audit.explainers.controls import controls_of
from mechinterp.audit.own_methods import stored_methods
from mechinterp.audit.pipeline import choose_target
from mechinterp.audit.sizes import one_size
from mechinterp.data import ImageData, open_data
from mechinterp.experiments.iq_study import PLAIN, Arm, Study, trial
from mechinterp.experiments.main_report import Found, report
from mechinterp.experiments.main_shortcut import Shown, relevance_on
from mechinterp.experiments.result import Result
from mechinterp.explain.ask import about_image
from mechinterp.explain.inject import injected, scale_of
from mechinterp.explain.methods import ELEMENT_METHODS, Method
from mechinterp.models import HookedVLM
from mechinterp.progress import progress

__all__ = ["Sizes", "run"]

FINDING, SHORTCUT = "pneumothorax", "drain"
PHANTOMS = ("phantom-clip", "phantom-clip-shortcut", "phantom-llava", "phantom-llava-shortcut")
REAL = "cxr-clip"
CORNER = (0,)
INVERTED = (
    "lime",
    "kernel_shap",
    "gradient_shap",
    "integrated_gradients",
    "gradient_times_input",
    "occlusion",
    "grad_cam",
    "grad_cam_plus_plus",
    "attention_rollout",
    "attention_flow",
    "transmm",
)


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    models: tuple[str, ...] = PHANTOMS
    methods: tuple[str, ...] = tuple(ELEMENT_METHODS)
    images: int = 12
    draws: int = 30
    inverted: tuple[str, ...] = INVERTED
    injected_images: int = 12
    shown_images: int = 24
    psi: tuple[float, ...] = (0.0, 0.8)


QUICK = Sizes(
    ("phantom-clip-shortcut",), ("gradient_times_input", "grad_cam", "random"), 3, 3, ("gradient_times_input",), 5,
    8, (0.0, 0.8),
)  # fmt: skip


def run(seed: int = 0, quick: bool = False, sizes: Sizes | None = None, data: Path | None = None) -> Result:
    """Run the experiment. `sizes` overrides both versions; `data` is a folder of real radiographs for cxr-clip."""
    size = sizes or (QUICK if quick else Sizes())
    phantom = default_data(64 if quick else 600, seed)
    compared: dict[str, Compared] = {}
    for name in progress(size.models, "models", unit="model"):
        compared[name] = _one(HookedVLM.from_pretrained(name), phantom, FINDING, size, seed, (SHORTCUT,))
    if data is not None:
        model = HookedVLM.from_pretrained(REAL)
        real = one_size(model, open_data(data))
        compared[REAL] = _one(model, real, choose_target(model, real, None).name, size, seed, ())
    turned = _injection(size.models[0], phantom, size, seed)
    shown = {name: found for name in size.models if (found := _shown(name, phantom, size, seed)) is not None}
    return report(Found(compared, turned, size.inverted, size.psi, SHORTCUT, shown), data is not None)


def _one(model: HookedVLM, data: ImageData, finding: str, size: Sizes, seed: int, masks: Sequence[str]) -> Compared:
    target, methods = data.targets[finding], _methods(model, data, size, seed)
    effort = Effort(size.images, size.draws, masks=tuple(masks))
    rows = chosen_rows(data, finding, size.images, seed, masks).tolist()  # half with the shortcut's mask
    controls = controls_of(model, HookedVLM.from_pretrained)
    return compare_explainers(model, data, target, methods, effort, seed, rows, controls=controls)


def _methods(model: HookedVLM, data: ImageData, size: Sizes, seed: int) -> dict[str, Method]:
    found = methods_of(size.methods)
    return found | stored_methods(model, data, seed) if len(size.methods) == len(ELEMENT_METHODS) else found


def _shown(name: str, data: ImageData, size: Sizes, seed: int) -> Shown | None:
    model = HookedVLM.from_pretrained(name)
    return relevance_on(model, data, FINDING, SHORTCUT, _methods(model, data, size, seed), size.shown_images, seed)


def _injection(name: str, data: ImageData, size: Sizes, seed: int) -> Study:
    """The explainers on one model, with a corner patch that follows the output."""
    model = HookedVLM.from_pretrained(name)
    target = data.targets[FINDING]
    batch = prepare(model, data, chosen_rows(data, FINDING, size.injected_images, seed), target)
    question, judge = about_image(model, batch, target), about_image(model, batch, target, "blur")
    wanted = [Arm(m, PLAIN, ELEMENT_METHODS[m].explain) for m in size.inverted]
    scale, study = scale_of(question), Study()
    for psi in progress(size.psi, "injection", unit="psi"):
        inject = partial(injected, slots=CORNER, psi=psi, scale=scale, seed=seed + 1)
        study.add(
            trial(
                f"psi {psi:g}",
                question,
                wanted,
                {"blur": judge},
                inject,
                CORNER,
                size.draws,
                0.05,
                seed,
                own_fill=False,
            )
        )
    return study
