"""DICOM: the order of the steps, refusals before decoding, and that no identifier leaves."""

from __future__ import annotations

import csv
import json
import logging
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

from mechinterp.data import load_dicom, open_data
from mechinterp.errors import DataError

CANARY = "ZZCANARY"


def make_dicom(path: Path, pixels: np.ndarray, syntax: UID = ExplicitVRLittleEndian, **fields) -> Path:
    """Write a small valid DICOM file; `fields` add or (None) remove elements."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.1")
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(path.name)])
    meta.TransferSyntaxUID = syntax
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    bits = pixels.dtype.itemsize * 8
    ds.Rows, ds.Columns = pixels.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = bits
    ds.HighBit, ds.PixelRepresentation = bits - 1, int(pixels.dtype.kind == "i")
    ds.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    ds["PixelData"].VR = "OW" if bits > 8 else "OB"
    for key, value in fields.items():
        if value is None:
            delattr(ds, key)
        else:
            setattr(ds, key, value)
    ds.save_as(path, enforce_file_format=True, little_endian=True, implicit_vr=False)
    return path


def ramp(height: int = 4, width: int = 8, dtype: str = "uint16", step: int = 100) -> np.ndarray:
    return (np.arange(height * width, dtype=dtype) * step).reshape(height, width)


def test_window_follows_rescale_and_the_standards_formula(tmp_path):
    stored = ramp()
    path = make_dicom(
        tmp_path / "a.dcm", stored, RescaleSlope="2", RescaleIntercept="-1000", WindowCenter="500", WindowWidth="401"
    )
    pixels, record = load_dicom(path)
    x = stored * 2.0 - 1000  # PS3.3 C.11.2.1.2.1, onto [0, 1]
    expected = np.clip((x - (500 - 0.5)) / (401 - 1) + 0.5, 0, 1)
    np.testing.assert_allclose(pixels, expected, atol=1e-6)
    assert pixels.dtype == np.float32
    assert record["modality"] == {"kind": "rescale", "slope": 2.0, "intercept": -1000.0}
    assert record["voi"] == {"kind": "window", "centre": 500.0, "width": 401.0, "function": "LINEAR"}
    assert record["inverted"] is False


def test_a_window_agrees_with_pydicom(tmp_path):
    from pydicom.pixels.processing import apply_modality_lut, apply_windowing

    for function in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        path = make_dicom(
            tmp_path / f"{function}.dcm", ramp(), WindowCenter="1500", WindowWidth="900", VOILUTFunction=function
        )
        ds = pydicom.dcmread(path)
        theirs = apply_windowing(apply_modality_lut(ds.pixel_array, ds), ds) / (2**16 - 1)
        np.testing.assert_allclose(load_dicom(path)[0], theirs, atol=1e-6)


def test_monochrome1_is_inverted_after_the_window(tmp_path):
    fields = {"WindowCenter": "1000", "WindowWidth": "801"}
    plain, _ = load_dicom(make_dicom(tmp_path / "a.dcm", ramp(), **fields))
    other, record = load_dicom(
        make_dicom(tmp_path / "b.dcm", ramp(), PhotometricInterpretation="MONOCHROME1", **fields)
    )
    np.testing.assert_allclose(other, 1 - plain, atol=1e-6)
    assert record["inverted"] is True


def test_percentiles_where_there_is_no_window_and_windows_on_demand(tmp_path):
    path = make_dicom(tmp_path / "a.dcm", ramp())
    pixels, record = load_dicom(path)
    low, high = np.percentile(ramp(), (0.5, 99.5))
    np.testing.assert_allclose(pixels, np.clip((ramp() - low) / (high - low), 0, 1), atol=1e-6)
    assert record["voi"]["kind"] == "percentile"
    assert load_dicom(path, window=(1000, 401))[1]["voi"]["centre"] == 1000.0
    full, record = load_dicom(path, voi="none")
    np.testing.assert_allclose(full, ramp() / 65535, atol=1e-6)
    assert record["voi"]["kind"] == "range"


def test_voi_and_modality_tables_win_over_windows(tmp_path):
    lut = Dataset()
    lut.LUTDescriptor, lut.LUTData = [4, 0, 8], [0, 10, 100, 255]
    lut["LUTDescriptor"].VR = lut["LUTData"].VR = "US"
    stored = np.array([[0, 1, 2, 3]], dtype="uint8")
    path = make_dicom(tmp_path / "a.dcm", stored, VOILUTSequence=Sequence([lut]), WindowCenter="2", WindowWidth="2")
    pixels, record = load_dicom(path)
    np.testing.assert_allclose(pixels[0], np.array([0, 10, 100, 255]) / 255, atol=1e-6)
    assert record["voi"] == {"kind": "lut"}


def test_padding_is_background_and_does_not_set_the_range(tmp_path):
    stored = ramp()
    stored[0, :] = 65535
    path = make_dicom(tmp_path / "a.dcm", stored, PixelPaddingValue=65535, PhotometricInterpretation="MONOCHROME1")
    pixels, record = load_dicom(path)
    assert (pixels[0] == 0).all() and pixels[1:].max() == 1 and record["padding_pixels"] == 8
    assert record["voi"]["high"] < 4000


def test_signed_pixels_and_flat_images(tmp_path):
    stored = (ramp(dtype="int16") - 1600).astype("int16")
    assert load_dicom(make_dicom(tmp_path / "a.dcm", stored))[0].max() == 1
    flat, _ = load_dicom(make_dicom(tmp_path / "b.dcm", np.full((4, 4), 7, dtype="uint8")))
    assert (flat == 0).all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"NumberOfFrames": 2}, "frames"),
        ({"PhotometricInterpretation": "RGB"}, "grey"),
        ({"SamplesPerPixel": 3}, "grey"),
        ({"Rows": 40000, "Columns": 40000}, "cap"),
        ({"Rows": 400, "Columns": 400}, "truncated"),
        ({"Rows": None}, "no Rows"),
        ({"PixelData": None}, "pixels"),
        ({"BitsAllocated": 17}, "17 bits"),
        ({"WindowCenter": "1", "WindowWidth": "-5"}, "window"),
        ({"RescaleSlope": "1e308", "RescaleIntercept": "1e308"}, "finite"),
    ],
)
def test_what_is_refused_says_why(tmp_path, fields, words):
    path = make_dicom(tmp_path / "a.dcm", ramp(), **fields)
    with pytest.raises(DataError, match=words) as caught:
        load_dicom(path)
    assert caught.value.where.startswith("dicom-")
    assert caught.value.__cause__ is None and caught.value.__context__ is None


def test_the_cap_holds_before_anything_is_decoded(tmp_path, monkeypatch):
    path = make_dicom(tmp_path / "a.dcm", ramp(), Rows=60000, Columns=60000)
    monkeypatch.setattr(FileDataset, "pixel_array", property(lambda self: pytest.fail("decoded")))
    with pytest.raises(DataError, match="cap"):
        load_dicom(path)


def test_a_compressed_file_without_its_plugin_names_the_package(tmp_path):
    path = make_dicom(tmp_path / "a.dcm", ramp())
    content = path.read_bytes()
    jpeg_ls = b"1.2.840.10008.1.2.4.80"
    plain = b"1.2.840.10008.1.2.1\0"
    at = content.index(plain)
    group = bytearray(content[:at] + jpeg_ls + content[at + len(plain) :])
    group[at - 2 : at] = len(jpeg_ls).to_bytes(2, "little")
    length_at = 128 + 4 + 8  # value of (0002,0000), the length of the group
    length = int.from_bytes(group[length_at : length_at + 4], "little") + len(jpeg_ls) - len(plain)
    group[length_at : length_at + 4] = length.to_bytes(4, "little")
    path.write_bytes(bytes(group))
    with pytest.raises(DataError, match=r"JPEG-LS.*pip install pylibjpeg pylibjpeg-libjpeg"):
        load_dicom(path)


def test_deflated_files_are_refused_before_they_are_inflated(tmp_path):
    path = make_dicom(tmp_path / "a.dcm", ramp())
    ds = pydicom.dcmread(path)
    ds.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.1.99")
    ds.save_as(path, enforce_file_format=True)
    with pytest.raises(DataError, match="deflated"):
        load_dicom(path)


# ---- no identifier leaves ------------------------------------------------------------------------------------------

_TEXT = {
    "AE", "AS", "CS", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT",
}  # fmt: skip
_KEYWORDS = """
    PatientName PatientID OtherPatientIDs PatientAddress PatientBirthDate PatientBirthTime PatientAge
    PatientComments ReferringPhysicianName OperatorsName InstitutionName InstitutionAddress StationName
    StationAETitle StudyID StudyDescription SeriesDescription AccessionNumber ImageComments
    RequestAttributesSequence BodyPartExamined ViewPosition Manufacturer DeviceSerialNumber StudyDate
    StudyTime AcquisitionDateTime StudyInstanceUID AdditionalPatientHistory Modality
    WindowCenterWidthExplanation VOILUTFunction BurnedInAnnotation Laterality PresentationLUTShape
    RescaleType LongCodeValue URNCodeValue RetrieveURL TextValue PatientIdentityRemoved
