"""`python -m saes.layouts.convert IN OUT`: a pickled checkpoint becomes a safetensors file, in a process of its own.

A `.pt` file is a pickle, and a pickle can run any code. Nothing here does: `torch.load(weights_only=True)` rebuilds
tensors and plain containers and refuses every other class (https://pytorch.org/docs/stable/notes/serialization.html).
Were a way found around that, it would still run in this process only, which holds nothing and ends at once.

OUT holds the tensors under their dotted names (`ae.encoder.weight`); its metadata has one JSON text, `rest`, with the
numbers and words beside them, and `header`, the JSON line that saev writes before the pickle. OUT is whole or not
there. On a refusal the exit status is 2 and the last line of stdout is a JSON object with `what` and `hint`.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechinterp.errors import MechInterpError, StorageError
from mechinterp.storage import canonical_json, save_tensors

__all__ = ["convert", "main"]

MAX_HEADER = 2**20
"""Longest JSON line before a pickle, in bytes."""
_SKIPPED = {"optimizer"}
"""Of a training state, what no dictionary needs."""
_DEPTH = 20


def main(argv: list[str]) -> int:
    """Convert one file. Returns 0, or 2 with the reason as JSON on stdout."""
    try:
        if len(argv) != 2:
            raise StorageError("two arguments are needed", hint="python -m saes.layouts.convert IN OUT")
        convert(Path(argv[0]), Path(argv[1]))
    except MechInterpError as error:
        sys.stdout.write(json.dumps({"what": error.what, "hint": error.hint}) + "\n")
        return 2
    return 0


def convert(source: Path, out: Path) -> None:
    """Read the pickled `source` with PyTorch's restricted reader and write `out`, a safetensors file.

    Raises:
        StorageError: `source` is damaged, is not a pickle of tensors, or holds anything but tensors, numbers and text.
    """
    for name in ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"):
        os.environ.pop(name, None)  # a setting of the caller does not open this door
    header, content = _split(source)
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises whatever the file makes it raise
        raise _refusal(error, source) from None
    if not isinstance(state, dict):
        raise StorageError(f"holds a {type(state).__name__}, not named tensors", where=str(source))
    tensors: dict[str, Tensor] = {}
    rest = _plain({k: v for k, v in state.items() if k not in _SKIPPED}, "", tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > 4 * len(content) + 2**20:  # a tensor of stride 0 can claim any size
        raise StorageError(f"claims {size} bytes of tensors in a file of {len(content)}", where=str(source))
    metadata = {"rest": canonical_json(rest)} | ({} if header is None else {"header": canonical_json(header)})
    save_tensors(out, {name: tensor.clone() for name, tensor in tensors.items()}, metadata)


def _split(source: Path) -> tuple[Any, bytes]:
    """The JSON line that saev puts first (None where there is none), and the pickle after it."""
    try:
        with open(source, "rb") as opened:
            line = opened.readline(MAX_HEADER) if opened.peek(1)[:1] == b"{" else None
            return (None if line is None else json.loads(line)), opened.read()
    except (ValueError, RecursionError) as error:
        raise StorageError(f"its first line is not JSON: {error}", where=str(source)) from None
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror or error}", where=str(source)) from None


def _plain(value: Any, path: str, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    """What JSON can hold of `value`; tensors go to `tensors` under their dotted path and leave null behind."""
    if depth > _DEPTH:
        raise StorageError(f"nests more than {_DEPTH} deep", where=path)
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_quantized:
            raise StorageError(f"{path} is not a dense tensor", hint="save dense tensors")
        tensors[path] = value.detach()
        return None
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{path}.{k}" if path else str(k), tensors, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{path}.{i}", tensors, depth + 1) for i, v in enumerate(value)]
    return value if isinstance(value, str | bool | int | float) or value is None else str(value)


def _refusal(error: Exception, source: Path) -> StorageError:
    """Our error for one of torch.load. Not its own words: they tell how to open the file without protection."""
    text = str(error)
    wanted = re.search(r"GLOBAL ([\w.]+)", text)
    if wanted is not None:
        hint = "only tensors are read; ask its author for a state dict or a safetensors file"
        return StorageError(f"is a pickle that wants to run {wanted[1]}", where=str(source), hint=hint)
    unpickler = re.search(r"WeightsUnpickler error: (.*)", text)
    if unpickler is not None or "weights_only" in text.lower() or "weights only" in text.lower():
        why = f": {unpickler[1][:200]}" if unpickler else ""
        return StorageError(f"is not a pickle of plain tensors{why}", where=str(source), hint="download it again")
    first = (text.splitlines() or [type(error).__name__])[0][:200]
    return StorageError(f"is not a whole file of tensors: {first}", where=str(source), hint="download it again")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
