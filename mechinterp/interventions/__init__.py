"""Ablate, steer, patch and inject features; sweep the effects of all of them; draw matched random sets.

with intervene(model, [Edit(placed, (12, 40), Zero(), "patch")]):
    scores = model.score(batch, targets)
all_effects = effects(model, placed, batch, targets)
"""

from mechinterp.interventions.controls import Activity, activity, matched_random_sets
from mechinterp.interventions.edits import Edit, How, Inject, Mean, Patch, Resample, Scale, Steer, Tokens, Zero
from mechinterp.interventions.effects import Effects, effects, set_effect, set_effects
from mechinterp.interventions.hooks import ablate, inject, intervene, patch, steer
from mechinterp.interventions.tokens import token_mask

__all__ = [
    "Activity",
    "Edit",
    "Effects",
    "How",
    "Inject",
    "Mean",
    "Patch",
    "Resample",
    "Scale",
    "Steer",
    "Tokens",
    "Zero",
    "ablate",
    "activity",
    "effects",
    "inject",
    "intervene",
    "matched_random_sets",
    "patch",
    "set_effect",
    "set_effects",
    "steer",
    "token_mask",
]
