"""The Phantom: a table of factors that can be rendered, masked, described, intervened on, and written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, UInt8

from mechinterp.data.phantom import language
from mechinterp.data.phantom._render import CHUNK, factor_mask, render_chunk
from mechinterp.data.phantom.factors import DETAILS, FACTORS, check_associations, sample_factors
from mechinterp.errors import UsageError

__all__ = ["Phantom", "question_answers"]

_RANGES: dict[str, tuple[float, float]] = {"age": (0, 120), "exposure": (-1, 1), "noise": (0, 1), "breast": (0, 1)}
_WHOLE = ("age", *(name for name in DETAILS if not name.endswith("_size")))


class Phantom:
    """Images of synthetic patients, defined by `factors` (one row per image) and a `seed`.

    Nothing is rendered until asked. Anatomy, texture and noise of row i follow from (seed, its patient and image
    number), so that a row renders to the same bytes alone, in any batch, and after writing and loading.
    """

    def __init__(
        self,
        factors: pd.DataFrame,
        seed: int,
        size: int = 128,
        associations: Mapping[tuple[str, str], float] | None = None,
    ):
        if not 64 <= size <= 512 or size % 8:
            raise UsageError(f"cannot render {size} pixels", where="size", hint="a multiple of 8 from 64 to 512")
        self.factors = factors.reset_index(drop=True)
        self.seed, self.size = int(seed), int(size)
        self.associations = check_associations(associations or {})

    @classmethod
    def sample(
        cls, n: int, seed: int = 0, size: int = 128, associations: Mapping[tuple[str, str], float] | None = None
    ) -> Phantom:
        """Draw `n` images (about n / 1.4 patients) of `size` x `size` pixels from the causal graph.

        Args:
            n: number of images.
            seed: the same seed gives the same bytes, and the first k of n images do not depend on n.
            size: pixels per side, a multiple of 8 from 64 to 512.
            associations: {(shortcut, finding): rho}, rho in [-1, 1] the phi correlation in expectation. Both factors
                of a dialled pair have marginal 1/2; a pair without a dial is independent unless the graph joins it.

        Raises:
            UsageError: for a pair or a dial that cannot be met, or a size that cannot be rendered.
        """
        if n < 1:
            raise UsageError(f"cannot draw {n} images", where="n", hint="at least 1")
        return cls(sample_factors(n, seed, associations or {}), seed, size, associations)

    def __len__(self) -> int:
        return len(self.factors)

    def __repr__(self) -> str:
        return f"Phantom({len(self)} images, {len(set(self.patients))} patients, size={self.size}, seed={self.seed})"

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> Phantom:
        """Some of the images: a row, a slice, row numbers, or a boolean mask."""
        picked = np.atleast_1d(np.arange(len(self))[rows if isinstance(rows, int | slice) else np.asarray(rows)])
        return Phantom(self.factors.iloc[picked], self.seed, self.size, self.associations)

    @property
    def patients(self) -> list[str]:
        """Patient of each image."""
        return [f"p{number:05d}" for number in self.factors["patient"]]

    @property
    def images(self) -> list[str]:
        """Name of each image, as in metadata.csv."""
        return [f"images/{number:06d}.png" for number in self.factors["image"]]

    def _chunks(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        columns = {name: self.factors[name].to_numpy() for name in self.factors}
        for start in range(0, len(self), CHUNK):
            yield start, {name: values[start : start + CHUNK] for name, values in columns.items()}

    def render(self) -> UInt8[np.ndarray, "n size size"]:
        """The radiographs, 0 (air) to 255 (metal); patient right is on the left of the image."""
        out = np.empty((len(self), self.size, self.size), np.uint8)
        for start, chunk in self._chunks():
            out[start : start + CHUNK] = render_chunk(chunk, self.seed, self.size)
        return out

    def masks(self, factor: str) -> Bool[np.ndarray, "n size size"]:
        """Where the factor is in each image: nowhere if absent, everywhere if it is global (view, exposure ...).

        The mask of a local factor, grown by a few pixels, bounds all that `do` of that factor changes; for `letter`
        and `breast` that is the union of the masks before and after.
        """
        if factor not in FACTORS:
            raise UsageError(f"no factor {factor!r}", where="factor", hint=f"one of {', '.join(FACTORS)}")
        if FACTORS[factor].scope == "global":
            return np.ones((len(self), self.size, self.size), bool)
        out = np.zeros((len(self), self.size, self.size), bool)
        for start, chunk in self._chunks():
            out[start : start + CHUNK] = factor_mask(chunk, self.seed, self.size, factor)
        return out

    def _rows(self) -> list[dict[str, Any]]:
        return self.factors.to_dict("records")

    def reports(self) -> list[str]:
        """A report per image; see `mechinterp.data.phantom.language`."""
        return language.reports(self._rows(), self.seed)

    def captions(self) -> list[str]:
        """A caption of at most 24 words per image."""
        return language.captions(self._rows(), self.seed)

    def do(self, **values: Any) -> Phantom:
        """The same patients, positions and noise, with some factors (or details such as effusion_side) set.

        An intervention in the sense of Pearl (Causality, 2009, section 3.2) whose descendants are held at the values
        they had: do(sex=1) leaves the breast shadow to do(breast=0), do(hospital=1) leaves the scanner.

        Args:
            values: factor=value for all images, or a sequence with one value per image; categories also by name
                (view="AP").

        Raises:
            UsageError: for an unknown factor or a value outside its range.
        """
        table = self.factors.copy()
        for name, value in values.items():
            table[name] = check_values(name, value, len(self))
        return Phantom(table, self.seed, self.size, self.associations)

    def write(self, folder: str | Path, masks: bool = True) -> Path:
        """Write a data folder (images, metadata.csv, dataset.json, reports.csv, masks) with truth.json beside it."""
        from mechinterp.data.phantom.folder import write_phantom

        return write_phantom(self, Path(folder), masks)

    @classmethod
    def load(cls, folder: str | Path) -> Phantom:
        """Restore a written phantom: it renders to the bytes it was written with. Raises DataError or StorageError."""
        from mechinterp.data.phantom.folder import load_phantom

        return load_phantom(Path(folder))


def question_answers(phantom: Phantom, seed: int = 0) -> list[list[tuple[str, str]]]:
    """Per image a list of (question, answer): yes and no in equal number, and sides; `seed` picks which are asked."""
    return language.question_answers(phantom._rows(), seed)


def check_values(name: str, value: Any, n: int) -> np.ndarray:
    """`n` values of a factor or detail, from one or many, categories as 0 and 1. Raises UsageError."""
    if name not in FACTORS and name not in DETAILS:
        raise UsageError(f"no factor {name!r}", where=name, hint=f"one of {', '.join((*FACTORS, *DETAILS))}")
    factor = FACTORS.get(name)
    if factor and factor.values and isinstance(value, str):
        if value not in factor.values:
            raise UsageError(f"{value!r} is not a value of {name}", where=name, hint=f"one of {factor.values}")
        value = factor.values.index(value)
    try:
        values = np.broadcast_to(np.asarray(value, np.float64), (n,)).copy()
    except (TypeError, ValueError) as error:
        raise UsageError(f"needs a number or {n} of them", where=name) from error
    low, high = DETAILS.get(name) or _RANGES.get(name, (0, 1))
    if not ((values >= low) & (values <= high)).all():
        raise UsageError(f"a value is outside [{low}, {high}]", where=name)
    whole = name in _WHOLE or (factor is not None and factor.rate is not None)
    if whole and not (values == np.round(values)).all():
        raise UsageError("needs whole numbers", where=name)
    return values.astype(np.int64) if whole else values
