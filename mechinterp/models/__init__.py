"""HookedVLM: an unchanged transformers vision-language model with TransformerLens hook points.

    from mechinterp.models import HookedVLM

The names below are imported on first use; importing this package loads neither torch nor transformers. The check of a
user's own model is `mechinterp.models.doctor.doctor`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mechinterp.lazy import lazily

if TYPE_CHECKING:
    from mechinterp.models.bundles import bundled, controls
    from mechinterp.models.freeze import Check, verify_freeze
    from mechinterp.models.hooked import HookedVLM
    from mechinterp.models.tables import Family, families

__all__ = ["Check", "Family", "HookedVLM", "bundled", "controls", "families", "verify_freeze"]

_HOMES = {
    "Check": "freeze",
    "Family": "tables",
    "HookedVLM": "hooked",
    "bundled": "bundles",
    "controls": "bundles",
    "families": "tables",
    "verify_freeze": "freeze",
}

__getattr__ = lazily(__name__, _HOMES)
