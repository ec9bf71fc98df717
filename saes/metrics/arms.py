"""All image-level scores of one set of activations, with bootstrap draws, under one held-out discipline.

Latents are chosen on training patients, thresholds and penalties on validation patients, and every number is of test
patients. The draws resample test patients with the choices held fixed: they say how far the scores would move with
other test patients, not with another training run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped

from mechinterp.metrics.statistics import PatientBootstrap, auroc_columns, weighted_auroc
from saes.metrics.alignment import Sorted, auroc_table, average_precision, f_score
from saes.metrics.matching import Match, match_at
from saes.metrics.probing import k_sparse_probe
from saes.metrics.selectivity import mean_cosine, weighted_monosemanticity

__all__ = ["Measured", "Task", "measure", "measure_monosemanticity"]

BETA = 0.5
"""Of `fbmp`: precision counts more."""


@dataclass(frozen=True)
class Measured:
    """A score of several units (concepts), and the same under each bootstrap draw."""

    value: Float[np.ndarray, " unit"]
    draws: Float[np.ndarray, "draw unit"]


@dataclass(frozen=True)
class Task:
    """What is asked of every set of activations: labels, splits, and draws of the test patients."""

    labels: Shaped[np.ndarray, "image concept"]
    split: Shaped[np.ndarray, " image"]
    patients: Shaped[np.ndarray, " image"]
    weights: Float[np.ndarray, "draw test_image"]

    @classmethod
    def of(
        cls,
        labels: Shaped[np.ndarray, "image concept"],
        split: Shaped[np.ndarray, " image"],
        patients: Shaped[np.ndarray, " image"],
        draws: int,
        seed: int,
    ) -> Task:
        """Draw the test patients."""
        boot = PatientBootstrap.of(patients[split == "test"], draws=draws, seed=seed)
        return cls(np.asarray(labels, np.float64), split, patients, boot.weights)

    def rows(self, name: str, concept: int) -> np.ndarray:
        """Images of a split whose label is known."""
        return (self.split == name) & np.isfinite(self.labels[:, concept])

    def with_labels(self, labels: Shaped[np.ndarray, "image concept"]) -> Task:
        """The same images and draws with other labels."""
        return Task(np.asarray(labels, np.float64), self.split, self.patients, self.weights)

    def _test_weights(self, concept: int) -> np.ndarray:
        return self.weights[:, np.isfinite(self.labels[self.split == "test", concept])]


def measure(
    acts: Float[np.ndarray, "image latent"], task: Task, k: int = 3, sparse: tuple[int, ...] = (1, 5)
) -> tuple[dict[str, Measured], tuple[Match, ...]]:
    """Every concept score of a set of activations, and the latents matched to each concept at validation thresholds.

    AUROC: of the latent with the highest training AUROC. AP and F1: of the latent with the highest training F1, at
    its validation threshold. MATCHScore: `match_score` with z > 0, and with validation thresholds. k-sparse probes.
    """
    parts: dict[str, list[tuple[float, np.ndarray]]] = {}
    matches = []
    train_auroc = auroc_table(acts[task.split == "train"], task.labels[task.split == "train"])
    sorts: dict[bytes, Sorted] = {}  # concepts known for the same images share one sorting

    def best(rows: np.ndarray, y: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
        if rows.tobytes() not in sorts:
            sorts[rows.tobytes()] = Sorted.of(acts[rows])
        return sorts[rows.tobytes()].best(y, beta)

    for a, column in enumerate(task.labels.T):
        train, val, test = (task.rows(name, a) for name in ("train", "val", "test"))
        y, weights = column[test], task._test_weights(a)
        z = acts[test, int(np.argmax(np.nan_to_num(train_auroc[:, a], nan=-1.0)))]
        _add(parts, "AUROC", float(auroc_columns(z[:, None], y)[0]), weighted_auroc(z, y, weights))
        chosen = int(np.argmax(np.nan_to_num(best(train, column[train], 1.0)[1], nan=-1.0)))
        z = acts[test, chosen]
        _add(parts, "AP", average_precision(z, y), average_precision(z, y, weights))
        threshold = best(val, column[val], 1.0)[0][chosen]
        _add(parts, "F1", f_score(z > threshold, y), f_score(z > threshold, y, weights))
        held = best(val, column[val], BETA)[0]
        for name, least in (("MATCHScore (z > 0)", np.zeros(acts.shape[1])), ("MATCHScore", held)):
            found = match_at(acts, column, task.split, least, k, BETA)
            _add(parts, name, found.f1, f_score(found.fires(acts[test]), y, weights))
            if least is held:
                matches.append(found)
        for count in sparse:
            probe = k_sparse_probe(acts, column, task.split, count)
            draws = weighted_auroc(probe.test_scores, y, weights)
            _add(parts, f"{count}-sparse probe AUROC", probe.auroc, draws)
    joined = {
        name: Measured(np.array([value for value, _ in units]), np.stack([draw for _, draw in units], 1))
        for name, units in parts.items()
    }
    return joined, tuple(matches)


def measure_monosemanticity(
    acts: Float[np.ndarray, "image latent"], embeddings: Float[np.ndarray, "image e"], task: Task, draws: int = 100
) -> dict[str, Measured]:
    """Mean MS over live latents on test images, plain and corrected for chance; one unit; `draws` draws at most.

    Latents that are nan in the sample (dead, constant) count neither here nor in the mean of a draw.
    """
    rows = task.split == "test"
    weights = np.vstack([np.ones((1, int(rows.sum()))), task.weights[:draws]])
    with np.errstate(invalid="ignore"):
        scores = weighted_monosemanticity(acts[rows], embeddings[rows], weights)
    live = np.isfinite(scores[0])
    if not live.any():
        nothing = Measured(np.full(1, np.nan), np.full((len(weights) - 1, 1), np.nan))
        return {"MS": nothing, "MS corrected": nothing}
    means = np.nanmean(np.where(live, scores, np.nan), axis=1)
    chance = mean_cosine(embeddings[rows])
    plain = Measured(means[:1], means[1:, None])
    corrected = (means - chance) / (1 - chance)
    return {"MS": plain, "MS corrected": Measured(corrected[:1], corrected[1:, None])}


def _add(parts: dict[str, list], name: str, value: float, draws: np.ndarray) -> None:
    parts.setdefault(name, []).append((float(value), np.asarray(draws, np.float64)))
