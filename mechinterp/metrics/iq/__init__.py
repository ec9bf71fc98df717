"""IQ, the inversion of explanations: how far an attribution leans on the output instead of the path to it.

After Tan et al. 2025, arXiv:2504.08919, whose formulas for R and F are not public in full. What is missing there is
filled in by the reading documented in `mechinterp.metrics.iq.scores` and named `iq-reading-1`; its numbers are ours and
are not comparable with those of the paper.
"""

from mechinterp.metrics.iq.null import expected_absolute_r, permutation_floor
from mechinterp.metrics.iq.scores import READING, IQScores, Measurement, Status, iq, psc

__all__ = [
    "READING",
    "IQScores",
    "Measurement",
    "Status",
    "expected_absolute_r",
    "iq",
    "permutation_floor",
    "psc",
]
