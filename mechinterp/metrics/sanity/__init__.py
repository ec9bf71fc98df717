"""Sanity checks of explanations: does the map depend on the weights, the labels and the prompt that it explains?

Adebayo et al. 2018 (arXiv:1810.03292): randomise the weights, or train on permuted labels; a map that stays as it was
explained something else. Arun et al. 2021 (Radiology: AI 3:e200267): the map must become less alike than maps of other
images are; and maps of a model trained again, or built differently, should stay more alike than that. For a
vision-language model the prompt is a third thing to replace: the same map for nonsense is a failure.
"""

from mechinterp.metrics.sanity.checks import (
    Check,
    Maps,
    baseline,
    judge,
    label_randomisation,
    overall,
    prompt_randomisation,
    reproducibility,
    weight_randomisation,
)
from mechinterp.metrics.sanity.prompts import nonsense, reads_prompt
from mechinterp.metrics.sanity.randomise import Stage, randomising, stages
from mechinterp.metrics.sanity.similarity import SIMILARITIES, Similarity

__all__ = [
    "SIMILARITIES",
    "Check",
    "Maps",
    "Similarity",
    "Stage",
    "baseline",
    "judge",
    "label_randomisation",
    "nonsense",
    "overall",
    "prompt_randomisation",
    "randomising",
    "reads_prompt",
    "reproducibility",
    "stages",
    "weight_randomisation",
]
