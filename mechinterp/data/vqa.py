"""VQA-RAD (Lau et al., Scientific Data 2018): radiology images with clinicians' questions and answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from mechinterp.data.files import inside
from mechinterp.data.folder import assign_split
from mechinterp.data.images import load_image, resize_square
from mechinterp.errors import DataError, StorageError
from mechinterp.progress import progress
from mechinterp.storage import read_json

__all__ = ["VqaData", "VqaQuestion", "open_vqa"]

FILE = "questions.json"
_FIELDS = ("image_name", "image_organ", "question", "question_type", "answer", "answer_type")


@dataclass(frozen=True)
class VqaQuestion:
    """One question about the image in row `image`; `closed` when the answer is yes, no or one of a few words."""

    id: str
    image: int
    organ: str
    question: str
    kind: str
    answer: str
    closed: bool

    @property
    def yes(self) -> bool | None:
        """True or False when the answer is yes or no, else None."""
        return {"yes": True, "no": False}.get(self.answer.strip().lower().rstrip("."))


@dataclass(frozen=True, eq=False, repr=False)
class VqaData:
    """Images and questions. `split` has one entry for each image: the official split shares images between its
    parts, so images (the nearest there is to patients) are split 60/15/25 instead.
    """

    root: Path
    images: tuple[str, ...]
    questions: tuple[VqaQuestion, ...]
    split: np.ndarray
    _paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.questions)

    def __repr__(self) -> str:
        return f"VqaData({len(self.images)} images, {len(self.questions)} questions)"

    def select(self, split: str | None = None, organ: str | None = None) -> tuple[VqaQuestion, ...]:
        """Questions of one split and organ (HEAD, CHEST, ABD); all of them by default."""
        return tuple(
            q
            for q in self.questions
            if (split is None or self.split[q.image] == split) and (organ is None or q.organ == organ)
        )

    def pixels(self, rows: Iterable[int], size: int) -> Float[np.ndarray, "image size size"]:
        """Grey images in [0, 1] of some image rows, resized to a square. Raises DataError naming the file."""
        picked = list(progress(rows, "reading images", unit="image"))
        out = np.empty((len(picked), size, size), dtype=np.float32)
        for i, row in enumerate(picked):
            out[i] = resize_square(load_image(self._paths[row], self.images[row]), size)
        return out


def open_vqa(folder: str | Path, *, seed: int = 0) -> VqaData:
    """Open a folder with questions.json and images/. Raises DataError naming the entry and field that is wrong."""
    root = Path(folder)
    try:
        entries = read_json(root / FILE)
    except StorageError as error:
        raise DataError(error.what, where=str(root / FILE), hint=error.hint) from error
    if not isinstance(entries, list) or not entries:
        raise DataError("is not a list of questions", where=FILE)
    rows: dict[str, int] = {}
    questions = []
    for i, entry in enumerate(entries):
        texts = _texts(entry, f"{FILE} entry {i}")
        image = rows.setdefault(texts["image_name"], len(rows))
        questions.append(
            VqaQuestion(
                id=str(entry.get("qid", i)),
                image=image,
                organ=texts["image_organ"],
                question=texts["question"],
                kind=texts["question_type"],
                answer=texts["answer"],
                closed=texts["answer_type"].upper() == "CLOSED",
            )
        )
    paths = tuple(_image(root, name) for name in rows)
    return VqaData(root, tuple(rows), tuple(questions), assign_split(tuple(rows), seed), paths)


def _texts(entry: object, where: str) -> dict[str, str]:
    if not isinstance(entry, dict):
        raise DataError("is not an object {...}", where=where)
    texts = {}
    for key in _FIELDS:
        value = entry.get(key)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise DataError(f"has no text {key!r}", where=where)
        texts[key] = str(value).strip()
    return texts


def _image(root: Path, name: str) -> Path:
    path = inside(root / "images", name)
    if path is None:
        raise DataError(f"the image {name[:120]!r} is not below images/", where=FILE)
    try:
        found = path.is_file()
    except OSError:
        found = False
    if not found:
        raise DataError(f"there is no image {name[:120]!r} in images/", where=FILE)
    return path
