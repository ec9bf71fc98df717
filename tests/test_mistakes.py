"""Mistakes at the command line that once ended in a traceback, or in a result about nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_dicom import make_dicom, ramp

from mechinterp.audit.asking import target_of
from mechinterp.audit.pipeline import choose_target
from mechinterp.cli import main
from mechinterp.data import open_data
from mechinterp.data.files import open_image
from mechinterp.errors import DataError
from mechinterp.models import HookedVLM


def said(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line that a refused command says."""
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and "Traceback" not in error
    return error


def test_a_seed_below_zero_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """numpy takes no negative seed; the command says so before it does anything."""
    assert "--seed" in said(capsys, ["audit", "phantom-clip", "--seed", "-1", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_feature_that_the_dictionary_lacks_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A latent beyond the dictionary is named, with what there is."""
    feature = "vision.blocks.2.hook_resid_post:99999"
    error = said(capsys, ["ablate", "phantom-clip", "--features", feature, "--out", str(tmp_path / "out")])
    assert feature in error and "0 to " in error


def test_an_image_of_one_shade_and_an_empty_target_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """There is nothing to explain in a black picture, nor about an empty text."""
    black, noise = tmp_path / "black.png", tmp_path / "noise.png"
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(black)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(noise)
    asked = ["--target", "effusion", "--out", str(tmp_path / "out")]
    assert "one shade" in said(capsys, ["graph", "phantom-clip", "--image", str(black), *asked])
    assert "one shade" in said(capsys, ["explain", "phantom-clip", "--image", str(black), "--method", "lime", *asked])
    asked[1] = " "
    assert "--target" in said(capsys, ["graph", "phantom-clip", "--image", str(noise), *asked])
    assert not (tmp_path / "out").exists()


def test_a_dicom_file_can_be_the_image(tmp_path: Path) -> None:
    """`--image` takes what a data folder takes; a DICOM file is called by its bytes, not by its name."""
    path = make_dicom(tmp_path / "DOE^JANE.dcm", ramp())
    name, pixels = open_image(path)
    assert (
        name.startswith("dicom-") and "DOE" not in name and pixels.ndim == 2 and 0 <= pixels.min() < pixels.max() <= 1
    )
    with pytest.raises(DataError, match="no such image"):
        open_image(tmp_path / "nowhere.png")


@pytest.fixture
def noise(tmp_path: Path) -> str:
    """A picture that is not of one shade."""
    path = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(path)
    return str(path)


def test_a_map_and_a_graph_ask_the_same_of_the_same_text(noise: str, tmp_path: Path) -> None:
    """`explain --target WORD` contrasts the two captions of the finding, as `graph --target WORD` does."""
    call = ["explain", "phantom-clip", "--image", noise, "--target", "effusion", "--method", "constant"]
    assert main([*call, "--out", str(tmp_path / "out")]) == 0
    asked = json.loads((tmp_path / "out" / "map.json").read_text())["target"]
    meant = target_of(HookedVLM.from_pretrained("phantom-clip"), "effusion")
    assert meant.negative is not None and asked == {
        "name": "effusion",
        "positive": meant.positive,
        "negative": meant.negative,
    }


@pytest.mark.parametrize("command", [["graph"], ["explain", "--method", "constant"]])
@pytest.mark.parametrize(
    ("model", "asked", "words"),
    [
        ("cxr-clip", ["--target", "pneumothorax"], "does not know 'pneumothorax'"),
        ("cxr-clip", ["--target", "a pnuemonia."], "does not know 'pnuemonia', '.'"),
        ("cxr-clip", ["--target", "a pnuemonia."], "it knows pneumonia"),
        ("phantom-clip", ["--target", "effusion", "--against", "giraffe"], "it knows pleural effusion, pneumothorax"),
        ("phantom-llava", ["--target", "is there a giraffe ?"], "does not know 'giraffe'"),
    ],
)
def test_a_word_that_the_model_does_not_know_is_refused(
    capsys: pytest.CaptureFixture[str],
    noise: str,
    tmp_path: Path,
    command: list[str],
    model: str,
    asked: list[str],
    words: str,
) -> None:
    """It would be read as the unknown token: any two such findings would have one score."""
    call = [command[0], model, "--image", noise, *command[1:], *asked, "--out", str(tmp_path / "out")]
    assert words in said(capsys, call) and not (tmp_path / "out").exists()


def test_an_unknown_word_in_a_set_is_refused_and_in_a_data_folder_said_aloud(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, noise: str, tmp_path: Path
) -> None:
    """What holds for a typed text holds for prompt sets; a folder's target is scored, and said not to be understood."""
    call = ["graph", "cxr-clip", "--image", noise, "--target", "edema", "--against", "effusion; nodule"]
    assert "'nodule'" in said(capsys, [*call, "--out", str(tmp_path / "out")])
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "metadata.csv").write_text("image,patient_id,hernia\na.png,a,1\n")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "a.png")
    (folder / "dataset.json").write_text('{"targets": {"hernia": {}}}')
    assert choose_target(HookedVLM.from_pretrained("cxr-clip"), open_data(folder), None).name == "hernia"
    assert "cxr-clip does not know 'hernia'" in caplog.text


@pytest.mark.parametrize(
    "call",
    [
        ["data", "phantom"],
        ["audit", "no-such-model"],
        ["extract", "no-such-model", "--data", "D", "--site", "S"],
        ["train", "no-such-store"],
        ["import", "no-such-folder", "--site", "S"],
        ["features", "no-such-model"],
        ["graph", "no-such-model", "--image", "a.png", "--target", "a"],
        ["ablate", "no-such-model", "--features", "S:1"],
        ["explain", "no-such-model", "--image", "a.png", "--target", "a", "--method", "lime"],
        ["iq", "no-such-model"],
        ["experiment", "no-such-experiment"],
    ],
    ids=lambda call: call[0],
)
def test_an_out_that_cannot_be_written_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, call: list[str]
) -> None:
    """Whatever else is wrong with the command, its --out is the first thing said: nothing has been read or computed."""
    file = tmp_path / "file"
    file.write_text("a file, no folder")
    for out in (file, file / "below" / "it", Path("/proc/nowhere/out")):
        error = said(capsys, [*call, "--out", str(out)])
        assert error.startswith(("mechinterp: " + str(file), "mechinterp: " + str(out))) and "--out" in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_map_and_a_phantom_folder_can_be_verified(
    capsys: pytest.CaptureFixture[str], noise: str, tmp_path: Path
) -> None:
    """Both are closed by a manifest, also when written anew; a changed byte is found, another artefact is kept."""
    explain = ["explain", "phantom-clip", "--image", noise, "--target", "effusion", "--method", "constant"]
    for name, call, file in (("map", explain, "map.json"), ("data", ["data", "phantom", "--n", "3"], "metadata.csv")):
        out = tmp_path / name
        for _ in range(2):
            assert main([*call, "--out", str(out)]) == 0 and main(["verify", str(out)]) == 0
        content = (out / file).read_bytes()
        (out / file).write_bytes(content + b" ")
        assert f"{file}: does not match its sha256" in said(capsys, ["verify", str(out)])
        (out / file).write_bytes(content)
    assert main(["data", "phantom", "--n", "2", "--out", str(tmp_path / "data")]) == 0
    assert len(list((tmp_path / "data" / "images").iterdir())) == 2, "of the earlier phantom an image is left"
    assert "'map', not 'data'" in said(capsys, ["data", "phantom", "--n", "2", "--out", str(tmp_path / "map")])
    assert main(["verify", str(tmp_path / "map")]) == 0
