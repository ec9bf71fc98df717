"""What the score loses when features are removed, against matched random features; and what the errors lose.

The causal effect of a feature set is a difference of differences. With push(i) = score(i) - score(i, set ablated),
in sd of the score,

    effect = mean of push over images with the attribute - mean over images without it, within target strata:

how much the features raise the score of images that have the attribute, over images that do not, at the same truth.
What the set does to every image alike is no shortcut and cancels. Positive: the attribute pushes the score up.

The null is the same number for matched random sets (same size; each member matched in firing rate and in decoder norm
x activation). There the effect of a set is the sum of its members' single ablations, for the set on trial and for the
random ones alike, so that a thousand sets cost nothing. Features that stand in for one another do little one by one
and much together, so a set whose removal moves the score by more than `effect_line` is compared with random sets that
are removed together, in the model; that comparison then decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from mechinterp.audit.settings import Settings
from mechinterp.errors import UsageError
from mechinterp.interventions import Activity, effects, matched_random_sets, set_effects
from mechinterp.interventions.edits import Tokens
from mechinterp.metrics.statistics import (
    Interval,
    PatientBootstrap,
    auroc,
    difference_weights,
    percentile_interval,
    permutation_p,
    smallest_detectable_effect,
    stratified_mean_difference,
)
from mechinterp.models import HookedVLM
from mechinterp.types import ImageTextBatch, Placed, Target

__all__ = ["Causal", "Harm", "Trial", "causal_effect", "harm", "joint_p", "stage"]

JOINT_IMAGES = 48  # on which some hundred sets are removed together


@dataclass(frozen=True, eq=False)
class Trial:
    """The test images on which features are removed, and the push of every live feature on each of them.

    Fields (n images, f swept features): `position` is the place of each image among all images of the evidence;
    `push[f, n]` is score(clean) - score(feature ablated) in sd of the score.
    """

    model: HookedVLM
    placed: Placed
    tokens: Tokens
    target: Target
    batch: ImageTextBatch
    position: Int[np.ndarray, " n"]
    score: Float[np.ndarray, " n"]
    labels: Float[np.ndarray, " n"]
    sd: float
    features: tuple[int, ...]
    push: Float[np.ndarray, "f n"]
    bootstrap: PatientBootstrap

    def of(self, feature: int) -> Float[np.ndarray, " n"]:
        """Push of one feature on every image."""
        return self.push[self.features.index(feature)]

    def remove(
        self, sets: Sequence[Sequence[int]], rows: Int[np.ndarray, " m"] | None = None
    ) -> Float[np.ndarray, "set m"]:
        """Push of whole sets, removed together in the model, on some of the images (all by default)."""
        batch = self.batch if rows is None else self.batch[torch.from_numpy(rows)]
        change = set_effects(self.model, self.placed, batch, [self.target], sets, tokens=self.tokens)
        return -change[:, :, 0].double().cpu().numpy() / self.sd


@dataclass(frozen=True)
class Causal:
    """Effect of one feature set in sd of the score, its interval, its null, and the power that there was.

    `effect_with` is the plain mean push over images with the attribute.
    """

    effect: float
    ci95: Interval
    effect_with: float
    p: float
    null_band: Interval
    null_sets: int
    detectable_effect: float
    push: Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Harm:
    """AUROC where the attribute agrees with the target minus AUROC where it contradicts it, and what ablation mends.

    Fields: `gap` before, `gap_after` ablation, `recovered` = gap - gap_after, all signed so that a gap in the direction
    of the causal effect is positive. AUROC saturates: a partial removal can take most of an effect away and yet close
    little of a large gap, so `gap` is the harm and `recovered` a supplement.
    """

    aligned: float
    conflicting: float
    gap: float
    gap_ci95: Interval
    gap_after: float
    recovered: float
    recovered_ci95: Interval


def stage(
    model: HookedVLM,
    placed: Placed,
    tokens: Tokens,
    target: Target,
    batch: ImageTextBatch,
    position: Int[np.ndarray, " n"],
    labels: Float[np.ndarray, " n"],
    patients: np.ndarray,
    sd: float,
    features: Sequence[int],
    bootstrap: PatientBootstrap,
) -> Trial:
    """Sweep the single effects of `features` over the test images."""
    swept = effects(model, placed, batch, [target], features, tokens=tokens)
    push = -swept.dense()[:, :, 0].double().cpu().numpy() / sd
    score = swept.clean[:, 0].double().cpu().numpy()
    return Trial(
        model, placed, tokens, target, batch, position, score, labels, sd, tuple(swept.features), push, bootstrap
    )


def causal_effect(
    trial: Trial,
    features: Sequence[int],
    push: Float[np.ndarray, " n"],
    values: Float[np.ndarray, " n"],
    activity: Activity,
    settings: Settings,
    seed: int,
) -> Causal:
    """Effect of removing `features` together; `push` is `trial.remove([features])[0]`.

    `values` is the attribute on the trial's images; those where it is nan are left out.
    """
    known = np.isfinite(values)
    attribute, labels = values[known], trial.labels[known]
    effect = float(stratified_mean_difference(push[known], attribute, labels)[0])
    draws = stratified_mean_difference(push[known], attribute, labels, trial.bootstrap.weights[:, known])
    single = trial.push[:, known] @ difference_weights(attribute, labels)
    place = {feature: i for i, feature in enumerate(trial.features)}
    sets = _matched(activity, features, settings.random_sets, seed, place)
    null = np.array([single[[place[f] for f in members]].sum() for members in sets])
    observed = float(single[[place[f] for f in features]].sum())
    band = percentile_interval(null) if len(null) else (float("nan"), float("nan"))
    return Causal(
        effect=effect,
        ci95=percentile_interval(draws),
        effect_with=float(push[known][attribute == 1].mean()),
        p=permutation_p(abs(observed), np.abs(null)),
        null_band=band,
        null_sets=len(null),
        detectable_effect=smallest_detectable_effect(float(np.nanstd(draws))),
        push=push,
    )


def joint_p(
    trial: Trial,
    causal: Causal,
    features: Sequence[int],
    values: Float[np.ndarray, " n"],
    activity: Activity,
    wanted: int,
    seed: int,
) -> float:
    """p of the effect against `wanted` matched random sets removed together in the model, on the same images."""
    known = np.flatnonzero(np.isfinite(values))
    rows = np.sort(np.random.default_rng(seed).permutation(known)[:JOINT_IMAGES])
    place = {feature: i for i, feature in enumerate(trial.features)}
    sets = _matched(activity, features, wanted, seed + 1, place)
    if not sets:
        return float("nan")
    weights = difference_weights(values[rows], trial.labels[rows])
    null = trial.remove(sets, rows) @ weights
    return permutation_p(abs(float(causal.push[rows] @ weights)), np.abs(null))


def harm(trial: Trial, causal: Causal, values: Float[np.ndarray, " n"]) -> Harm:
    """Stratified AUROC before and after the features of `causal` are removed.

    Aligned pairs are positives with the attribute against negatives without it (for a negative effect: the other way
    round); conflicting pairs are the rest. A model that leans on the attribute is better on aligned pairs.
    """
    known = np.isfinite(values)
    agrees = (values > 0.5) == (trial.labels > 0.5)
    if causal.effect < 0:
        agrees = ~agrees
    after = trial.score - causal.push * trial.sd
    drawn, point = {}, {}
    for when, score in (("before", trial.score), ("after", after)):
        for name, rows in (("aligned", known & agrees), ("conflicting", known & ~agrees)):
            drawn[when, name] = trial.bootstrap.auroc(score, trial.labels, rows)
            point[when, name] = auroc(score[rows], trial.labels[rows])
    gap = point["before", "aligned"] - point["before", "conflicting"]
    gap_after = point["after", "aligned"] - point["after", "conflicting"]
    gap_draws = drawn["before", "aligned"] - drawn["before", "conflicting"]
    after_draws = drawn["after", "aligned"] - drawn["after", "conflicting"]
    return Harm(
        aligned=point["before", "aligned"],
        conflicting=point["before", "conflicting"],
        gap=gap,
        gap_ci95=percentile_interval(gap_draws),
        gap_after=gap_after,
        recovered=gap - gap_after,
        recovered_ci95=percentile_interval(gap_draws - after_draws),
    )


def _matched(
    activity: Activity, features: Sequence[int], wanted: int, seed: int, swept: dict[int, int]
) -> list[tuple[int, ...]]:
    """As many distinct matched sets as the dictionary allows, up to `wanted`; none when it is too small for 100."""
    unswept = [f for f in range(len(activity.frequency)) if f not in swept]
    for n in (wanted, wanted // 2, wanted // 4, 100):
        try:
            return matched_random_sets(activity, features, n=n, seed=seed, exclude=unswept)
        except UsageError:
            continue
    return []
