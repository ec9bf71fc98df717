"""Cards of the features that the report speaks of: name, how well the name fits, where they fire, on which images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from mechinterp.audit.candidates import Candidate
from mechinterp.audit.causal import Trial
from mechinterp.audit.drivers import Place, place_of
from mechinterp.audit.evidence import BATCH, Evidence, activations, prepare
from mechinterp.audit.features import Selectivity
from mechinterp.data import ImageData
from mechinterp.metrics.statistics import auroc
from mechinterp.types import FeatureId

__all__ = ["Example", "Heat", "feature_row", "heat_maps"]

EXAMPLES = 4
NAMED = 0.6  # AUROC on test patients below which a name says too little: the feature is then "unnamed"
UNNAMED = "unnamed"
SHUFFLES = 50


@dataclass(frozen=True)
class Example:
    """One image in a feature's gallery: its row in the data folder, and the activation of each patch."""

    row: int
    heat: Float[np.ndarray, "rows columns"]


@dataclass(frozen=True)
class Heat:
    """The images that a feature fires for most (at most one a patient), and where it fires on average."""

    examples: tuple[Example, ...]
    mean: Float[np.ndarray, "rows columns"]
    place: Place


def heat_maps(trial: Trial, data: ImageData, evidence: Evidence, features: Sequence[int]) -> dict[int, Heat]:
    """Galleries of several features from the trial's test images, in one pass over the images they need."""
    tops = {feature: _top(evidence, trial, feature) for feature in features}
    needed = sorted({int(i) for images in tops.values() for i in images})
    if not needed:
        return {
            feature: Heat((), np.zeros(trial.model.grid_shape), place_of(np.zeros((1, 1)), 0.0)) for feature in tops
        }
    at = {image: k for k, image in enumerate(needed)}
    columns = list(features)
    parts = []
    for start in range(0, len(needed), BATCH):
        rows = evidence.rows[needed[start : start + BATCH]]
        batch = prepare(trial.model, data, rows, trial.target)
        acts, _ = activations(trial.model, trial.placed, trial.tokens, batch, [trial.target])
        parts.append(acts[:, :, columns].cpu().numpy())
    acts = np.concatenate(parts)
    rows, cols = trial.model.grid_shape
    patches = (
        acts[:, trial.model.patch_tokens()]
        if acts.shape[1] >= rows * cols
        else np.zeros((len(acts), rows * cols, len(columns)))
    )
    heats = {}
    for k, feature in enumerate(columns):
        mine = [at[int(i)] for i in tops[feature]]
        maps = patches[mine, :, k].reshape(len(mine), rows, cols)
        mean = maps.mean(0) if len(mine) else np.zeros((rows, cols))
        elsewhere = float(acts[mine, :, k].sum() / max(len(mine), 1) - mean.sum())
        examples = tuple(Example(int(evidence.rows[i]), m) for i, m in zip(tops[feature], maps, strict=True))
        heats[feature] = Heat(examples[:EXAMPLES], mean, place_of(mean, max(elsewhere, 0.0)))
    return heats


def _top(evidence: Evidence, trial: Trial, feature: int, patients: int = 12) -> list[int]:
    """The test images that the feature fires for most, one for each patient, as positions in the evidence."""
    seen: set[str] = set()
    found = []
    strength = evidence.strongest[trial.position, feature]
    for i in np.argsort(-strength, kind="stable"):
        image = int(trial.position[i])
        if strength[i] <= 0 or len(found) == patients:
            break
        if str(evidence.patients[image]) not in seen:
            seen.add(str(evidence.patients[image]))
            found.append(image)
    return found


def feature_row(
    feature: int,
    trial: Trial,
    evidence: Evidence,
    selectivity: Selectivity,
    candidates: Sequence[Candidate],
    place: Place,
    seed: int,
) -> dict[str, Any]:
    """The row of audit.json of one feature; `name_score` and `f1` are on test patients.

    The name is the attribute that explains the feature best on train and val patients, or "unnamed" where that does not
    hold on test patients; `best_attribute` and its scores are given in either case.

    f1 is of the rule "fires more than a threshold", the threshold chosen on train and val patients; f1_null is the mean
    of the same with the attribute's labels shuffled, threshold chosen again. seed_stability is the share of other
    seeds' dictionaries in which the feature comes back, None where the dictionary does not say.
    """
    from saes.stability import seed_stability

    name, _ = selectivity.best(feature)
    a = selectivity.names.index(name)
    values = candidates[a].values if a < len(candidates) else evidence.labels
    signal = (evidence.average if selectivity.by_mean[a, feature] else evidence.strongest)[:, feature]
    known = np.isfinite(values)
    sign = 1 if selectivity.deviation[a, feature] >= 0 else -1
    fit, held = known & ~evidence.test, known & evidence.test
    rng = np.random.default_rng([seed, feature])
    comes_back = seed_stability(trial.placed.dictionary)
    null = [_f1_of(sign * signal, rng.permutation(values), fit, held) for _ in range(SHUFFLES)] if known.all() else []
    area = auroc(sign * signal[held], values[held]) if held.any() else float("nan")
    return {
        "id": str(FeatureId(trial.placed.writes, feature)),
        "site": str(trial.placed.writes),
        "name": UNNAMED if not area >= NAMED else name if sign > 0 else f"not {name}",
        "name_score": area,
        "frequency": float(evidence.activity.frequency[feature]),
        "seed_stability": None if comes_back is None else float(comes_back[feature]),
        "best_attribute": name,
        "f1": _f1_of(sign * signal, values, fit, held),
        "f1_null": float(np.mean(null)) if null else None,
        "push": float(trial.of(feature).mean()) if feature in trial.features else None,
        "place": place.words,
    }


def _f1_of(signal: np.ndarray, values: np.ndarray, fit: np.ndarray, held: np.ndarray) -> float:
    """F1 on `held` of the threshold that is best on `fit`."""
    if not fit.any() or not held.any():
        return float("nan")
    levels = np.unique(np.quantile(signal[fit], np.linspace(0, 0.98, 25)))
    truth, above = values[fit] > 0.5, signal[fit][None] > levels[:, None]
    hits = (above & truth).sum(1)
    best = levels[int((2 * hits / np.maximum(above.sum(1) + truth.sum(), 1)).argmax())]
    said, true = signal[held] > best, values[held] > 0.5
    return float(2 * (said & true).sum() / max(said.sum() + true.sum(), 1))
