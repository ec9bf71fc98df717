"""Files that are whole or not there: atomic writes, and a manifest that closes each artefact folder.

A write goes to a temporary file in the same folder, is flushed and fsynced, and is renamed over its name; then the
folder is fsynced. `manifest.json` lists the sha256 and size of every other file in its folder and is written last, so
a folder with a manifest that verifies is complete. The manifest also carries the sha256 of its own other fields.
Tensors live in safetensors files only (https://huggingface.co/docs/safetensors); nothing here reads or writes pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mechinterp.errors import StorageError

if TYPE_CHECKING:  # torch takes a second to import, and most users of this file need none of it
    from torch import Tensor

__all__ = [
    "MANIFEST",
    "atomic_path",
    "canonical_json",
    "check_writable",
    "discard_earlier",
    "load_tensors",
    "read_json",
    "read_tensor_metadata",
    "save_tensors",
    "sha256_file",
    "verify_folder",
    "write_bytes",
    "write_json",
    "write_manifest",
]

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
MAX_TENSOR_HEADER = 100 * 2**20  # bytes; the limit of the safetensors library itself


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
        partial = Path(name)
        os.close(handle)
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
            with suppress(OSError):  # the first error is the one to report
                partial.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise StorageError where `folder` cannot be made or written to: before the work, not after it. Leaves nothing.

    A file is opened, and gone again, in the folder or in the nearest one above it that exists.
    """
    folder = Path(folder)
    hint = "choose another --out"
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
        if not there.is_dir():
            raise StorageError("is no folder", where=str(there), hint=hint)
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise StorageError(f"cannot write: {error.strerror or error}", where=str(folder), hint=hint) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_path(path) as partial:
        partial.write_bytes(content)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, two-space indent and no NaN: not-a-number becomes null. Same value, same bytes."""
    plain = _plain(value)
    text = json.dumps(plain, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, e.g. from a file name that is not UTF-8: escape it
        text = json.dumps(plain, sort_keys=True, indent=2, ensure_ascii=True, allow_nan=False) + "\n"
    return text


def write_json(path: Path, value: Any) -> None:
    """Write `value` as canonical JSON, atomically."""
    write_bytes(path, canonical_json(value).encode())


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises StorageError naming the file when it is missing, damaged, no text, or holds NaN."""
    try:
        return json.loads(Path(path).read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise StorageError("no such file", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise StorageError(f"is not JSON: {error}", where=str(path), hint="restore or remove the file") from error
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror or error}", where=str(path)) from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as a safetensors file, atomically; same tensors and metadata, same bytes.

    `metadata` maps strings to strings, as the format asks. The header is written here with sorted keys because the
    library writes metadata in an order that changes from run to run.
    """
    from safetensors.torch import save

    kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        content = save(kept)
    except Exception as error:  # the library raises several kinds (shared memory, sparse, unknown dtype)
        raise StorageError(f"tensors cannot be written: {_first_line(error)}", where=str(path)) from error
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    if metadata:
        header["__metadata__"] = {str(k): str(v) for k, v in metadata.items()}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned to 8 bytes
    with atomic_path(path) as partial, open(partial, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.write(memoryview(content)[8 + size :])


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file into `{name: tensor}` on the CPU. Raises StorageError when it is not a whole one."""
    from safetensors.torch import load_file

    read_tensor_metadata(path)  # checks the header before anything is mapped or allocated
    try:
        return load_file(path)
    except Exception as error:  # the library raises several kinds for a header that lies
        raise StorageError(f"is not a whole safetensors file: {_first_line(error)}", where=str(path)) from error


def read_tensor_metadata(path: Path) -> dict[str, str]:
    """The string metadata in the header of a safetensors file. Raises StorageError when the header is damaged."""
    hint = "only safetensors files are read; restore the file or make it again"
    try:
        with open(path, "rb") as opened:
            total = os.fstat(opened.fileno()).st_size
            size = int.from_bytes(opened.read(8), "little")
            if total < 10 or size > min(total - 8, MAX_TENSOR_HEADER):
                raise StorageError("is not a whole safetensors file", where=str(path), hint=hint)
            header = json.loads(opened.read(size), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise StorageError("no such file", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise StorageError("has no safetensors header", where=str(path), hint=hint) from error
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise StorageError("has no safetensors header", where=str(path), hint=hint)
    return metadata


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file."""
    try:
        with open(path, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror or error}", where=str(path)) from error


def write_manifest(folder: Path, about: Mapping[str, Any]) -> str:
    """Close an artefact folder: hash every file below it into `manifest.json`. Returns the manifest's sha256.

    Temporary files that a killed writer left behind are removed.
    """
    folder = Path(folder)
    try:
        for left in folder.rglob(".*.partial"):
            left.unlink(missing_ok=True)
        files = {
            name: {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size}
            for name in _files(folder)
        }
    except OSError as error:
        raise StorageError(f"cannot be closed: {error.strerror or error}", where=str(folder)) from error
    manifest = {"schema_version": SCHEMA_VERSION, **about, "files": files}
    manifest["manifest_sha256"] = _digest_of(manifest)
    write_json(folder / MANIFEST, manifest)
    return sha256_file(folder / MANIFEST)


def discard_earlier(folder: Path, kind: str) -> None:
    """Remove an earlier artefact of this kind from a folder: its manifest, then the files that this lists.

    A new artefact in the same folder would seal them as its own. Files that no manifest lists stay. Raises StorageError
    where the manifest is of another kind of artefact, or cannot be read: nothing of it is touched.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return
    manifest, hint = read_json(path), "choose another --out"
    held = manifest.get("kind") if isinstance(manifest, dict) else None
    if held != kind or not isinstance(manifest.get("files"), dict):
        raise StorageError(f"holds an artefact of kind {held!r}, not {kind!r}", where=str(folder), hint=hint)
    names = [
        name for name in map(PurePosixPath, manifest["files"]) if not name.is_absolute() and ".." not in name.parts
    ]
    try:
        path.unlink()
        for name in names:
            (path.parent / name).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot be replaced: {error.strerror or error}", where=str(folder)) from error


def verify_folder(folder: Path) -> list[str]:
    """Check every file of an artefact folder against its manifest; return one line per problem (empty: all is well).

    A change of any single byte, in a file or in the manifest itself, is found. Raises StorageError when there is no
    readable manifest.
    """
    folder = Path(folder)
    manifest = read_json(folder / MANIFEST)
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(v, dict) and "sha256" in v for v in listed.values()):
        raise StorageError("lists no files", where=str(folder / MANIFEST), hint="make the artefact again")
    problems = []
    own = manifest.pop("manifest_sha256", None)
    whole = canonical_json({**manifest, "manifest_sha256": own}).encode()
    if own != _digest_of(manifest) or whole != (folder / MANIFEST).read_bytes():
        problems.append(f"{MANIFEST}: does not match its own sha256")
    for name, entry in sorted(listed.items()):
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            problems.append(f"{name!r}: points outside the folder")
        elif not path.is_file():
            problems.append(f"{name}: missing")
        elif sha256_file(path) != entry["sha256"]:
            problems.append(f"{name}: does not match its sha256")
    return problems + [f"{name}: not in the manifest" for name in sorted(set(_files(folder)) - set(listed))]


def _files(folder: Path) -> list[str]:
    """Names, relative and sorted, of the files an artefact folder is made of: not its own manifest, no leftovers."""
    own = folder / MANIFEST
    found = (p for p in folder.rglob("*") if p.is_file() and p != own and not p.name.endswith(".partial"))
    return sorted(p.relative_to(folder).as_posix() for p in found)


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(manifest).encode()).hexdigest()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _plain(value: Any) -> Any:
    """Turn numpy and torch scalars, paths, tuples and not-a-number into what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        plain = [_plain(v) for v in value]
        return sorted(plain, key=repr) if isinstance(value, set | frozenset) else plain
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)
