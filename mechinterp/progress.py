"""Progress that is quiet when nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["progress"]

T = TypeVar("T")


def progress(items: Iterable[T], what: str, *, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Iterate with a bar, an ETA and a rate on a terminal; silently elsewhere."""
    from tqdm.auto import tqdm

    yield from tqdm(items, desc=what, total=total, unit=unit, disable=not sys.stderr.isatty(), leave=False)
