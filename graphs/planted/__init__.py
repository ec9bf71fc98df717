"""A model whose circuit is known exactly, because it was written into the weights and then hidden.

planted = plant()
image = planted.images(planted.random_amounts(1))
recovery(graph_of(image), truth(planted, image, "pneumonia"))     # AUROC 1 and no error, or the graph is wrong
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
