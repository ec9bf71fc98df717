"""A dictionary beside what has learnt nothing: every score as value, null, and difference with an interval.

    card = scorecard(placed, store, labels)
    print(card)

One number alone says little: untrained dictionaries reach most of many published scores. So each score of the
dictionary stands beside that of its untrained twin, random directions, raw neurons, PCA, ICA, permuted labels, and a
linear probe as upper bound, on the same test patients, and the difference carries a 95 % interval of a bootstrap over
patients (paired: the same draws on both sides).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Num

from mechinterp.activations import ActivationStore
from mechinterp.errors import UsageError
from mechinterp.metrics.statistics import percentile_interval
from mechinterp.progress import progress
from mechinterp.types import Placed
from saes.metrics.alignment import feature_tests
from saes.metrics.arms import Measured, Task, measure, measure_monosemanticity
from saes.metrics.images import image_activations, image_errors, image_table
from saes.metrics.matching import Match, tapa_score
from saes.metrics.pairs import RenderedPairs
from saes.nulls.directions import DEFAULT, NullName, dictionary_nulls
from saes.nulls.labels import permuted_labels
from saes.nulls.probe import probe_bound, probe_inputs

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Score", "Scorecard", "scorecard"]

PROBE, PERMUTED = "linear probe", "permuted labels"
LEAST = 10
"""Positive and negative images that a concept needs in every split."""


@dataclass(frozen=True)
class Score:
    """`difference = value - null_value`, with its 95 % interval; `concept` is "mean" for the mean."""

    metric: str
    concept: str
    value: float
    null: str
    null_value: float
    difference: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Scorecard:
    """All scores of one dictionary.

    `discoveries` counts, for the dictionary and each null, the latents that go with some concept on test patients at
    a false discovery rate of 5 % over all latents and concepts, as a share of its latents.
    """

    scores: tuple[Score, ...]
    discoveries: Mapping[str, float]
    patients: int
    images: int
    notes: tuple[str, ...]

    def to_table(self, concept: str | None = "mean") -> pd.DataFrame:
        """One line a metric and null; of one concept, or of all (None)."""
        import pandas as pd

        kept = [s for s in self.scores if concept in (None, s.concept)]
        rows = [{**asdict(s), "low": s.ci95[0], "high": s.ci95[1]} for s in kept]
        return pd.DataFrame(rows).drop(columns="ci95")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; what is not a number is None."""
        scores = [
            {name: _plain(value) for name, value in asdict(s).items()} | {"ci95": [_plain(v) for v in s.ci95]}
            for s in self.scores
        ]
        return {
            "scores": scores,
            "discoveries": dict(self.discoveries),
            "patients": self.patients,
            "images": self.images,
            "notes": list(self.notes),
        }

    def find(self, metric: str, null: str, concept: str = "mean") -> Score:
        """One score. Raises UsageError when it is not on the card."""
        for score in self.scores:
            if (score.metric, score.null, score.concept) == (metric, null, concept):
                return score
        raise UsageError(f"no {metric} beside {null} for {concept}", where="scorecard")

    def __str__(self) -> str:
        lines = [f"{self.images} test images of {self.patients} patients; means over concepts; 95 % intervals", ""]
        lines.append(f"{'metric':<22}{'value':>8}  {'null':<20}{'null':>8}{'difference':>12}")
        for s in self.scores:
            if s.concept != "mean":
                continue
            interval = f"[{s.ci95[0]:+.3f}, {s.ci95[1]:+.3f}]"
            value, null = f"{s.value:>8.3f}", f"{s.null_value:>8.3f}"
            lines.append(f"{s.metric:<22}{value}  {s.null:<20}{null}{s.difference:>+12.3f}  {interval}")
        found = ", ".join(f"{name} {share:.1%}" for name, share in self.discoveries.items())
        return "\n".join([*lines, "", f"latents that go with a concept (FDR 5 %): {found}", *self.notes])


