"""What one dictionary does on the phantom, factor by factor: the measurements of intervention-fidelity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.errors import UsageError
from mechinterp.interventions import Mean, Resample, Zero, activity, matched_random_sets
from mechinterp.interventions.controls import Activity
from mechinterp.interventions.edits import Tokens
from mechinterp.metrics.statistics import Interval, PatientBootstrap, percentile_interval
from mechinterp.models import HookedVLM
from mechinterp.types import Placed, Site, Target
from saes.metrics.alignment import f_score
from saes.metrics.matching import Match
from saes.truth.causes import Causation, Pairs, causation, midpoints
from saes.truth.cohort import Cohort, Removal, batch_of, scores
from saes.truth.fidelity import Fidelity, fidelity
from saes.truth.readings import Acts, Overlap, effect_of_sets, site_values, swapped

__all__ = [
    "Budget",
    "Material",
    "Reading",
    "Truth",
    "all_effects",
    "all_swaps",
    "compare",
    "gain_interval",
    "live_features",
]

Effects = dict[str, Float[np.ndarray, "repeat factor image target"]]


@dataclass(frozen=True)
class Budget:
    """What a model can afford: a generative one runs its language model for every pass.

    Args:
        test: images on which effects are compared.
        pairs: pairs a factor for cause and isolation.
        random_sets, random_swaps: matched random sets a factor, for ablation and for swapping.
        other_ablations: whether mean and resample ablation stand beside zero ablation.
    """

    test: int
    pairs: int
    random_sets: int
    random_swaps: int
    other_ablations: bool = True


@dataclass(frozen=True, eq=False)
class Material:
    """Images that every model sees, rendered once."""

    fit: Cohort
    test: Cohort
    removed: dict[str, Removal]
    pairs: dict[str, Pairs]
    targets: list[Target]
    bootstrap: PatientBootstrap
    budget: Budget
    seed: int

    def own(self, factor: str) -> int | None:
        """Column of the factor's own output, where the model is asked for it."""
        names = [target.name for target in self.targets]
        return names.index(factor) if factor in names else None

    def within(self, budget: Budget) -> Material:
        """The part of it that a budget pays for: the first images, and pairs whose base is among them."""
        n = budget.test
        removed = {k: Removal(r.rows[r.rows < n], r.rendered[r.rows < n]) for k, r in self.removed.items()}
        pairs = {k: p.of(p.rows < n).head(budget.pairs) for k, p in self.pairs.items()}
        weights = PatientBootstrap(self.bootstrap.weights[:, :n])
        return replace(self, test=self.test.head(n), removed=removed, pairs=pairs, bootstrap=weights, budget=budget)


@dataclass(frozen=True, eq=False)
class Reading:
    """All that was measured of one dictionary for one factor.

    Fields:
        kind, l0: of the dictionary; `l0` latents fire a token on average.
        images: test images of f1 and probe; effects may be of fewer (`present`).
        f1, f1_zero: of the matched latents on test patients, thresholds from validation patients and at 0; for
            "trained" and "untrained".
        gain_ci95: interval of f1 trained minus untrained.
        probe: AUROC of a linear probe of the site (mean over the tokens) on test patients.
        shape: whether the factor is split, merged or absorbed.
        effect: ablation against removal on the factor's own output; "zero", "mean", "resample", "untrained", "random"
            (a list), "patch matched", "patch all". Empty where the model is not asked for the factor.
        swap: cause and isolation of swapping "matched", "untrained", "all" latents, or "random" sets (a list).
        true, ablated: `[image, target]` effects of the removal and of zero ablation; in sd of the output.
    """

    model: str
    dictionary: str
    site: str
    kind: str
    l0: float
    factor: str
    images: int
    latents: tuple[int, ...]
    f1: dict[str, float]
    f1_zero: dict[str, float]
    gain_ci95: Interval
    probe: float
    shape: Overlap
    effect: dict[str, list[Fidelity]]
    swap: dict[str, list[Causation]]
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


