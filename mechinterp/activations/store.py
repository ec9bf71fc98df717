"""Read an activation store (`format.md`): rows by number, an index of what they are, and batches in random order."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mechinterp.activations.layout import Layout, index_path, read_config, shard_path
from mechinterp.activations.order import permutation
from mechinterp.activations.shards import Rows, map_shard
from mechinterp.errors import StorageError, UsageError
from mechinterp.storage import MANIFEST, read_json, sha256_file, verify_folder
from mechinterp.types import Site

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ActivationStore", "SiteActivations"]

HASHED_ON_OPENING = 256 * 2**20
"""A store up to this many bytes is checked against every sha256 when it is opened; a larger one only for sizes."""

KEPT_IN_MEMORY = 2**30
"""Rows of a site up to this many bytes are read into memory at the first random access."""

INDEX_COLUMNS = ("image", "patient", "split", "token", "patch", "kind")


class SiteActivations:
    """The rows of one site, `[N, d]`, memory-mapped; behaves like a read-only array that returns float32 tensors."""

    def __init__(self, folder: Path, site: Site, layout: Layout):
        self.site = site
        self.d = layout.d[str(site)]
        self._shards: list[Rows] = [
            map_shard(shard_path(folder, str(site), number), self.d) for number in range(layout.shards)
        ]
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, d)`."""
        return len(self), self.d

    @cached_property
    def _in_memory(self) -> Float[np.ndarray, "row d"] | None:
        if len(self) * self.d * 4 > KEPT_IN_MEMORY:
            return None
        return np.concatenate([shard.activations for shard in self._shards]) if self._shards else None

    def __getitem__(self, rows: int | slice | np.ndarray | Tensor) -> Float[Tensor, "*row d"]:
        """Rows by number, by slice, or by an array of numbers or of booleans, as a new tensor."""
        if isinstance(rows, int | np.integer):
            return self[np.asarray([rows])][0]
        if isinstance(rows, slice):
            rows = np.arange(len(self))[rows]
        numbers = np.asarray(rows)
        numbers = np.flatnonzero(numbers) if numbers.dtype == bool else numbers.astype(np.int64)
        numbers = np.where(numbers < 0, numbers + len(self), numbers)
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise UsageError(f"row {numbers.max()} of {len(self)}", where=str(self.site))
        if self._in_memory is not None:
            return torch.from_numpy(self._in_memory[numbers])
        return torch.from_numpy(self._gather(numbers))

    def _gather(self, numbers: Int64[np.ndarray, " row"]) -> Float[np.ndarray, "row d"]:
        """Read rows shard by shard, in file order inside a shard, so that pages are touched once."""
        gathered = np.empty((len(numbers), self.d), np.float32)
        shard_of = np.searchsorted(self._starts, numbers, side="right") - 1
        for shard in np.unique(shard_of):
            places = np.flatnonzero(shard_of == shard)
            places = places[np.argsort(numbers[places], kind="stable")]
            gathered[places] = self._shards[shard].activations[numbers[places] - self._starts[shard]]
        return gathered

    def chunks(self, rows: Int64[np.ndarray, " row"], size: int = 8192) -> Iterator[Float[Tensor, "chunk d"]]:
        """The given rows in pieces of at most `size`, for sums that must not hold everything at once."""
        for start in range(0, len(rows), size):
            yield self[rows[start : start + size]]


