"""The audit: does a model rely on a shortcut, how much, whom does it harm, and could we have seen it?

    from mechinterp.audit import audit
    result = audit(model, data, out="out/audit")
    print(result.summary())

The names below are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mechinterp.lazy import lazily

if TYPE_CHECKING:
    from mechinterp.audit.pipeline import AuditResult, audit
    from mechinterp.audit.settings import Settings, settings_of

__all__ = ["AuditResult", "Settings", "audit", "settings_of"]

_HOMES = {"AuditResult": "pipeline", "Settings": "settings", "audit": "pipeline", "settings_of": "settings"}

__getattr__ = lazily(__name__, _HOMES)
