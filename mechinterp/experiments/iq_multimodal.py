"""iq-multimodal: image and words explained together; does injection turn them around, and what does RBP cost?

1. A question about patches and words of one input (`about_both`), for phantom-clip and phantom-llava.
2. At test time a corner patch and a neutral word follow the output, x = psi * z(output) + noise: R, F, IS and the share
   of the attribution on the two injected elements, with and without. The gate drops inputs whose output it moved.
3. RBP four ways: each modality perturbed by itself (1 + 3 + 3 explanations), both at once (1 + 3), both at once in one
   pair of opposite perturbations (1 + 2), and both at once, once (1 + 1). IS of each, and the time of each in single
   explanations. Methods that remove elements have the last one only.

About 83 minutes of CPU time: 37 for phantom-clip, 46 for phantom-llava.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.audit.defaults import default_data
from mechinterp.audit.evidence import prepare
from mechinterp.audit.explainers.choose import chosen_rows
from mechinterp.experiments.iq_study import PLAIN, Arm, Study, trial
from mechinterp.experiments.multimodal_report import APART, JOINT, KINDS, ONE, PAIR, Found, condition, report
from mechinterp.experiments.result import Result
from mechinterp.explain.ask import about_both
from mechinterp.explain.inject import injected, scale_of
from mechinterp.explain.methods import ELEMENT_METHODS
from mechinterp.explain.question import ElementExplainer, Question
from mechinterp.explain.rbp import rbp, with_rbp
from mechinterp.explain.shake import shaken
from mechinterp.models import HookedVLM
from mechinterp.progress import progress

__all__ = ["Sizes", "run", "separate_rbp"]

FINDING = "consolidation"
CORNER = 0  # the upper left patch
DEAR = "kernel_shap"
NEUTRAL = {"a", "there", "is", "chest"}  # the first of these words in the prompt is the slot


@dataclass(frozen=True)
class Sizes:
    """How much of everything. In generative models KernelSHAP (0.7 s an input) is asked without RBP.

    `hardened`: RBP's effect is measured on these in all four ways, seven explanations a copy for the first of them;
    `once`: on these with a single perturbation only; `timed`: its cost on these.
    """

    models: tuple[str, ...] = ("phantom-clip", "phantom-llava")
    methods: tuple[str, ...] = ("gradient_times_input", "integrated_gradients", "kernel_shap", "lime", "occlusion")
    images: int = 8
    draws: int = 30
    psi: tuple[float, ...] = (0.0, 0.8)
    hardened: tuple[str, ...] = ("gradient_times_input", "integrated_gradients")
    once: tuple[str, ...] = ("kernel_shap", "lime", "occlusion")
    timed: tuple[str, ...] = ("gradient_times_input", "integrated_gradients", "kernel_shap")


QUICK = Sizes(
    ("phantom-clip",), ("gradient_times_input", "integrated_gradients"), 4, 4, (0.0, 0.8), ("gradient_times_input",),
    ("integrated_gradients",), ("gradient_times_input",),
)  # fmt: skip


def separate_rbp(explain: ElementExplainer, perturbations: int = 3, noise: float = 0.05) -> ElementExplainer:
    """RBP with each part perturbed by itself: delta_j from the perturbations of the part that j belongs to."""

    def explained(question: Question, generator: torch.Generator) -> Float[Tensor, "row element"]:
        base = explain(question, generator)
        found = base.clone()
        for place, part in enumerate(question.parts):
            near = shaken(question, perturbations, noise, generator)
            kept = tuple(
                moved if i == place else other.value.repeat_interleave(1 + perturbations, 0)
                for i, (moved, other) in enumerate(zip(near.values, question.parts, strict=True))
            )
            copies = (torch.arange(len(near)) % (1 + perturbations) > 0).nonzero()[:, 0]
            around = explain(near.at(kept)[copies], generator).view(len(question), perturbations, question.count)
            mine = torch.unique(part.owner[part.owner >= 0])
            found[:, mine] = rbp(base, around)[:, mine]
        return found

    return explained


def run(seed: int = 0, quick: bool = False, sizes: Sizes | None = None) -> Result:
    """Run the experiment. `sizes` overrides both versions."""
    size = sizes or (QUICK if quick else Sizes())
    found = {name: _of_model(name, size, seed) for name in size.models}
    return report(found, size.psi)


def _of_model(name: str, size: Sizes, seed: int) -> Found:
    model = HookedVLM.from_pretrained(name)
    data = default_data(600 if size.images > 4 else 64, seed)
    target = data.targets[FINDING]
    rows = chosen_rows(data, FINDING, size.images, seed)
    batch = prepare(model, data, rows, target)
    question, judge = about_both(model, batch, target), about_both(model, batch, target, "blur", "mean")
    slots, scale = (CORNER, _slot(question)), scale_of(question)
    dear = {DEAR} if model.family == "llava" else set()
    explainers = {m: ELEMENT_METHODS[m].explain for m in size.methods}
    own: dict[str, tuple[str, ...]] = dict.fromkeys(size.hardened, KINDS)
    own |= {m: (ONE,) for m in size.once if m not in dear}
    wanted = [Arm(m, PLAIN, explain) for m, explain in explainers.items()]
    for m, kinds in own.items():
        wanted += [Arm(m, kind, made) for kind, made in _hardened(explainers[m]).items() if kind in kinds]
    study = Study()
    for psi in progress(size.psi, name, unit="psi"):
        inject = partial(injected, slots=slots, psi=psi, scale=scale, seed=seed + 1)
        study.add(
            trial(
                condition(psi), question, wanted, {"blur": judge}, inject, slots, size.draws, 0.05, seed, own_fill=False
            )
        )
    patches = question.count - len(_words_of(question))
    words = {}
    for m, explain in explainers.items():
        a = explain(question, torch.Generator().manual_seed(seed)).abs()
        words[m] = float((a[:, patches:].sum(1) / a.sum(1)).mean())
    timed = [m for m in size.timed if m in explainers and m not in dear]
    cost = {(m, kind): t for m in timed for kind, t in _cost(question, explainers[m]).items()}
    return Found(study, words, cost, own)


def _hardened(explain: ElementExplainer) -> dict[str, ElementExplainer]:
    return {
        APART: separate_rbp(explain),
        JOINT: with_rbp(explain),
        PAIR: with_rbp(explain, perturbations=2, antithetic=True),
        ONE: with_rbp(explain, perturbations=1),
    }


def _slot(question: Question) -> int:
    words = _words_of(question)
    for place, word in words:
        if word in NEUTRAL:
            return place
    return words[0][0]


def _words_of(question: Question) -> list[tuple[int, str]]:
    return [(i, name) for i, name in enumerate(question.names) if not name.startswith("patch ")]


def _cost(question: Question, explain: ElementExplainer, repeats: int = 3) -> dict[str, float]:
    """Seconds of each kind of RBP over those of one explanation, on the same rows; the best of a few runs of each."""
    variants = {PLAIN: explain} | _hardened(explain)
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(repeats):  # in turn, so that a busy moment meets all of them
        for name, made in variants.items():
            start = time.process_time()
            made(question, torch.Generator().manual_seed(0))
            best[name] = min(best[name], time.process_time() - start)
    return {name: seconds / best[PLAIN] for name, seconds in best.items()}
