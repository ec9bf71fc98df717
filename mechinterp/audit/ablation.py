"""Remove a user's features and print what the output does, beside matched random sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mechinterp.audit.dictionary import dictionary_of, model_folder, tokens_of
from mechinterp.audit.evidence import Evidence, collect, prepare
from mechinterp.audit.pipeline import choose_target
from mechinterp.audit.sizes import one_size
from mechinterp.data import ImageData
from mechinterp.errors import UsageError
from mechinterp.interventions import matched_random_sets, set_effects
from mechinterp.metrics.statistics import PatientBootstrap, auroc, percentile_interval, permutation_p
from mechinterp.models import HookedVLM
from mechinterp.storage import MANIFEST, write_json, write_manifest
from mechinterp.types import FeatureId, Placed

__all__ = ["ablation_table"]

RANDOM_SETS = 100


def ablation_table(
    model: HookedVLM,
    data: ImageData,
    features: Sequence[str],
    target: str | None = None,
    out: Path | str = Path("out/ablate"),
    seed: int = 0,
) -> str:
    """Remove the features `SITE:12` together on test images; write ablation.json; return a table to print.

    Raises UsageError when the features are of several sites, or of one that no stored dictionary reads.
    """
    asked = choose_target(model, data, target)
    data = one_size(model, data)
    ids = [FeatureId.parse(text) for text in features]
    placed = _dictionary_at(model, data, ids, seed)
    tokens = tokens_of(placed)
    evidence = collect(model, data, asked, placed, tokens)
    beyond = [feature for feature in ids if feature.index >= len(evidence.activity.frequency)]
    if beyond:
        hint = f"0 to {len(evidence.activity.frequency) - 1}"
        raise UsageError(f"{beyond[0]} is no feature of the dictionary", where="--features", hint=hint)
    test = np.flatnonzero(evidence.test)
    if len(test) == 0:
        raise UsageError("the data has no test patient", where=data.name)
    mine = tuple(sorted({feature.index for feature in ids}))
    sets = [mine, *matched_random_sets(evidence.activity, mine, n=RANDOM_SETS, seed=seed)]
    batch = prepare(model, data, evidence.rows[test], asked)
    change = set_effects(model, placed, batch, [asked], sets, tokens=tokens)[:, :, 0].double().cpu().numpy()
    record = _record(evidence, change, seed) | {
        "target": asked.name,
        "features": [str(FeatureId(placed.writes, index)) for index in mine],
    }
    write_json(Path(out) / "ablation.json", record)
    write_manifest(Path(out), {"kind": "ablation", "model": model.label, "seed": seed})
    return _table(record)


def _record(evidence: Evidence, change: np.ndarray, seed: int) -> dict[str, Any]:
    score, labels = evidence.score[evidence.test], evidence.labels[evidence.test]
    bootstrap = PatientBootstrap.of(evidence.patients[evidence.test], seed=seed)
    mean = change.mean(1) / evidence.sd
    return {
        "images": len(score),
        "mean_change": float(mean[0]),
        "ci95": list(percentile_interval(bootstrap.mean(change[0] / evidence.sd))),
        "unit": "sd of the score",
        "random_sets": len(mean) - 1,
        "random_band": list(percentile_interval(mean[1:])),
        "p": permutation_p(abs(float(mean[0])), np.abs(mean[1:])),
        "auroc_before": auroc(score, labels),
        "auroc_after": auroc(score + change[0], labels),
    }


def _dictionary_at(model: HookedVLM, data: ImageData, ids: Sequence[FeatureId], seed: int) -> Placed:
    """The dictionary that reads the features' one site: stored with the model, else the one an audit trains."""
    from saes import load_sae

    sites = sorted({str(feature.site) for feature in ids})
    if len(sites) != 1:
        raise UsageError(f"features of {len(sites)} sites", where="--features", hint="name features of one site")
    folder = model_folder(model)
    found = [load_sae(path.parent) for path in sorted(folder.glob(f"dictionaries/*/{MANIFEST}"))] if folder else []
    found = found or [dictionary_of(model, data, seed)[0]]
    for placed in found:
        if str(placed.writes) == sites[0]:
            return placed
    there = ", ".join(str(placed.writes) for placed in found)
    raise UsageError(f"no dictionary at {sites[0]}", where="--features", hint=f"there is one at {there}")


def _table(record: dict[str, Any]) -> str:
    low, high = record["ci95"]
    left, right = record["random_band"]
    return "\n".join(
        (
            f"removed {len(record['features'])} features on {record['images']} test images, target {record['target']}",
            f"  mean change of the score   {record['mean_change']:+.3f} sd [{low:+.3f}, {high:+.3f}]",
            f"  {record['random_sets']} matched random sets    [{left:+.3f}, {right:+.3f}], p = {record['p']:.3f}",
            f"  AUROC                      {record['auroc_before']:.3f} -> {record['auroc_after']:.3f}",
        )
    )
