"""The models that ship with the package: ordinary transformers folders under mechinterp/bundled."""

from __future__ import annotations

from pathlib import Path

__all__ = ["bundled", "bundled_folder"]

_ROOT = Path(__file__).resolve().parent.parent / "bundled"


def bundled() -> tuple[str, ...]:
    """Names of the models that ship."""
    return tuple(sorted(p.parent.name for p in _ROOT.glob("*/config.json")))


def bundled_folder(name: str) -> Path | None:
    """The folder of a bundled model, or None when there is none of that name."""
    return _ROOT / name if name in bundled() else None
