"""Explainers side by side on one model: IQ, truth masks and sanity checks; for audits, `mechinterp iq`, experiments."""

from mechinterp.audit.explainers.compare import Comparison, Effort, compare
from mechinterp.audit.explainers.records import explainer_rows
from mechinterp.audit.explainers.section import IN_AUDITS, Compared, audit_section, compare_explainers, methods_of

__all__ = [
    "IN_AUDITS",
    "Compared",
    "Comparison",
    "Effort",
    "audit_section",
    "compare",
    "compare_explainers",
    "explainer_rows",
    "methods_of",
]
