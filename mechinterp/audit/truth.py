"""On a phantom the truth is known: render every image again with one factor changed, and ask the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mechinterp.audit.evidence import BATCH, Evidence
from mechinterp.audit.settings import Settings
from mechinterp.data import ImageData
from mechinterp.metrics.statistics import PatientBootstrap, percentile_interval
from mechinterp.models import HookedVLM
from mechinterp.progress import progress
from mechinterp.types import Target

__all__ = ["measure_truth"]

IMAGES = 48  # test images that are rendered again for each factor


def measure_truth(
    model: HookedVLM,
    data: ImageData,
    target: Target,
    evidence: Evidence,
    shortcuts: list[dict[str, Any]],
    settings: Settings,
    seed: int,
) -> dict[str, Any] | None:
    """The do() effect of every factor on the score, beside what the audit said of it; None when not a phantom.

    `do_effect` is the mean over images of score(with the candidate) - score(without it) in sd of the score, everything
    else in the image the same, with a patient-bootstrap interval.
    """
    if data.truth is None:
        return None
    from mechinterp.data.phantom import FACTORS, Phantom

    phantom = Phantom.load(data.truth.parent)
    test = np.flatnonzero(evidence.test)
    picked = np.sort(np.random.default_rng(seed).permutation(test)[:IMAGES])
    phantom = phantom[evidence.rows[picked]]
    bootstrap = PatientBootstrap.of(evidence.patients[picked], draws=settings.draws, seed=seed)
    said = {row["column"]: row for row in shortcuts if row["kind"] == "attribute"}
    planted, found = [], []
    factors = [n for n, f in FACTORS.items() if f.rate is not None and n != target.name and f.kind != "anatomy"]
    for name in progress(factors, "truth by do()", unit="factor"):
        row = said.get(name)
        on, off = (_scores(model, phantom.do(**{name: level}), target) for level in _levels(FACTORS[name], row))
        change = (on - off) / evidence.sd
        interval = percentile_interval(bootstrap.mean(change))
        matters = abs(change.mean()) >= settings.effect_line and (interval[0] > 0 or interval[1] < 0)
        planted.append(
            {
                "factor": name,
                "kind": FACTORS[name].kind,
                "do_effect": float(change.mean()),
                "do_ci95": list(interval),
                "used_in_truth": bool(matters),
                "candidate": row and row["candidate"],
                "verdict": row["verdict"] if row else "NOT TESTED",
            }
        )
        if row and row["verdict"] in ("FAIL", "CONCERN"):
            found.append({"candidate": row["candidate"], "factor": name, "verdict": row["verdict"]})
    return {"images": len(picked), "target": target.name, "planted": planted, "found": found}


def _levels(factor: Any, row: dict[str, Any] | None) -> tuple[int, int]:
    """Values of the factor with and without the candidate: a candidate such as letter=R may be the factor's 0."""
    named = row["candidate"].rpartition("=")[2] if row else None
    return (0, 1) if factor.values and named == factor.values[0] else (1, 0)


@torch.no_grad()
def _scores(model: HookedVLM, phantom: Any, target: Target) -> np.ndarray:
    pixels = phantom.render().astype(np.float32) / 255
    parts = [
        model.score(model.prepare(pixels[start : start + BATCH], [target]), [target])[:, 0].double().cpu().numpy()
        for start in range(0, len(pixels), BATCH)
    ]
    return np.concatenate(parts)