@dataclass(eq=False)
class Truth:
    """What is true of a model, measured once and kept for all of its dictionaries.

    Fields:
        effects: `f(I) - f(I under do(factor = 0))` of every test image; exactly 0 where the factor is absent.
        spread: sd of each output over the test images.
        base, source: scores of the pairs of each factor.
        least: the score from which on each output says yes, from images to fit on.
    """

    model: HookedVLM
    material: Material
    effects: dict[str, Float[np.ndarray, "image target"]] = field(default_factory=dict)
    base: dict[str, Float[np.ndarray, "pair target"]] = field(default_factory=dict)
    source: dict[str, Float[np.ndarray, "pair target"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        m, targets = self.material, self.material.targets
        clean = scores(self.model, m.test.rendered, targets)
        self.spread = clean.std(0)
        for name, removal in m.removed.items():
            self.effects[name] = np.zeros_like(clean)
            self.effects[name][removal.rows] = clean[removal.rows] - scores(self.model, removal.rendered, targets)
        for name, pairs in m.pairs.items():
            self.base[name], self.source[name] = clean[pairs.rows], scores(self.model, pairs.rendered, targets)
        fit = m.fit.head(400)
        has = np.stack([fit.has(target.name) for target in targets], 1)
        self.least = midpoints(scores(self.model, fit.rendered, targets), has)
        self._values: dict[str, dict[str, Tensor]] = {}

    def values(self, site: Site) -> dict[str, Float[Tensor, "image pos d"]]:
        """What passes a site: "test", "removed FACTOR", "source FACTOR"."""
        if str(site) not in self._values:
            m = self.material
            rendered = {"test": m.test.rendered}
            rendered |= {f"removed {name}": r.rendered for name, r in m.removed.items() if m.own(name) is not None}
            rendered |= {f"source {name}": p.rendered for name, p in m.pairs.items()}
            self._values[str(site)] = {k: site_values(self.model, site, images) for k, images in rendered.items()}
        return self._values[str(site)]


def live_features(truth: Truth, placed: Placed, tokens: Tokens) -> Activity:
    """How often and how strongly every latent fires, on images to fit on: what random sets are matched by."""
    m = truth.material
    return activity(truth.model, placed, batch_of(truth.model, m.fit.head(200).rendered, m.targets), tokens)


def all_effects(
    truth: Truth,
    pair: Mapping[str, Placed],
    tokens: Tokens,
    factors: Sequence[str],
    sets: Mapping[str, Sequence[tuple[int, ...]]],
    live: Activity,
) -> Effects:
    """What ablating the latents of each factor with an output does, by how it is done; see `Reading.effect`."""
    material, model, placed = truth.material, truth.model, pair["trained"]
    asked = [material.own(name) is not None for name in factors]
    sets = {k: [s if a else () for s, a in zip(v, asked, strict=True)] for k, v in sets.items()}
    mine = sets["trained"]

    def swept(which: str, how) -> np.ndarray:
        return effect_of_sets(model, pair[which], material.test, material.targets, sets[which], how, tokens)[None]

    found = {"zero": swept("trained", Zero()), "untrained": swept("untrained", Zero())}
    if material.budget.other_ablations:
        found |= {"mean": swept("trained", Mean(live.mean)), "resample": swept("trained", Resample(material.seed))}
    drawn = [random_sets(live, members, material.budget.random_sets, material.seed) for members in mine]
    count = min((len(d) for d, members in zip(drawn, mine, strict=True) if members), default=0)
    if count:
        flat = [d[i] if d else () for i in range(count) for d in drawn]
        effects = effect_of_sets(model, placed, material.test, material.targets, flat, Zero(), tokens)
        found["random"] = effects.reshape(count, len(mine), *effects.shape[1:])
    everything, values = tuple(range(placed.dictionary.W_dec.shape[0])), truth.values(placed.reads)
    for name in ("patch matched", "patch all"):
        found[name] = np.zeros_like(found["zero"])
    for number, name in enumerate(factors):
        rows = material.removed[name].rows
        if not asked[number] or not len(rows):
            continue
        x, y = values["test"][rows], values[f"removed {name}"]
        moved = swapped(model, placed, material.targets, x, y, [(), mine[number], everything], tokens)
        for how, after in zip(("patch matched", "patch all"), moved[1:], strict=True):
            found[how][0, number, rows] = moved[0] - after
    return found


def all_swaps(
    truth: Truth,
    pair: Mapping[str, Placed],
    tokens: Tokens,
    sets: Mapping[str, Mapping[str, tuple[int, ...]]],
    live: Activity,
) -> dict[str, dict[str, list[Causation]]]:
    """Cause and isolation of swapping each factor's latents into its pairs; see `Reading.swap`."""
    material, placed = truth.material, pair["trained"]
    columns = {i: own for i, name in enumerate(material.pairs) if (own := material.own(name)) is not None}
    values = truth.values(placed.reads)
    everything, out = tuple(range(placed.dictionary.W_dec.shape[0])), {}
    for number, (name, pairs) in enumerate(material.pairs.items()):
        random = random_sets(live, sets["trained"][name], material.budget.random_swaps, material.seed)
        x, y = values["test"][pairs.rows], values[f"source {name}"]
        swaps = [sets["trained"][name], everything, *random]
        moved = swapped(truth.model, placed, material.targets, x, y, swaps, tokens)
        twin = swapped(truth.model, pair["untrained"], material.targets, x, y, [sets["untrained"][name]], tokens)
        present = material.test.has(name)[pairs.rows]

        def judged(after: np.ndarray, name=name, number=number, pairs=pairs, present=present) -> Causation:
            three = truth.base[name], truth.source[name], after
            return causation(pairs, number, columns, three, truth.least, present, material.bootstrap.weights)

        found = {"matched": [moved[0]], "all": [moved[1]], "random": list(moved[2:]), "untrained": [twin[0]]}
        out[name] = {how: [judged(one) for one in each] for how, each in found.items() if each}
    return out


def random_sets(live: Activity, members: tuple[int, ...], n: int, seed: int) -> list[tuple[int, ...]]:
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
