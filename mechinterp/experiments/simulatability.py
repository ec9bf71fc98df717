"""simulatability: does an explanation help an agent to predict the model, and when would it help or harm a reader?

1. Student and teacher (Pruthi et al. 2022). The teacher is phantom-clip on one finding. Small students learn its score
   from few images of some patients and are tested on others; in training they may be told where the teacher is said to
   look. Beside each explanation stand no explanation, random maps, the same maps on the wrong images, a map that spells
   out the answer, and the true place of the finding.
2. The same with the map shown at test time too: what a leak would then be worth.
3. A simulated reader beside the AI on a finding on which the AI errs: accuracy of the pair over persuasion and
   detection, with the maps' own conviction and oddness, and with a lure that convinces exactly where the AI is wrong.

Nothing here is about people: no person was asked. Minutes on one core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.data.phantom import Phantom
from mechinterp.data.phantom.language import prompts
from mechinterp.experiments.result import Result
from mechinterp.explain.ask import about_image
from mechinterp.explain.methods import ELEMENT_METHODS
from mechinterp.metrics.localisation import mask_shares, top_k_intersection
from mechinterp.metrics.reader import Advice, Surface, conviction, read
from mechinterp.metrics.simulation import (
    Lessons,
    Simulated,
    given,
    leak,
    patch_features,
    random_maps,
    shuffled,
    simulate,
)
from mechinterp.models import HookedVLM
from mechinterp.progress import progress
from mechinterp.types import Target

__all__ = ["Findings", "Seen", "Sizes", "run"]

UNCHECKABLE = 0.5  # oddness of the map of a "no": nothing in the image could show that it is wrong


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    methods: tuple[str, ...] = (
        "occlusion",
        "integrated_gradients",
        "gradient_times_input",
        "grad_cam",
        "attention_rollout",
        "edges",
    )
    finding: str = "consolidation"
    uncertain: str = "nodule"  # a finding on which the model errs, for the reader
    train: int = 200
    valid: int = 150
    test: int = 300
    shown: int = 100  # test images of which maps are made
    told: tuple[int, ...] = (25, 75, 200)
    seeds: int = 5
    steps: int = 200


QUICK = Sizes(("gradient_times_input", "edges"), train=16, valid=12, test=20, shown=12, told=(6, 12), seeds=2, steps=15)


@dataclass(frozen=True)
class Seen:
    """Images of one set of patients with the model's score of a finding, and explanations of the first of them."""

    pixels: Float[Tensor, "image patch pixel"]
    scores: Float[Tensor, " image"]
    patients: tuple[str, ...]
    truth: Bool[np.ndarray, " image"]
    inside: Float[np.ndarray, "image patch"]
    maps: Mapping[str, Float[Tensor, "shown patch"]]


@dataclass(frozen=True)
class Findings:
    """All that was measured, for the report."""

    size: Sizes
    students: Mapping[int, Mapping[str, Simulated]]
    shown: Mapping[str, Simulated]
    readers: Mapping[str, Surface]
    balance: float


def run(seed: int = 0, quick: bool = False, sizes: Sizes | None = None) -> Result:
    """Run the experiment. `sizes` overrides both versions."""
    from mechinterp.experiments.simulatability_report import report

    size = sizes or (QUICK if quick else Sizes())
    model = HookedVLM.from_pretrained("phantom-clip")
    train = seen(model, size.finding, size.train, size.methods, size.train, _seed(seed, 0))
    valid = seen(model, size.finding, size.valid, (), 0, _seed(seed, 1))
    test = seen(model, size.finding, size.test, size.methods, size.shown, _seed(seed, 2))
    lessons = _lessons(train, valid, test)
    learnt, checked, unseen = lessons
    told = _explanations(train, learnt, seed)
    students = {
        n: simulate(learnt, checked, unseen, told, n, size.seeds, steps=size.steps, seed=seed)
        for n in progress(size.told, "students", unit="size")
    }
    readers = _readers(model, size, seed)
    balance = float((test.scores > 0).double().mean())
    return report(Findings(size, students, _shown(lessons, train, test, size, seed), readers, balance))


