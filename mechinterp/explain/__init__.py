"""Post-hoc explainers behind one signature: `METHODS[name](model, batch, target) -> [batch, height, width]`."""

from mechinterp.explain.cam import grad_cam
from mechinterp.explain.maps import Explainer, MapStatus, check_map
from mechinterp.explain.pixels import integrated_gradients, occlusion

__all__ = ["METHODS", "Explainer", "MapStatus", "check_map", "grad_cam", "integrated_gradients", "occlusion"]

METHODS: dict[str, Explainer] = {
    "integrated_gradients": integrated_gradients,
    "grad_cam": grad_cam,
    "occlusion": occlusion,
}
