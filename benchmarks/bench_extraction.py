"""`extract` to disk against the bare forward: the plain transformers model on the same images, keeping nothing."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import subject
from benchmarks.common import Row, interleaved
from mechinterp.activations import extract
from mechinterp.data import open_data

NAME = "extraction"
BATCH = 64


def run(quick: bool = False) -> list[Row]:
    """Images per second from a phantom folder on disk: patch tokens of one late site, and pooled vectors."""
    n_images, repeats = (64, 1) if quick else (512, 3)
    model, name = subject.model()
    site = f"vision.blocks.{model.n_layers() - 2}.hook_resid_post"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        subject.write_folder(Path(folder) / "data", n_images)
        data = open_data(Path(folder) / "data")
        kept: dict[str, Any] = {}

        @torch.no_grad()
        def bare() -> None:
            for start in range(0, n_images, BATCH):
                batch = model.preprocess(data.pixels(range(start, min(start + BATCH, n_images))))
                kept["bare"] = model.hf.get_image_features(pixel_values=batch.pixel_values)

        for tokens, where in (("patch", site), ("pooled", "vision.hook_pooled")):
            out = Path(folder) / "store"

            def ours(tokens: Any = tokens, where: str = where, out: Path = out) -> None:
                shutil.rmtree(out, ignore_errors=True)
                kept["ours"] = extract(model, data, [where], out, tokens=tokens, batch_size=BATCH)

            seconds = interleaved({"bare": bare, "ours": ours}, repeats)
            rate = {who: n_images / value for who, value in seconds.items()}
            rows.append(
                Row(
                    f"{n_images} images, {tokens} tokens at {where}; {name}",
                    rate["ours"],
                    rate["bare"],
                    "read, preprocess, plain transformers forward",
                    "images/s",
                    rate["ours"] / rate["bare"],
                    _difference(model, data, where, tokens, kept["ours"]),
                )
            )
    return rows


@torch.no_grad()
def _difference(model: Any, data: Any, site: str, tokens: str, store: Any) -> float:
    """Largest difference between what is stored for the first images and what the model gives now."""
    rows = range(min(BATCH, len(data)))
    _, cache = model.run_with_cache(model.preprocess(data.pixels(rows)), names_filter=site)
    value = cache[site][:, model.patch_tokens()] if tokens == "patch" else cache[site]
    value = value.flatten(0, -2).float().numpy()
    stored = np.asarray(store.site(site)[: len(value)], dtype=np.float32)
    return float(np.abs(stored - value).max())
