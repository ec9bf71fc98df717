"""A model whose circuit is known exactly, because it was written into the weights and then hidden.

    planted = plant()
    image = planted.images(planted.random_amounts(1))
    frozen = freeze(planted.model, image, [Logit(Target("pneumonia", "pneumonia"))])
    recovery(build_graph(frozen, planted.dictionaries), truth(planted, image, "pneumonia"))

says AUROC 1 and no error in any weight, or the graph is wrong (nan where the image holds nothing of the circuit).
"""

from graphs.planted.circuit import CLASSES, FINDINGS, THRESHOLD, Circuit
from graphs.planted.model import PlantedModel, plant
from graphs.planted.truth import Recovery, Truth, recovery, truth

__all__ = [
    "CLASSES",
    "FINDINGS",
    "THRESHOLD",
    "Circuit",
    "PlantedModel",
    "Recovery",
    "Truth",
    "plant",
    "recovery",
    "truth",
]
