"""Run a model over a data folder and store what passes its sites. The file format is `format.md`.

1. Ask one image for the width of each site; plan the shards; write config.json.
2. For each shard that is not there yet: load, preprocess and run its batches, keep the chosen tokens, check that
   they are finite, write the shard. Loading the next batch and writing the last shard happen beside the forward.
3. Write the indices from the shards, then the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mechinterp.activations.capture import Capture, Images, Reader
from mechinterp.activations.layout import (
    CONFIG,
    KINDS,
    Layout,
    Request,
    Tokens,
    config_json,
    index_path,
    read_config,
    shard_path,
)
from mechinterp.activations.shards import Rows, map_shard, write_shard
from mechinterp.activations.store import INDEX_COLUMNS, ActivationStore
from mechinterp.errors import DataError, ModelError, StorageError, UsageError
from mechinterp.progress import progress
from mechinterp.storage import MANIFEST, atomic_path, write_json, write_manifest
from mechinterp.types import Site, Target

__all__ = ["extract", "store_folder"]


def store_folder(
    root: Path | str,
    model: Reader,
    data: Images,
    sites: Sequence[str | Site],
    tokens: Tokens = "patch",
    batch_size: int = 64,
    seed: int = 0,
    target: Target | None = None,
    texts: Sequence[str] | None = None,
) -> Path:
    """Folder below `root` that is named after the content of the request, for a cache of stores."""
    request = Request.make(model, data, sites, tokens, batch_size, seed, target, texts)
    return Path(root) / f"acts-{request.key[:16]}"


def extract(
    model: Reader,
    data: Images,
    sites: Sequence[str | Site],
    out: Path | str,
    tokens: Tokens = "patch",
    batch_size: int = 64,
    seed: int = 0,
    target: Target | None = None,
    texts: Sequence[str] | None = None,
) -> ActivationStore:
    """Store the activations of `model` at `sites` over all images of `data`, in one pass.

    Args:
        model: a `HookedVLM`.
        data: an `ImageData`; rows come in its order, all splits.
        sites: hook names such as `vision.blocks.3.hook_resid_post`.
        out: folder of the store. A finished store of the same request is opened, an unfinished one is resumed.
        tokens: which tokens to keep: "all", "patch", "cls", "text", or "pooled" (`format.md`, Kinds).
        batch_size: images per forward pass.
        seed: default seed of the random order in which the store is read.
        target: question put to a generative model when a site of its language tower is asked for.
        texts: what is said beside each image when a site of the language side is asked for, in place of the target's
            question (generative model: the prompt, and what has been written so far) or the image's report (dual
            encoder). They may differ in length.

    Raises:
        UsageError: an argument that cannot be, or a site that cannot be stored.
        ModelError: a site that the model does not have.
        DataError: an image that cannot be read, or no text for a text site.
        NonFiniteError: an activation is NaN or infinite; names the images. Shards made before stay.
        StorageError: `out` holds something else, or cannot be written.
    """
    folder = Path(out)
    request = Request.make(model, data, sites, tokens, batch_size, seed, target, texts)
    absent = sorted(set(request.sites) - set(model.sites()))
    if absent:
        near = [name for name in model.sites() if name.rsplit(".", 1)[-1] == absent[0].rsplit(".", 1)[-1]]
        raise ModelError(f"has no site {absent[0]}", where="sites", hint=f"it has {', '.join(near[:8]) or 'others'}")
    if len(data) == 0:
        raise DataError("has no image", where="data")
    run = Capture(model, data, request, target, texts)
    layout = _claim(folder, request, run)
    if not (folder / MANIFEST).exists():
        _write_shards(folder, layout, run)
        for site in request.sites:
            _write_index(folder, site, layout, data)
        _remove_partial(folder)
        write_manifest(folder, {"kind": "activations", "key": request.key})
    return ActivationStore(folder)


def _claim(folder: Path, request: Request, run: Capture) -> Layout:
    """Open `folder` for this request: refuse another's, resume our own, plan a new one."""
    if (folder / CONFIG).exists():
        found, layout = read_config(folder)
        if found != request:
            names = ("model", "data", "sites", "tokens", "batch_size", "seed", "target", "texts")
            differing = [name for name in names if getattr(found, name) != getattr(request, name)]
            raise StorageError(
                f"holds the store of another request (differs in {', '.join(differing)})",
                where=str(folder),
                hint="choose another folder, or remove this one",
            )
        _remove_partial(folder)
        return layout
    if folder.is_dir() and any(not p.name.endswith(".partial") for p in folder.iterdir()):
        raise StorageError("is not empty and holds no store", where=str(folder), hint="choose another folder")
    first = run.load(range(1))
    values = run.capture(first)
    kept = {site: len(rows) for site, rows in run.rows(0, first).items()}
    empty = [site for site, rows in kept.items() if rows == 0]
    if empty:
        raise UsageError(f"has no token of kind {request.tokens!r}", where=empty[0], hint="choose other tokens")
    layout = Layout.plan(request, {site: value.shape[-1] for site, value in values.items()}, kept)
    _remove_partial(folder)
    write_json(folder / CONFIG, config_json(request, layout))
    return layout