""".split()


def canary_file(path: Path, number: int) -> Path:
    """A readable file with a canary in every kind of text field, private tags and the preamble."""
    make_dicom(path, ramp(8, 8), WindowCenter="1000", WindowWidth="801")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(path)
        for keyword in _KEYWORDS:
            vr = dictionary_VR(tag_for_keyword(keyword))
            if vr in _TEXT:
                element = pydicom.DataElement(
                    tag_for_keyword(keyword), vr, f"{CANARY}{number}{vr}"[:16],
                    validation_mode=pydicom.config.IGNORE,
                )  # fmt: skip
                ds.add(element)
        nested = Dataset()
        nested.add_new(0x00100010, "PN", f"{CANARY}^NESTED")
        ds.RequestAttributesSequence = Sequence([nested])
        private = ds.private_block(0x0011, f"{CANARY} PRIVATE", create=True)
        private.add_new(0x01, "LO", f"{CANARY} VALUE")
        ds.preamble = (CANARY.encode() * 16)[:128]
        pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
        try:
            ds.save_as(path)
        finally:
            pydicom.config.settings.writing_validation_mode = pydicom.config.RAISE
    return path


def exposed(value, seen: set[int] | None = None) -> str:
    """Everything public that an object shows, as text."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, Path):  # the path of the folder is the user's own
        return ""
    seen.add(id(value))
    if isinstance(value, dict):
        return " ".join(exposed(k, seen) + exposed(v, seen) for k, v in value.items())
    if isinstance(value, list | tuple):
        return " ".join(exposed(v, seen) for v in value)
    if isinstance(value, np.ndarray) or not hasattr(value, "__dict__"):
        return str(value) if not isinstance(value, np.ndarray) else " ".join(map(str, value.ravel()[:2000]))
    return repr(value) + " ".join(exposed(getattr(value, n), seen) for n in dir(value) if not n.startswith("_"))


