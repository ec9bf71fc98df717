"""Is a graph true of its model? Interventions, the causal report, suppression of supernodes.

    from graphs.causal import Lab, report, suppress

    lab = Lab(model, batch, dictionaries, outputs, frozen=frozen)
    report(lab, graph).to_dict()

Nothing is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphs.causal.changes import Change, FeatureAt, features_of, scaled, taken_from
    from graphs.causal.figure import draw_suppression
    from graphs.causal.lab import Lab
    from graphs.causal.reporting import CausalReport, report
    from graphs.causal.suppression import Suppression, predicted, suppress

__all__ = [
    "CausalReport",
    "Change",
    "FeatureAt",
    "Lab",
    "Suppression",
    "draw_suppression",
    "features_of",
    "predicted",
    "report",
    "scaled",
    "suppress",
    "taken_from",
]

_HOMES = {
    "CausalReport": "reporting",
    "Change": "changes",
    "FeatureAt": "changes",
    "Lab": "lab",
    "Suppression": "suppression",
    "draw_suppression": "figure",
    "features_of": "changes",
    "predicted": "suppression",
    "report": "reporting",
    "scaled": "changes",
    "suppress": "suppression",
    "taken_from": "changes",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"graphs.causal.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
