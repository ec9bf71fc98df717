"""How far a feature set stands for an attribute: what its removal takes out of the model's image embedding.

Removing features that hold little of an attribute moves nothing, whether the model uses the attribute or not. So a
small effect clears an attribute only as far as the removal took the attribute away. That is read off a linear probe
for the attribute (fitted on train and val patients, embeddings as the model made them), on test images before and
after the removal: 1 minus the share of its gap that is left. Compare amnesic probing (Elazar et al. 2021, TACL 9).
Features that act behind the embedding (in a language model) take nothing out of it: then this test clears nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from mechinterp.audit.candidates import Candidate
from mechinterp.audit.causal import Trial
from mechinterp.audit.evidence import Evidence
from mechinterp.audit.probe import logistic_scores
from mechinterp.interventions import ablate
from mechinterp.metrics.statistics import Interval, percentile_interval, stratified_mean_difference

__all__ = ["ENOUGH", "Standing", "stands_for"]

ENOUGH = 0.5  # of the attribute has to be taken out, by the lower end of the interval, before a removal can clear it
BATCH = 64


@dataclass(frozen=True)
class Standing:
    """Share of the probe's gap that the removal takes out of the embedding, with its interval over patients.

    1: nothing of the attribute is left for the probe; 0: all of it. Below 0 or above 1 where the gap grows or turns
    round; nan where the probe cannot be fitted.
    """

    share: float
    ci95: Interval

    @property
    def enough(self) -> bool:
        """Whether at least `ENOUGH` is taken out, by the lower end of the interval (False for nan)."""
        return bool(self.ci95[0] >= ENOUGH)


def stands_for(trial: Trial, candidate: Candidate, features: Sequence[int], evidence: Evidence) -> Standing:
    """How much of `candidate` the removal of `features` takes out of the embedding, on the images of the trial."""
    fit, values = candidate.known & ~evidence.test, candidate.values[trial.position]
    known = np.isfinite(values)
    if len(np.unique(candidate.values[fit])) < 2 or len(np.unique(values[known])) < 2:
        return Standing(float("nan"), (float("nan"), float("nan")))
    clean, removed = evidence.embedding[trial.position][known], _without(trial, features)[known]
    log_odds = logistic_scores(evidence.embedding[fit], candidate.values[fit], np.r_[clean, removed])
    before, after = log_odds[: len(clean)], log_odds[len(clean) :]
    asked = (values[known], trial.labels[known])
    weights = np.r_[np.ones((1, int(known.sum()))), trial.bootstrap.weights[:, known]]  # the sample itself, then draws
    gaps = [stratified_mean_difference(x, *asked, weights) for x in (before, after)]
    share = 1 - np.divide(gaps[1], gaps[0], out=np.full(len(weights), np.nan), where=gaps[0] != 0)
    return Standing(float(share[0]), percentile_interval(share[1:]))


@torch.no_grad()
def _without(trial: Trial, features: Sequence[int]) -> Float[np.ndarray, "n d"]:
    """Embeddings of the trial's images with `features` removed."""
    rows = torch.arange(len(trial.position)).split(BATCH)
    with ablate(trial.model, trial.placed, features, tokens=trial.tokens) as model:
        return np.concatenate([model.encode_image(trial.batch[chunk]).float().cpu().numpy() for chunk in rows])
