"""Check weight files against a config before any memory is taken: only headers are read, and a meta model is built."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from mechinterp.errors import ModelError

__all__ = ["check_config_sizes", "check_fit", "weight_shapes"]

Shapes = dict[str, tuple[int, ...]]
_MAX_INT = 2**31
_MAX_LABELS = 100_000


def weight_shapes(folder: Path) -> Shapes:
    """Shape of every tensor in the folder's safetensors files, from their headers.

    Raises ModelError when there are none (naming the pickle files, which are never read) or one is damaged.
    """
    from safetensors import SafetensorError, safe_open

    shapes: Shapes = {}
    for path in _weight_files(folder):
        try:
            with safe_open(str(path), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dict
                    shapes[name] = tuple(opened.get_slice(name).get_shape())
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(
                f"is no whole safetensors file: {error}", where=str(path), hint="truncated or damaged: fetch it again"
            ) from error
    return shapes


def check_config_sizes(config: Mapping[str, Any], shapes: Shapes, folder: Path) -> None:
    """Raise ModelError for numbers in the config that would cost time or memory before a shape can be compared."""
    for name, value in _integers(config):
        layers = name.endswith(("num_hidden_layers", "num_layers", "n_layer"))
        high = len(shapes) if layers else _MAX_LABELS if name.endswith("num_labels") else _MAX_INT
        if not -_MAX_INT <= value <= high:
            raise ModelError(
                f"{name} is {value}, more than the weight files can hold",
                where=str(folder / "config.json"),
                hint="the config is damaged or belongs to another model",
            )


def check_fit(built: Any, config: Any, shapes: Shapes, folder: Path) -> None:
    """Raise ModelError when the model that the config describes has other shapes, or more numbers, than the files."""
    with torch.device("meta"):
        model = built(config)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, shape in wanted.items():
        if name in shapes and shapes[name] != shape:
            raise ModelError(
                f"{name} is {list(shapes[name])} in the files, {list(shape)} by the config",
                where=str(folder / "config.json"),
                hint="config and weights belong to different models, or one is damaged",
            )
    # names may differ between versions of transformers, so compare the totals as well
    need, have = sum(prod(s) for s in wanted.values()), sum(prod(s) for s in shapes.values())
    if need > have:
        raise ModelError(
            f"describes a model of {need} weights, and the files hold {have}",
            where=str(folder / "config.json"),
            hint="config and weights belong to different models, or one is damaged",
        )


def _weight_files(folder: Path) -> list[Path]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".h5"))
        raise ModelError(
            f"is missing; {', '.join(pickled)} can run code when read and is never opened" if pickled else "is missing",
            where=str(whole),
            hint="have its owner publish safetensors, or convert it where you trust it: save_pretrained() writes them",
        )
    try:
        listed = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"has no readable weight_map: {error}", where=str(index), hint="fetch it again") from error
    files = []
    for name in sorted(map(str, listed)):
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelError(f"lists {name!r}, which is not in the folder", where=str(index), hint="fetch it again")
        files.append(folder / name)
    return files


def _integers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number in a config, with its dotted name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _integers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _integers(inner, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value