class ActivationStore:
    """A finished activation store.

    Args:
        folder: what `extract` made.

    Raises:
        StorageError: no store, unfinished, damaged, or of another version; the message names the file. A store up
            to 256 MiB is checked against all its hashes here, a larger one for names and sizes; `verify()` hashes.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.request, self.layout = read_config(self.folder)
        if not (self.folder / MANIFEST).exists():
            raise StorageError("is not finished", where=str(self.folder), hint="run the same extraction again")
        self._check_files()
        self._sites: dict[str, SiteActivations] = {}

    def __repr__(self) -> str:
        images, sites = self.request.data["images"], ", ".join(self.request.sites)
        return f"ActivationStore({images} images, {self.request.tokens} tokens at {sites})"

    @property
    def sites(self) -> tuple[str, ...]:
        """Hook names of the sites that are stored."""
        return self.request.sites

    @cached_property
    def sha256(self) -> str:
        """Content hash: sha256 of the manifest, which holds the sha256 of every other file."""
        return sha256_file(self.folder / MANIFEST)

    def site(self, name: str | Site) -> SiteActivations:
        """The rows of a site. Raises UsageError with the list of what is stored when the site is not."""
        key = self._known(name)
        if key not in self._sites:
            self._sites[key] = SiteActivations(self.folder, Site.parse(key), self.layout)
        return self._sites[key]

    @cached_property
    def _indices(self) -> dict[str, pd.DataFrame]:
        return {}

    def index_of(self, name: str | Site) -> pd.DataFrame:
        """Index of a site: row number to `image`, `patient`, `split`, `token`, `patch`, `kind` (`format.md`)."""
        key = self._known(name)
        if key not in self._indices:
            self._indices[key] = _read_index(index_path(self.folder, key), len(self.site(key)))
        return self._indices[key]

    @property
    def index(self) -> pd.DataFrame:
        """The index, when all sites share one. Raises UsageError when they differ; then ask `index_of(site)`."""
        first, *others = (self.index_of(site) for site in self.sites)
        if not all(first.equals(other) for other in others):
            raise UsageError("the sites have different rows", where="index", hint="ask index_of(site)")
        return first

    def rows(self, name: str | Site, split: str | None = None) -> Int64[np.ndarray, " row"]:
        """Row numbers of a split in increasing order; of all splits for None."""
        index = self.index_of(name)
        return np.arange(len(index)) if split is None else np.flatnonzero((index["split"] == split).to_numpy())

    def images_of(self, name: str | Site, rows: Int64[np.ndarray, " row"]) -> list[str]:
        """Names of the images that the given rows come from, each once, in order of appearance."""
        return list(dict.fromkeys(self.index_of(name)["image"].iloc[rows].astype(str)))

    def order(
        self, name: str | Site, *, seed: int | None = None, epoch: int = 0, split: str | None = "train"
    ) -> Int64[np.ndarray, " row"]:
        """Row numbers of a split in the random order of one epoch; a function of its arguments only."""
        rows = self.rows(name, split)
        return rows[permutation(len(rows), self.request.seed if seed is None else seed, epoch)]

    def batches(
        self,
        site: str | Site,
        batch_size: int,
        seed: int | None = None,
        epoch: int = 0,
        start_step: int = 0,
        split: str | None = "train",
    ) -> Iterator[tuple[int, Float[Tensor, "batch d"]]]:
        """Batches of one epoch in random order, as `(step, rows)`, from `start_step` on.

        The batch at (seed, epoch, step) is always the same one, wherever iteration began. A last, smaller batch is
        left out.
        """
        activations, order = self.site(site), self.order(site, seed=seed, epoch=epoch, split=split)
        for step in range(start_step, len(order) // batch_size):
            yield step, activations[order[step * batch_size : (step + 1) * batch_size]]

    def verify(self) -> list[str]:
        """Check every file against its sha256; one line per problem."""
        return verify_folder(self.folder)

    def _known(self, name: str | Site) -> str:
        key = str(Site.parse(name))
        if key not in self.request.sites:
            raise UsageError(f"{key} is not stored", where=str(self.folder), hint=f"stored: {', '.join(self.sites)}")
        return key

    def _check_files(self) -> None:
        manifest = read_json(self.folder / MANIFEST)
        files = manifest.get("files") if isinstance(manifest, dict) else None
        if not isinstance(files, dict) or not all(isinstance(v, dict) and "bytes" in v for v in files.values()):
            raise StorageError("lists no files", where=str(self.folder / MANIFEST), hint="extract again")
        if sum(int(v["bytes"]) for v in files.values()) <= HASHED_ON_OPENING:
            problems = self.verify()
        else:
            problems = [
                f"{name}: missing or of another size"
                for name, entry in files.items()
                if not (self.folder / name).is_file() or (self.folder / name).stat().st_size != entry["bytes"]
            ]
        if problems:
            raise StorageError(
                "; ".join(problems[:3]), where=str(self.folder), hint="remove the folder and extract again"
            )


def _read_index(path: Path, rows: int) -> pd.DataFrame:
    """Read an index and check its columns and length. Raises StorageError."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path)
        missing = set(INDEX_COLUMNS) - set(table.column_names)
        if missing or table.num_rows != rows:
            raise ValueError(f"{table.num_rows} lines for {rows} rows, missing columns {sorted(missing)}")
        return table.select(list(INDEX_COLUMNS)).to_pandas()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise StorageError(f"is no index of this site: {error}", where=str(path), hint="extract again") from error
