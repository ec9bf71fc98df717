"""Broken files of every kind we read: each opens, or gives one of our errors that says where. Nothing else.

No other exception, no warning (pytest makes them errors), nothing that takes over 5 seconds. Bytes are flipped, cut,
repeated and overwritten by a seeded mutator; fields are mutated by hypothesis.
"""

from __future__ import annotations

import io
import json
import os
import signal
import struct
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless

from mechinterp.data import load_dicom, load_image, open_data, open_vqa
from mechinterp.errors import MechInterpError
from mechinterp.storage import load_tensors, read_json, save_tensors, verify_folder, write_json, write_manifest

SEEDS = range(60)  # for each of the samples below: over 1,000 files in all, besides what hypothesis makes
LIMIT = 5.0  # seconds
MARKS = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xd9", b"\xff\xd8", b"IDAT", b"../", b'"', b"\0"]


class TooSlow(BaseException):
    """Not an Exception, so that no handler of ours takes it for a damaged file."""


@contextmanager
def time_limit(seconds: float = LIMIT):
    def ring(*_):
        raise TooSlow(f"took over {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def mutate(content: bytes, seed: int) -> bytes:
    """Break some bytes: flips, a cut, a repeat, a hole, or marks that mean something to parsers."""
    rng = np.random.default_rng(seed)
    broken = bytearray(content)
    at = int(rng.integers(0, len(broken)))
    # half of all changes hit the first kilobyte, where the headers are
    near = int(rng.integers(0, min(len(broken), 1024)))
    kind = seed % 6
    if kind == 0:
        return bytes(broken[: at if seed % 12 else near])
    if kind == 1:
        for position in rng.integers(0, len(broken), size=rng.integers(1, 40)):
            broken[position] ^= 1 << int(rng.integers(0, 8))
    elif kind == 2:
        broken[near] = int(rng.integers(0, 256))
        broken[at] = int(rng.integers(0, 256))
    elif kind == 3:
        mark = MARKS[int(rng.integers(len(MARKS)))]
        broken[near : near + len(mark)] = mark
    elif kind == 4:
        broken[at:at] = broken[max(0, at - 64) : at] * int(rng.integers(1, 30))
    else:
        del broken[near : near + int(rng.integers(1, 64))]
    return bytes(broken)


def opens_or_says_where(action: Callable[[], object], names: tuple[str, ...]) -> bool:
    """Run `action`: True when it works, False when it gives our error naming one of `names`; anything else fails."""
    with time_limit():
        try:
            action()
        except MechInterpError as error:
            assert error.where and any(name in str(error) for name in names), f"names no place: {error}"
            assert len(str(error)) < 1500 and "\n" not in str(error), "more than one line"
            return False
    return True


# ---- samples --------------------------------------------------------------------------------------------------------


def picture(fmt: str, mode: str = "L", **options) -> bytes:
    grey = (np.add.outer(np.arange(40), np.arange(48)) * 3 % 256).astype(np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = 6
    return tags


IMAGES = {
    "grey.png": lambda: picture("PNG"),
    "deep.png": lambda: picture("PNG", "I;16"),
    "palette.png": lambda: picture("PNG", "P", transparency=0),
    "alpha.png": lambda: picture("PNG", "RGBA", exif=exif()),
    "grey.jpg": lambda: picture("JPEG"),
    "colour.jpg": lambda: picture("JPEG", "RGB", exif=exif(), progressive=True),
    "print.jpg": lambda: picture("JPEG", "CMYK"),
}


def dicom(syntax: UID = ExplicitVRLittleEndian, **fields) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.1")
    meta.MediaStorageSOPInstanceUID = UID("1.2.3.4")
    meta.TransferSyntaxUID = syntax
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.Rows, ds.Columns, ds.SamplesPerPixel = 40, 48, 1
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation, ds.PhotometricInterpretation = 7, 0, "MONOCHROME1"
    ds.RescaleSlope, ds.RescaleIntercept, ds.WindowCenter, ds.WindowWidth = "2", "-3", ["100", "9"], ["200", "9"]
    ds.PatientName, ds.StudyDate, ds.PixelPaddingValue = "A^B", "20200101", 0
    for key, value in fields.items():
        setattr(ds, key, value)
    pixels = (np.add.outer(np.arange(40), np.arange(48)) * 3 % 256).astype(np.uint8)
    if syntax == JPEGBaseline8Bit:
        ds.PixelData = encapsulate([picture("JPEG")])
    else:
        ds.PixelData = pixels.tobytes()
    ds["PixelData"].VR = "OB"
    out = io.BytesIO()
    if syntax == RLELossless:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(RLELossless, pixels, generate_instance_uid=False)
    ds["PixelData"].is_undefined_length = syntax.is_compressed
    little = syntax != ExplicitVRBigEndian
    pydicom.dcmwrite(out, ds, implicit_vr=False, little_endian=little, enforce_file_format=True)
    return out.getvalue()


DICOMS = {
    "plain.dcm": dicom,
    "big.dcm": lambda: dicom(ExplicitVRBigEndian),
    "rle.dcm": lambda: dicom(RLELossless),
    "jpeg.dcm": lambda: dicom(JPEGBaseline8Bit, PhotometricInterpretation="MONOCHROME2"),
    "plain": dicom,
}

TABLE = (
    "image,patient_id,split,age,sex,view,findings,boxes_64\r\n"
    'a.png,1,train,61,M,AP,Edema;Effusion,"[[""Edema"", 1, 2, 3.5, 4]]"\r\n'
    "b.png,2,val,n/a,F,PA,No Finding,\r\nc.jpg,3,test,30,F,AP,Effusion,\r\n"
)
DESCRIPTION = {
    "name": "x",
    "targets": {"edema": {"column": "findings", "value": "Edema", "positive": "p", "negative": "n", "question": "q"}},
    "findings": ["findings"],
    "acquisition": ["view"],
    "demographic": ["age", "sex"],
}
REPORTS = 'image,report\na.png,"Edema, and more.\nLungs."\nb.png,Clear.\n'
QUESTION = {
    "qid": 1, "image_name": "a.png", "image_organ": "CHEST", "question": "Edema?", "question_type": "PRES",
    "answer": "yes", "answer_type": "CLOSED",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    for name, content in (("a.png", picture("PNG")), ("b.png", picture("PNG")), ("c.jpg", picture("JPEG"))):
        (root / name).write_bytes(content)
        (root / "images" / name).write_bytes(content)
    for name, text in tables().items():
        (root / name).write_bytes(text)
    return root


def tables() -> dict[str, bytes]:
    return {
        "metadata.csv": TABLE.encode(),
        "dataset.json": json.dumps(DESCRIPTION, indent=1).encode(),
        "reports.csv": REPORTS.encode(),
        "questions.json": json.dumps([QUESTION] * 3).encode(),
    }


def use(root: Path) -> None:
    """Open a folder and touch everything in it."""
    data = open_data(root)
    data.pixels(size=8)
    _ = data.sha256, data.reports, repr(data), [data.labels(t) for t in data.targets]
    for attribute in data.attributes:
        data.mask(attribute.name, 0)


# ---- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGES)
def test_broken_images(tmp_path, name):
    content, path = IMAGES[name](), tmp_path / name
    path.write_bytes(content)
    assert opens_or_says_where(lambda: load_image(path), (name,)), "the sample itself must open"
    refused = 0
    for seed in SEEDS:
        path.write_bytes(mutate(content, seed))
        refused += not opens_or_says_where(lambda: check_pixels(load_image(path)), (name,))
    assert refused > 5  # the mutator does break files


def check_pixels(pixels: np.ndarray) -> None:
    assert pixels.dtype == np.float32 and pixels.ndim == 2 and pixels.min() >= 0 and pixels.max() <= 1


@pytest.mark.parametrize("name", DICOMS)
def test_broken_dicom(tmp_path, name):
    content, path = DICOMS[name](), tmp_path / name
    path.write_bytes(content)
    assert opens_or_says_where(lambda: load_dicom(path), ("dicom-",)), "the sample itself must open"
    (tmp_path / "metadata.csv").write_text(f"image,patient_id\n{name},1\n")
    refused = 0
    for seed in range(2 * len(SEEDS)):
        path.write_bytes(mutate(content, seed))
        refused += not opens_or_says_where(lambda: check_pixels(load_dicom(path)[0]), ("dicom-",))
        if seed % 4 == 0:
            opens_or_says_where(lambda: use(tmp_path), ("metadata.csv line 2",))
    assert refused > 10


@pytest.mark.parametrize("name", ["metadata.csv", "dataset.json", "reports.csv"])
def test_broken_tables(folder, name):
    content, path = tables()[name], folder / name
    assert opens_or_says_where(lambda: use(folder), (name,)), "the sample itself must open"
    refused = 0
    try:
        for seed in range(2 * len(SEEDS)):
            path.write_bytes(mutate(content, seed))
            refused += not opens_or_says_where(lambda: use(folder), (name, "dataset.json"))
    finally:
        path.write_bytes(content)
    assert refused > 20


def test_broken_questions(folder):
    content, path = tables()["questions.json"], folder / "questions.json"
    try:
        for seed in SEEDS:
            path.write_bytes(mutate(content, seed))
            opens_or_says_where(lambda: open_vqa(folder), ("questions.json",))
    finally:
        path.write_bytes(content)


def test_broken_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "e": torch.zeros(0)}
    save_tensors(path, tensors, {"k": "v", "l": "w"})
    content, refused = path.read_bytes(), 0
    for seed in range(3 * len(SEEDS)):
        path.write_bytes(mutate(content, seed))
        refused += not opens_or_says_where(lambda: load_tensors(path), ("x.safetensors",))
    assert refused > 60


def test_broken_manifests(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    write_manifest(tmp_path, {"kind": "sample"})
    path = tmp_path / "manifest.json"
    content = path.read_bytes()
    for seed in range(2 * len(SEEDS)):
        broken = mutate(content, seed)
        path.write_bytes(broken)
        problems: list[str] = []
        fine = opens_or_says_where(lambda found=problems: found.extend(verify_folder(tmp_path)), ("manifest.json",))
        assert not fine or problems or broken == content, "a broken manifest verified"


# ---- fields ---------------------------------------------------------------------------------------------------------

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
relaxed = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
cells = st.text(max_size=12) | st.sampled_from(
    ["../../etc/passwd", "/etc/hostname", "a.png", "b.png", "\\a.png", "=1+1", "-1", "1e999", "NaN", "1;2;;", ";", "[]",
     '[["Edema", 1e308, 0, 1, 1]]', '[["Edema", NaN, 0, 1, 1]]', "a" * 300, "\u202e", "train", "test", "metadata.csv"]
)  # fmt: skip


def replaced(value: object, path: list, new: object) -> object:
    """A copy of nested JSON with the value at `path` replaced."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


def paths_of(value: object, at: tuple = ()) -> list[list]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [list(at), *(found for key, item in inner for found in paths_of(item, (*at, key)))]


@relaxed
@given(where=st.sampled_from(paths_of(DESCRIPTION)), new=anything)
def test_mutated_descriptions(folder, where, new):
    path = folder / "dataset.json"
    content = path.read_bytes()
    try:
        path.write_text(json.dumps(replaced(DESCRIPTION, where, new)))
        opens_or_says_where(lambda: use(folder), ("dataset.json",))
    finally:
        path.write_bytes(content)


@relaxed
@given(where=st.sampled_from(paths_of([QUESTION])), new=anything)
def test_mutated_questions(folder, where, new):
    path = folder / "questions.json"
    content = path.read_bytes()
    try:
        path.write_text(json.dumps(replaced([QUESTION], where, new)))
        opens_or_says_where(lambda: open_vqa(folder), ("questions.json",))
    finally:
        path.write_bytes(content)


@relaxed
@given(
    header=st.lists(st.sampled_from(["split", "age", "sex", "findings", "boxes_64", "boxes_0", "x", ""]), unique=True),
    rows=st.lists(st.tuples(st.sampled_from(["a.png", "b.png", "c.jpg"]) | cells, cells, st.lists(cells, max_size=8))),
)
def test_mutated_tables(folder, header, rows):
    path = folder / "metadata.csv"
    content = path.read_bytes()
    described = (folder / "dataset.json").read_bytes()
    quote = '"'
    lines = [["image", "patient_id", *header]] + [
        [image, patient, *(rest + [""] * len(header))[: len(header)]] for image, patient, rest in rows
    ]
    try:
        text = "\n".join(",".join(quote + cell.replace(quote, quote * 2) + quote for cell in line) for line in lines)
        path.write_text(text, encoding="utf-8", errors="replace", newline="")
        (folder / "dataset.json").unlink()
        opens_or_says_where(lambda: use(folder), ("metadata.csv",))
    finally:
        path.write_bytes(content)
        (folder / "dataset.json").write_bytes(described)


HEADER = {
    "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "__metadata__": {"k": "v"},
}
numbers = st.integers(-(2**70), 2**70) | st.sampled_from([2**63, 2**64 - 1, 2**32, -1, 0, 24, 25])


@relaxed
@given(
    where=st.sampled_from(paths_of(HEADER)),
    new=anything | numbers | st.lists(numbers, max_size=4) | st.sampled_from(["F64", "I8", "F8_E4M3", "F4", "PICKLE"]),
    size=st.none() | st.integers(0, 2**64 - 1),
)
def test_mutated_safetensors_headers(tmp_path, where, new, size):
    path = tmp_path / "x.safetensors"
    text = json.dumps(replaced(HEADER, where, new)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + bytes(32))
    opens_or_says_where(lambda: load_tensors(path), ("x.safetensors",))


KEYWORDS = """
    Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation SamplesPerPixel PixelPaddingValue
    NumberOfFrames RescaleSlope RescaleIntercept WindowCenter WindowWidth VOILUTFunction
    PhotometricInterpretation BurnedInAnnotation SmallestImagePixelValue
""".split()
VALUES = ["", "1\\2", "1e300", "-1e300", "0", "-5", "MONOCHROME2", "RGB", "x"]


@relaxed
@given(
    keyword=st.sampled_from(KEYWORDS),
    value=st.integers(0, 65535)
    | st.sampled_from(["", "1\\2", "1e300", "-1e300", "0", "-5", "MONOCHROME2", "RGB", "x"]),
)
def test_mutated_dicom_fields(tmp_path, keyword, value):
    path = tmp_path / "x.dcm"
    try:
        path.write_bytes(dicom(**{keyword: value}))
    except Exception:  # pydicom itself will not write this one
        return
    opens_or_says_where(lambda: check_pixels(load_dicom(path)[0]), ("dicom-",))


# ---- places -------------------------------------------------------------------------------------------------------


def test_what_is_no_file_at_all(tmp_path):
    (tmp_path / "folder.png").mkdir()
    os.symlink(tmp_path / "gone", tmp_path / "dangling.png")
    os.symlink(tmp_path / "loop.png", tmp_path / "loop.png")
    names = ("folder.png", "dangling.png", "loop.png", "gone.png", "a" * 300 + ".png", "")
    for read in (load_image, load_tensors, read_json):
        for name in names:
            path = tmp_path / name
            assert not opens_or_says_where(lambda read=read, path=path: read(path), (name or tmp_path.name,))
    for name in names:
        assert not opens_or_says_where(lambda name=name: load_dicom(tmp_path / name), ("DICOM",))


def test_empty_files_and_deep_json(tmp_path):
    for name, read in {"a.png": load_image, "a.json": read_json, "a.safetensors": load_tensors}.items():
        path = tmp_path / name
        for content in (b"", b"\0", b"[" * 200_000, b'{"a":' * 50_000, b"\xff" * 100, b"9" * 5000, b'"\\ud800"'):
            path.write_bytes(content)
            opens_or_says_where(lambda read=read, path=path: read(path), (name,))
