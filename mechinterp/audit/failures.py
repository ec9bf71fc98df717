"""The worst errors on test patients, and which features pushed them there."""

from __future__ import annotations

from typing import Any

import numpy as np

from mechinterp.audit.causal import Trial
from mechinterp.audit.evidence import Evidence
from mechinterp.audit.shortcuts import Case
from mechinterp.data import ImageData
from mechinterp.types import FeatureId

__all__ = ["failures"]

EACH = 6
PUSHES = 3


def failures(trial: Trial, data: ImageData, evidence: Evidence, cases: list[Case]) -> list[dict[str, Any]]:
    """The positives with the lowest score and the negatives with the highest, at most one a patient.

    `standing` is the share of test images of the other class that the image is on the wrong side of; `attributes` are
    those it has; `pushes` are the features that moved its score most towards the error, in sd.
    """
    found = []
    for kind, label, sign in (("false negative", 1, 1), ("false positive", 0, -1)):
        mine = np.flatnonzero(trial.labels == label)
        others = trial.score[trial.labels != label]
        seen: set[str] = set()
        for i in mine[np.argsort(sign * trial.score[mine], kind="stable")]:
            image = int(trial.position[i])
            wrong = float((sign * others > sign * trial.score[i]).mean())
            if wrong < 0.5 or len(seen) == EACH:
                break
            patient = str(evidence.patients[image])
            if patient in seen:
                continue
            seen.add(patient)
            found.append(
                {
                    "kind": kind,
                    "image": data.images[int(evidence.rows[image])],
                    "row": int(evidence.rows[image]),
                    "score": float(trial.score[i]),
                    "standing": wrong,
                    "attributes": [c.candidate.name for c in cases if c.candidate.values[image] == 1],
                    "pushes": _pushes(trial, int(i), sign),
                }
            )
    return found


def _pushes(trial: Trial, image: int, sign: int) -> list[dict[str, Any]]:
    push = trial.push[:, image]
    order = np.argsort(sign * push, kind="stable")[:PUSHES]
    return [
        {"feature": str(FeatureId(trial.placed.writes, trial.features[f])), "push": float(push[f])}
        for f in order
        if sign * push[f] < 0
    ]
