"""The lines that a verdict is drawn at, in one place. Every one is printed in the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mechinterp.metrics.grades import Thresholds

__all__ = ["Settings", "settings_of"]


@dataclass(frozen=True)
class Settings:
    """What counts as much, as enough, and as proof.

    Args:
        harm_line: change of AUROC that matters in the clinic. 0.05 is the line of Tang et al. 2021 (BMJ Open
            11:e053024) for subgroups of a chest X-ray model; a user may set another.
        effect_line: causal effect that matters, in standard deviations of the score over the test images. 0.25 lies
            between "small" (0.2) and "medium" (0.5) of Cohen 1988.
        alpha: family-wise error of the causal tests of one audit, and 1 minus the level of its intervals.
        min_cell: images that each of the four cells (target yes/no x attribute yes/no) needs among the test patients.
        draws: patient-bootstrap draws.
        random_sets: matched random feature sets for each candidate.
        joint_sets: the least number that are removed together, in the model, where an effect reaches `effect_line`; as
            many more as Holm's correction needs to be able to reject.
        max_images: test images on which features are ablated (a seeded choice of patients when there are more).
        explainer_images: test images on which saliency methods are compared; 0 leaves them out.
        grades: thresholds of their grades; None: those of `mechinterp.metrics.grades`.
    """

    harm_line: float = 0.05
    effect_line: float = 0.25
    alpha: float = 0.05
    min_cell: int = 10
    draws: int = 2000
    random_sets: int = 1000
    joint_sets: int = 100
    max_images: int = 240
    explainer_images: int = 6
    grades: Thresholds | None = None


def settings_of(thresholds: Path | None) -> Settings:
    """The settings with thresholds of the grades from a file, if one is given. Raises UsageError that names it."""
    from mechinterp.audit.explainers.grading import read_thresholds

    return Settings(grades=read_thresholds(thresholds) if thresholds else None)
