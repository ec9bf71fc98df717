"""Post-hoc explainers behind one signature: `METHODS[name](model, batch, target) -> [batch, height, width]`.

The same methods answer a Question about patches, words, both, or any function: `ELEMENT_METHODS[name].explain(question,
generator) -> [row, element]`.
"""

from mechinterp.explain.maps import Explainer, MapStatus, check_map
from mechinterp.explain.methods import ELEMENT_METHODS, Method, applies
from mechinterp.explain.pixels import METHODS, grad_cam, integrated_gradients, occlusion

__all__ = [
    "ELEMENT_METHODS",
    "METHODS",
    "Explainer",
    "MapStatus",
    "Method",
    "applies",
    "check_map",
    "grad_cam",
    "integrated_gradients",
    "occlusion",
]
