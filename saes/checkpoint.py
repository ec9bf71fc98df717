"""A training state that is whole or not there, without pickle.

One safetensors file: the weights, Adam's moments and the counters, and in its metadata one JSON text with the numbers
and with what run it is of. Floats survive JSON exactly, so resuming is exact.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from mechinterp.errors import StorageError
from mechinterp.storage import canonical_json, load_tensors, read_tensor_metadata, save_tensors
from saes.engine.trainer import Trainer

__all__ = ["CHECKPOINT", "read_state", "restore", "same_run", "save_state"]

CHECKPOINT = "checkpoint.partial"
"""`.partial`: a manifest does not list it, since it is gone from a finished folder. It outlives the writing of one."""


def save_state(path: Path, trainer: Trainer, extra: dict[str, Any]) -> None:
    """Write the state of a trainer and what `extra` says of the run."""
    tensors, numbers = trainer.state()
    rest = {"extra": extra, "numbers": numbers}
    save_tensors(path, {name: tensor.cpu() for name, tensor in tensors.items()}, {"state": _json(rest)})


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and the rest of a checkpoint. Raises StorageError, naming the file, when it is damaged."""
    try:
        return load_tensors(path), json.loads(read_tensor_metadata(path)["state"])
    except (KeyError, ValueError, RecursionError) as error:
        raise StorageError(f"is damaged: {error}", where=str(path), hint="remove it to train from the start") from error


def restore(path: Path, trainer: Trainer, wanted: dict[str, Any]) -> None:
    """Put a trainer back into a saved state. Raises StorageError when it is damaged or of another run than `wanted`."""
    tensors, rest = read_state(path)
    if not same_run(rest.get("extra"), wanted):
        raise StorageError(
            "holds a checkpoint of another run", where=str(path.parent), hint="choose another folder, or remove it"
        )
    try:
        trainer.load_state(tensors, rest["numbers"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise StorageError(f"is damaged: {error}", where=str(path), hint="remove it to train from the start") from error


def same_run(found: Any, wanted: dict[str, Any]) -> bool:
    """Whether a record on disk describes the run that is asked for."""
    return canonical_json(found) == canonical_json(wanted)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
