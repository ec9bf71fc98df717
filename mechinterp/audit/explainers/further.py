"""The faithfulness and robustness metrics of others beside IQ, on the same images, for `mechinterp iq`.

Each has its own idea of a good map, so methods change places from one to the next; which is why they stand together.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from mechinterp.explain.methods import Method
from mechinterp.explain.question import Question
from mechinterp.metrics.faithfulness import (
    Removals,
    comprehensiveness,
    faithfulness_correlation,
    infidelity,
    random_subsets,
    removals,
    saco,
    sensitivity,
    sufficiency,
)
from mechinterp.metrics.iq import Measurement, psc

__all__ = ["BY_REMOVAL", "FURTHER", "further_columns", "further_table", "parquet", "scores_table", "shared_removals"]

SHAKES = 5  # explanations more of each image, for sensitivity; captum's 10 would cost all methods a third more time
SUBSETS = 50  # random sets of patches, the same for all methods and images
FURTHER = {
    "saco": ("SaCo", "↑"),
    "comprehensiveness": ("comprehensiveness", "↑"),
    "sufficiency": ("sufficiency", "↓"),
    "faithfulness_correlation": ("correlation", "↑"),
    "infidelity": ("infidelity", "↓"),
    "psc": ("PSC", "↑"),
    "sensitivity_max": ("sensitivity, greatest", "↓"),
    "sensitivity_mean": ("sensitivity, mean", "↓"),
}
"""Title of every further score, and which way is called good."""
BY_REMOVAL = ("saco", "comprehensiveness", "sufficiency", "faithfulness_correlation", "infidelity")
ABOUT = """All metrics. SaCo, comprehensiveness, sufficiency, correlation and infidelity remove sets of patches to the
filling that judges F. SaCo: do groups of patches with more relevance move the score more? Comprehensiveness: what the
score loses without the most relevant patches; sufficiency: what it loses with these alone (both in units of the
score). Correlation: of the summed relevance of random sets with what removing them takes; infidelity: the mean square
of the difference, each map in its best scale. PSC: correlation, over small perturbations, of how far the map and how
far the score move; it reads as good nearly what R reads as bad. Sensitivity: how far the map moves, of its own length,
under small even noise, five times; a map that never moves is perfect at it. Arrows: what is called good. No metric
here tells a right map from a wrong one alone: look at the anchors first."""


def shared_removals(judge: Question, seed: int) -> Removals:
    """The random sets of patches whose removal all methods are scored on."""
    return removals(judge, random_subsets(judge.count, SUBSETS, torch.Generator().manual_seed(seed)))


def further_columns(
    method: Method,
    question: Question,
    judge: Question,
    measured: Measurement,
    seen: Removals,
    seed: int,
) -> dict[str, Float[np.ndarray, " image"]]:
    """Every score of `FURTHER` for each image, nan where it is not defined.

    Args:
        question: what the method was asked; sensitivity asks it again.
        judge: the same images with the references that sets of patches are removed to.
        measured: of the method, as IQ scores it.
        seen: see `shared_removals`.
        seed: of the order among equal values and of sensitivity's noise.
    """
    a = torch.from_numpy(measured.attribution)
    moved = sensitivity(question, method.explain, draws=SHAKES, seed=seed)
    return {
        "saco": saco(judge, a, seed=seed).value,
        "comprehensiveness": comprehensiveness(judge, a, seed=seed).value,
        "sufficiency": sufficiency(judge, a, seed=seed).value,
        "faithfulness_correlation": faithfulness_correlation(a, seen).value,
        "infidelity": infidelity(a, seen, scaled=True).value,
        "psc": psc(measured),
        "sensitivity_max": moved.greatest.value,
        "sensitivity_mean": moved.mean.value,
    }


def further_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of the further scores, and what they are; empty where none was measured."""
    if not any(key in row for row in rows for key in FURTHER):
        return ""
    lines = ["| method | " + " | ".join(f"{title} {arrow}" for title, arrow in FURTHER.values()) + " |"]
    lines.append("|" + "---|" * (len(FURTHER) + 1))
    for row in sorted(rows, key=lambda r: r["anchor"]):
        name = f"*{row['method']}* (anchor)" if row["anchor"] else row["method"]
        lines.append("| " + " | ".join([name, *(_cell(row, key) for key in FURTHER)]) + " |")
    return "\n".join(["## All metrics", "", *lines, "", ABOUT])


def scores_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Every score of every method, one a line: method, anchor, score, value, low, high, n, circular.

    `low` and `high` end the 95 % interval over patients; values that are not defined are empty.
    """
    lines = []
    for row in rows:
        for score, n in row["n"].items():
            low, high = row["ci95"].get(score) or (None, None)
            circular = score in row["circular"]
            lines.append((row["method"], row["anchor"], score, row.get(score), low, high, n, circular))
    found = pd.DataFrame(lines, columns=["method", "anchor", "score", "value", "low", "high", "n", "circular"])
    return found.astype({"value": float, "low": float, "high": float})


def parquet(table: pd.DataFrame) -> bytes:
    """The table as Parquet."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False, engine="pyarrow")
    return buffer.getvalue()


def _cell(row: Mapping[str, Any], key: str) -> str:
    value, interval = row.get(key), row["ci95"].get(key)
    if value is None:
        return "-"
    mark = " °" if key in row["circular"] else ""
    return f"{value:.2f}{mark}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")
