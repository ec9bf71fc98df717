"""Faithfulness: does removing what an attribution ranks high move the score as it says?

Every score takes a Question (or what was removed from one) and attributions `[row, element]`, and returns a `Scored`.
None of them is beyond doubt (Tomsett et al. 2020 find them unreliable and inconsistent with each other), so they are
read together, beside random and constant maps, and only for removals that the explanation was not built from
(`held_out`).
"""

from mechinterp.metrics.faithfulness.curves import (
    Curves,
    best_and_worst,
    comprehensiveness,
    insertion_deletion,
    naopc,
    ranked,
    sufficiency,
)
from mechinterp.metrics.faithfulness.held_out import Removal, check_held_out, held_out, judged_by, refilled, scored_by
from mechinterp.metrics.faithfulness.removals import (
    Removals,
    faithfulness_correlation,
    infidelity,
    random_subsets,
    removals,
    saco,
)
from mechinterp.metrics.faithfulness.sensitivity import Sensitivity, sensitivity

__all__ = [
    "Curves",
    "Removal",
    "Removals",
    "Sensitivity",
    "best_and_worst",
    "check_held_out",
    "comprehensiveness",
    "faithfulness_correlation",
    "held_out",
    "infidelity",
    "insertion_deletion",
    "judged_by",
    "naopc",
    "random_subsets",
    "ranked",
    "refilled",
    "removals",
    "saco",
    "scored_by",
    "sensitivity",
    "sufficiency",
]
