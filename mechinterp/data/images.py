"""PNG and JPEG in, grey float images out, without trusting the file.

The size in the header is checked before a pixel is decoded, only the PNG and JPEG decoders are offered the bytes, and
every failure of a decoder becomes a DataError that names the file.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps

from mechinterp.errors import DataError

__all__ = ["MAX_PIXELS", "load_image", "resize_square"]

MAX_PIXELS = 50_000_000  # the largest radiographs have about 20 million; 50 million float32 are 200 MB
_FULL = (255, 1023, 4095, 16383, 65535)  # 8, 10, 12, 14 and 16 bits
_ORIENTATION = 0x0112  # EXIF tag


def load_image(path: Path, label: str | None = None) -> Float[np.ndarray, "height width"]:
    """Decode a PNG or JPEG as grey in [0, 1], upright as its EXIF orientation says.

    8-bit images are divided by 255. 16-bit grey is divided by the largest value of the smallest of 8, 10, 12, 14 and 16
    bits that holds it: detectors give 10 to 14 bits, and a file says 16 all the same. Colour becomes luma (ITU-R 601),
    a palette is resolved and transparency is shown on black.

    Raises DataError naming `label` (by default the path) when the file is missing, is neither PNG nor JPEG, is damaged
    or truncated, or has more than `MAX_PIXELS`.
    """
    where = label or str(path)
    try:
        with _quiet(), Image.open(path, formats=("PNG", "JPEG")) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"has {width} x {height} pixels, over the cap of {MAX_PIXELS}", where=where, hint="resize it first"
                )
            image.load()
            if image.getexif().get(_ORIENTATION, 1) != 1:
                image = ImageOps.exif_transpose(image)
            return _grey(image)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"has pixels over the cap of {MAX_PIXELS}", where=where, hint="resize it first") from error
    except FileNotFoundError as error:
        raise DataError("no such image", where=where, hint="is the image column relative to the folder?") from error
    except OSError as error:
        raise DataError(f"is not a whole PNG or JPEG: {_reason(error)}", where=where, hint=_HINT) from error
    except Exception as error:  # Pillow's decoders raise many kinds on damaged bytes
        raise DataError(f"is not a readable PNG or JPEG: {_reason(error)}", where=where, hint=_HINT) from error


def resize_square(image: Float[np.ndarray, "height width"], size: int) -> Float[np.ndarray, "size size"]:
    """Resize to `size` x `size` with an antialiased triangle filter, which never leaves the range of its input.

    The aspect ratio is not kept: no border is added and nothing is cut off.
    """
    if image.shape == (size, size):
        return image
    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized, dtype=np.float32)


def _grey(image: Image.Image) -> Float[np.ndarray, "height width"]:
    if image.mode.startswith("I"):  # 16-bit grey PNG
        deep = np.asarray(image, dtype=np.float32).clip(0, 65535)
        largest = float(deep.max(initial=0))
        return deep / np.float32(next(full for full in _FULL if largest <= full))
    if image.mode in ("P", "PA", "RGBA", "LA") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return np.asarray(image.convert("RGB").convert("L") if image.mode == "CMYK" else image.convert("L"), np.float32) / (
        np.float32(255)
    )


_HINT = "export it again as PNG, JPEG or DICOM"


def _reason(error: Exception) -> str:
    """A decoder's own words, without the path that Pillow puts into some of them."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = (str(error).splitlines() or [""])[0]
    return type(error).__name__ if not text or "/" in text or "<" in text else text[:120]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Pillow's warnings about odd files to ourselves, and make its decompression bomb warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield
