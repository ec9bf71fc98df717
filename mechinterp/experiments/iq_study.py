"""What the IQ experiments measure alike: explainers under treatments, before and after an injection, over seeds.

A *trial* is one model (one seed), some rows and one condition. Every arm (an explainer under a treatment) explains the
same rows, the same perturbed copies and is judged by the same removals, so differences between arms are paired. Where a
condition injects a spurious element, it does so in the perturbed copies too, as that is how such an element arrives.

F is judged by removals to other references than those of the explainers (`Judges`, the first of them for every claim
that names none); a judge with the explainers' own reference is refused. Scores by their own reference are kept as
"F_dist by the explainers' own fill" and the like, to be held beside: bounds, KernelSHAP and Shapley values are made of
removals to it, so there they win by construction.

Intervals come from a bootstrap of two levels: models with replacement, then rows within each. Perturbations are never
resampled. p values are two-sided, from the same draws, and Holm-corrected over methods where a claim rests on several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.experiments.iq_judges import OWN_FILL, RBP_SAME, Judges, by, check_judges
from mechinterp.explain.bounds import Check, bounded
from mechinterp.explain.inject import GATE, Injected, Scale, injected
from mechinterp.explain.question import ElementExplainer, Question
from mechinterp.explain.rbp import NOISE, PERTURBATIONS, STRENGTH, rbp, shares
from mechinterp.explain.shake import shaken
from mechinterp.metrics.iq import IQScores, iq, permutation_floor
from mechinterp.metrics.iq.ask import Bench, perturbed, staged
from mechinterp.metrics.iq.measure import seed_of
from mechinterp.metrics.statistics import holm, percentile_interval

__all__ = [
    "BOUNDS",
    "PLAIN",
    "RBP",
    "RBP10",
    "RBP_SHARES",
    "SHARES",
    "TREATMENTS",
    "Arm",
    "Difference",
    "Key",
    "Study",
    "Trial",
    "arms",
    "corrected",
    "shuffled",
    "trial",
]

PLAIN, RBP, RBP_SHARES, RBP10 = "plain", "RBP", "RBP on shares", "RBP on shares, lambda 10"
SHARES, BOUNDS, CHECK = "shares only", "bounds", "check alone"
TREATMENTS = (RBP, RBP_SAME, SHARES, RBP_SHARES, RBP10, BOUNDS, CHECK)
SCORES = ("R", "R_zero", "F_dist", "F_corr", "IS_p2", "IS_zero_p2", "R_null", "R_excess", "coverage")
JUDGED_SCORES = ("F_dist", "F_corr", "IS_p2", "IS_zero_p2", "R_null", "R_excess")
Key = tuple[str, str, str]
"""Condition, explainer, treatment."""
Interval = tuple[float, float]
Injection = Callable[[Question], Injected]
DRAWS_OF_BOOTSTRAP = 2000


@dataclass(frozen=True)
class Arm:
    """An explainer under a treatment (plain, RBP, bounds or another)."""

    explainer: str
    treatment: str
    explain: ElementExplainer


class _Once:
    """One call of an explainer for x and RBP's perturbed copies, which all treatments of a question share."""

    def __init__(self, explain: ElementExplainer, shake: bool, tolerance: float):
        self.explain, self.copies, self.tolerance = explain, 1 + PERTURBATIONS if shake else 1, tolerance
        self.last: tuple[Question, Tensor, Tensor] | None = None

    def __call__(
        self, question: Question, generator: torch.Generator
    ) -> tuple[Float[Tensor, "row copy element"], Bool[Tensor, "row draw"]]:
        """Attributions at x and its copies, and which copies left the output within the tolerance."""
        if self.last is None or self.last[0] is not question:
            near = question if self.copies == 1 else shaken(question, PERTURBATIONS, NOISE, generator)
            found = self.explain(near, generator).detach().view(len(question), self.copies, question.count)
            y = near.score().view(len(question), self.copies)
            self.last = (question, found, (y[:, 1:] - y[:, :1]).abs() <= self.tolerance)
        return self.last[1:]


def arms(
    explainers: Mapping[str, ElementExplainer],
    treatments: Sequence[str],
    check: Check | None = None,
    sd: float = float("inf"),
) -> list[Arm]:
    """Every explainer under every treatment; `bounds` and `check alone` need a check.

    Treatments see the same explanation of x; `check alone` sees none, so it is the same for every explainer. `RBP_SAME`
    leaves out perturbations that move the output by more than GATE times `sd`, the output's standard deviation; the
    other forms of RBP use all three.
    """
    found = []
    for name, explain in explainers.items():
        once = _Once(explain, bool({RBP, RBP_SAME, RBP_SHARES, RBP10} & set(treatments)), GATE * sd)
        for treatment in treatments:
            found.append(Arm(name, treatment, partial(_treated, once, treatment, check)))
    return found


