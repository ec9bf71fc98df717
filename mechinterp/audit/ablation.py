"""`mechinterp ablate`: remove named features and see what every target does, beside matched random features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from mechinterp.audit.dictionary import dictionary_of, tokens_of
from mechinterp.audit.evidence import prepare
from mechinterp.audit.pipeline import choose_target
from mechinterp.data import ImageData
from mechinterp.errors import UsageError
from mechinterp.interventions import activity, matched_random_sets, set_effects
from mechinterp.metrics.statistics import PatientBootstrap, percentile_interval, permutation_p
from mechinterp.models import HookedVLM
from mechinterp.storage import atomic_path, write_json, write_manifest
from mechinterp.types import FeatureId

__all__ = ["ablation_table"]

RANDOM_SETS = 100


def ablation_table(
    model: HookedVLM, data: ImageData, features: Sequence[str], target: str | None, out: Path, seed: int = 0
) -> str:
    """Zero-ablate `features` (written `SITE:12`) on the test patients, one by one and together.

    Writes `ablation.parquet` (image x set), `ablation.json` (the table) and a manifest to `out`; returns the table as
    text. Change of score in standard deviations of the score; interval: bootstrap over patients; p: against
    `RANDOM_SETS` random sets matched in size, firing rate and strength, on |mean change|.

    Raises UsageError when the features stand at another site than the model's dictionary, or do not exist.
    """
    asked = choose_target(model, data, target)
    placed, _ = dictionary_of(model, data, seed)
    ids = [FeatureId.parse(text) for text in features]
    for feature in ids:
        if feature.site != placed.writes:
            raise UsageError(f"{feature} is not at the site of the dictionary", hint=f"that is {placed.writes}")
    rows = np.flatnonzero(data.split == "test")
    if len(rows) == 0:
        raise UsageError("no image belongs to a test patient", where=data.name)
    batch, tokens = prepare(model, data, rows, asked), tokens_of(placed)
    indices = [feature.index for feature in ids]
    sets = [[i] for i in indices] + ([indices] if len(indices) > 1 else [])
    random = matched_random_sets(activity(model, placed, batch, tokens), indices, RANDOM_SETS, seed)
    moved = set_effects(model, placed, batch, [asked], [*sets, *random], tokens=tokens)[:, :, 0].double().numpy()
    sd = float(np.std(_scores(model, batch, asked)))
    moved = moved / sd
    patients = PatientBootstrap.of([data.patients[i] for i in rows], seed=seed)
    table = []
    for members, change in zip(sets, moved, strict=False):
        together = len(members) == len(indices)
        null = moved[len(sets) :].mean(1)
        table.append(
            {
                "features": [str(f) for f in ids] if together else [str(ids[indices.index(members[0])])],
                "images_changed": int((change != 0).sum()),
                "mean_change_sd": float(change.mean()),
                "ci95": list(percentile_interval(patients.mean(change))),
                "p_random": permutation_p(abs(float(change.mean())), np.abs(null)) if together else None,
            }
        )
    record = {"schema_version": 1, "model": model.label, "data": data.name, "target": asked.name, "seed": seed}
    write_json(out / "ablation.json", {**record, "images": len(rows), "rows": table, "random_sets": len(random)})
    frame = pd.DataFrame(moved[: len(sets)].T, columns=[" + ".join(row["features"]) for row in table])
    frame.insert(0, "image", [data.images[i] for i in rows])
    with atomic_path(out / "ablation.parquet") as partial:
        frame.to_parquet(partial, index=False)
    write_manifest(out, {"kind": "ablation", **record})
    return _text(table, asked.name, len(rows), len(random))


def _scores(model: HookedVLM, batch, target) -> np.ndarray:
    import torch

    with torch.no_grad():
        parts = [model.score(batch[i : i + 100], [target])[:, 0] for i in range(0, len(batch), 100)]
    return torch.cat(parts).double().cpu().numpy()


def _text(table: list[dict], target: str, n: int, random: int) -> str:
    lines = [f"change of the score for {target} when the features are removed, in sd, on {n} test images"]
    for row in table:
        low, high = row["ci95"]
        p = "" if row["p_random"] is None else f"  p = {row['p_random']:.3f} against {random} matched random sets"
        lines.append(f"  {row['mean_change_sd']:+.3f} [{low:+.3f}, {high:+.3f}]  {' + '.join(row['features'])}{p}")
    return "\n".join(lines)
