"""iq-sanity: do maps follow weights and labels, and do they come back with a twin and with another architecture?

1. A CNN on synthetic shapes (several seeds), beside one with random weights, one that learnt permuted labels of a fixed
   set by heart, one trained again from another seed, and one of another architecture that solves the task as well.
2. phantom-clip on test images, beside random weights, phantom-clip-permuted (which learnt other images' labels by
   heart), phantom-clip-again (another seed), phantom-clip-deep (narrower and deeper), and phantom-llava, a generative
   model whose vision tower was trained on from it; and phantom-llava beside the same made from those four. SAE maps and
   attribution graphs read each model with features of its own; SAE maps also the same model with another dictionary.
3. Each pair's likeness (rank correlation of the maps' sizes) is held beside that of maps of different images of the
   same model: below it for random weights and permuted labels, above it for the twin and the other architecture
   (Adebayo et al. 2018, arXiv:1810.03292; Arun et al. 2021, Radiology: AI 3:e200267).

The unit of an interval is the network (toys) or the patient (phantoms). About half an hour on one core.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechinterp.activations import extract
from mechinterp.audit.defaults import default_data
from mechinterp.audit.dictionary import dictionary_of
from mechinterp.audit.evidence import prepare
from mechinterp.audit.explainers.choose import chosen_rows
from mechinterp.audit.own_methods import own_methods, stored_methods
from mechinterp.experiments.iq_image import GRID, SIDE, Shapes, shapes
from mechinterp.experiments.iq_toys import explainers_for, fit
from mechinterp.experiments.result import Result
from mechinterp.experiments.sanity_report import ALL, DIFFERENT, ON_TOYS, Checks, report
from mechinterp.explain.ask import about_function, about_image, patch_owner
from mechinterp.explain.methods import ELEMENT_METHODS, Method, applies
from mechinterp.explain.question import ElementExplainer, Question, Values
from mechinterp.metrics.sanity import SIMILARITIES, Check, Maps, baseline, judge, randomising, stages
from mechinterp.models import HookedVLM
from mechinterp.progress import progress
from mechinterp.types import Placed, Target
from saes import train_sae
from saes.choices import KINDS

__all__ = ["Likeness", "Mixing", "Sizes", "another_dictionary", "memorised", "of_model", "pooled", "run"]

SIMILARITY = "spearman_abs"
CONTROLS = {
    "phantom-clip": {
        "permuted labels": "phantom-clip-permuted",
        "trained again": "phantom-clip-again",
        "other architecture": "phantom-clip-deep",
        "trained on": "phantom-llava",
    },
    "phantom-llava": {
        "permuted labels": "phantom-llava-permuted",
        "trained again": "phantom-llava-again",
        "other architecture": "phantom-llava-deep",
    },
}
SKIPPED = {"echo", "constant"}  # no map of their own to compare


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    seeds: int = 8
    images: int = 24
    steps: int = 600
    learnt_by_heart: int = 192
    heart_steps: int = 1500
    models: tuple[str, ...] = tuple(CONTROLS)
    findings: tuple[str, ...] = ("consolidation", "cardiomegaly", "effusion")
    phantoms: int = 24
    few: bool = False


QUICK = Sizes(5, 4, 40, 16, 60, ("phantom-clip",), ("consolidation",), 6, True)
FEW = ("gradient_times_input", "edges", "random")  # on phantoms, in the quick version


class Mixing(nn.Module):
    """No convolution over neighbours: patches are embedded one by one and mixed by a dense layer over places."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(1, 24, SIDE // GRID, stride=SIDE // GRID)
        self.mix, self.hidden, self.last = nn.Linear(GRID**2, GRID**2), nn.Linear(24 * GRID**2, 48), nn.Linear(48, 1)

    def features(self, x: Float[Tensor, "row side side"]) -> Float[Tensor, "row place d"]:
        """What Grad-CAM reads: each patch by itself, before the mixing."""
        return self.embed(x[:, None]).relu().flatten(2).transpose(1, 2)

    def read(self, features: Float[Tensor, "row place d"]) -> Float[Tensor, " row"]:
        """The logit of "square"."""
        places = features.transpose(1, 2)
        mixed = (places + self.mix(places)).relu()
        return self.last(self.hidden(mixed.flatten(1)).relu())[:, 0]

    def forward(self, x: Float[Tensor, "row side side"]) -> Float[Tensor, " row"]:
        """The logit of "square"."""
        return self.read(self.features(x))


