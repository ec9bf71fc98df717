"""Files that are whole or not there: atomic writes, and a manifest that closes each artefact folder.

A write goes to a temporary file in the same folder, is flushed and fsynced, and is renamed over its name; then the
folder is fsynced. `manifest.json` lists the sha256 and size of every other file in its folder and is written last, so
a folder with a manifest that verifies is complete.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mechinterp.errors import StorageError

__all__ = [
    "MANIFEST",
    "atomic_path",
    "canonical_json",
    "read_json",
    "sha256_file",
    "verify_folder",
    "write_bytes",
    "write_json",
    "write_manifest",
]

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it over `path` when the block ends without an error.

    Raises StorageError (with the path and the system's reason) when it cannot be written; the old file then stands.
    """
    path = Path(path)
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
        partial = Path(name)
        yield partial
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StorageError(f"cannot write: {error.strerror or error}", where=str(path)) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_path(path) as partial:
        partial.write_bytes(content)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, two-space indent and no NaN: not-a-number becomes null. Same value, same bytes."""
    return json.dumps(_plain(value), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as canonical JSON, atomically."""
    write_bytes(path, canonical_json(value).encode())


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises StorageError naming the file when it is missing, damaged or no text."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise StorageError("no such file", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise StorageError(f"is not JSON: {error}", where=str(path), hint="restore or remove the file") from error
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror or error}", where=str(path)) from error


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file."""
    try:
        with open(path, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror or error}", where=str(path)) from error


def write_manifest(folder: Path, about: Mapping[str, Any]) -> str:
    """Close an artefact folder: hash every file below it into `manifest.json`. Returns the manifest's sha256."""
    folder = Path(folder)
    files = {
        str(path.relative_to(folder)): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST and not path.name.endswith(".partial")
    }
    write_json(folder / MANIFEST, {"schema_version": SCHEMA_VERSION, **about, "files": files})
    return sha256_file(folder / MANIFEST)


def verify_folder(folder: Path) -> list[str]:
    """Check every file of an artefact folder against its manifest; return one line per problem (empty: all is well).

    Raises StorageError when there is no readable manifest.
    """
    folder = Path(folder)
    manifest = read_json(folder / MANIFEST)
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(v, dict) and "sha256" in v for v in listed.values()):
        raise StorageError("lists no files", where=str(folder / MANIFEST), hint="make the artefact again")
    problems = []
    for name, entry in sorted(listed.items()):
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif sha256_file(path) != entry["sha256"]:
            problems.append(f"{name}: does not match its sha256")
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST}
    problems += [f"{name}: not in the manifest" for name in sorted(present - set(listed))]
    return problems


def _plain(value: Any) -> Any:
    """Turn numpy and torch scalars, paths, tuples and not-a-number into what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [_plain(v) for v in items]
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)
