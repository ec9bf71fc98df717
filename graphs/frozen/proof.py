"""Is what a graph names as held really held? One proof by `verify_freeze` for every entry of its `freezes`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mechinterp.models.freeze import Check, verify_freeze
from mechinterp.models.freeze_words import freezes_in_words

__all__ = ["verify"]

_GATE = re.compile(r"gate of the MLP of (\S+)")
_CAPTION = re.compile(r"^text\.\d+\.")


def verify(model: Any, freezes: Sequence[str], batch: Any = None) -> list[Check]:
    """One check for each entry of the `freezes` of a pass, a replacement or a graph (`graph.meta["freezes"]`), by name.

    `model` is what was frozen, a HookedVLM or a HookedTransformer; `batch` as `verify_freeze` takes it. An entry that
    names nothing that the model holds is a failed check: no freeze is believed without a proof.
    """
    names = [_proof_of(model, freeze) for freeze in freezes]
    known = {*model.hook_dict, *freezes_in_words(str(getattr(model, "family", "")))}
    wanted = list(dict.fromkeys(name for name in names if name in known))
    found = {check.name: check for check in verify_freeze(model, batch, wanted)}
    return [
        replace(found[name], name=freeze) if name in found else Check(freeze, False, "nothing in the model proves it")
        for freeze, name in zip(freezes, names, strict=True)
    ]


def _proof_of(model: Any, freeze: str) -> str:
    """What `verify_freeze` calls it: captions share a tower, and TransformerLens has no name for its only one."""
    gate = _GATE.fullmatch(freeze)
    name = f"{gate[1]}.mlp.hook_post" if gate else freeze
    name = _CAPTION.sub("text.", name)
    return name.removeprefix("text.") if type(model).__name__ == "HookedTransformer" else name
