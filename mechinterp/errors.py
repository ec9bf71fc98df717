"""One family of errors. Each message names what is wrong, where, and what to do."""

from __future__ import annotations

__all__ = ["DataError", "MechInterpError", "ModelError", "NonFiniteError", "StorageError", "UsageError"]


class MechInterpError(Exception):
    """Base of every error that this package raises on purpose.

    Args:
        what: what is wrong, with the offending value in it.
        where: the file, field, hook name or argument it concerns.
        hint: what the user can do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None):
        self.what, self.where, self.hint = what, where, hint
        head = f"{where}: {what}" if where else what
        super().__init__(_one_line(f"{head} ({hint})" if hint else head))


def _one_line(text: str) -> str:
    """A message is one line whatever name, from whatever file, stands in it: what does not print is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UsageError(MechInterpError):
    """A call or command line that cannot mean anything."""


class DataError(MechInterpError):
    """An image, table, DICOM file or data folder that cannot be read as what it claims to be."""


class ModelError(MechInterpError):
    """A model folder that does not load completely, or a hook point or site that a model does not have."""


class StorageError(MechInterpError):
    """An artefact on disk that is missing, damaged, from another version, or cannot be written."""


class NonFiniteError(MechInterpError):
    """A NaN or infinity. The run stops at once; `images` names the images it came from."""

    def __init__(
        self, what: str, *, images: list[str] | None = None, where: str | None = None, hint: str | None = None
    ):
        self.images = images or []
        shown = ", ".join(self.images[:5]) + (" ..." if len(self.images) > 5 else "")
        super().__init__(f"{what}; images: {shown}" if shown else what, where=where, hint=hint)