def _treated(
    once: _Once, treatment: str, check: Check | None, question: Question, generator: torch.Generator
) -> Float[Tensor, "row element"]:
    seen, same = once(question, generator)
    a, around = seen[:, 0], seen[:, 1:]
    if treatment == PLAIN:
        return a
    if treatment == SHARES:
        return shares(a)
    if treatment in (BOUNDS, CHECK) and check is not None:
        effect, error = check(question)
        return effect if treatment == CHECK else bounded(a, effect, error)
    strength, kept = 10.0 if treatment == RBP10 else STRENGTH, same if treatment == RBP_SAME else None
    return rbp(a, around, strength, kept, as_written=treatment in (RBP, RBP_SAME))


def shuffled(near: Question, slots: tuple[int, ...], psi: float, scale: Scale, seed: int) -> Injected:
    """Control: the injected values of other rows and copies. Their size is the same, but they follow nothing."""
    follows = injected(near, slots, psi, scale, seed).question
    order = torch.randperm(len(near), generator=torch.Generator().manual_seed(seed))
    values = []
    for part, now, then in zip(near.parts, near.values, follows.values, strict=True):
        chosen = torch.zeros(1, near.count, dtype=now.dtype)
        chosen[:, list(slots)] = 1
        values.append(torch.where(part.spread(chosen, rest=0.0) > 0, then[order], now))
    changed = near.at(tuple(values))
    return Injected(changed, changed.score() - near.score(), scale.sd)


@dataclass(frozen=True)
class Trial:
    """Scores of one model and condition: `columns[explainer, treatment][score]` and `kept`, both by row.

    `judges` names the references F was judged by, the first of which has the scores without a name.
    """

    condition: str
    columns: dict[tuple[str, str], dict[str, Float[np.ndarray, " row"]]]
    kept: Bool[np.ndarray, " row"]
    judges: tuple[str, ...] = ()


def trial(
    condition: str,
    question: Question,
    wanted: Sequence[Arm],
    judges: Judges,
    inject: Injection | None = None,
    slots: tuple[int, ...] = (),
    draws: int = 30,
    noise: float = 0.05,
    seed: int = 0,
    own_fill: bool = True,
) -> Trial:
    """Measure every arm on the rows of `question` under one condition.

    Args:
        judges: the same rows with other references, for F (see `stage`).
        inject: sets the spurious element, in all copies; None leaves them as they are.
        slots: its elements, whose share of sum|a| is the score "slot".
        draws, noise, seed: of the perturbation.
        own_fill: also score by the explainers' own reference, to be held beside.

    Raises UsageError for a judge that is not held out (see `check_judges`).
    """
    check_judges(question, judges)
    near = perturbed(question, draws, noise, seed)
    kept = np.ones(len(question), bool)
    if inject is not None:
        changed = inject(near)
        near, kept = changed.question, changed.kept.numpy().reshape(len(question), -1)[:, 0]
    benches = {name: staged(near, len(question), judge) for name, judge in judges.items()}
    if own_fill:
        benches[OWN_FILL] = staged(near, len(question))
    columns = {}
    for arm in wanted:
        columns[arm.explainer, arm.treatment] = score(benches, arm.explain, slots, seed_of(arm.explainer, seed))
    return Trial(condition, columns, kept, tuple(judges))


def score(
    benches: Mapping[str, Bench], explain: ElementExplainer, slots: tuple[int, ...], seed: int
) -> dict[str, np.ndarray]:
    """IQ of one explainer by row, R by shuffling, and the share of the attribution on the slots.

    The first bench gives all scores; of the others those that depend on the reference are kept, under `by(score,
    bench)`.
    """
    bench, *others = benches.values()
    attributions, _ = bench.explain(explain, seed)
    measured = bench.measurement(attributions)
    found: IQScores = iq(measured)
    columns = {name: found.columns[name] for name in SCORES}
    for name, other in zip(list(benches)[1:], others, strict=True):
        again = iq(other.measurement(attributions)).columns
        columns |= {by(score, name): again[score] for score in JUDGED_SCORES}
    floor = permutation_floor(measured, shuffles=10, seed=seed)
    defined = np.isfinite(floor).all(0)
    columns["R_floor"] = np.where(defined, np.where(np.isfinite(floor), floor, 0.0).mean(0), np.nan)
    if slots:
        size = np.abs(attributions[:, 0])
        total = size.sum(1)
        columns["slot"] = np.divide(
            size[:, list(slots)].sum(1), total, out=np.full(len(total), np.nan), where=total > 0
        )
    return columns


