"""The near side of `saes.layouts.convert`: starts it, waits, and reads the safetensors file that it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from mechinterp.errors import StorageError
from mechinterp.storage import load_tensors, read_tensor_metadata

__all__ = ["read_checkpoint"]

SECONDS = 900
"""How long one conversion may take."""


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any] | None]:
    """Tensors by dotted name, the numbers and words beside them, and saev's header line (None where there is none).

    A safetensors file is read here. Anything else is a pickle, and is converted by a process of its own first.

    Raises:
        StorageError: the file is missing, damaged, or holds anything but tensors, numbers and text.
    """
    if not path.is_file():
        raise StorageError("no such file", where=str(path))
    if path.suffix == ".safetensors":
        return load_tensors(path), {}, None
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "converted.safetensors"
        _convert_apart(path, converted)
        metadata = read_tensor_metadata(converted)
        header = json.loads(metadata["header"]) if "header" in metadata else None
        if header is not None and not isinstance(header, dict):
            raise StorageError("its first line is not a JSON object", where=str(path))
        tensors = {name: tensor.clone() for name, tensor in load_tensors(converted).items()}
        return tensors, json.loads(metadata["rest"]), header


def _convert_apart(path: Path, converted: Path) -> None:
    """Run `python -m saes.layouts.convert`, with no say of ours in what it finds and none of its in this process."""
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "saes.layouts.convert", str(path.resolve()), str(converted)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            stdin=subprocess.DEVNULL,
            cwd=converted.parent,
            env={**os.environ, "PYTHONPATH": paths},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise StorageError(f"was not converted in {SECONDS} s", where=str(path)) from None
    if done.returncode == 0 and converted.is_file():
        return
    try:
        said = json.loads(done.stdout.splitlines()[-1])
        what, hint = str(said["what"]), said["hint"]
    except (ValueError, LookupError, TypeError):  # killed, out of memory, or not ours at all
        what, hint = f"the converter ended with status {done.returncode}", "the file is damaged or does not fit memory"
    raise StorageError(what, where=str(path), hint=hint)
