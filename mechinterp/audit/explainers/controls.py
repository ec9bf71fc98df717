"""Other models that maps are held beside: one trained on permuted labels, one trained again, one built differently."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from mechinterp.audit.dictionary import model_folder, training_record
from mechinterp.errors import MechInterpError, UsageError
from mechinterp.models import HookedVLM

__all__ = ["Controls", "controls_of"]


@dataclass(frozen=True)
class Controls:
    """What a model's maps are held beside; None leaves a check out.

    Args:
        permuted: of the same kind, trained on permuted labels: maps must change (Adebayo et al. 2018).
        again: the same, trained again from another seed: maps must come back (Arun et al. 2021, repeatability).
        other: another architecture that answers the same questions: maps must come back (reproducibility).
    """

    permuted: HookedVLM | None = None
    again: HookedVLM | None = None
    other: HookedVLM | None = None


def controls_of(
    model: HookedVLM, load: Callable[[str], HookedVLM], named: Mapping[str, str | None] | None = None
) -> Controls:
    """The models that somebody names, else those in `controls` of the model's own training.json, by name or folder.

    A folder in training.json may be relative to the model's own. Raises UsageError when a model is named as its own
    control, and when one that training.json names does not open.
    """
    said = training_record(model).get("controls")
    known = said if isinstance(said, dict) else {}
    wanted = {f.name: (named or {}).get(f.name) or known.get(f.name) for f in fields(Controls)}
    made = {}
    for key, name in wanted.items():
        if name and (named or {}).get(key):
            made[key] = load(str(name))
        elif name:
            made[key] = _recorded(model, load, key, str(name))
    for key, other in made.items():
        if other.sha256 == model.sha256:
            raise UsageError("is the model itself", where=f"--{key} {wanted[key]}", hint="name another model")
    return Controls(**made)


def _recorded(model: HookedVLM, load: Callable[[str], HookedVLM], key: str, name: str) -> HookedVLM:
    folder = model_folder(model)
    beside = folder / name if folder else None
    try:
        return load(str(beside) if beside and beside.is_dir() else name)
    except MechInterpError as error:
        hint = f"name another with --{key}, or take it out of the file"
        raise UsageError(
            f"names {name!r}, which does not open: {error}", where=f"training.json: controls.{key}", hint=hint
        ) from error
