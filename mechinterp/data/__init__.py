"""Images with metadata: data folders, DICOM, VQA-RAD, and the synthetic phantom.

    from mechinterp.data import open_data
    data = open_data("my-folder")

Names are imported when first used, so that `import mechinterp.data` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mechinterp.lazy import lazily

if TYPE_CHECKING:
    from mechinterp.data.attributes import Attribute
    from mechinterp.data.dicom import load_dicom
    from mechinterp.data.folder import open_data
    from mechinterp.data.imagedata import ImageData
    from mechinterp.data.images import load_image, resize_square
    from mechinterp.data.vqa import VqaData, VqaQuestion, open_vqa

__all__ = [
    "Attribute",
    "ImageData",
    "VqaData",
    "VqaQuestion",
    "load_dicom",
    "load_image",
    "open_data",
    "open_vqa",
    "resize_square",
]

_HOME = {
    "Attribute": "attributes",
    "ImageData": "imagedata",
    "VqaData": "vqa",
    "VqaQuestion": "vqa",
    "load_dicom": "dicom",
    "load_image": "images",
    "open_data": "folder",
    "open_vqa": "vqa",
    "resize_square": "images",
}

__getattr__ = lazily(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)
