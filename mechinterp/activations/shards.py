"""One shard: a safetensors file of rows that is written at once and read through a memory map."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, UInt8
from safetensors.numpy import save

from mechinterp.errors import StorageError
from mechinterp.storage import write_bytes

__all__ = ["Rows", "map_shard", "write_shard"]

_DTYPES = {"F32": np.dtype("<f4"), "I32": np.dtype("<i4"), "U8": np.dtype("u1")}
_TENSORS = {"activations": "F32", "image": "I32", "token": "I32", "patch": "I32", "kind": "U8"}
_HINT = "extract the activations again"


@dataclass(frozen=True)
class Rows:
    """Rows of one site with where each comes from; the columns of `format.md`, Rows and shards."""

    activations: Float32[np.ndarray, "row d"]
    image: Int32[np.ndarray, " row"]
    token: Int32[np.ndarray, " row"]
    patch: Int32[np.ndarray, " row"]
    kind: UInt8[np.ndarray, " row"]

    def __len__(self) -> int:
        return len(self.image)

    @classmethod
    def concatenate(cls, parts: list[Rows]) -> Rows:
        """The rows of several batches, in order."""
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in _TENSORS})


def write_shard(path: Path, rows: Rows) -> None:
    """Write one shard atomically. Raises StorageError when the disk refuses."""
    # not save_file: it writes under a temporary name of its own, which a killed run would leave behind for good
    write_bytes(path, save({name: np.ascontiguousarray(getattr(rows, name)) for name in _TENSORS}))


def map_shard(path: Path, d: int) -> Rows:
    """Memory-map a shard without reading its rows.

    Raises StorageError, naming the file, when it is missing, cut short, or not a shard of width `d`.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"its header claims {length} bytes of {size}")
            header = json.loads(opened.read(length))
        arrays = {name: _map(path, header[name], 8 + length, size, dtype) for name, dtype in _TENSORS.items()}
    except FileNotFoundError as error:
        raise StorageError("no such shard", where=str(path), hint=_HINT) from error
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"is damaged: {error}", where=str(path), hint=_HINT) from error
    count = len(arrays["image"])
    expected = {name: (count, d) if name == "activations" else (count,) for name in _TENSORS}
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise StorageError(f"{name} has shape {arrays[name].shape}, not {shape}", where=str(path), hint=_HINT)
    return Rows(**arrays)


def _map(path: Path, entry: dict[str, Any], start: int, size: int, dtype: str) -> np.ndarray:
    """Map one tensor of a safetensors file; ValueError when the header does not fit the file."""
    shape = tuple(int(n) for n in entry["shape"])
    first, last = (int(n) for n in entry["data_offsets"])
    kind = _DTYPES[dtype]
    count = int(np.prod(shape, dtype=object)) if shape else 1
    if entry["dtype"] != dtype or min(shape, default=0) < 0:
        raise ValueError(f"a tensor is {entry['dtype']}{list(shape)}")
    if last - first != count * kind.itemsize or first < 0 or start + last > size:
        raise ValueError("its offsets do not fit its shapes")
    if count == 0:
        return np.zeros(shape, kind)
    return np.memmap(path, kind, "r", offset=start + first, shape=shape)
