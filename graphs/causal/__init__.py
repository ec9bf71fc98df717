"""Is a graph true of its model? Interventions, the causal report, suppression of supernodes.

    from graphs.causal import Lab, report, suppress

    lab = Lab(model, batch, dictionaries, outputs, frozen=frozen)
    report(lab, graph).to_dict()

Nothing is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mechinterp.lazy import lazily

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

__getattr__ = lazily(__name__, _HOMES)
