"""One self-contained HTML page from a template: everything from data or model is escaped, nothing is loaded.

Style and script are our own files; the page's content security policy names them by hash, so nothing else can run.
"""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["clean", "data_uri", "number", "page", "percent", "signed", "span"]


def page(
    template: Path,
    style: str,
    script: str = "",
    filters: Mapping[str, Callable[..., str | None]] | None = None,
    **values: Any,
) -> str:
    """Render a jinja2 template.

    Args:
        template: file, whose folder may hold what it includes.
        style, script: names of files beside it. The template gets their text as `style` and `script`, and
            `style_hash`, `script_hash` (sha256, base64) for its content security policy.
        filters: more filters; `number`, `signed`, `percent` and `picture` are there.
        values: what the template shows.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "percent": percent, "picture": data_uri}
    environment.filters |= filters or {}
    environment.finalize = clean
    for name, file in (("style", style), ("script", script)):
        text = (template.parent / file).read_text() if file else ""
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        values |= {name: Markup(text), f"{name}_hash": digest}  # our own files, not data
    return environment.get_template(template.name).render(values)


def clean(value: Any) -> Any:
    """Control characters, and marks that reorder text, are shown as a replacement character; None as a dash."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return "–" if value is None else value
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n\t" else c for c in value)


def data_uri(content: bytes) -> str:
    """A PNG or JPEG as a data: URI."""
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash where there is none."""
    return "–" if _missing(value) else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 2) -> str:
    """A number with its sign."""
    return "–" if _missing(value) else f"{value:+.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 0) -> str:
    """A share in per cent."""
    return "–" if value is None or not np.isfinite(value) else f"{100 * value:.{digits}f} %"


def span(value: Sequence[float | None] | None, form: str) -> tuple[str, str] | None:
    """Both ends of an interval in a format such as "+.2f", or None where one is missing."""
    if not value or any(_missing(end) for end in value):
        return None
    return format(value[0], form), format(value[1], form)


def _missing(value: float | None) -> bool:
    return value is None or not np.isfinite(value)
