"""HookedVLM: an unchanged transformers vision-language model with TransformerLens hook points.

    from mechinterp.models import HookedVLM

The names below are imported on first use; importing this package loads neither torch nor transformers. The check of a
user's own model is `mechinterp.models.doctor.doctor`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechinterp.models.bundles import bundled
    from mechinterp.models.freeze import Check, verify_freeze
    from mechinterp.models.hooked import HookedVLM
    from mechinterp.models.tables import Family, families

__all__ = ["Check", "Family", "HookedVLM", "bundled", "families", "verify_freeze"]

_HOMES = {
    "Check": "freeze",
    "Family": "tables",
    "HookedVLM": "hooked",
    "bundled": "bundles",
    "families": "tables",
    "verify_freeze": "freeze",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"mechinterp.models.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
