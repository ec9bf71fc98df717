"""What one dictionary does on the phantom, factor by factor: the measurements of intervention-fidelity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from mechinterp.errors import UsageError
from mechinterp.interventions import Mean, Resample, Zero, activity, matched_random_sets
from mechinterp.interventions.edits import Tokens
from mechinterp.metrics.statistics import Interval, PatientBootstrap, percentile_interval
from mechinterp.models import HookedVLM
from mechinterp.types import Placed, Target
from saes.metrics.alignment import f_score
from saes.metrics.matching import Match
from saes.truth.cohort import Cohort, Removal, batch_of, scores
from saes.truth.fidelity import Fidelity, fidelity
from saes.truth.readings import Acts, Overlap, effect_of_sets, patched

__all__ = ["Material", "Reading", "Truth", "all_effects", "compare", "gain_interval", "true_effects"]

Effects = dict[str, Float[np.ndarray, "repeat factor image target"]]


@dataclass(frozen=True, eq=False)
class Material:
    """Images that every model sees, rendered once."""

    fit: Cohort
    test: Cohort
    removed: dict[str, Removal]
    targets: list[Target]
    bootstrap: PatientBootstrap
    seed: int

    def own(self, factor: str) -> int | None:
        """Column of the factor's own output, where the model is asked for it."""
        names = [target.name for target in self.targets]
        return names.index(factor) if factor in names else None


@dataclass(frozen=True, eq=False)
class Reading:
    """All that was measured of one dictionary for one factor.

    Fields:
        f1, f1_zero: of the matched latents on test patients, thresholds from validation patients and at 0; for
            "trained" and "untrained".
        gain_ci95: interval of f1 trained minus untrained.
        probe: AUROC of a linear probe of the site (mean over the tokens) on test patients.
        shape: whether the factor is split, merged or absorbed.
        effect: ablation against removal on the factor's own output; "zero", "mean", "resample", "untrained", "random"
            (a list's mean), "patch matched", "patch all". Empty where the model is not asked for the factor.
        true, ablated: `[image, target]` effects of the removal and of zero ablation; in sd of the output.
    """

    model: str
    dictionary: str
    site: str
    factor: str
    latents: tuple[int, ...]
    f1: dict[str, float]
    f1_zero: dict[str, float]
    gain_ci95: Interval
    probe: float
    shape: Overlap
    effect: dict[str, list[Fidelity]]
    own: int | None
    present: Bool[np.ndarray, " image"]
    true: Float[np.ndarray, "image target"]
    ablated: Float[np.ndarray, "image target"]

    @property
    def f1_gain(self) -> float:
        """F1 above the untrained twin."""
        return self.f1["trained"] - self.f1["untrained"]

    @property
    def r2(self) -> float:
        """Fidelity R2 of zero ablation over all test images; nan where the model is not asked for the factor."""
        return self.effect["zero"][0].r2 if self.effect else float("nan")


@dataclass(frozen=True, eq=False)
class Truth:
    """What is true of a model: effects of removing each factor, and the sd of each output over the test images."""

    effects: dict[str, Float[np.ndarray, "image target"]]
    spread: Float[np.ndarray, " target"]


def true_effects(model: HookedVLM, material: Material) -> Truth:
    """`f(I) - f(I under do(factor = 0))` of every test image; exactly 0 where the factor is absent."""
    clean = scores(model, material.test.rendered, material.targets)
    found = {}
    for name, removal in material.removed.items():
        found[name] = np.zeros_like(clean)
        found[name][removal.rows] = clean[removal.rows] - scores(model, removal.rendered, material.targets)
    return Truth(found, clean.std(0))


def all_effects(
    model: HookedVLM,
    pair: Mapping[str, Placed],
    tokens: Tokens,
    material: Material,
    sets: Mapping[str, Sequence[tuple[int, ...]]],
    random_sets: int,
) -> Effects:
    """What ablating each factor's latents does, by how it is done; see `Reading.effect`."""
    placed, mine = pair["trained"], sets["trained"]
    live = activity(model, placed, batch_of(model, material.fit.head(200).rendered, material.targets), tokens)

    def swept(which: str, how) -> np.ndarray:
        return effect_of_sets(model, pair[which], material.test, material.targets, sets[which], how, tokens)[None]

    found = {
        "zero": swept("trained", Zero()),
        "mean": swept("trained", Mean(live.mean)),
        "resample": swept("trained", Resample(material.seed)),
        "untrained": swept("untrained", Zero()),
    }
    drawn = [_random_sets(live, members, random_sets, material.seed) for members in mine]
    count = min((len(d) for d, members in zip(drawn, mine, strict=True) if members), default=0)
    if count:
        flat = [d[i] if d else () for i in range(count) for d in drawn]
        effects = effect_of_sets(model, placed, material.test, material.targets, flat, Zero(), tokens)
        found["random"] = effects.reshape(count, len(mine), *effects.shape[1:])
    everything = tuple(range(placed.dictionary.W_dec.shape[0]))
    for name in ("patch matched", "patch all"):
        found[name] = np.zeros_like(found["zero"])
    for number, (name, removal) in enumerate(material.removed.items()):
        if material.own(name) is None:
            continue
        chosen = [mine[number], everything]
        moved = patched(model, placed, material.test, removal, material.targets, chosen, tokens)
        for how, values in zip(("patch matched", "patch all"), moved, strict=True):
            found[how][0, number, removal.rows] = values
    return found


def _random_sets(live, members: tuple[int, ...], n: int, seed: int) -> list[tuple[int, ...]]:
    """Sets that fire as often and as strongly; as many as a narrow dictionary has, down to none."""
    for count in range(n, 0, -1):
        try:
            return matched_random_sets(live, members, n=count, seed=seed) if members else []
        except UsageError:
            continue
    return []


def compare(
    factor: str, effects: Mapping[str, np.ndarray], material: Material, true: Float[np.ndarray, "image target"]
) -> dict[str, list[Fidelity]]:
    """Every way of ablating against the removal, on the factor's own output."""
    own, present = material.own(factor), material.test.has(factor)
    if own is None or present.sum() < 3:
        return {}
    weights = material.bootstrap.weights
    return {
        name: [fidelity(true[:, own], one[:, own], present, weights) for one in values]
        for name, values in effects.items()
    }


def gain_interval(
    found: Mapping[str, Match],
    acts: Mapping[str, Acts],
    labels: Bool[np.ndarray, " image"],
    bootstrap: PatientBootstrap,
) -> Interval:
    """Patient-bootstrap interval of F1 of the trained dictionary minus F1 of its twin, on the same patients."""
    drawn = [
        np.asarray(f_score(found[kind].fires(acts[kind].of("test")), labels.astype(np.float64), bootstrap.weights))
        for kind in ("trained", "untrained")
    ]
    return percentile_interval(drawn[0] - drawn[1])
