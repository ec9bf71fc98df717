"""`mechinterp iq`: explainers side by side on one model and data folder."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from mechinterp.audit.explainers.compare import Effort
from mechinterp.audit.explainers.controls import controls_of
from mechinterp.audit.explainers.folder import console_of, write_folder
from mechinterp.audit.explainers.grading import read_thresholds
from mechinterp.audit.explainers.section import compare_explainers, methods_of
from mechinterp.audit.explaining import OWN, check_chunk
from mechinterp.audit.own_methods import stored_methods
from mechinterp.audit.pipeline import choose_target
from mechinterp.audit.sizes import one_size
from mechinterp.data import ImageData
from mechinterp.errors import UsageError
from mechinterp.explain.methods import ELEMENT_METHODS, Method
from mechinterp.explain.question import CHUNK
from mechinterp.models import HookedVLM
from mechinterp.types import Target

__all__ = ["run"]

CONTROLS = ("permuted", "again", "other")


def run(
    args: argparse.Namespace, load: Callable[[str], HookedVLM], open_data: Callable[[], ImageData], out: Path
) -> str:
    """Measure and write the folder; returns the table and where the pictures are."""
    started = time.perf_counter()
    if args.images < 2:
        raise UsageError(f"--images {args.images}", hint="at least 2")
    check_chunk(args.chunk)
    limits = read_thresholds(args.thresholds) if args.thresholds else None
    model = load(args.model)
    data = one_size(model, open_data())
    target = choose_target(model, data, args.target)
    named = [name.strip() for name in args.methods.split(",") if name.strip()] if args.methods else []
    methods = _methods(model, data, target, named, args.seed)
    masks = tuple(name for name in (args.masks or "").split(",") if name)
    for name in masks:
        data.attribute(name)  # refuses what is not there before anything is computed
    effort = Effort(images=args.images, masks=masks, further=True, chunk=args.chunk or CHUNK)
    controls = controls_of(model, load, {key: getattr(args, key) for key in CONTROLS})
    compared = compare_explainers(model, data, target, methods, effort, args.seed, None, limits, controls)
    command = _command(args)
    write_folder(compared, data, out, args.seed, round(time.perf_counter() - started, 2), command)
    refused = [f"{name}: {why}" for name, why in compared.made.refused.items()]
    refused += _unseen(compared.made.masks, masks)
    return "\n".join(
        [
            console_of(compared.rows),
            *refused,
            f"table: {out / 'table.md'}, pictures: {out / 'maps.png'}, {out / 'plane.png'}",
        ]
    )


def _unseen(found: Mapping[str, tuple[Any, Bool[np.ndarray, " image"]]], masks: Sequence[str]) -> list[str]:
    """A line for each of `masks` that no explained image has: there is no column for it."""
    return [
        f"masks of {name}: none of these images has one, so there is no column; take more (--images)"
        for name in masks
        if name not in found or not found[name][1].any()
    ]


def _command(args: argparse.Namespace) -> str:
    """What to type for the same table."""
    parts = ["mechinterp", "iq", args.model, "--seed", str(args.seed), "--images", str(args.images)]
    for option in ("data", "target", "methods", "masks", "chunk", "thresholds", *CONTROLS):
        value = getattr(args, option)
        parts += [f"--{option}", str(value)] if value else []
    return shlex.join(parts)


def _methods(model: HookedVLM, data: ImageData, target: Target, named: list[str], seed: int) -> dict[str, Method]:
    """The named methods, or all; dictionary and transcoders are found only where one is needed."""
    known = dict(ELEMENT_METHODS)
    wrong = [name for name in named if name not in known and name not in OWN]
    if wrong:  # before a dictionary is trained for a name that does not exist
        hint = f"known: {', '.join(sorted([*known, *OWN]))}"
        raise UsageError(f"no method {wrong[0]!r}", where="methods", hint=hint)
    if not named or set(named) - set(known):
        own = stored_methods(model, data, seed)
        known |= own
        return methods_of(named or list(known), own)
    return methods_of(named)
