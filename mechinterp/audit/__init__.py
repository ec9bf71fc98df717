"""The audit: does a model rely on a shortcut, how much, whom does it harm, and could we have seen it?

    from mechinterp.audit import audit
    result = audit(model, data, out="out/audit")
    print(result.summary())

The names below are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechinterp.audit.pipeline import AuditResult, audit
    from mechinterp.audit.settings import Settings

__all__ = ["AuditResult", "Settings", "audit"]

_HOMES = {"AuditResult": "pipeline", "Settings": "settings", "audit": "pipeline"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