@dataclass(frozen=True)
class Difference:
    """A paired mean difference over rows, its two-level interval and p, the rows, and the sd of models' own means."""

    value: float
    ci95: Interval
    p: float
    n: int
    between: float

    def __str__(self) -> str:
        if not np.isfinite(self.value):
            return "undefined"
        return f"{self.value:+.3f} [{self.ci95[0]:+.3f}, {self.ci95[1]:+.3f}]"


NOTHING = Difference(float("nan"), (float("nan"), float("nan")), float("nan"), 0, float("nan"))


@dataclass
class Study:
    """All trials of each condition: the rows of its models one after another.

    Conditions may be compared where they were measured on the same models and rows.
    """

    trials: dict[str, list[Trial]] = field(default_factory=dict)
    _weights: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict)

    def add(self, found: Trial) -> None:
        """Take in one model's trial of a condition; all conditions get the models in the same order."""
        self.trials.setdefault(found.condition, []).append(found)

    def group(self, condition: str) -> Int[np.ndarray, " row"]:
        """The model of every row."""
        sizes = [len(t.kept) for t in self.trials[condition]]
        return np.repeat(np.arange(len(sizes)), sizes)

    def weights(self, condition: str) -> Float[np.ndarray, "draw row"]:
        """How often each bootstrap draw takes each row; the same for conditions on the same rows."""
        sizes = tuple(len(t.kept) for t in self.trials[condition])
        if sizes not in self._weights:
            self._weights[sizes] = two_level(self.group(condition))
        return self._weights[sizes]

    def kept(self, condition: str) -> Bool[np.ndarray, " row"]:
        """Rows that pass the gate under the condition."""
        return np.concatenate([t.kept for t in self.trials[condition]])

    def values(self, key: Key, column: str) -> Float[np.ndarray, " row"]:
        """A score of every row, gated rows nan."""
        condition, explainer, treatment = key
        found = np.concatenate([t.columns[explainer, treatment][column] for t in self.trials[condition]])
        return np.where(self.kept(condition), found, np.nan)

    def mean(self, key: Key, column: str) -> float:
        """Mean over kept rows where the score is defined; nan without any."""
        values = self.values(key, column)
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")

    def change(self, after: Key, before: Key, column: str) -> Difference:
        """`after - before`, paired over the rows that both keep and define."""
        return self.contrast(self.values(after, column) - self.values(before, column), after[0])

    def pooled(self, condition: str, after: str, before: str, names: Sequence[str], column: str) -> Difference:
        """Treatment `after` minus `before`, first averaged over explainers within each row."""
        each = [self.values((condition, n, after), column) - self.values((condition, n, before), column) for n in names]
        defined = np.isfinite(each)
        count = defined.sum(0)
        mean = np.divide(np.where(defined, each, 0.0).sum(0), count, out=np.full(len(count), np.nan), where=count > 0)
        return self.contrast(mean, condition)

    def contrast(self, change: Float[np.ndarray, " row"], condition: str) -> Difference:
        """Mean of differences by row, nan where not kept, with its interval and p."""
        use = np.isfinite(change)
        if use.sum() < 5:
            return NOTHING
        filled = np.where(use, change, 0.0)
        weights, group = self.weights(condition), self.group(condition)
        mass = weights @ use
        draws = np.divide(weights @ filled, mass, out=np.full(len(mass), np.nan), where=mass > 0)
        means = [change[use & (group == g)].mean() for g in np.unique(group[use])]
        between = float(np.std(means, ddof=1)) if len(means) > 1 else float("nan")
        return Difference(
            float(change[use].mean()), percentile_interval(draws), two_sided(draws), int(use.sum()), between
        )


def two_level(
    group: Int[np.ndarray, " row"], draws: int = DRAWS_OF_BOOTSTRAP, seed: int = 0
) -> Float[np.ndarray, "draw row"]:
    """Weights of a bootstrap that draws groups with replacement, then rows of each drawn group with replacement."""
    rng = np.random.default_rng(seed)
    names, size = np.unique(group, return_counts=True)
    copies = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    weights = np.zeros((draws, len(group)))
    for i, name in enumerate(names):
        rows = np.flatnonzero(group == name)
        weights[:, rows] = rng.multinomial(copies[:, i] * size[i], np.full(size[i], 1 / size[i]))
    return weights


def two_sided(draws: Float[np.ndarray, " draw"]) -> float:
    """Two-sided bootstrap p of no difference: twice the smaller share of draws beyond 0, never 0."""
    known = draws[np.isfinite(draws)]
    if len(known) == 0:
        return float("nan")
    smaller = min(np.count_nonzero(known <= 0), np.count_nonzero(known >= 0))
    return float(min(1.0, 2 * (smaller + 1) / (len(known) + 1)))


def corrected(differences: Mapping[str, Difference]) -> dict[str, float]:
    """Holm-adjusted p of each."""
    return dict(zip(differences, holm(np.array([d.p for d in differences.values()])).tolist(), strict=True))
