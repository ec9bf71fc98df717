"""HookedVLM: an unchanged transformers vision-language model with TransformerLens hook points.

    from mechinterp.models import HookedVLM

The names below are imported on first use; importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechinterp.models.bundles import bundled
    from mechinterp.models.doctor import Check, doctor, verify_freeze
    from mechinterp.models.families import Family, families
    from mechinterp.models.hooked import HookedVLM

__all__ = ["Check", "Family", "HookedVLM", "bundled", "doctor", "families", "verify_freeze"]

_HOMES = {
    "Check": "doctor",
    "Family": "families",
    "HookedVLM": "hooked",
    "bundled": "bundles",
    "doctor": "doctor",
    "families": "families",
    "verify_freeze": "doctor",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = getattr(import_module(f"mechinterp.models.{_HOMES[name]}"), name)
        globals()[name] = found  # so that `doctor` stays the function, not the submodule of the same name
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