def seen(model: HookedVLM, finding: str, images: int, methods: tuple[str, ...], explained: int, seed: int) -> Seen:
    """Score phantoms of patients of their own (by the seed), and explain the first `explained` images.

    Half of the images have the finding: that is what a dial does, here at an association of 0.
    """
    phantom = Phantom.sample(images, seed=seed, associations={("portable", finding): 0.0})
    target = Target(finding, *prompts(finding))
    batch = model.prepare(phantom.render() / 255.0, [target])
    rows, columns = model.grid_shape
    with torch.no_grad():
        scores = torch.cat([model.score(batch[i : i + 64], [target])[:, 0] for i in range(0, images, 64)])
    maps = {}
    for name in progress(methods, "explanations", unit="method"):
        question = about_image(model, batch[:explained], target, chunk=64)
        generator = torch.Generator().manual_seed(seed)
        maps[name] = ELEMENT_METHODS[name].explain(question, generator).detach().float()
    side = batch.pixel_values.shape[-1] // columns
    patches = batch.pixel_values[:, 0].unfold(1, side, side).unfold(2, side, side).flatten(3).flatten(1, 2)
    return Seen(
        patches,
        scores,
        tuple(f"{seed}-{p}" for p in phantom.patients),
        phantom.factors[finding].to_numpy() > 0.5,
        mask_shares(phantom.masks(finding), rows, columns),
        maps,
    )


def _seed(seed: int, which: int) -> int:
    """Phantoms of these seeds are of patients that neither training nor the model's own test saw."""
    return 7_100_003 + 10 * seed + which


def _lessons(*sets: Seen) -> tuple[Lessons, ...]:
    features = patch_features(sets[0].pixels, *(s.pixels for s in sets[1:]))
    return tuple(Lessons(f, s.scores, s.patients) for f, s in zip(features, sets, strict=True))  # in their order


def _explanations(train: Seen, lessons: Lessons, seed: int) -> dict[str, Tensor | None]:
    """Every explanation of the training images, and the controls."""
    generator = torch.Generator().manual_seed(seed)
    patches = lessons.features.shape[1]
    found: dict[str, Tensor | None] = {"none": None, "random": random_maps(len(lessons), patches, generator)}
    found["leak"] = leak(lessons.scores, patches)
    found["truth"] = torch.from_numpy(train.inside).float()
    for name in (*train.maps, "truth"):
        maps = found["truth"] if name == "truth" else train.maps[name]
        assert maps is not None
        found[name] = maps
        found[f"{name}, shuffled"] = shuffled(maps, train.patients, generator)
    return found


def _shown(lessons: tuple[Lessons, ...], train: Seen, test: Seen, size: Sizes, seed: int) -> dict[str, Simulated]:
    """Students whose attention is the map, at test time too."""
    learnt, of = lessons[0], lessons[2]
    few = Lessons(of.features[: size.shown], of.scores[: size.shown], of.patients[: size.shown])
    patches = few.features.shape[1]
    maps = {name: (train.maps[name], test.maps[name]) for name in size.methods}
    maps["leak"] = (leak(learnt.scores, patches), leak(few.scores, patches))
    n = max(size.told)
    return {k: given(learnt, few, mine, theirs, n, size.seeds, size.steps, seed) for k, (mine, theirs) in maps.items()}


def _readers(model: HookedVLM, size: Sizes, seed: int) -> dict[str, Surface]:
    """The surface of every method on the uncertain finding, and of a lure."""
    from sklearn.linear_model import LogisticRegression

    known = seen(model, size.uncertain, max(size.valid, 40), (), 0, _seed(seed, 3))
    cases = seen(model, size.uncertain, size.shown, size.methods, size.shown, _seed(seed, 4))
    scale = LogisticRegression().fit(  # from score to probability, on other patients
        known.scores[:, None].numpy(), known.truth
    )
    probability = scale.predict_proba(cases.scores[:, None].numpy())[:, 1]
    yes, wrong = probability > 0.5, (probability > 0.5) != cases.truth
    found = {}
    for name, maps in cases.maps.items():
        values = maps.double().numpy()
        hit = np.where(cases.truth, top_k_intersection(values, cases.inside), 0.0)
        odd = np.where(yes, 1 - hit, UNCHECKABLE)
        found[name] = read(Advice(cases.truth, probability, conviction(values), odd), seed=seed)
    lure = Advice(cases.truth, probability, wrong.astype(float), np.zeros(len(wrong)))
    found["lure"] = read(lure, seed=seed)
    return found
