"""Explainers side by side on one model: IQ, truth masks and sanity checks; for audits, `mechinterp iq`, experiments."""

from mechinterp.audit.explainers.compare import Comparison, Effort, compare
from mechinterp.audit.explainers.records import explainer_rows

__all__ = ["Comparison", "Effort", "compare", "explainer_rows"]
