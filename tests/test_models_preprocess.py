"""The preprocessing is the model's own: held, bit for bit, to transformers' Pillow image processors."""

from __future__ import annotations

import contextlib
import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny

from mechinterp.errors import DataError, MechInterpError, ModelError, UsageError
from mechinterp.models import HookedVLM
from mechinterp.models.preprocess import Preprocessor

SQUARE = {"height": 20, "width": 24}
PROCESSORS = [
    ("clip", "CLIP", {"size": {"shortest_edge": 24}, "crop_size": {"height": 20, "width": 20}}),
    ("clip", "CLIP", {"size": {"shortest_edge": 16}, "crop_size": {"height": 21, "width": 20}}),  # the crop pads
    ("clip", "CLIP", {"do_resize": False, "crop_size": {"height": 15, "width": 14}, "do_normalize": False}),
    ("siglip", "Siglip", {"size": SQUARE}),
    ("siglip", "Siglip", {"size": SQUARE, "resample": 2, "image_mean": [0.1, 0.2, 0.3]}),
    ("vit", "ViT", {"size": SQUARE}),
    ("bit", "Bit", {"size": {"shortest_edge": 20}, "crop_size": {"height": 18, "width": 18}}),
    ("gemma3", "Gemma3", {"size": SQUARE}),
    ("llava", "Llava", {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}, "do_pad": True}),
    ("llava", "Llava", {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}}),
]


@pytest.mark.parametrize(("module", "name", "options"), PROCESSORS)
@pytest.mark.parametrize("shape", [(20, 24), (33, 47), (47, 33), (10, 11)])
def test_equal_to_transformers_bit_for_bit(module: str, name: str, options: dict, shape: tuple[int, int]) -> None:
    found = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    theirs = getattr(found, f"{name}ImageProcessorPil")(**options)
    ours = Preprocessor.from_config(theirs.to_dict())
    rng = np.random.default_rng(0)
    for grey in (False, True):
        eight = rng.integers(0, 256, (2, *shape, 3), dtype=np.uint8)
        if grey:
            eight = np.repeat(eight[..., :1], 3, axis=-1)
        want = theirs(list(eight), return_tensors="pt")["pixel_values"]
        pixels = (eight[..., 0] if grey else eight).astype(np.float32) / 255
        assert torch.equal(ours(pixels), want)
        assert torch.equal(ours(torch.from_numpy(pixels)), want)


def test_pixels_out_of_range_are_refused() -> None:
    model = HookedVLM(*tiny("clip"))
    good = np.random.default_rng(0).random((2, 32, 32), dtype=np.float32)
    wrong = [
        good * 255,
        good - 0.5,
        good / 255,
        np.where(good > 0.99, np.nan, good),
        np.where(good > 0.99, np.inf, good),
        (good * 255).astype(np.uint8),
        good[0],
        good[..., None],
        good[:0],
    ]
    for pixels in wrong:
        with pytest.raises(DataError):
            model.preprocess(pixels)
    assert torch.isfinite(model.preprocess(good * 0).pixel_values).all()  # a black image is an image
    assert model.preprocess(np.stack([good] * 3, -1)).pixel_values.shape == (2, 3, 32, 32)


def test_ids_and_texts_must_match_the_images() -> None:
    model = HookedVLM(*tiny("clip"))
    pixels = np.zeros((3, 32, 32), np.float32)
    assert model.preprocess(pixels, ["a chest"], ids=["a", "b", "c"]).ids == ("a", "b", "c")
    for texts, ids in [(["a", "b"], ()), (None, ("a",))]:
        with pytest.raises(UsageError):
            model.preprocess(pixels, texts, ids=ids)
    with pytest.raises(UsageError, match="reads no text"):
        HookedVLM(*tiny("vit")).preprocess(pixels, ["a chest"])


def test_one_question_a_batch_also_as_text() -> None:
    model = HookedVLM(*tiny("llava"))
    with pytest.raises(UsageError, match="length"):
        model.preprocess(np.zeros((2, 32, 32), np.float32), ["is there pneumonia ?", "pneumonia ?"])


def test_a_siglip_caption_is_padded_to_its_full_length_and_unmasked() -> None:
    model = HookedVLM(*tiny("siglip"))
    batch = model.preprocess(np.zeros((2, 32, 32), np.float32), ["a chest", "portable marker view"])
    assert batch.input_ids is not None and batch.input_ids.shape == (2, 24) and batch.attention_mask is None


def test_images_that_do_not_fill_the_grid_are_refused() -> None:
    hf, processor = tiny("dinov2")
    processor.image_processor.do_center_crop = False
    model = HookedVLM(hf, processor)
    assert model.preprocess(np.zeros((1, 64, 64), np.float32)).pixel_values.shape == (1, 3, 32, 32)
    with pytest.raises(UsageError, match="grid"):
        model.preprocess(np.zeros((1, 64, 128), np.float32))


def test_a_wider_dinov2_grid_follows_the_preprocessor() -> None:
    hf, processor = tiny("dinov2")
    processor.image_processor.size = {"shortest_edge": 48}
    processor.image_processor.crop_size = {"height": 48, "width": 48}
    model = HookedVLM(hf, processor)
    assert model.grid_shape == (6, 6)
    assert model.encode_image(model.preprocess(np.zeros((1, 48, 48), np.float32))).shape == (1, 32)


BASE = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": 32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rescale_factor": 1.0}, "pixel range"),
        ({"do_rescale": False}, "pixel range"),
        ({"image_std": [10.0, 10.0, 10.0]}, "pixel range"),
        ({"image_mean": [120.0, 120.0, 120.0]}, "pixel range"),
        ({"image_std": [0.0, 1.0, 1.0]}, "image_std"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_mean": None}, "image_mean"),
        ({"size": {"shortest_edge": "32"}}, "size"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "longest_edge"),
        ({"size": {"height": 10**9, "width": 32}}, "size"),
        ({"size": {}}, "size"),
        ({"crop_size": {"height": 0, "width": 32}}, "crop_size"),
        ({"resample": 9}, "resample"),
        ({"resample": True}, "resample"),
        ({"do_pan_and_scan": True}, "pan"),
        ({"image_processor_type": "NoSuchProcessor"}, "NoSuchProcessor.*CLIPImageProcessor"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Preprocessor.from_config({**BASE, **change})


def test_old_files_are_read() -> None:
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3}
    new = {"image_processor_type": "CLIPImageProcessorFast"}
    assert Preprocessor.from_config(old) == Preprocessor.from_config(new)
    vit = Preprocessor.from_config({"feature_extractor_type": "ViTFeatureExtractor", "size": 224})
    assert vit.size == (224, 224) and vit.crop is None


def test_a_preprocessor_of_another_size_or_depth_is_refused() -> None:
    hf, processor = tiny("clip")
    processor.image_processor.crop_size = {"height": 48, "width": 48}
    with pytest.raises(ModelError, match="48 x 48 for a model of 32 x 32"):
        HookedVLM(hf, processor)
    hf, processor = tiny("clip", num_channels=1)
    with pytest.raises(ModelError, match="channels"):
        HookedVLM(hf, processor)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["height", "shortest_edge"]), inner),
    max_leaves=6,
)
FIELDS = ["size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std", "do_resize", "do_normalize"]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from([*FIELDS, "image_processor_type", "do_pad"]), VALUES))
def test_any_config_is_read_or_refused(change: dict) -> None:
    with contextlib.suppress(MechInterpError):
        Preprocessor.from_config({**BASE, **change})
