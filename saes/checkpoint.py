"""A training state that is whole or not there, without pickle.

One safetensors file: the tensors of the SAE, of Adam and of the trainer's counters, and in its metadata one JSON text
with the rest (scheduler, parameter groups, step counters). Floats survive JSON exactly, so resuming is exact.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mechinterp.errors import StorageError
from mechinterp.storage import canonical_json, load_tensors, read_tensor_metadata, save_tensors

__all__ = ["CHECKPOINT", "read_state", "restore", "save_state"]

CHECKPOINT = "checkpoint.partial"
"""`.partial`: a manifest does not list it, since it is gone from a finished folder. It outlives the writing of one."""

_TENSORS = ("act_freq_scores", "n_forward_passes_since_fired")
_NUMBERS = ("n_training_steps", "n_training_samples", "n_frac_active_samples", "started_fine_tuning")


def save_state(path: Path, trainer: Any, extra: dict[str, Any]) -> None:
    """Write the state of a sae-lens trainer and what `extra` says of the run."""
    optimizer = trainer.optimizer.state_dict()
    tensors = {f"sae.{name}": tensor for name, tensor in trainer.sae.state_dict().items()}
    tensors |= {f"trainer.{name}": getattr(trainer, name) for name in _TENSORS}
    for number, entries in optimizer["state"].items():
        tensors |= {f"adam.{number}.{name}": tensor for name, tensor in entries.items()}
    rest = {
        "extra": extra,
        "numbers": {name: getattr(trainer, name) for name in _NUMBERS},
        "param_groups": optimizer["param_groups"],
        "lr_scheduler": trainer.lr_scheduler.state_dict(),
        "coefficients": {name: each.state_dict() for name, each in trainer.coefficient_schedulers.items()},
    }
    save_tensors(path, tensors, {"state": json.dumps(rest, sort_keys=True)})


def read_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and the rest of a checkpoint. Raises StorageError, naming the file, when it is damaged."""
    try:
        return load_tensors(path), json.loads(read_tensor_metadata(path)["state"])
    except (KeyError, ValueError, RecursionError) as error:
        raise StorageError(f"is damaged: {error}", where=str(path), hint="remove it to train from the start") from error


def restore(trainer: Any, tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> None:
    """Put a trainer back into a saved state."""
    trainer.sae.load_state_dict(_below("sae.", tensors))
    for name in _TENSORS:
        setattr(trainer, name, tensors[f"trainer.{name}"])
    for name in _NUMBERS:
        setattr(trainer, name, rest["numbers"][name])
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in _below("adam.", tensors).items():
        number, _, entry = name.partition(".")
        state.setdefault(int(number), {})[entry] = tensor
    trainer.optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})
    trainer.lr_scheduler.load_state_dict(rest["lr_scheduler"])
    for name, each in trainer.coefficient_schedulers.items():
        each.load_state_dict(rest["coefficients"][name])


def same_run(found: Any, wanted: dict[str, Any]) -> bool:
    """Whether a record on disk describes the run that is asked for."""
    return canonical_json(found) == canonical_json(wanted)


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
