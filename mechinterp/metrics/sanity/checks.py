"""The checks: each compares maps of the model with maps of something else, and says pass, fail or not tested."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float

from mechinterp.errors import UsageError
from mechinterp.explain.question import ElementExplainer, Question
from mechinterp.metrics.sanity.randomise import randomising, stages
from mechinterp.metrics.sanity.similarity import SIMILARITIES
from mechinterp.metrics.scored import Scored, numpy_of
from mechinterp.metrics.statistics import Interval
from mechinterp.models import HookedVLM
from mechinterp.types import Target

__all__ = [
    "Check",
    "Maps",
    "baseline",
    "judge",
    "label_randomisation",
    "overall",
    "prompt_randomisation",
    "reproducibility",
    "weight_randomisation",
]

PAIRS = 50  # Arun et al. 2021
LEAST = 5  # patients
DEFAULT = ("spearman", "spearman_abs", "ssim", "hog")
Passes = Literal["below", "above"]


@dataclass(frozen=True)
class Maps:
    """How the maps of a model are made.

    Args:
        ask: the question about the images, for any model and target; made anew for each, as a question may hold what a
            model computed before its weights changed.
        explain: the explainer.
        target: what is explained.
        patients: of the images.
        seed: of the explainer. It is the same for every model: maps that differ only by sampling noise would look as if
            they followed the weights, and a map of pure noise would pass.
    """

    ask: Callable[[HookedVLM, Target], Question]
    explain: ElementExplainer
    target: Target
    patients: tuple[str, ...]
    seed: int = 0

    def of(self, model: HookedVLM, target: Target | None = None) -> Float[np.ndarray, "row height width"]:
        """The maps on their grid; words and columns are one row of it. Raises UsageError for a wrong number of them."""
        question = self.ask(model, target or self.target)
        found = numpy_of(self.explain(question, torch.Generator().manual_seed(self.seed)))
        if len(found) != len(self.patients):
            raise UsageError(f"{len(self.patients)} patients for {len(found)} images", where="patients")
        return found.reshape(len(found), *(question.shape or (1, question.count)))


@dataclass(frozen=True)
class Check:
    """The outcome of a check under one similarity.

    Args:
        test: such as "weights, cascade".
        similarity: key of `SIMILARITIES`.
        value: mean similarity over the images that have one.
        ci95: by patient bootstrap.
        baseline: mean similarity of maps of different patients: what merely looking like a map is worth.
        verdict: "pass" or "fail" where the interval lies on one side of the baseline, else "not tested".
        n: images with a value.
        reason: in words.
        stages: mean similarity after each stage of a randomisation.
    """

    test: str
    similarity: str
    value: float
    ci95: Interval
    baseline: float
    verdict: Literal["pass", "fail", "not tested"]
    n: int
    reason: str
    stages: tuple[tuple[str, float], ...] = ()


def baseline(
    maps: Float[np.ndarray, "row height width"],
    patients: Sequence[str],
    similarity: str,
    pairs: int | None = PAIRS,
    seed: int = 0,
) -> float:
    """Mean similarity of random pairs of maps of different patients (Arun et al. 2021); nan with one patient.

    `pairs`: how many are drawn; None takes every pair once, so that nothing depends on the seed. The mean of 50 drawn
    ones is itself uncertain, and `judge` takes it as exact.
    """
    names = np.asarray(patients)
    left, right = np.nonzero(names[:, None] != names[None, :])
    if not len(left):
        return float("nan")
    rng = np.random.default_rng(seed)
    drawn = np.flatnonzero(left < right) if pairs is None else rng.integers(len(left), size=pairs)
    found = SIMILARITIES[similarity](maps[left[drawn]], maps[right[drawn]])
    return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")


def judge(
    test: str,
    similarity: str,
    values: Float[np.ndarray, " row"],
    against: float,
    patients: Sequence[str],
    passes: Passes,
    after: Sequence[tuple[str, float]] = (),
) -> Check:
    """Compare the mean of `values` with the baseline `against`; where the interval holds it, nothing is decided."""
    scored = Scored.of(values, {})
    kept = {p for p, v in zip(patients, values, strict=True) if np.isfinite(v)}
    ci = scored.interval(patients)
    n = int(np.isfinite(values).sum())
    verdict: Literal["pass", "fail", "not tested"] = "not tested"
    if n < 0.5 * len(values):
        reason = f"only {n} of {len(values)} images have two maps that are not constant"
    elif len(kept) < LEAST:
        reason = f"{len(kept)} patients; needs {LEAST}"
    elif not np.isfinite([against, *ci]).all():
        reason = "no baseline: too few maps that are not constant"
    elif ci[0] <= against <= ci[1]:
        reason = f"the interval holds the baseline of {against:.2f}"
    else:
        below = ci[1] < against
        verdict = "pass" if below == (passes == "below") else "fail"
        reason = f"{scored.mean:.2f} is {'below' if below else 'above'} the {against:.2f} of maps of other patients"
    return Check(test, similarity, scored.mean, ci, against, verdict, n, reason, tuple(after))


def overall(checks: Sequence[Check], similarities: Sequence[str] = ("spearman", "ssim")) -> Check:
    """One of several similarities' outcomes of one test: the first that fails, else the first that decided nothing.

    Only if all of `similarities` pass is the answer a pass. Raises UsageError when one of them was not computed.
    """
    by_name = {check.similarity: check for check in checks}
    missing = [name for name in similarities if name not in by_name]
    if missing or len({check.test for check in checks}) != 1:
        raise UsageError(f"needs {', '.join(similarities)} of one test", where="overall")
    order = {"fail": 0, "not tested": 1, "pass": 2}
    return min((by_name[name] for name in similarities), key=lambda check: order[check.verdict])


def weight_randomisation(
    maps: Maps,
    model: HookedVLM,
    tower: str = "vision",
    cascade: bool = True,
    similarities: Sequence[str] = DEFAULT,
    seed: int = 0,
    end_only: bool = False,
) -> list[Check]:
    """Randomise the tower from its head down (cumulative), or one stage at a time; the map must change.

    The cascade is judged once all of the tower is random; with `end_only` the maps in between are not made. One stage
    at a time is judged by the mean over the stages, and failing it alone says little where the model hardly uses a
    stage. The model is restored bit for bit, also on error.

    Raises UsageError for a tower that the model lacks.
    """
    trained = maps.of(model)
    found: dict[str, list[np.ndarray]] = {name: [] for name in similarities}
    names = []
    with randomising(model, seed) as weights:
        steps = stages(model, tower)
        for stage in steps:
            if not cascade:
                weights.restore()
            weights.randomise(stage)
            if end_only and cascade and stage is not steps[-1]:
                continue
            changed = maps.of(model)
            names.append(stage.name)
            for name in similarities:
                found[name].append(SIMILARITIES[name](trained, changed))
    test = f"{tower} weights, {'cascade' if cascade else 'one at a time'}"
    checks = []
    for name, values in found.items():
        after = [(stage, Scored.of(v, {}).mean) for stage, v in zip(names, values, strict=True)]
        value = values[-1] if cascade else _over_stages(np.stack(values))
        against = baseline(trained, maps.patients, name)
        checks.append(judge(test, name, value, against, maps.patients, "below", after))
    return checks


def label_randomisation(
    maps: Maps, model: HookedVLM, permuted: HookedVLM, similarities: Sequence[str] = DEFAULT
) -> list[Check]:
    """Maps of the model against those of one trained on permuted labels: they must differ (Adebayo et al. 2018)."""
    return _against(maps, model, maps.of(permuted), "labels permuted", "below", similarities)


def reproducibility(
    maps: Maps, model: HookedVLM, other: HookedVLM, test: str = "repeatability", similarities: Sequence[str] = DEFAULT
) -> list[Check]:
    """Maps of two models trained for the same: more alike than maps of different patients (Arun et al. 2021).

    `test`: "repeatability" for the same architecture trained again, "reproducibility" for another one. Maps on another
    grid are brought to the grid of `model`. A failure may be the models' as well as the explainer's: two models of
    equal skill can look at different things.
    """
    return _against(maps, model, maps.of(other), test, "above", similarities)


def prompt_randomisation(
    maps: Maps,
    model: HookedVLM,
    others: Sequence[Target],
    test: str = "prompt, nonsense",
    similarities: Sequence[str] = DEFAULT,
) -> list[Check]:
    """Maps for the target against maps for other prompts, such as `nonsense` ones or those of other findings.

    The similarities of one image with all `others` are averaged. A map that is the same for nonsense does not show what
    the model reads for the target.

    Raises UsageError without other prompts.
    """
    if not others:
        raise UsageError("no other prompt", where="others", hint="nonsense(model, target), or another finding")
    trained = maps.of(model)
    changed = [maps.of(model, target) for target in others]
    checks = []
    for name in similarities:
        values = _over_stages(np.stack([SIMILARITIES[name](trained, c) for c in changed]))
        against = baseline(trained, maps.patients, name)
        checks.append(judge(test, name, values, against, maps.patients, "below"))
    return checks


def _against(
    maps: Maps, model: HookedVLM, other: np.ndarray, test: str, passes: Passes, similarities: Sequence[str]
) -> list[Check]:
    mine = maps.of(model)
    if other.shape != mine.shape:
        from scipy.ndimage import zoom

        scale = (1, mine.shape[1] / other.shape[1], mine.shape[2] / other.shape[2])
        other = np.asarray(zoom(other, scale, order=1, grid_mode=True, mode="nearest"))
    checks = []
    for name in similarities:
        values = SIMILARITIES[name](mine, other)
        checks.append(judge(test, name, values, baseline(mine, maps.patients, name), maps.patients, passes))
    return checks


def _over_stages(values: Float[np.ndarray, "stage row"]) -> Float[np.ndarray, " row"]:
    """Mean of what is defined."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(0)
    return np.divide(total, known.sum(0), out=np.full(values.shape[1], np.nan), where=known.any(0))
