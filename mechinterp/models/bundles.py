"""The models that ship with the package: ordinary transformers folders.

Those under mechinterp/bundled are there to be explained. Those under mechinterp/controls (trained again, or on permuted
labels) are there to hold explanations beside, and open by their names as well.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["bundled", "bundled_folder", "controls"]

_ROOT = Path(__file__).resolve().parent.parent / "bundled"
_CONTROLS = _ROOT.with_name("controls")


def bundled() -> tuple[str, ...]:
    """Names of the models that ship to be explained."""
    return tuple(sorted(p.parent.name for p in _ROOT.glob("*/config.json")))


def controls() -> tuple[str, ...]:
    """Names of the models that ship to hold explanations beside."""
    return tuple(sorted(p.parent.name for p in _CONTROLS.glob("*/config.json")))


def bundled_folder(name: str) -> Path | None:
    """The folder of a bundled model or control, or None when there is none of that name."""
    if name in bundled():
        return _ROOT / name
    return _CONTROLS / name if name in controls() else None