def run(seed: int = 0, quick: bool = False, sizes: Sizes | None = None) -> Result:
    """Run the experiment. `sizes` overrides both versions."""
    size = sizes or (QUICK if quick else Sizes())
    toys, skills = _toys(size, seed)
    return report(toys, {name: of_model(name, size, seed) for name in size.models if size.findings}, skills)


def memorised(seed: int, count: int, steps: int) -> tuple[Shapes, float]:
    """A CNN that learnt coin flips as labels of a fixed set, and the share of the set that it has by heart."""
    generator = torch.Generator().manual_seed(80_000 + seed)
    images, _ = shapes(count, generator, with_slot=False)
    labels = (torch.rand(count, generator=generator) < 0.5).float()

    def draw(batch: int, dice: torch.Generator) -> tuple[Tensor, Tensor]:
        picked = torch.randint(count, (batch,), generator=dice)
        return images[picked], labels[picked]

    torch.manual_seed(60_000 + seed)
    net = Shapes()
    fit(net, draw, seed, steps)
    return net, float(((net(images) > 0) == (labels > 0.5)).float().mean())


Net = Shapes | Mixing


def _trained(make: Callable[[], Net], seed: int, steps: int) -> Net:
    torch.manual_seed(60_000 + seed)
    net = make()
    fit(net, lambda n, generator: shapes(n, generator, with_slot=False), seed, steps)
    return net


def _toys(size: Sizes, seed: int) -> tuple[dict[str, dict[str, Check]], dict[str, list[float]]]:
    """Checks by method and kind of other network, and the skill of every network (by heart: on its own set)."""
    similar: dict[str, dict[str, list[np.ndarray]]] = {}
    chance: dict[str, list[float]] = {}
    skills: dict[str, list[float]] = {}
    for s in progress(range(size.seeds), "networks", unit="network"):
        own = seed * 100 + s
        nets: dict[str, Net] = {"": _trained(Shapes, own, size.steps)}
        torch.manual_seed(90_000 + own)
        nets["random weights"] = Shapes().requires_grad_(False)
        nets["permuted labels"], by_heart = memorised(own, size.learnt_by_heart, size.heart_steps)
        nets["trained again"] = _trained(Shapes, 5_000 + own, size.steps)
        nets["other architecture"] = _trained(Mixing, own, 2 * size.steps)
        generator = torch.Generator().manual_seed(70_000 + own)
        many, label = shapes(500, generator, with_slot=False)
        for kind, net in nets.items():
            right = by_heart if kind == "permuted labels" else ((net(many) > 0) == (label > 0.5)).float().mean()
            skills.setdefault(kind, []).append(float(right))
        images = many[: size.images]
        explainers = explainers_for(_about(nets[""], images), size.few)
        for method in (name for name in explainers if name not in SKIPPED):
            maps = {kind: _maps(net, images, explainers[method], seed) for kind, net in nets.items()}
            patients = [str(i) for i in range(len(images))]
            chance.setdefault(method, []).append(baseline(maps[""], patients, SIMILARITY))
            for kind in ON_TOYS:
                found = SIMILARITIES[SIMILARITY](maps[""], maps[kind])
                similar.setdefault(method, {}).setdefault(kind, []).append(found)
    return {method: _judged(by_kind, chance[method]) for method, by_kind in similar.items()}, skills


def _judged(by_kind: Mapping[str, list[np.ndarray]], chance: list[float]) -> dict[str, Check]:
    known = [c for c in chance if np.isfinite(c)]
    against = float(np.mean(known)) if known else float("nan")
    return {
        kind: judge(
            kind,
            SIMILARITY,
            np.concatenate(values),
            against,
            [str(net) for net, v in enumerate(values) for _ in v],
            "below" if kind in DIFFERENT else "above",
        )
        for kind, values in by_kind.items()
    }


def _about(net: Net, images: Float[Tensor, "row side side"]) -> Question:
    def inner(values: Values) -> tuple[Tensor, Tensor]:
        features = net.features(values[0]).requires_grad_()
        return features, net.read(features)

    owner = patch_owner(SIDE, SIDE, GRID, GRID)
    return about_function(net, images, torch.zeros(SIDE, SIDE), owner, "patch", (GRID, GRID), inner)


