"""The preprocessing that belongs to a model, read from its own preprocessor_config.json.

transformers' fast image processors need torchvision, so the few operations they are made of are done here: pad to a
square, resize (Pillow, 8 bit, as transformers' Pillow backend does), centre crop, rescale, normalise. The result equals
transformers' own processor bit for bit on 8-bit images; a test holds it to that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from mechinterp.errors import DataError, ModelError

__all__ = ["Preprocessor"]

# what transformers fills in for a key that the file leaves out: size, crop, resample (Pillow's numbers: 2 bilinear,
# 3 bicubic), mean, std
_CLIP = ({"shortest_edge": 224}, True, 3, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
_HALF = ({"height": 224, "width": 224}, False, 2, [0.5] * 3, [0.5] * 3)
_DEFAULTS = {
    "CLIPImageProcessor": _CLIP,
    "CLIPFeatureExtractor": _CLIP,
    "BitImageProcessor": _CLIP,
    "LlavaImageProcessor": _CLIP,
    "ViTImageProcessor": _HALF,
    "ViTFeatureExtractor": _HALF,
    "SiglipImageProcessor": (_HALF[0], False, 3, _HALF[3], _HALF[4]),
    "Gemma3ImageProcessor": (_HALF[0], False, 2, _HALF[3], _HALF[4]),
}
_LARGEST = 8192


@dataclass(frozen=True)
class Preprocessor:
    """8-bit images to `pixel_values [n, channel, height, width]`.

    `size` is `(height, width)`, or `(shortest,)`, or None for no resize; `crop` is `(height, width)` or None.
    """

    size: tuple[int, ...] | None
    crop: tuple[int, int] | None
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad_to_square: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "preprocessor_config.json") -> Preprocessor:
        """Read a transformers image processor's config. Raises ModelError naming the field."""
        kind = config.get("image_processor_type") or config.get("feature_extractor_type")
        known = str(kind).removesuffix("Fast").removesuffix("Pil")
        if known not in _DEFAULTS:
            raise ModelError(f"unknown image_processor_type {kind!r}", where=where, hint=f"known: {sorted(_DEFAULTS)}")
        size, crops, resample, mean, std = _DEFAULTS[known]
        do_crop = config.get("do_center_crop", crops)
        square = known.startswith(("ViT", "Siglip", "Gemma"))
        read = cls(
            _size(config.get("size", size), where, square) if config.get("do_resize", True) else None,
            _pair(config.get("crop_size", {"height": 224, "width": 224}), f"{where}, crop_size") if do_crop else None,
            _number(config.get("resample", resample), f"{where}, resample", 0, 5, whole=True),
            _number(config.get("rescale_factor", 1 / 255), f"{where}, rescale_factor", 1e-6, 1.0)
            if config.get("do_rescale", True)
            else 1.0,
            _numbers(config.get("image_mean", mean), f"{where}, image_mean") if _normalises(config) else (0.0,) * 3,
            _numbers(config.get("image_std", std), f"{where}, image_std", 1e-6) if _normalises(config) else (1.0,) * 3,
            pad_to_square=bool(config.get("do_pad", False)) and known.startswith("Llava"),
        )
        if config.get("do_pan_and_scan"):
            raise ModelError("pan and scan is not supported", where=f"{where}, do_pan_and_scan", hint="turn it off")
        read.check_range(where)
        return read

    def check_range(self, where: str) -> None:
        """Raise ModelError unless black and white become numbers that a vision tower can have been trained on."""
        if len(self.mean) != len(self.std):
            raise ModelError("image_mean and image_std differ in length", where=where)
        table = self.table()
        low, high = float(table.min()), float(table.max())
        if not (-8.0 <= low < high <= 8.0) or float((table[:, 255] - table[:, 0]).min()) < 0.2:
            raise ModelError(
                f"turns black and white into {low:.4g} and {high:.4g}",
                where=where,
                hint="the pixel range does not fit: check do_rescale, rescale_factor, image_mean and image_std",
            )

    def output_size(self) -> tuple[int, int] | None:
        """Height and width of the pixel values, where they do not depend on the image."""
        if self.crop is not None:
            return self.crop
        if self.size is not None and (len(self.size) == 2 or self.pad_to_square):
            return (self.size[0], self.size[-1])
        return None

    def table(self) -> Float[Tensor, "channel grey"]:
        """Pixel value of every grey level 0..255 in every channel: rescaled, then normalised, in float32."""
        grey = torch.arange(256, dtype=torch.float64).mul(self.scale).float()
        mean, std = torch.tensor(self.mean)[:, None], torch.tensor(self.std)[:, None]
        return (grey - mean) / std

    def __call__(self, pixels: np.ndarray | Tensor) -> Float[Tensor, "n channel height width"]:
        """Pixel values of images `[n, h, w]` or `[n, h, w, 3]` in [0, 1] (quantised to 8 bits, as in training).

        Raises DataError when the values are not finite numbers in [0, 1], or not images.
        """
        images = _eight_bit(pixels)
        if self.pad_to_square and images.shape[1] != images.shape[2]:
            images = self._padded(images)
        height, width = self._resized(images.shape[1], images.shape[2])
        if (height, width) != images.shape[1:3]:
            method = Image.Resampling(self.resample)
            images = np.stack([np.asarray(Image.fromarray(i).resize((width, height), method)) for i in images])
        if self.crop is not None:
            images = _center_crop(images, self.crop)
        levels = torch.from_numpy(np.ascontiguousarray(images)).int()
        table = self.table()
        channels = [table[c][levels if levels.ndim == 3 else levels[..., c]] for c in range(len(table))]
        return torch.stack(channels, dim=1)

    def locate(self, height: int, width: int) -> tuple[Float[Tensor, " height"], Float[Tensor, " width"]]:
        """Where the centres of the rows and columns of an image of this size come to lie in the pixel values."""
        rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
        padded = (height, width)
        if self.pad_to_square:
            side = max(height, width)
            rows, columns, padded = rows + (side - height) // 2, columns + (side - width) // 2, (side, side)
        new = self._resized(*padded)
        rows, columns = rows * (new[0] / padded[0]), columns * (new[1] / padded[1])
        if self.crop is not None:
            rows, columns = rows - (new[0] - self.crop[0]) // 2, columns - (new[1] - self.crop[1]) // 2
        return rows, columns

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.size is None:
            return height, width
        if len(self.size) == 2:
            return self.size[0], self.size[1]
        short = self.size[0]
        if width <= height:
            return int(short * height / width), short
        return short, int(short * width / height)

    def _padded(self, images: UInt8[np.ndarray, "n h w *rgb"]) -> UInt8[np.ndarray, "n side side 3"]:
        """Pad to a square with the mean colour, as LLaVA does."""
        n, height, width = images.shape[:3]
        side = max(height, width)
        padded = np.empty((n, side, side, 3), np.uint8)
        padded[:] = [int(m * 255) for m in self.mean]
        top, left = (side - height) // 2, (side - width) // 2
        padded[:, top : top + height, left : left + width] = images if images.ndim == 4 else images[..., None]
        return padded