@pytest.fixture
def canary_folder(tmp_path):
    root = tmp_path / f"{CANARY}_folder"
    (root / "images" / f"{CANARY}^DIR").mkdir(parents=True)
    with open(root / "metadata.csv", "w", newline="") as opened:
        rows = csv.writer(opened)
        rows.writerow(["image", "patient_id", "sex", "pneumonia"])
        for i in range(6):
            name = f"images/{CANARY}^DIR/{CANARY}_{i}.dcm"
            canary_file(root / name, i)
            rows.writerow([name, f"{CANARY}-MRN-{i}", "MF"[i % 2], i % 2])
    return root


def test_the_canaries_are_really_in_the_files(canary_folder):
    path = next(canary_folder.rglob("*.dcm"))
    assert path.read_bytes().count(CANARY.encode()) > 30
    assert str(pydicom.dcmread(path).PatientName).startswith(CANARY)


def test_no_canary_leaves_a_dicom_folder(canary_folder, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    data = open_data(canary_folder)
    data.pixels(size=8)
    shown = exposed(data) + repr(data) + str([data.record(i) for i in range(len(data))]) + data.sha256
    shown += exposed(data.subset([0, 3])) + json.dumps(data.notes)
    assert "dicom-" in shown and "pneumonia" in shown  # the walk sees what there is
    captured = capfd.readouterr()
    for text in (shown, caplog.text, captured.out, captured.err):
        assert CANARY not in text and CANARY.lower() not in text.lower()
    assert len(set(data.images)) == 6 and len(set(data.patients)) == 6
    assert data.name.startswith("dicom-folder-")
    assert not data.may_show.any()  # the burned-in field says something else than NO


def test_names_are_the_same_on_every_opening(canary_folder):
    first, second = open_data(canary_folder), open_data(canary_folder)
    assert first.images == second.images and first.patients == second.patients and first.name == second.name


@pytest.mark.parametrize("seed", range(40))
def test_no_canary_leaves_in_an_error(canary_folder, seed, recwarn, caplog):
    caplog.set_level(logging.DEBUG)
    rng = np.random.default_rng(seed)
    path = sorted(canary_folder.rglob("*.dcm"))[seed % 6]
    content = bytearray(path.read_bytes())
    if seed % 4 == 0:
        content = content[: rng.integers(0, len(content))]
    else:
        for at in rng.integers(132, len(content), size=12):
            content[at] = rng.integers(0, 256)
    path.write_bytes(bytes(content))
    try:
        open_data(canary_folder).pixels(size=8)
    except DataError as error:
        link: BaseException | None = error
        while link is not None:
            assert CANARY not in str(link) and CANARY not in repr(link.args)
            link = link.__cause__ or link.__context__
        assert "metadata.csv line" in str(error)
    assert CANARY not in caplog.text and not recwarn.list


def test_a_file_that_declares_itself_clean_may_be_shown(tmp_path):
    (tmp_path / "images").mkdir()
    make_dicom(tmp_path / "images/a.dcm", ramp(), BurnedInAnnotation="NO")
    make_dicom(tmp_path / "images/b.dcm", ramp(step=50), PatientIdentityRemoved="YES")
    make_dicom(tmp_path / "images/c.dcm", ramp(step=20), PatientIdentityRemoved="YES", BurnedInAnnotation="YES")
    make_dicom(tmp_path / "images/d.dcm", ramp(step=10))
    rows = "".join(f"images/{name}.dcm,{i}\n" for i, name in enumerate("abcd"))
    (tmp_path / "metadata.csv").write_text("image,patient_id\n" + rows)
    data = open_data(tmp_path)
    assert data.may_show.tolist() == [True, True, False, False]
    assert any("2 DICOM images do not declare" in note for note in data.notes)


def test_dicom_is_known_by_its_bytes_not_its_name(tmp_path):
    make_dicom(tmp_path / "SURNAME.png", ramp())
    make_dicom(tmp_path / "1.2.840.99", ramp(step=50))
    (tmp_path / "metadata.csv").write_text("image,patient_id\nSURNAME.png,1\n1.2.840.99,2\n")
    data = open_data(tmp_path)
    assert all(name.startswith("dicom-") for name in data.images)
    assert data.pixels().shape == (2, 4, 8)
