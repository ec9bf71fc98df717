"""Other people's dictionaries become folders of ours.

The folder is written like one that was trained here: sae-lens's layout in its inference form, `mechinterp.json` (which
says under `imported` where it came from, with the sha256 of each file, and what was noted), and the manifest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import StorageError, UsageError
from mechinterp.storage import MANIFEST, canonical_json, sha256_file
from mechinterp.types import Placed, Site
from saes.dictionary import SparseDictionary
from saes.folder import load_sae, read_weights, save_sae
from saes.layouts import dictionary_learning, lens, saev
from saes.layouts.canonical import Canonical

__all__ = ["LAYOUTS", "Layout", "import_dictionary", "recognise"]

Layout = Literal["sae_lens", "dictionary_learning", "saev"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def import_dictionary(
    source: Path | str,
    site: str | Site,
    out: Path | str,
    layout: str | None = None,
    *,
    tokens: str | None = None,
    mean: Float[Tensor, " d_in"] | None = None,
    scale: float = 1.0,
) -> Placed:
    """Read somebody's sparse autoencoder and write it to `out` as a dictionary folder.

    Args:
        source: a sae-lens folder, a dictionary_learning folder, a saev checkpoint, or a file in one of them.
        site: where it stands in the model, e.g. `vision.blocks.3.hook_resid_post`; its files do not say it our way.
        out: folder of the dictionary. One that holds the same import is loaded.
        layout: which of `LAYOUTS` it is (default: recognised by its files).
        tokens: the tokens it was trained on ("patch", "cls", ...), kept in mechinterp.json.
        mean, scale: it was trained on `(x - mean) / scale`, and its files do not hold these (saev before July 2025).
            They are folded into the weights: activations stay as trained, reconstructions are of the rows as they are.

    Raises:
        UsageError: `layout` or `site` is none, or `mean` or `scale` do not fit.
        StorageError: a file is missing, damaged, of a kind that is not read, or wants to run code; or `out` is taken.
    """
    source, out, site = Path(source), Path(out), Site.parse(site)
    layout = recognise(source) if layout is None else layout
    if layout not in LAYOUTS:
        raise UsageError(f"{layout!r} is no layout", where="layout", hint=f"known: {', '.join(LAYOUTS)}")
    found, files = _read(source, layout)
    found = found.behind(mean, scale)
    info = _info(source, layout, found, files, site)
    info |= {"tokens": tokens, "scale": scale}
    if mean is not None:
        info["imported"]["mean"] = mean.tolist()
    if (out / MANIFEST).exists():
        return _finished(out, info)
    if out.exists() and (not out.is_dir() or any(path.suffix != ".partial" for path in out.iterdir())):
        raise StorageError("is not empty and holds no dictionary of ours", where=str(out), hint="choose another folder")
    read_weights(found.cfg(site), found.tensors(), source)  # what we could not open again is not written
    save_sae(out, found.cfg(site), found.tensors(), info)
    return load_sae(out)


def recognise(source: Path) -> Layout:
    """The layout of a folder or file. Raises StorageError when it is none or could be several."""
    found: list[Layout] = []
    if source.is_file():
        found = [_of_file(source)]
    elif source.is_dir():
        if (source / lens.CFG).is_file() and (source / lens.WEIGHTS).is_file():
            found.append("sae_lens")
        if any((source / name).is_file() for name in (dictionary_learning.PICKLE, dictionary_learning.TENSORS)):
            found.append("dictionary_learning")
        if any((source / name).is_file() for name in saev.PLACES):
            found.append("saev")
    else:
        raise StorageError("no such file or folder", where=str(source))
    if len(found) == 1:
        return found[0]
    if found:
        raise StorageError(f"could be {' or '.join(found)}", where=str(source), hint="name the layout")
    hint = (
        f"read: {lens.CFG} + {lens.WEIGHTS} (sae_lens), {dictionary_learning.CONFIG} + {dictionary_learning.PICKLE} "
        f"(dictionary_learning), {saev.CHECKPOINT} (saev)"
    )
    raise StorageError("holds no dictionary in a layout that is read", where=str(source), hint=hint)


def _of_file(source: Path) -> Layout:
    if source.name in (lens.CFG, lens.WEIGHTS):
        return "sae_lens"
    try:
        with open(source, "rb") as opened:
            return "saev" if opened.read(1) == b"{" and source.suffix == ".pt" else "dictionary_learning"
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror or error}", where=str(source)) from error


def _read(source: Path, layout: str) -> tuple[Canonical, list[Path]]:
    try:
        if layout == "sae_lens":
            return lens.read_lens(source if source.is_dir() else source.parent)
        if layout == "dictionary_learning":
            return dictionary_learning.read_dictionary_learning(source)
        places = [source / name for name in saev.PLACES] if source.is_dir() else [source]
        return saev.read_saev(next((path for path in places if path.is_file()), places[0]))
    except StorageError as error:
        if error.where is not None:
            raise
        raise StorageError(error.what, where=str(source), hint=error.hint) from error


def _info(source: Path, layout: str, found: Canonical, files: Sequence[Path], site: Site) -> dict[str, Any]:
    """What mechinterp.json says; no path of this machine, only names."""
    hashes = {path.name: sha256_file(path) for path in files}
    whole = hashlib.sha256(canonical_json(hashes).encode()).hexdigest()
    return {
        "kind": "sae",
        "site": str(site),
        "reads": str(site),
        "writes": str(site),
        "imported": {
            "layout": layout,
            "from": source.resolve().name,
            "files": hashes,
            "sha256": whole,
            "notes": list(found.notes),
            **found.about,
        },
    }


def _finished(out: Path, info: dict[str, Any]) -> Placed:
    """Load what `out` holds, if it is this very import."""
    placed = load_sae(out)
    assert isinstance(placed.dictionary, SparseDictionary)
    there = placed.dictionary.info
    if canonical_json({name: there.get(name) for name in info}) != canonical_json(info):
        raise StorageError("holds another dictionary", where=str(out), hint="choose another folder")
    return placed
