"""Files are whole or not there, faults name the path, and a manifest finds every changed byte."""

from __future__ import annotations

import builtins
import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mechinterp import storage
from mechinterp.errors import StorageError
from mechinterp.storage import (
    MANIFEST,
    atomic_path,
    canonical_json,
    load_tensors,
    read_json,
    read_tensor_metadata,
    save_tensors,
    sha256_file,
    verify_folder,
    write_bytes,
    write_json,
    write_manifest,
)

FAULTS = [errno.ENOSPC, errno.EACCES, errno.EIO, errno.EROFS, errno.EDQUOT]


def fail_in(monkeypatch, call: str, code: int) -> None:
    """Make one system call fail the way a full, forbidden or broken disk does."""

    def fails(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    if call == "open":
        real = builtins.open
        monkeypatch.setattr(
            builtins, "open", lambda f, *a, **k: fails() if str(f).endswith(".partial") else real(f, *a, **k)
        )
        monkeypatch.setattr("io.open", builtins.open)
    elif call == "mkstemp":
        monkeypatch.setattr("tempfile.mkstemp", fails)
    elif call == "write":
        monkeypatch.setattr(Path, "write_bytes", fails)
    elif call == "mkdir":
        monkeypatch.setattr(Path, "mkdir", fails)
    else:
        monkeypatch.setattr(os, call, fails)


@pytest.mark.parametrize("code", FAULTS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["mkstemp", "write", "fsync", "replace", "chmod", "open", "mkdir", "close"])
def test_a_disk_fault_names_the_path_and_leaves_the_old_file(tmp_path, monkeypatch, call, code):
    path = tmp_path / "kept.json"
    write_bytes(path, b"old")
    before = set(tmp_path.iterdir())
    with monkeypatch.context() as patched:
        fail_in(patched, call, code)
        with pytest.raises(StorageError, match=os.strerror(code)) as caught:
            write_bytes(path, b"new")
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert set(tmp_path.iterdir()) == before


def test_a_fault_while_cleaning_up_does_not_hide_the_first(tmp_path, monkeypatch):
    fail_in(monkeypatch, "replace", errno.ENOSPC)

    def fails(*_args, **_kwargs):
        raise OSError(errno.EIO, "cleanup")

    monkeypatch.setattr(Path, "unlink", fails)
    with pytest.raises(StorageError, match="No space left"):
        write_bytes(tmp_path / "a", b"new")


def test_an_error_inside_the_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    write_bytes(path, b"old")
    with pytest.raises(KeyError), atomic_path(path) as partial:
        partial.write_bytes(b"half")
        raise KeyError("mine")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_write_over_a_folder_or_below_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="folder"):
        write_bytes(tmp_path / "folder", b"x")
    write_bytes(tmp_path / "file", b"x")
    with pytest.raises(StorageError, match="below"):
        write_bytes(tmp_path / "file" / "below", b"x")


def test_killed_at_any_moment_the_file_is_old_or_new(tmp_path):
    """SIGKILL between every two system calls of a write: never a half-visible file."""
    path = tmp_path / "a"
    for call in ("fsync", "chmod", "replace"):
        write_bytes(path, b"old" * 1000)
        code = (
            "import os, signal, sys\nfrom pathlib import Path\nfrom mechinterp.storage import write_bytes\n"
            f"os.{call} = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
            "write_bytes(Path(sys.argv[1]), b'new' * 1000)\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
        assert done.returncode == -9
        assert path.read_bytes() == b"old" * 1000
    assert list(tmp_path.glob(".*.partial"))  # a killed writer leaves its temporary file ...
    write_manifest(tmp_path, {})
    assert not list(tmp_path.glob(".*.partial"))  # ... and closing the folder removes it
    assert verify_folder(tmp_path) == []


# ---- manifest ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artefact(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("artefact")
    write_bytes(folder / "weights.bin", bytes(range(256)))
    write_json(folder / "deep" / "audit.json", {"a": [1, 2.5, None], "ü": "text"})
    write_manifest(folder / "deep", {"kind": "inner"})
    write_manifest(folder, {"kind": "outer", "seconds": 1.5, "nan": math.nan, "sha256": "mine"})
    return folder


def test_a_closed_folder_verifies(artefact):
    assert verify_folder(artefact) == [] and verify_folder(artefact / "deep") == []


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["weights.bin", "deep/audit.json", "deep/manifest.json", MANIFEST]),
    share=st.floats(0, 1, exclude_max=True),
    mask=st.integers(1, 255),
)
def test_every_single_byte_flip_is_found(artefact, name, share, mask):
    path = artefact / name
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[int(share * len(content))] ^= mask
    path.write_bytes(bytes(flipped))
    try:
        problems = verify_folder(artefact)
    except StorageError as error:
        problems = [str(error)]
    finally:
        path.write_bytes(content)
    assert problems and any(Path(name).name in problem for problem in problems)


