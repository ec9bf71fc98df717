"""features.parquet: one row for each live feature. No patient, no image name."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mechinterp.types import FeatureId
from saes.gallery.facts import subgroup_rates
from saes.gallery.overlap import Overlap
from saes.naming import UNNAMED

if TYPE_CHECKING:
    from saes.gallery.build import Catalogue

__all__ = ["feature_table", "parquet_bytes"]


def feature_table(made: Catalogue, places: dict[int, str], overlaps: dict[int, Overlap]) -> pd.DataFrame:
    """Columns: id, site, tower, index, name and its proof, frequency, push, place, overlap, firing by subgroup."""
    observed, site = made.observed, made.placed.writes
    test = observed.test
    fires = observed.strongest > 0
    rates = subgroup_rates(fires[test], made.data.attributes, observed.rows[test])
    rows: list[dict[str, Any]] = []
    for name in made.naming.names:
        f = name.feature
        on = fires[test, f]
        found = overlaps.get(f)
        rows.append(
            {
                "id": str(FeatureId(site, f)),
                "site": str(site),
                "tower": site.tower,
                "index": f,
                "name": name.name,
                "name_score": None if name.name == UNNAMED else name.auroc,
                "source": name.source if name.name != UNNAMED else None,
                "proposal": name.proposal,
                "train_auroc": name.fit,
                "test_auroc": name.auroc,
                "test_auroc_low": name.ci95[0],
                "test_auroc_high": name.ci95[1],
                "within_auroc": name.within,
                "within_low": name.within_ci95[0],
                "within_high": name.within_ci95[1],
                "held_fixed": name.rival or None,
                "q": name.q,
                "precision": name.precision,
                "text": name.said or None,
                "text_alignment": name.alignment,
                "best_attribute": name.nearest or None,
                "best_attribute_train_auroc": name.nearest_fit,
                "best_attribute_test_auroc": name.nearest_auroc,
                "beats_untrained": name.beats,
                "frequency": float(on.mean()),
                "mean_when_firing": float(observed.strongest[test, f][on].mean()) if on.any() else np.nan,
                "push": made.push.mean[f] if made.push else np.nan,
                "push_when_firing": made.push.active[f] if made.push else np.nan,
                "push_size": made.push.size[f] if made.push else np.nan,
                "place": places.get(f, ""),
                "mask_images": found.images if found else 0,
                "iou": found.iou if found else np.nan,
                "iou_chance": found.iou_chance if found else np.nan,
                "pointing": found.pointing if found else np.nan,
                "pointing_chance": found.pointing_chance if found else np.nan,
                "seed_stability": made.stability[f] if made.stability is not None else np.nan,
                **{f"fires_with:{a}": float(one[f]) for a, (one, _) in rates.items()},
                **{f"fires_without:{a}": float(zero[f]) for a, (_, zero) in rates.items()},
            }
        )
    return pd.DataFrame(rows)


def parquet_bytes(table: pd.DataFrame) -> bytes:
    """The table as Parquet, without the index; the same table gives the same bytes."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False, engine="pyarrow")
    return buffer.getvalue()