def _maps(
    net: Net, images: Float[Tensor, "row side side"], explain: ElementExplainer, seed: int
) -> Float[np.ndarray, "row height width"]:
    found = explain(_about(net, images), torch.Generator().manual_seed(seed))
    return found.detach().double().numpy().reshape(len(images), GRID, GRID)


@dataclass(frozen=True)
class Likeness:
    """Of the maps of one method for one finding: to those of the other model (per image), and of different patients."""

    values: Float[np.ndarray, " image"]
    baseline: float
    patients: tuple[str, ...]


def of_model(model: str, size: Sizes, seed: int) -> dict[str, Checks]:
    """Checks of a model by finding, method and kind of other model; `ALL` holds the findings together."""
    data, one = default_data(600, seed), HookedVLM.from_pretrained(model)
    controls = {kind: HookedVLM.from_pretrained(name) for kind, name in CONTROLS[model].items()}
    methods = {name: ELEMENT_METHODS[name] for name in (FEW if size.few else ELEMENT_METHODS) if name not in SKIPPED}
    methods |= {} if size.few else stored_methods(one, data, seed)
    sisters = {} if size.few else own_methods(one, another_dictionary(one, dictionary_of(one, data, seed)[0], seed + 1))
    found: dict[str, dict[str, dict[str, Likeness]]] = {}
    for finding in size.findings:
        rows = chosen_rows(data, finding, size.phantoms, seed)
        patients = tuple(data.patients[int(row)] for row in rows)
        target = data.targets[finding]

        def ask(model: HookedVLM, target: Target, rows: np.ndarray = rows) -> Question:
            return about_image(model, prepare(model, data, rows, target), target)

        for name, method in progress(list(methods.items()), f"{model}, {finding}", unit="method"):
            if all(applies(method, ask(m, target)) for m in (one, *controls.values())):
                maps = Maps(ask, method.explain, target, patients, seed)
                found.setdefault(finding, {})[name] = _beside(maps, one, controls, sisters.get(name))
    together = {
        name: {kind: pooled([found[finding][name][kind] for finding in size.findings]) for kind in by_kind}
        for name, by_kind in found[size.findings[0]].items()
    }
    return {
        finding: {
            name: {kind: _verdict(kind, likeness) for kind, likeness in by_kind.items()}
            for name, by_kind in by_method.items()
        }
        for finding, by_method in {**found, ALL: together}.items()
    }


def another_dictionary(model: HookedVLM, placed: Placed, seed: int) -> Placed:
    """One of the same kind at the same site of the same model, from another seed and other images."""
    info = placed.dictionary.info  # type: ignore[attr-defined]
    # what ships was trained before `start` was a choice
    given: dict[str, Any] = {"start": "sae-lens"} | {k: v for k, v in info["config"].items() if k != "kind"}
    config = KINDS[info["config"]["kind"]](**given)
    with tempfile.TemporaryDirectory() as folder:
        data = default_data(info["data"]["images"], 1_000_000 + seed)
        store = extract(model, data, [placed.reads], Path(folder) / "store", tokens=info["tokens"])
        return train_sae(store, placed.reads, config, Path(folder) / "dictionary", seed=seed)  # type: ignore[arg-type]


def _beside(
    maps: Maps, one: HookedVLM, controls: Mapping[str, HookedVLM], sister: Method | None = None
) -> dict[str, Likeness]:
    """Likeness of a method's maps of a model to those of the model with random weights, and of its controls.

    `sister`: the method with another dictionary of the same model.
    """
    mine, others = maps.of(one), {}
    chance = baseline(mine, maps.patients, SIMILARITY)
    with randomising(one, maps.seed) as weights:
        for stage in stages(one, "vision"):
            weights.randomise(stage)
        others["random weights"] = maps.of(one)
    others |= {kind: maps.of(model) for kind, model in controls.items()}
    if sister is not None:
        others["another dictionary"] = replace(maps, explain=sister.explain).of(one)
    return {
        kind: Likeness(SIMILARITIES[SIMILARITY](mine, other), chance, maps.patients) for kind, other in others.items()
    }


def pooled(parts: Sequence[Likeness]) -> Likeness:
    """The images of all findings; a patient may be in several."""
    return Likeness(
        np.concatenate([part.values for part in parts]),
        float(np.mean([part.baseline for part in parts])),
        tuple(patient for part in parts for patient in part.patients),
    )


def _verdict(kind: str, of: Likeness) -> Check:
    return judge(kind, SIMILARITY, of.values, of.baseline, of.patients, "below" if kind in DIFFERENT else "above")
