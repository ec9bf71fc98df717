"""One saliency map of one image, with any method: for `mechinterp explain`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import UsageError
from mechinterp.explain import ELEMENT_METHODS, Explainer, MapStatus, Method, check_map
from mechinterp.explain.picture import save_map
from mechinterp.explain.pixels import PatchMap, seeded
from mechinterp.models import HookedVLM
from mechinterp.storage import discard_earlier, write_json, write_manifest
from mechinterp.types import Target

if TYPE_CHECKING:
    from mechinterp.data import ImageData

__all__ = ["OWN", "ImageMap", "check_chunk", "explain_image", "write_map"]

OWN = ("sae_maps", "graph_patches")
MEANING: dict[MapStatus, str] = {
    "ok": "",
    "all_zero": ": it explains nothing, every pixel is 0",
    "constant": ": it ranks no pixel above another",
    "non_finite": ": not every pixel is a number",
}


@dataclass(frozen=True, eq=False)
class ImageMap:
    """A map, what made it, and what it cost."""

    method: Method
    model: str
    target: Target
    seed: int
    seconds: float
    relevance: Float[Tensor, "height width"]
    image: Float[np.ndarray, "rows columns"]

    @property
    def status(self) -> MapStatus:
        """What is wrong with the map, if anything."""
        return check_map(self.relevance)


def explain_image(
    model: HookedVLM,
    image: Float[np.ndarray, "rows columns"],
    target: Target,
    method: str,
    seed: int,
    data: Callable[[], ImageData],
    chunk: int | None = None,
) -> ImageMap:
    """Explain one image.

    Args:
        image: grey, in [0, 1], as read.
        method: any of `ELEMENT_METHODS` or `OWN`.
        seed: of a method that draws.
        data: opens what dictionaries are trained on, for a method that needs one where none is stored.
        chunk: images through the model at once, instead of what the method takes; it bounds the memory and moves maps
            by rounding only.

    Raises UsageError for a method that does not exist or cannot explain this model, and for a chunk below 1.
    """
    check_chunk(chunk)
    if method not in ELEMENT_METHODS and method not in OWN:
        known = ", ".join(sorted([*ELEMENT_METHODS, *OWN]))
        raise UsageError(f"no method {method!r}", where="--method", hint=f"known: {known}")
    found, explain = _own(model, method, seed, data) if method in OWN else (ELEMENT_METHODS[method], None)
    explain = explain or seeded(method, seed)
    batch = model.prepare(image[None], [target], ids=("image",))
    start = time.perf_counter()
    relevance = explain(model, batch, target, **({"chunk": chunk} if chunk else {}))[0]
    return ImageMap(found, model.label, target, seed, time.perf_counter() - start, relevance, image)


def check_chunk(chunk: int | None) -> None:
    """Raise UsageError for a number of images at once that cannot be."""
    if chunk is not None and chunk < 1:
        raise UsageError(f"is {chunk}", where="--chunk", hint="1 or more; without it, what suits most models")


def write_map(made: ImageMap, out: Path) -> str:
    """Write map.png, map.safetensors, map.json and the manifest; returns a line to print.

    An earlier map in `out` goes first. Raises StorageError where another kind of artefact is there.
    """
    discard_earlier(out, "map")
    method, target, values = made.method, made.target, made.relevance
    picture = save_map(values, made.image, out, title=f"{method.name}: {target.name}")
    record = {
        "method": method.name,
        "built_from": method.built_from,
        "anchor": method.anchor,
        "stochastic": method.stochastic,
        "model": made.model,
        "target": {"name": target.name, "positive": target.positive, "negative": target.negative},
        "seed": made.seed,
        "seconds": made.seconds,
        "status": made.status,
        "smallest": float(values.min()),
        "largest": float(values.max()),
        "sum": float(values.double().sum()),
    }
    write_json(out / "map.json", record)
    write_manifest(out, {"kind": "map", "model": made.model, "seed": made.seed})
    return f"map: {picture} ({made.status}{MEANING[made.status]}; {made.seconds:.2f} s)"


def _own(model: HookedVLM, name: str, seed: int, data: Callable[[], ImageData]) -> tuple[Method, Explainer]:
    """One of our own methods, with dictionaries that are stored with the model or trained now."""
    from mechinterp.audit.dictionary import dictionary_of, train_transcoders, transcoders_of
    from mechinterp.audit.own_methods import own_methods

    if name == "sae_maps":
        methods = own_methods(model, dictionary_of(model, data(), seed)[0])
    else:
        methods = own_methods(model, None, transcoders_of(model) or train_transcoders(model, data(), seed))
    if name not in methods:
        raise UsageError("needs a dictionary in the vision tower", where=name)
    return methods[name], PatchMap(methods[name])