def _eight_bit(pixels: np.ndarray | Tensor) -> UInt8[np.ndarray, "n h w *rgb"]:
    """Check images in [0, 1] and turn them into 8 bits."""
    array = pixels.detach().cpu().numpy() if isinstance(pixels, Tensor) else np.asarray(pixels)
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[-1] != 3) or 0 in array.shape:
        raise DataError(f"images have shape {array.shape}", hint="give [n, height, width] or [n, height, width, 3]")
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"images are {array.dtype}", hint="give floats in [0, 1]: divide 8-bit images by 255")
    low, high = float(array.min()), float(array.max())
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        raise DataError(f"pixels lie in [{low:.4g}, {high:.4g}], not in [0, 1]", hint="rescale the images")
    if 0 < high <= 1 / 255 + 1e-6:
        raise DataError(f"the brightest pixel is {high:.4g}", hint="the images were divided by 255 twice")
    return np.rint(array.clip(0, 1) * 255).astype(np.uint8)


def _center_crop(images: UInt8[np.ndarray, "n h w *rgb"], size: tuple[int, int]) -> UInt8[np.ndarray, "n ch cw *rgb"]:
    """Centre crop; an image smaller than the crop is first padded with black, as transformers does."""
    short = [max(0, want - have) for want, have in zip(size, images.shape[1:3], strict=True)]
    if any(short):
        before = [-(-s // 2) for s in short]
        pads = [(0, 0), *((b, s - b) for b, s in zip(before, short, strict=True))] + [(0, 0)] * (images.ndim - 3)
        images = np.pad(images, pads)
    top, left = ((have - want) // 2 for want, have in zip(size, images.shape[1:3], strict=True))
    return images[:, top : top + size[0], left : left + size[1]]


def _normalises(config: Mapping[str, Any]) -> bool:
    return bool(config.get("do_normalize", True))


def _number(value: Any, where: str, low: int | float, high: int | float, whole: bool = False) -> Any:
    wanted = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, wanted) or not low <= value <= high:
        raise ModelError(f"is {value!r}, not a number from {low:g} to {high:g}", where=where)
    return value


def _numbers(value: Any, where: str, low: float = -1e6) -> tuple[float, ...]:
    values = value if isinstance(value, list | tuple) else [value] * 3
    if len(values) not in (1, 3):
        raise ModelError(f"has {len(values)} values, not 1 or 3", where=where)
    return tuple(float(_number(v, where, low, 1e6)) for v in values)


def _size(value: Any, where: str, square: bool) -> tuple[int, ...]:
    """`{"shortest_edge": n}`, `{"height": h, "width": w}`, or a bare number (old files)."""
    where = f"{where}, size"
    if isinstance(value, Mapping) and value.get("shortest_edge") is not None:
        if value.get("longest_edge") is not None:
            raise ModelError("has a longest_edge, which is not supported", where=where)
        return (_number(value["shortest_edge"], where, 1, _LARGEST, whole=True),)
    if isinstance(value, int) and not square:
        return (_number(value, where, 1, _LARGEST, whole=True),)
    return _pair(value, where)


def _pair(value: Any, where: str) -> tuple[int, int]:
    if isinstance(value, int):
        value = {"height": value, "width": value}
    if not isinstance(value, Mapping) or value.get("height") is None or value.get("width") is None:
        raise ModelError(f"is {value!r}, without height and width", where=where)
    height, width = (_number(value[k], where, 1, _LARGEST, whole=True) for k in ("height", "width"))
    return height, width
