"""The comparison of explainers as a whole: for the audit's section, for `mechinterp iq` and for the main table."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mechinterp.audit.explainers.checks import checked, located
from mechinterp.audit.explainers.compare import Comparison, Effort, compare
from mechinterp.audit.explainers.controls import Controls, controls_of
from mechinterp.audit.explainers.grading import curve_share, grade_fields, graded
from mechinterp.audit.explainers.records import explainer_rows
from mechinterp.data import ImageData
from mechinterp.errors import UsageError
from mechinterp.explain.methods import ELEMENT_METHODS, Method
from mechinterp.metrics.grades import Thresholds
from mechinterp.models import HookedVLM
from mechinterp.types import Target

__all__ = ["IN_AUDITS", "Compared", "audit_section", "compare_explainers", "methods_of"]

log = logging.getLogger(__name__)

IN_AUDITS = (
    "integrated_gradients",
    "gradient_times_input",
    "grad_cam",
    "attention_rollout",
    "occlusion",
    "kernel_shap",
    "lime",
    "edges",
    "random",
    "echo",
)
"""The usual maps and three anchors; `mechinterp iq` takes all methods."""
FILLS = {"blur": "the blurred image", "grey": "mean grey"}
OTHERS = 2  # other findings whose prompts replace the target's


@dataclass(frozen=True)
class Compared:
    """The comparison and its records; `controls`: the models that maps were held beside, by kind."""

    made: Comparison
    rows: list[dict[str, Any]]
    controls: dict[str, str] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """What iq.json holds beside versions and seconds."""
        return {
            "model": self.made.model.label,
            "target": self.made.target.name,
            "images": list(self.made.question.source.batch.ids) if self.made.question.source else [],
            "patients": len(set(self.made.patients)),
            "reading": "iq-reading-1",
            "judge": f"effects with each patch replaced by {FILLS[self.made.judge_fill]}; explainers use mean grey",
            "fills": {"explainers": self.made.question.fill, "judge": self.made.judge_fill},
            "controls": self.controls,
            "explainers": self.rows,
            "refused": self.made.refused,
        }


def methods_of(names: Sequence[str], own: Mapping[str, Method] | None = None) -> dict[str, Method]:
    """The methods of those names, in that order. Raises UsageError listing what there is."""
    known = ELEMENT_METHODS | dict(own or {})
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"no method {unknown[0]!r}", where="methods", hint=f"known: {', '.join(sorted(known))}")
    return {name: known[name] for name in names}


def compare_explainers(
    model: HookedVLM,
    data: ImageData,
    target: Target,
    methods: Mapping[str, Method],
    effort: Effort,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    thresholds: Thresholds | None = None,
    controls: Controls | None = None,
) -> Compared:
    """IQ, localisation, sanity checks and a grade of each method; the same for the same images, draws and seed.

    No method's numbers depend on which others are measured beside it. `thresholds`: of the grades. `controls`: other
    models that maps are held beside.
    """
    made = compare(model, data, target, methods, effort, seed, rows)
    others = {n: t for n, t in data.targets.items() if n != target.name}
    others = {name: others[name] for name in list(others)[:OTHERS]}
    checks = checked(made, data, others, seed, controls)
    found = explainer_rows(made, located(made, seed), checks, seed)
    for row in found:
        curves = curve_share(made, made.judged[row["method"]], seed)
        row["curves"] = curves.value if np.isfinite(curves.value) else None
        row["ci95"]["curves"] = list(curves.ci95) if curves.known else None
        row["n"]["curves"] = int(np.isfinite(made.judged[row["method"]].curve).sum())
        row |= grade_fields(graded(made, row, curves, thresholds))
    beside = {key: other.label for key, other in vars(controls or Controls()).items() if other is not None}
    return Compared(made, found, beside)


def audit_section(
    model: HookedVLM,
    data: ImageData,
    target: Target,
    shortcuts: Sequence[Mapping[str, Any]],
    images: int,
    seed: int,
    thresholds: Thresholds | None = None,
) -> Compared | None:
    """The usual methods on an audit's data, held beside the masks of what its verdicts accuse, and beside the controls
    that the model's own record names. One that does not open is left out with a warning: the verdicts need none.

    The images do not depend on the verdicts, so that `mechinterp iq` explains the same ones.

    Args:
        shortcuts: the records of the shortcut search.
        images: how many; 0 leaves the section out (None).
        thresholds: of the grades.
    """
    if not images:
        return None
    accused = tuple(row["candidate"] for row in shortcuts if row["verdict"] in ("FAIL", "CONCERN"))
    try:
        controls = controls_of(model, HookedVLM.from_pretrained)
    except UsageError as error:
        log.warning("explainers are held beside no other model: %s", error)
        controls = Controls()
    methods, effort = methods_of(IN_AUDITS), Effort(images, masks=accused)
    return compare_explainers(model, data, target, methods, effort, seed, None, thresholds, controls)
