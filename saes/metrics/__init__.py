"""Numbers about dictionaries: fidelity, sparsity, meaning, recovery. Each formula stands in its docstring."""

from saes.metrics.fidelity import Evaluation, dead, evaluate, frequency, l0, r2
from saes.metrics.images import image_activations, image_table

__all__ = ["Evaluation", "dead", "evaluate", "frequency", "image_activations", "image_table", "l0", "r2"]
