"""Names, paths and numbers of `format.md`: the one owner of how a store is laid out on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from mechinterp.errors import StorageError, UsageError
from mechinterp.storage import MANIFEST, canonical_json, read_json
from mechinterp.types import Site, Target

__all__ = ["KINDS", "Layout", "Request", "Tokens", "index_path", "read_config", "shard_path"]

FORMAT = "mechinterp-activations"
SCHEMA_VERSION = 1
CONFIG = "config.json"
KINDS = ("cls", "patch", "text", "pooled", "register")
SHARD_BYTES = 64 * 2**20

Tokens = Literal["all", "patch", "cls", "text", "pooled"]


@dataclass(frozen=True)
class Request:
    """What a store holds; it determines every byte of the folder (`format.md`, config.json)."""

    model: dict[str, str]
    data: dict[str, Any]
    sites: tuple[str, ...]
    tokens: Tokens
    batch_size: int
    seed: int
    target: dict[str, Any] | None = None
    texts: str | None = None

    @classmethod
    def make(
        cls,
        model: Any,
        data: Any,
        sites: Sequence[str | Site],
        tokens: Tokens,
        batch_size: int,
        seed: int,
        target: Target | None,
        texts: Sequence[str] | None = None,
    ) -> Request:
        """Check the arguments and describe model and data by their hashes. Raises UsageError for what cannot be."""
        if tokens not in get_args(Tokens):
            raise UsageError(f"{tokens!r} is no choice of tokens", where="tokens", hint=f"one of {get_args(Tokens)}")
        if batch_size < 1:
            raise UsageError(f"{batch_size} images a batch", where="batch_size", hint="at least 1")
        names = tuple(sorted({str(Site.parse(site)) for site in sites}))
        if not names:
            raise UsageError("no site asked for", where="sites", hint="for example vision.blocks.3.hook_resid_post")
        request = cls(
            model={"family": str(model.family), "sha256": str(model.sha256)},
            data={"sha256": str(data.sha256), "images": len(data)},
            sites=names,
            tokens=tokens,
            batch_size=batch_size,
            seed=seed,
        )
        if texts is not None and len(texts) != len(data):
            raise UsageError(f"{len(texts)} texts for {len(data)} images", where="texts", hint="one for each image")
        if not request.reads_text:
            return request
        if texts is not None:
            return replace(request, texts=hashlib.sha256(canonical_json(list(texts)).encode()).hexdigest())
        return replace(request, target=asdict(target)) if target is not None else request

    @property
    def reads_text(self) -> bool:
        """Whether a site lies behind the language side, so that the batch must hold text."""
        return any(Site.parse(site).tower.startswith("text") for site in self.sites)

    @property
    def key(self) -> str:
        """Hex sha256 of the canonical JSON of the request."""
        return hashlib.sha256(canonical_json(self.to_dict()).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it: `texts` only where texts were given."""
        return {name: value for name, value in asdict(self).items() if name != "texts" or value is not None}

    @property
    def batches(self) -> int:
        """How many forward passes the request takes."""
        return -(-int(self.data["images"]) // self.batch_size)


@dataclass(frozen=True)
class Layout:
    """What follows from a request once the widths of its sites are known."""

    d: dict[str, int]
    batches_per_shard: int
    shards: int

    @classmethod
    def plan(cls, request: Request, d: Mapping[str, int], rows_per_image: Mapping[str, int]) -> Layout:
        """Choose the shard size: as many batches as keep the largest site's shard within 64 MiB."""
        largest = max(d[site] * max(1, rows_per_image[site]) for site in request.sites) * 4 * request.batch_size
        per_shard = max(1, SHARD_BYTES // largest)
        return cls(dict(d), per_shard, -(-request.batches // per_shard))

    def shard_batches(self, shard: int, request: Request) -> range:
        """The batches that shard number `shard` holds."""
        first = shard * self.batches_per_shard
        return range(first, min(first + self.batches_per_shard, request.batches))


def shard_path(folder: Path, site: str, shard: int) -> Path:
    """Where shard number `shard` of a site lies."""
    return folder / "sites" / site / f"{shard:05d}.safetensors"


def index_path(folder: Path, site: str) -> Path:
    """Where the index of a site lies."""
    return folder / "sites" / site / "index.parquet"


def config_json(request: Request, layout: Layout) -> dict[str, Any]:
    """The content of config.json."""
    return {"format": FORMAT, "schema_version": SCHEMA_VERSION, "request": request.to_dict(), "layout": asdict(layout)}


def read_config(folder: Path) -> tuple[Request, Layout]:
    """Read config.json of a store. Raises StorageError when it is missing, damaged or of another version."""
    path = folder / CONFIG
    if folder.is_dir() and not path.exists() and not (folder / MANIFEST).exists():
        raise StorageError("is not an activation store", where=str(folder), hint="make one with `mechinterp extract`")
    config = read_json(path)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise StorageError(f"is not the config of an activation store ({FORMAT})", where=str(path))
    if config.get("schema_version") != SCHEMA_VERSION:
        raise StorageError(
            f"has schema_version {config.get('schema_version')!r}, this program reads {SCHEMA_VERSION}",
            where=str(path),
            hint="extract the activations again",
        )
    try:
        request = Request(**{**config["request"], "sites": tuple(config["request"]["sites"])})
        layout = Layout(**config["layout"])
        whole = (
            set(layout.d) == set(request.sites)
            and layout.batches_per_shard >= 1
            and layout.shards == -(-request.batches // layout.batches_per_shard)
            and all(isinstance(width, int) and width > 0 for width in layout.d.values())
            and all(str(Site.parse(site)) == site for site in request.sites)
        )
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, UsageError) as error:
        raise StorageError(f"is damaged: {error}", where=str(path), hint="extract the activations again") from error
    if not whole:
        raise StorageError("contradicts itself", where=str(path), hint="extract the activations again")
    return request, layout
