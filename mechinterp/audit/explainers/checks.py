"""Beside IQ: does the map lie on the truth, does it change with weights, labels and prompt, does it come back?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from mechinterp.audit.evidence import prepare
from mechinterp.audit.explainers.compare import FEW, Comparison, Judged
from mechinterp.audit.explainers.controls import Controls
from mechinterp.data import ImageData
from mechinterp.errors import UsageError
from mechinterp.explain.ask import about_image
from mechinterp.explain.methods import applies
from mechinterp.explain.question import Question
from mechinterp.metrics.localisation import localise
from mechinterp.metrics.sanity import (
    Check,
    Maps,
    label_randomisation,
    nonsense,
    prompt_randomisation,
    reproducibility,
    weight_randomisation,
)
from mechinterp.models import HookedVLM
from mechinterp.progress import progress
from mechinterp.types import Target

__all__ = ["SIMILARITY", "check_fields", "checked", "counts", "intervals", "located"]

SIMILARITY = "spearman_abs"  # where the map is, not its direction: half the methods have no direction
NONSENSE = 3  # prompts


def located(made: Comparison, seed: int = 0) -> dict[str, dict[str, Float[np.ndarray, " image"]]]:
    """Per-image columns of every method: `auprc` in the target's mask, `auprc_chance`, and `mass NAME` of each mask.

    Images without a mask are nan. `mass NAME` is the share of positive relevance inside over the area's share: 1 is
    chance. Where the target has no masks, there is no `auprc`.
    """
    columns: dict[str, dict[str, np.ndarray]] = {}
    for place, (name, (inside, known)) in enumerate(made.masks.items()):
        if not known.any():
            continue
        for method, judged in made.judged.items():
            found = localise(judged.attribution, inside, seed, made.question.eps)
            if place == 0 and made.has_target_mask:
                columns.setdefault("auprc", {})[method] = np.where(known, found["auprc"].score.value, np.nan)
                columns.setdefault("auprc_chance", {})[method] = np.where(known, found["auprc"].chance, np.nan)
            columns.setdefault(f"mass {name}", {})[method] = np.where(known, found["mass_ratio"].score.value, np.nan)
    return columns


def checked(
    made: Comparison,
    data: ImageData,
    others: Mapping[str, Target] | None = None,
    seed: int = 0,
    controls: Controls | None = None,
) -> dict[str, dict[str, Check]]:
    """Sanity checks of every method: `weights` (cascade over the vision tower), `nonsense`, and `prompt` (`others`).

    With `controls` also `permuted`, `again` and `other`; a method that reads a model with features takes each model's
    own. A check that a model cannot have (a classifier has no prompt) is left out.
    """

    def ask(model: HookedVLM, target: Target) -> Question:
        return about_image(model, prepare(model, data, made.rows, target), target, chunk=made.question.chunk)

    found: dict[str, dict[str, Check]] = {}
    for name, judged in progress(list(made.judged.items()), "sanity checks", unit="method"):
        maps = Maps(ask, judged.method.explain, made.target, made.patients, seed)
        found[name] = {"weights": _weights(maps, made.model, seed)}
        found[name] |= _beside(maps, made, judged, controls or Controls())
        try:
            drawn = [nonsense(made.model, made.target, seed + i) for i in range(NONSENSE)]
        except UsageError:
            continue
        found[name]["nonsense"] = prompt_randomisation(maps, made.model, drawn, similarities=(SIMILARITY,))[0]
        if others:
            listed = list(others.values())
            found[name]["prompt"] = prompt_randomisation(
                maps, made.model, listed, "prompt, other findings", (SIMILARITY,)
            )[0]
    return found


FIELDS = {
    "weights": "randomisation",
    "nonsense": "prompt_randomisation",
    "prompt": "other_prompt",
    "permuted": "label_randomisation",
    "again": "repeatability",
    "other": "reproducibility",
}


def _beside(maps: Maps, made: Comparison, judged: Judged, controls: Controls) -> dict[str, Check]:
    """Checks against other models, where the method explains them too."""
    found: dict[str, Check] = {}
    for key, model in vars(controls).items():
        if model is None or not applies(judged.method, maps.ask(model, made.target)):
            continue
        if key == "permuted":
            found[key] = label_randomisation(maps, made.model, model, (SIMILARITY,))[0]
        else:
            found[key] = reproducibility(maps, made.model, model, FIELDS[key], (SIMILARITY,))[0]
    return found


def _weights(maps: Maps, model: HookedVLM, seed: int) -> Check:
    return weight_randomisation(maps, model, similarities=(SIMILARITY,), seed=seed, end_only=True)[0]


def check_fields(checks: Mapping[str, Check]) -> dict[str, Any]:
    """A method's checks as fields of its record: similarity (1: the map stayed as it was), baseline and verdict."""
    fields: dict[str, Any] = {}
    for key, field in FIELDS.items():
        check = checks.get(key)
        fields[field] = None if check is None or not np.isfinite(check.value) else check.value
        fields[f"{field}_baseline"] = None if check is None or not np.isfinite(check.baseline) else check.baseline
        fields[f"{field}_verdict"] = "not tested" if check is None else check.verdict
    return fields


def intervals(checks: Mapping[str, Check]) -> dict[str, list[float] | None]:
    """Patient intervals of the similarities, by field; None of fewer than `FEW` images."""
    kept = {key: check for key, check in checks.items() if check.n >= FEW and np.isfinite(check.ci95).all()}
    return {field: list(kept[key].ci95) if key in kept else None for key, field in FIELDS.items()}


def counts(checks: Mapping[str, Check]) -> dict[str, int]:
    """Images that each similarity is a mean of, by field; 0 where it was not tested."""
    return {field: checks[key].n if key in checks else 0 for key, field in FIELDS.items()}