def test_a_change_of_white_space_in_a_manifest_is_found(tmp_path):
    write_manifest(tmp_path, {})
    path = tmp_path / MANIFEST
    path.write_bytes(path.read_bytes().replace(b"\n", b" ", 1))
    assert verify_folder(tmp_path) == [f"{MANIFEST}: does not match its own sha256"]


def test_added_lost_and_outside_files_are_found(tmp_path):
    write_bytes(tmp_path / "a", b"1")
    write_manifest(tmp_path, {})
    (tmp_path / "extra").write_bytes(b"")
    (tmp_path / "a").unlink()
    assert verify_folder(tmp_path) == ["a: missing", "extra: not in the manifest"]
    write_json(tmp_path / MANIFEST, {"files": {"../../secret": {"sha256": "0"}, "/etc/hostname": {"sha256": "0"}}})
    assert sum("outside" in problem for problem in verify_folder(tmp_path)) == 2


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"files": []}', b'{"files": {"a": 1}}', b"\xff", b"[" * 9999])
def test_a_manifest_that_is_none_is_a_storage_error(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(StorageError, match=MANIFEST):
        verify_folder(tmp_path)


# ---- canonical JSON ------------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=10)


@settings(max_examples=100, deadline=None)
@given(values)
@example("\ud800")
@example({"\udcff": ["\udfff"]})
def test_json_survives_and_same_value_gives_same_bytes(tmp_path_factory, value):
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text
    assert text.encode()  # also with half a surrogate pair
    if isinstance(value, dict):
        assert canonical_json(dict(reversed(list(value.items())))) == text


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan"), torch.tensor(math.inf)])
def test_not_a_number_becomes_null(bad):
    assert json.loads(canonical_json({"x": [bad]})) == {"x": [None]}


def test_numbers_of_other_libraries_and_sets():
    value = {"a": np.int64(3), "b": np.arange(3), "c": torch.tensor([1.5]), "d": {"z", "a"}, "e": Path("x/y"), 1: (2,)}
    expected = {"a": 3, "b": [0, 1, 2], "c": [1.5], "d": ["a", "z"], "e": "x/y", "1": [2]}
    assert json.loads(canonical_json(value)) == expected


def test_json_with_nan_is_refused_on_reading(tmp_path):
    (tmp_path / "a.json").write_text('{"x": NaN}')
    with pytest.raises(StorageError, match=r"a.json.*NaN"):
        read_json(tmp_path / "a.json")


# ---- safetensors ---------------------------------------------------------------------------------------------------


def test_tensors_come_back_as_they_were_and_the_bytes_are_the_same(tmp_path):
    tensors = {
        "b": torch.arange(6.0).reshape(2, 3).T,
        "a": torch.ones(3, dtype=torch.bfloat16),
        "i": torch.tensor([1, 2]),
        "empty": torch.zeros(0, 4),
    }
    metadata = {str(i): f"value {i}" for i in range(30)}
    save_tensors(tmp_path / "1", tensors, metadata)
    save_tensors(tmp_path / "2", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert sha256_file(tmp_path / "1") == sha256_file(tmp_path / "2")
    loaded = load_tensors(tmp_path / "1")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    assert read_tensor_metadata(tmp_path / "1") == metadata


def test_other_libraries_open_our_tensors(tmp_path):
    from safetensors import safe_open

    save_tensors(tmp_path / "1", {"x": torch.arange(5)}, {"k": "v"})
    with safe_open(tmp_path / "1", "pt") as opened:
        assert opened.metadata() == {"k": "v"} and torch.equal(opened.get_tensor("x"), torch.arange(5))


def test_a_pickle_is_refused_and_never_run(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(StorageError, match="safetensors"):
        load_tensors(tmp_path / "a.pt")


def test_the_storage_module_stays_light():
    code = "import sys, mechinterp.storage; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'safetensors')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert storage.SCHEMA_VERSION == 1