def scorecard(
    placed: Placed,
    store: ActivationStore,
    labels: Mapping[str, Num[np.ndarray, " image"]] | pd.DataFrame,
    *,
    nulls: tuple[NullName, ...] = DEFAULT,
    others: Mapping[str, tuple[Placed, ActivationStore]] | None = None,
    embeddings: Float[np.ndarray, "image e"] | None = None,
    pairs: RenderedPairs | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Scorecard:
    """Score a dictionary beside its nulls.

    Args:
        placed: the dictionary.
        store: activations of its site on train, val and test patients.
        labels: 0/1 (nan: unknown) of each concept for the images of the store, in their order (`image_table`).
        nulls: what stands beside it, of `dictionary_nulls`; permuted labels and the linear probe always do.
        others: further dictionaries with stores of the same images, such as `randomised_encoder`'s.
        embeddings: of the same images by an *external* encoder; without them monosemanticity is not tested.
        pairs: `rendered_pairs` at the dictionary's site; without them TAPAScore is not tested.
        draws: of the bootstrap.
        seed: of nulls, permutations and draws.

    Raises:
        UsageError: no concept has enough images, or lengths differ.
    """
    table = image_table(store, placed.reads)
    names, values, notes = _usable(labels, table["split"].to_numpy(str))
    task = Task.of(values, table["split"].to_numpy(str), table["patient"].to_numpy(str), draws, seed)
    arms = {"": (placed, store)} | {
        name: (p, store) for name, p in dictionary_nulls(placed, store, nulls, seed).items()
    }
    arms |= dict(others or {})
    measured: dict[str, dict[str, Measured]] = {}
    discoveries: dict[str, float] = {}
    units = {"R2": ("mean",), "MS": ("mean",), "MS corrected": ("mean",)}
    for name, (arm, its_store) in progress(arms.items(), "score", unit="dictionary"):
        acts, images, _ = image_activations(arm, its_store, None)
        if images.tolist() != table["image"].tolist():
            raise UsageError("holds other images", where=name, hint="extract the same data folder")
        found, matches = measure(acts, task)
        if name == "":
            shuffled = task.with_labels(permuted_labels(values, task.patients, task.split, seed))
            measured[PERMUTED] = measure(acts, shuffled)[0]
            discoveries[PERMUTED] = _discoveries(acts, shuffled, seed)
        if embeddings is not None:
            found |= measure_monosemanticity(acts, embeddings, task)
        if pairs is not None and its_store is store:
            found["TAPAScore"] = _tapa(arm, pairs, names, matches, draws, seed)
        if placed.reads == placed.writes:
            found["R2"] = _r2(arm, its_store, task)
        measured[name] = found
        discoveries[name or "dictionary"] = _discoveries(acts, task, seed)
    measured[PROBE] = _probe(store, placed, task)
    notes += _untested(embeddings, pairs, others)
    if placed.reads != placed.writes:
        notes.append("R2: NOT TESTED, the nulls reconstruct what the transcoder reads, not what it writes")
    scores = [
        score
        for metric in measured[""]
        for null, found in measured.items()
        if null and metric in found
        for score in _compare(metric, null, measured[""][metric], found[metric], units.get(metric, names))
    ]
    test = task.split == "test"
    return Scorecard(tuple(scores), discoveries, len(set(task.patients[test])), int(test.sum()), tuple(notes))


def _usable(labels: Any, split: np.ndarray) -> tuple[tuple[str, ...], np.ndarray, list[str]]:
    """Concepts with enough images on either side in each split; a note for each of the others."""
    kept, notes = {}, []
    for name, column in labels.items():
        y = np.asarray(column, np.float64)
        if len(y) != len(split):
            raise UsageError(f"{len(y)} labels for {len(split)} images", where=str(name))
        few = min(((y == value) & (split == part)).sum() for value in (0, 1) for part in ("train", "val", "test"))
        if few < LEAST:
            notes.append(f"{name}: NOT TESTED, a split holds {few} images of one kind, {LEAST} are needed")
        else:
            kept[str(name)] = y
    if not kept:
        raise UsageError("no concept has enough images in train, val and test", where="labels")
    return tuple(kept), np.stack(list(kept.values()), 1), notes


def _compare(metric: str, null: str, mine: Measured, other: Measured, units: tuple[str, ...]) -> list[Score]:
    """A score a unit, and their mean over the units that both sides have."""
    differences = mine.draws - other.draws
    both = np.isfinite(mine.value) & np.isfinite(other.value)
    out = []
    if units != ("mean",) and both.any():
        # a draw without any image of a concept leaves that concept out of that draw
        kept = differences[:, both]
        count = np.isfinite(kept).sum(1)
        mean = np.divide(np.nansum(kept, 1), count, out=np.full(len(kept), np.nan), where=count > 0)
        value, null_value = float(mine.value[both].mean()), float(other.value[both].mean())
        out.append(Score(metric, "mean", value, null, null_value, value - null_value, percentile_interval(mean)))
    for i, name in enumerate(units):
        value, null_value = float(mine.value[i]), float(other.value[i])
        interval = percentile_interval(differences[:, i])
        out.append(Score(metric, name, value, null, null_value, value - null_value, interval))
    return out


def _r2(placed: Placed, store: ActivationStore, task: Task) -> Measured:
    """R2 on test rows; the mean that it is measured against is held at that of all test rows."""
    error, spread, _ = image_errors(placed, store, "test")
    value = 1 - error.sum() / spread.sum()
    return Measured(np.array([value]), (1 - (task.weights @ error) / (task.weights @ spread))[:, None])


def _tapa(
    placed: Placed, pairs: RenderedPairs, names: tuple[str, ...], matches: tuple[Match, ...], draws: int, seed: int
) -> Measured:
    """TAPAScore of the latents matched to each concept that has rendered pairs, at their thresholds; else nan."""
    from mechinterp.metrics.statistics import PatientBootstrap

    boot = PatientBootstrap.of(pairs.patients, draws=draws, seed=seed)
    value, drawn = np.full(len(names), np.nan), np.full((draws, len(names)), np.nan)
    for a, (name, match) in enumerate(zip(names, matches, strict=True)):
        if name in pairs.activations:
            without, present = (match.fires(side)[:, None] for side in pairs.encode(placed, name))
            found = tapa_score(without, present)
            value[a], drawn[:, a] = found.value, 2 * boot.mean(found.pairs)
    return Measured(value, drawn)


def _probe(store: ActivationStore, placed: Placed, task: Task) -> dict[str, Measured]:
    """The linear probe's AUROC, AP and F1 under the same discipline: its one "latent" for a concept is its own."""
    x = probe_inputs(store, placed.reads)
    bound = probe_bound(x, task.labels, task.split)
    outputs = bound.encode(x)
    found: dict[str, list[Measured]] = {"AUROC": [], "AP": [], "F1": []}
    for a in range(task.labels.shape[1]):
        alone = Task(task.labels[:, [a]], task.split, task.patients, task.weights)
        mine = measure(np.nan_to_num(outputs[:, [a]]), alone, sparse=())[0]
        for name, parts in found.items():
            parts.append(mine[name])
    joined = {
        name: Measured(np.concatenate([p.value for p in parts]), np.concatenate([p.draws for p in parts], 1))
        for name, parts in found.items()
    }
    return joined | {f"{k}-sparse probe AUROC": joined["AUROC"] for k in (1, 5)}


def _discoveries(acts: np.ndarray, task: Task, seed: int) -> float:
    test = task.split == "test"
    tests = feature_tests(acts[test], task.labels[test], task.patients[test], seed=seed)
    return tests.discoveries() / acts.shape[1]


def _untested(embeddings: Any, pairs: Any, others: Any) -> list[str]:
    notes = []
    if embeddings is None:
        notes.append("MS: NOT TESTED, no embeddings of an external encoder were given")
    if pairs is None:
        notes.append("TAPAScore: NOT TESTED, no rendered pairs were given")
    if not others:
        notes.append("randomised encoder: NOT TESTED, give others={...: randomised_encoder(...)}")
    return notes


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value
