"""Mistakes at the command line that once ended in a traceback, or in a result about nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_dicom import make_dicom, ramp

from mechinterp.cli import main
from mechinterp.data.files import open_image
from mechinterp.errors import DataError


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