def _write_shards(folder: Path, layout: Layout, run: Capture) -> None:
    """Make the shards that are not there; the disk works beside the model."""
    sites = run.request.sites
    todo = [s for s in range(layout.shards) if not all(shard_path(folder, site, s).exists() for site in sites)]
    numbers = [(shard, batch) for shard in todo for batch in layout.shard_batches(shard, run.request)]
    pending: list[dict[str, Rows]] = []
    with ThreadPoolExecutor(1) as writer:
        written: Future[None] | None = None
        loaded = _ahead(lambda item: run.load(run.images_of(item[1])), numbers)
        ready = zip(numbers, loaded, strict=True)
        for (shard, number), batch in progress(ready, "extract", total=len(numbers), unit="batch"):
            pending.append(run.rows(number, batch))
            if number == layout.shard_batches(shard, run.request)[-1]:
                if written is not None:
                    written.result()
                written = writer.submit(_write_shard, folder, shard, pending)
                pending = []
        if written is not None:
            written.result()


def _write_shard(folder: Path, shard: int, batches: list[dict[str, Rows]]) -> None:
    for site in batches[0]:
        write_shard(shard_path(folder, site, shard), Rows.concatenate([rows[site] for rows in batches]))


def _ahead(load: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Load one item ahead of the one in use, in another thread."""
    with ThreadPoolExecutor(1) as loader:
        coming: Future[Any] | None = None
        for item in items:
            following = loader.submit(load, item)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()


def _write_index(folder: Path, site: str, layout: Layout, data: Any) -> None:
    """Write index.parquet of one site from what its shards say of their rows."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    shards = [map_shard(shard_path(folder, site, s), layout.d[site]) for s in range(layout.shards)]
    rows = Rows.concatenate([replace(shard, activations=np.zeros((len(shard), 0), np.float32)) for shard in shards])

    def names(values: Any) -> pa.Array:
        used, codes = np.unique(np.asarray(values, dtype=str), return_inverse=True)
        return pa.DictionaryArray.from_arrays(pa.array(codes[rows.image].astype(np.int32)), pa.array(used.tolist()))

    columns = {
        "image": names(data.images),
        "patient": names(data.patients),
        "split": names(data.split),
        "token": pa.array(rows.token),
        "patch": pa.array(rows.patch),
        "kind": pa.DictionaryArray.from_arrays(pa.array(rows.kind.astype(np.int32)), pa.array(list(KINDS))),
    }
    with atomic_path(index_path(folder, site)) as partial:
        parquet.write_table(pa.table({name: columns[name] for name in INDEX_COLUMNS}), partial, compression="zstd")


def _remove_partial(folder: Path) -> None:
    """Remove what an interrupted run left half-written."""
    for path in folder.rglob("*.partial"):
        path.unlink(missing_ok=True)
