"""Measure many explainers on the same images of one model: one set of perturbations, removals and masks for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float

from mechinterp.audit.evidence import prepare
from mechinterp.audit.explainers.choose import chosen_rows, masks_of
from mechinterp.audit.explainers.further import BY_REMOVAL, further_columns, shared_removals
from mechinterp.data import ImageData
from mechinterp.explain.ask import Fill, about_image
from mechinterp.explain.methods import Method, applies
from mechinterp.explain.question import CHUNK, Question
from mechinterp.metrics.faithfulness import Removals, insertion_deletion, judged_by
from mechinterp.metrics.iq import IQScores, iq, permutation_floor
from mechinterp.metrics.iq.ask import Bench, effects_of, stage
from mechinterp.models import HookedVLM
from mechinterp.progress import progress
from mechinterp.types import Target

__all__ = ["Comparison", "Effort", "Judged", "compare"]

FEW = 5  # patients: below that an interval of a bootstrap is not worth printing, and no grade rests on one
STEPS = 16  # of the insertion and deletion curves
BY_JUDGE = ("F", "F_corr", "IS", "IS_zero", "IS_p1", "IS_p4", "R_null", "R_excess", "curves", *BY_REMOVAL)
BY_OWN_FILL = ("F_own",)


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Args:
        images: test images, one a patient.
        draws: perturbations of each, for R (30 or more; with fewer, its floor by chance rises).
        noise: of the perturbation, relative to each patch.
        judge: the filling of the removals that F, the curves and R_excess are made of; explainers fill with grey.
        further: also score by the metrics of `further.FURTHER`.
        masks: names of attributes whose masks maps are held beside, the target's own apart. They change no other
            number: images are chosen without regard to them, and one without the mask is left out of its column.
        chunk: images through the model at once; it bounds the memory and moves numbers by rounding only.
    """

    images: int = 6
    draws: int = 30
    noise: float = 0.05
    judge: Fill = "blur"
    further: bool = False
    masks: tuple[str, ...] = ()
    chunk: int = CHUNK


@dataclass(frozen=True)
class Judged:
    """One explainer on all images.

    Args:
        attribution: `[image, element]` at the images themselves.
        scores: IQ with effects from the judge's filling (blur), which no explainer used.
        circular: the columns (see `columns_of`) scored by the removals that the method is made of: no evidence.
        F_own: F_dist against effects of the explainers' own filling (grey), shown beside.
        floor: R with outputs shuffled, mean over shuffles, of each image.
        curve: insertion minus deletion by the judge's filling (`Curves.gain`).
        further: other metrics of each image, by name.
        seconds: for one explanation of one image, all copies explained together.
    """

    method: Method
    attribution: Float[np.ndarray, "image element"]
    scores: IQScores
    F_own: Float[np.ndarray, " image"]
    floor: Float[np.ndarray, " image"]
    curve: Float[np.ndarray, " image"]
    seconds: float
    circular: tuple[str, ...] = ()
    further: dict[str, Float[np.ndarray, " image"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Explainers of one target of one model on the same images.

    `masks` gives, for each attribute asked for, shares of patches covered and for which images they are known; the
    target's own comes first, if the data name it (`has_target_mask`). `curve_random` and `curve_oracle` are
    `Judged.curve` of a random order and of the order of the true effects.
    """

    model: HookedVLM
    target: Target
    question: Question
    rows: np.ndarray
    patients: tuple[str, ...]
    judged: dict[str, Judged]
    masks: dict[str, tuple[Float[np.ndarray, "image element"], Bool[np.ndarray, " image"]]]
    curve_random: Float[np.ndarray, " image"]
    curve_oracle: Float[np.ndarray, " image"]
    has_target_mask: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    judge_fill: Fill = "blur"


def compare(
    model: HookedVLM,
    data: ImageData,
    target: Target,
    methods: Mapping[str, Method],
    effort: Effort,
    seed: int = 0,
    rows: Sequence[int] | None = None,
) -> Comparison:
    """Explain, perturb, explain again, remove; for every method that can answer a question about this model's patches.

    Explainers fill removed patches with mean grey; F is judged with the image's own blur as the filling, so that no
    method is scored by the operation that made it; where `Effort.judge` says otherwise, `Judged.circular` names what
    such a score is worth nothing in. `rows`: images, instead of those that `chosen_rows` picks from the
    seed alone.

    Raises DataError without labelled test patients.
    """
    picked = chosen_rows(data, target.name, effort.images, seed) if rows is None else np.asarray(rows)
    batch = prepare(model, data, picked, target)
    question = about_image(model, batch, target, "grey", effort.chunk)
    judge = about_image(model, batch, target, effort.judge, effort.chunk)
    bench = stage(question, judge, effort.draws, effort.noise, seed)
    own = effects_of(question).double().numpy()
    seen = shared_removals(judge, seed) if effort.further else None
    judged: dict[str, Judged] = {}
    refused: dict[str, str] = {}
    for name, method in progress(list(methods.items()), "explainers", unit="method"):
        if not applies(method, question):
            refused[name] = f"does not apply to a {model.family} model"
            continue
        judged[name] = _judge(method, bench, question, judge, own, seen, seed)
    attribute = data.target_attribute(target.name)
    wanted = ((attribute,) if attribute else ()) + tuple(name for name in effort.masks if name != attribute)
    masks = {name: masks_of(model, data, name, picked) for name in wanted}
    patients = tuple(data.patients[int(row)] for row in picked)
    by_chance = _curve(judge, np.random.default_rng(seed).standard_normal(own.shape))
    by_effect = _curve(judge, bench.effect[:, 0])
    curves, has_mask = (by_chance, by_effect), attribute is not None
    return Comparison(
        model, target, question, picked, patients, judged, masks, *curves, has_mask, refused, effort.judge
    )


def _curve(judge: Question, attribution: Float[np.ndarray, "image element"]) -> Float[np.ndarray, " image"]:
    return insertion_deletion(judge, torch.from_numpy(attribution), STEPS).gain.value


def _judge(
    method: Method,
    bench: Bench,
    question: Question,
    judge: Question,
    own: Float[np.ndarray, "image element"],
    seen: Removals | None,
    seed: int,
) -> Judged:
    attributions, seconds = bench.explain(method.explain, seed)
    measured = bench.measurement(attributions)
    own_effects = replace(measured, effect=own, effects=None)
    shuffled = permutation_floor(measured, 20, seed)
    defined = np.isfinite(shuffled).all(0)
    floor = np.where(defined, np.where(np.isfinite(shuffled), shuffled, 0.0).mean(0), np.nan)
    curve = _curve(judge, attributions[:, 0])
    asked = ((judge, BY_JUDGE), (question, BY_OWN_FILL))
    circular = tuple(
        c for by, names in asked if judged_by(method.built_from, question, by) == "circular" for c in names
    )
    scores, F_own = iq(measured), iq(own_effects).F_dist
    further = {} if seen is None else further_columns(method, question, judge, measured, seen, seed)
    return Judged(method, attributions[:, 0], scores, F_own, floor, curve, seconds, circular, further)
