"""Data folders: what a column becomes, splits by patient, pixels, masks, and the refusals."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mechinterp.data import load_image, open_data, open_vqa, resize_square
from mechinterp.data.attributes import attributes_of, guess_kind
from mechinterp.errors import DataError, UsageError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
NIH, VQA = SHARED / "nih-cxr", SHARED / "vqa-rad"
needs_nih = pytest.mark.skipif(not NIH.is_dir(), reason="the NIH ChestX-ray14 subset is not here")
needs_vqa = pytest.mark.skipif(not VQA.is_dir(), reason="VQA-RAD is not here")


def make_folder(root: Path, columns: dict[str, list], description: dict | None = None, size: int = 8) -> Path:
    """Write a data folder with one small grey image a row."""
    n = len(next(iter(columns.values())))
    columns = {"image": [f"images/{i}.png" for i in range(n)], "patient_id": [f"p{i}" for i in range(n)], **columns}
    (root / "images").mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.fromarray(np.full((size, size), i % 256, np.uint8)).save(root / f"images/{i}.png")
    lines = [",".join(columns)] + [",".join(f'"{v}"' for v in row) for row in zip(*columns.values(), strict=True)]
    (root / "metadata.csv").write_text("\n".join(lines))
    if description is not None:
        (root / "dataset.json").write_text(json.dumps(description))
    return root


def values(data, name):
    return data.attribute(name).values.tolist()


# ---- columns ------------------------------------------------------------------------------------------------------


def test_columns_become_binary_attributes(tmp_path):
    columns = {
        "portable": [1, 0, 1, 0, "", 1],
        "sex": ["M", "F", "F", "M", "M", "F"],
        "view": ["AP", "PA", "AP", "AP", "AP", ""],
        "hospital": ["A", "B", "C", "A", "B", "C"],
        "age": [20, 30, 40, 50, 60, ""],
        "findings": ["Edema;Effusion", "No Finding", "Edema", "", "Effusion", "No Finding"],
        "constant": [1, 1, 1, 1, 1, 1],
        "empty": [""] * 6,
        "comment": [f"seen {i}" for i in range(6)],
        "chexpert": ["1.0", "-1.0", "0.0", "", "1.0", "0.0"],
    }
    data = open_data(make_folder(tmp_path, columns))
    nan = np.nan
    expected = {
        "portable": [1, 0, 1, 0, nan, 1],
        "sex=M": [1, 0, 0, 1, 1, 0],
        "view=AP": [1, 0, 1, 1, 1, nan],
        "hospital=A": [1, 0, 0, 1, 0, 0],
        "hospital=C": [0, 0, 1, 0, 0, 1],
        "age>40": [0, 0, 0, 1, 1, nan],
        "findings:Edema": [1, 0, 1, nan, 0, 0],
        "findings:Effusion": [1, 0, 0, nan, 1, 0],
        "chexpert": [1, nan, 0, nan, 1, 0],
    }
    for name, wanted in expected.items():
        np.testing.assert_array_equal(data.attribute(name).values, np.array(wanted, np.float32), err_msg=name)
        assert data.attribute(name).values.dtype == np.float32
    assert {a.name for a in data.attributes} == expected.keys() | {"hospital=B"}
    assert data.skipped.keys() == {"constant", "empty", "comment"}
    kinds = {a.column: a.kind for a in data.attributes}
    assert kinds["sex"] == kinds["age"] == "demographic" and kinds["findings"] == "finding"
    assert kinds["portable"] == kinds["view"] == kinds["hospital"] == "acquisition" and kinds["chexpert"] == "other"
    notes = "\n".join(data.notes)
    assert "guessed" in notes and "No Finding" in notes and "uncertain" in notes


def test_a_slip_among_numbers_is_missing_and_said(tmp_path):
    """One bad cell neither turns a number into categories nor counts as a 0 of a target; its line is in the notes."""
    columns = {
        "age": [20, 30, 40, 50, 60, 70, "6o", 80, 90, 25, 35],
        "pneumonia": [1, 0, 1, 0, 1, 0, 1, 0, 1, 0, "see report"],
        "ward": [1, 2, 1, 2, "A", "B", "A", "B", 1, 2, 1],
    }
    data = open_data(make_folder(tmp_path, columns, {"targets": {"pneumonia": {}}, "demographic": ["age"]}))
    assert np.isnan(data.attribute("age>45").values[6]) and np.isnan(data.labels("pneumonia")[10])
    assert [a.name for a in data.attributes if a.column in ("age", "pneumonia")] == ["age>45", "pneumonia"]
    assert "age: 1 cells that are no numbers taken as missing (metadata.csv line 8)" in data.notes
    assert "pneumonia: 1 cells that are no numbers taken as missing (metadata.csv line 12)" in data.notes
    assert {a.name for a in data.attributes if a.column == "ward"} == {"ward=1", "ward=2", "ward=A", "ward=B"}


@pytest.mark.parametrize(
    ("cells", "name"),
    [
        (["yes", "no", "yes"], "x"),
        (["TRUE", "false", ""], "x"),
        (["1", "2", "2"], "x>1"),
        (["5", "5", "5", "1"], "x>1"),
        (["rare", "usual", "usual"], "x=rare"),
        (["b", "a", "b", "a"], "x=b"),
        (["F", "M", "M"], "x=M"),
    ],
)
def test_the_positive_side_of_a_column_is_predictable(cells, name):
    made, reason, _ = attributes_of("x", cells, "other")
    assert reason is None and [a.name for a in made] == [name]
    assert {0.0, 1.0} <= set(made[0].values.tolist())


def test_too_many_categories_and_prose_are_skipped():
    many = [str(i % 30) + "x" for i in range(90)]
    assert attributes_of("x", many, "other")[1] == "has 30 categories (at most 20)"
    assert attributes_of("x", ["a" * 100, "b", "b"], "other")[1] == "is free text"
    assert attributes_of("x", ["a", "b", "c"], "other")[1] == "has another value in every row"


def test_two_categories_of_a_finding_are_never_named_after_the_normal_one():
    made, _, _ = attributes_of("label", ["Pneumonia", "Normal", "Pneumonia"], "finding")
    assert [a.name for a in made] == ["label:Pneumonia"]


def test_kinds_are_guessed_from_well_known_names():
    names = {"Age": "demographic", "patient_sex": "demographic", "scanner": "acquisition", "ViewPosition": "other"}
    names |= {"view-position": "acquisition", "labels": "finding", "pleural_effusion": "finding", "usage": "other"}
    assert {name: guess_kind(name) for name in names} == names


# ---- targets ------------------------------------------------------------------------------------------------------


def test_targets_come_from_dataset_json(tmp_path):
    targets = {
        "edema": {
            "column": "f", "value": "Edema", "positive": "with", "negative": "without",
            "question": "is there edema ?", "yes": "ja", "no": "nein",
        },
        "mark": {"column": "mark"},
        "healthy": {"column": "f", "value": "No Finding"},
        "unmarked": {"column": "mark", "value": 0},
    }  # fmt: skip
    columns = {"f": ["Edema;Mass", "No Finding", ""], "mark": [1, 0, 0]}
    data = open_data(
        make_folder(
            tmp_path, columns, {"name": "mine", "targets": targets, "findings": ["f"], "acquisition": ["mark", "gone"]}
        )
    )
    assert data.name == "mine" and data.targets["edema"].no == "nein" and data.targets["edema"].asked().startswith("is")
    np.testing.assert_array_equal(data.labels("edema"), [1, 0, np.nan])
    np.testing.assert_array_equal(data.labels("healthy"), [0, 1, np.nan])
    np.testing.assert_array_equal(data.labels("mark"), [1, 0, 0])
    np.testing.assert_array_equal(data.labels("unmarked"), [0, 1, 1])
    assert data.target_attribute("edema") == "f:Edema" and data.target_attribute("unmarked") == "mark"
    assert data.attribute("mark").kind == "acquisition" and any("gone" in note for note in data.notes)
    assert data.subset([0]).target_attribute("edema") == "f:Edema"  # though on one row every attribute fits
    with pytest.raises(UsageError, match="edema"):
        data.labels("nothing")


def test_targets_are_made_from_findings_where_none_is_named(tmp_path):
    columns = {"findings": ["Pleural Effusion", "No Finding", "Mass;Nodule", "Mass"], "sex": list("MFMF")}
    data = open_data(make_folder(tmp_path, columns))
    assert data.targets.keys() == {"pleural_effusion", "mass", "nodule"}
    assert data.targets["mass"].positive == "a chest x-ray with mass"
    assert data.target_attribute("pleural_effusion") == "findings:Pleural Effusion"


# ---- splits -------------------------------------------------------------------------------------------------------


def test_a_split_by_hash_keeps_patients_whole_and_does_not_move(tmp_path):
    patients = [f"p{i // 3}" for i in range(600)]
    data = open_data(make_folder(tmp_path, {"patient_id": patients}, size=1))
    where = {}
    for patient, split in zip(data.patients, data.split, strict=True):
        assert where.setdefault(patient, split) == split
    share = {s: np.mean(data.split == s) for s in ("train", "val", "test")}
    assert abs(share["train"] - 0.6) < 0.1 and abs(share["val"] - 0.15) < 0.08 and abs(share["test"] - 0.25) < 0.1
    assert (open_data(tmp_path).split == data.split).all() and (open_data(tmp_path, seed=1).split != data.split).any()
    first = open_data(make_folder(tmp_path, {"patient_id": patients[:30]}, size=1))
    assert (first.split == data.split[:30]).all()


def test_a_given_split_is_taken_and_checked(tmp_path):
    columns = {"patient_id": ["a", "a", "b"], "split": ["train", "Train", "valid"]}
    assert open_data(make_folder(tmp_path, columns)).split.tolist() == ["train", "train", "val"]
    columns["split"] = ["train", "test", "val"]
    with pytest.raises(DataError, match=r"line 3 column split.*in test here and in train on line 2"):
        open_data(make_folder(tmp_path, columns))
    columns["split"] = ["train", "train", "holdout"]
    with pytest.raises(DataError, match=r"line 4.*holdout"):
        open_data(make_folder(tmp_path, columns))


# ---- pixels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_png_mode_becomes_grey_in_unit_range(tmp_path, mode):
    grey = np.tile(np.array([[0, 255]], np.uint8), (4, 2))
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert("RGB" if mode == "P" else mode).convert(mode)
    image.save(tmp_path / "a.png")
    pixels = load_image(tmp_path / "a.png")
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, grey / 255, atol=1e-6)


def test_sixteen_bits_are_kept(tmp_path):
    deep = np.arange(16, dtype=np.uint16).reshape(4, 4) + 60000
    Image.fromarray(deep).save(tmp_path / "a.png")
    np.testing.assert_allclose(load_image(tmp_path / "a.png"), deep / 65535, atol=1e-7)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_a_detectors_bits_in_a_file_of_16_fill_the_range(tmp_path, bits):
    """What a detector gives as white is nearly 1 in the picture, however many bits the file could hold."""
    full = 2**bits - 1
    values = np.linspace(0, 0.95 * full, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_allclose(load_image(tmp_path / "a.png"), values / full, atol=1e-6)


def test_transparency_is_black_and_a_palette_is_resolved(tmp_path):
    image = Image.new("RGBA", (2, 1), (255, 255, 255, 255))
    image.putpixel((0, 0), (255, 255, 255, 0))
    image.save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").tolist() == [[0.0, 1.0]]
    image = Image.new("P", (2, 1))
    image.putpalette([255, 255, 255, 0, 0, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "b.png", transparency=b"\x00\xff")
    assert load_image(tmp_path / "b.png").tolist() == [[0.0, 0.0]]


def test_exif_orientation_is_followed_and_cmyk_read(tmp_path):
    image = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 16, axis=0).repeat(8, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows become columns
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    plain = np.asarray(image, np.float32) / 255
    np.testing.assert_allclose(load_image(tmp_path / "a.jpg"), np.rot90(plain, -1), atol=0.02)
    image.convert("CMYK").save(tmp_path / "b.jpg", quality=95)
    assert np.abs(load_image(tmp_path / "b.jpg") - plain).mean() < 0.02


@pytest.mark.parametrize("side", [7_100, 10_000, 30_000, 2_000_000_000])
def test_a_decompression_bomb_is_refused_from_its_header(tmp_path, monkeypatch, side):
    Image.new("1", (8, 8)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "a.png").write_bytes(content)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"a.png.*cap"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["gif", "bmp", "tiff", "webp"])
def test_other_formats_are_refused(tmp_path, suffix):
    Image.new("L", (4, 4)).save(tmp_path / f"a.{suffix}")
    with pytest.raises(DataError, match=rf"a.{suffix}.*PNG"):
        load_image(tmp_path / f"a.{suffix}")


def test_resizing_is_antialiased_and_stays_in_range():
    stripes = np.tile(np.array([[0.0, 1.0]], np.float32), (64, 32))
    small = resize_square(stripes, 8)
    assert small.shape == (8, 8) and np.abs(small - 0.5).max() < 0.05
    assert resize_square(stripes, 64) is stripes
    up = resize_square(stripes[:, :48], 100)
    assert up.min() >= 0 and up.max() <= 1


def test_pixels_by_rows_slices_and_masks(tmp_path):
    data = open_data(make_folder(tmp_path, {"x": list(range(10))}))
    expected = np.arange(10, dtype=np.float32) / 255
    for rows in ([3, 1], np.array([3, 1]), range(2, 5), slice(4), slice(None), np.arange(10) > 7, None, [-1], []):
        wanted = expected if rows is None else expected[rows if isinstance(rows, slice | np.ndarray) else list(rows)]
        got = data.pixels(rows)
        np.testing.assert_allclose(got.mean(axis=(1, 2)) if len(got) else [], wanted if len(got) else [], atol=1e-7)
        assert len(got) == len(wanted) and got.dtype == np.float32
    assert data.mask("x>4.5", np.int64(3)) is None and len(data.pixels([np.int64(3)])) == 1
    for bad in ([10], [-11], np.array([0.5]), np.zeros(3, bool)):
        with pytest.raises(UsageError):
            data.pixels(bad)


def test_images_of_different_size_need_a_size(tmp_path):
    root = make_folder(tmp_path, {"x": [1, 0]})
    Image.new("L", (5, 9)).save(root / "images/1.png")
    data = open_data(root)
    with pytest.raises(DataError, match=r"images/1.png.*5 x 9.*size"):
        data.pixels()
    assert data.pixels(size=4).shape == (2, 4, 4)


# ---- masks, reports, identity ---------------------------------------------------------------------------------------


def test_masks_from_files_and_from_boxes(tmp_path):
    boxes = ['[[""Mass"", 0, 0, 512, 256], [""Infiltrate"", 512, 512, 512, 512]]', "", '[[""Mass"", -9, 0, 1, 1]]']
    columns = {"f": ["Mass;Infiltration", "Mass", "No Finding"], "mark": [1, 0, 1], "boxes_1024": boxes}
    root = make_folder(tmp_path, columns)
    drawn = np.zeros((8, 8), np.uint8)
    drawn[:2, :3] = 255
    for name in ("mark/0.png", "f_Mass/1.png"):
        (root / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn).save(root / "masks" / name)
    data = open_data(root)
    assert data.mask("mark", 0).sum() == 6 and data.mask("mark", 2) is None
    assert data.mask("mark", 0, size=16).sum() == 24
    assert data.mask("f:Mass", 0).tolist() == (np.indices((8, 8))[0] < 2).__and__(np.indices((8, 8))[1] < 4).tolist()
    assert data.mask("f:Mass", 1).sum() == 6 and not data.mask("f:Mass", 2).any()
    assert data.mask("f:Infiltration", 0)[4:, 4:].all() and data.mask("f:Infiltration", 0).sum() == 16
    assert data.subset([1]).mask("f:Mass", 0).sum() == 6
    assert data.mask("mark", 0).dtype == bool and "boxes_1024" not in data.skipped


def test_reports_are_joined_by_image(tmp_path):
    root = make_folder(tmp_path, {"x": [1, 0, 1]})
    (root / "reports.csv").write_text(
        'image,report\nimages/2.png,"No ""acute"" finding,\nlungs clear."\nimages/0.png,\n'
    )
    data = open_data(root)
    assert data.reports == (None, None, 'No "acute" finding,\nlungs clear.')
    assert any("2 of 3 images have no report" in note for note in data.notes)


def test_the_hash_follows_every_byte_and_not_the_order(tmp_path):
    root = make_folder(tmp_path, {"x": [1, 0, 1]})
    before = open_data(root)
    assert before.sha256 == open_data(root).sha256 != before.subset([0]).sha256
    assert before.subset([2, 1, 0]).sha256 == before.sha256
    Image.fromarray(np.full((8, 8), 99, np.uint8)).save(root / "images/1.png")
    assert open_data(root).sha256 != before.sha256
    (root / "dataset.json").write_text("{}")
    assert open_data(root).sha256 not in (before.sha256, "")


def test_a_subset_keeps_rows_together(tmp_path):
    data = open_data(make_folder(tmp_path, {"x": [1, 0, 1, 0], "findings": ["A;B", "No Finding", "B", "A"]}))
    part = data.subset(np.array([3, 0]))
    assert part.images == ("images/3.png", "images/0.png") and part.patients == ("p3", "p0")
    assert values(part, "x") == [0, 1] and part.labels("a").tolist() == [1, 1]
    assert part.subset([1]).pixels().max() == 0 and part.truth is None and "2 images" in repr(part)


def test_truth_is_found_and_nothing_is_written(tmp_path):
    root = make_folder(tmp_path, {"x": [1, 0]})
    (root / "truth.json").write_text("{}")
    before = sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*"))
    data = open_data(root)
    _ = data.pixels(), data.sha256
    assert data.truth == root / "truth.json"
    assert before == sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*"))


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("image,patient_id\n", "no rows"),
        ("image;patient_id\na;b\n", "no column 'image'"),
        ("image,patient\nimages/0.png,1\n", "no column 'patient_id'"),
        ("image,patient_id,x,x\nimages/0.png,1,2,3\n", "two columns"),
        ("image,patient_id\nimages/0.png\n", "line 2.*1 cells"),
        ("image,patient_id\nimages/0.png,\n", "line 2.*patient_id is empty"),
        ("image,patient_id\nimages/9.png,1\n", "line 2.*no such image.*9.png"),
        ("image,patient_id\nimages/0.png,1\nimages/0.png,1\n", "line 3.*same image as line 2"),
        ("image,patient_id\nimages/0.png,1\nimages/./0.png,1\n", "line 3.*same image as line 2"),
        ("image,patient_id\n../images/0.png,1\n", "not below"),
        ("image,patient_id\n/etc/hostname.png,1\n", "not below"),
        ("image,patient_id\nimages/../../0.png,1\n", "not below"),
        ("image,patient_id\nlink.png,1\n", "not below"),
        ("image,patient_id\nloop.png,1\n", "line 2"),
        ("image,patient_id\nimages,1\n", "no such image"),
        ("image,patient_id\n" + "a" * 5000 + ".png,1\n", "line 2"),
        ("image,patient_id\nimages/0.png,1\0\n", "NUL"),
        ('image,patient_id\n"images/0.png,1\n', "line 2.*not a table"),
        ("image,patient_id\nimages/0.png," + "9" * 200_000 + "\n", "line 2.*field"),
        ("image,patient_id,boxes_99\nimages/0.png,1,[[1]]\n", "boxes_99.*not a list"),
        ("image,patient_id,boxes_99\nimages/0.png,1," + "[" * 50_000 + "\n", "boxes_99.*not JSON"),
        ("image,patient_id\nimages/0.png,1\n".encode("utf-16"), "not UTF-8"),
        ("image,patient_id\nimages/0.png,é\n".encode("latin-1"), "not UTF-8"),
    ],
)
def test_a_wrong_table_is_refused_with_its_place(tmp_path, text, words):
    root = make_folder(tmp_path / "data", {"x": [1, 0]})
    (tmp_path / "0.png").write_bytes((root / "images/0.png").read_bytes())
    os.symlink(tmp_path / "0.png", root / "link.png")
    os.symlink(root / "loop.png", root / "loop.png")
    (root / "metadata.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=f"(?s)metadata.csv.*{words}"):
        open_data(root)


def test_formulas_are_text_and_a_byte_order_mark_is_no_column(tmp_path):
    root = make_folder(tmp_path, {"x": ["=1+1", "@SUM(A1)", "=1+1"]})
    text = (root / "metadata.csv").read_text()
    (root / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert [a.name for a in open_data(root).attributes] == ["x=@SUM(A1)"]


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ("[]", "not an object"),
        ("[" * 100_000, "not JSON"),
        ('{"name": 3}', "name"),
        ('{"name": NaN}', "NaN"),
        ('{"findings": "x"}', "findings"),
        ('{"acquisition": [1]}', "acquisition"),
        ('{"targets": []}', "targets"),
        ('{"targets": {"t": 1}}', "targets.t"),
        ('{"targets": {"t": {"column": "gone"}}}', "targets.t.column.*gone"),
        ('{"targets": {"t": {"column": "x", "value": [1]}}}', "targets.t.value"),
        ('{"targets": {"t": {"column": "x", "positive": 1}}}', "targets.t.positive"),
    ],
)
def test_a_wrong_description_is_refused_with_its_field(tmp_path, description, words):
    root = make_folder(tmp_path, {"x": [1, 0]})
    (root / "dataset.json").write_text(description)
    with pytest.raises(DataError, match=f"dataset.json.*{words}"):
        open_data(root)


def test_no_folder_and_no_table(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        open_data(tmp_path / "gone")
    with pytest.raises(DataError, match=r"metadata.csv"):
        open_data(tmp_path)


def test_the_package_is_light_to_import():
    code = "import sys, mechinterp.data; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'PIL', 'pydicom')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- real folders -------------------------------------------------------------------------------------------------


@needs_nih
def test_the_nih_folder_opens_as_it_lies():
    data = open_data(NIH)
    assert len(data) == 801 and len(set(data.patients)) == 535 and not data.skipped
    assert data.targets.keys() == {"pneumonia", "effusion", "edema"}
    assert data.labels("pneumonia").sum() == 393 and data.target_attribute("pneumonia") == "findings:Pneumonia"
    kinds = {a.name: a.kind for a in data.attributes}
    assert kinds["sex=M"] == kinds["age>46"] == "demographic" and kinds["view=AP"] == "acquisition"
    assert kinds["findings:Edema"] == "finding" and "findings:No Finding" not in kinds
    pixels = data.pixels([0, 400], size=64)
    assert pixels.shape == (2, 64, 64) and 0 <= pixels.min() < 0.1 and 0.7 < pixels.max() <= 1
    boxed = [i for i in range(801) if data.mask("findings:Pneumonia", i) is not None]
    assert len(boxed) == 39 and all(data.labels("pneumonia")[boxed] == 1)
    row = data.images.index("images/00000150_002.jpg")
    rows, columns = np.nonzero(data.mask("findings:Pneumonia", row))
    scale = 224 / 1024
    assert abs(columns.min() - 601.4 * scale) < 1 and abs(rows.max() - (596 + 181) * scale) < 1


@needs_vqa
def test_vqa_rad_opens_and_splits_by_image():
    data = open_vqa(VQA)
    assert len(data.images) == 236 and len(data) == 1716
    assert {q.organ for q in data.questions} == {"HEAD", "CHEST", "ABD"}
    train, test = ({q.image for q in data.select(split)} for split in ("train", "test"))
    assert not train & test
    assert data.pixels([0, 1], size=32).shape == (2, 32, 32)
    assert data.questions[0].yes is True and sum(q.yes is not None for q in data.questions) > 600


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "not a list"),
        ("[1]", "entry 0"),
        ('[{"image_name": "a.png"}]', "entry 0.*image_organ"),
        ("nonsense", "not JSON"),
    ],
)
def test_wrong_questions_are_refused(tmp_path, content, words):
    (tmp_path / "questions.json").write_text(content)
    with pytest.raises(DataError, match=f"questions.json.*{words}"):
        open_vqa(tmp_path)


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "gone.png"])
def test_questions_about_images_elsewhere_are_refused(tmp_path, name):
    entry = dict.fromkeys(("image_organ", "question", "question_type", "answer", "answer_type"), "x")
    (tmp_path / "questions.json").write_text(json.dumps([{**entry, "image_name": name}]))
    with pytest.raises(DataError, match="image"):
        open_vqa(tmp_path)
