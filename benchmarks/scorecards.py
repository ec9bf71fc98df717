"""Scorecards of the dictionaries that ship, beside all their nulls: `python -m benchmarks.scorecards [NAME ...]`.

    python -m benchmarks.scorecards                                     all on phantoms (about 10 minutes on one core)
    python -m benchmarks.scorecards cxr-clip --data FOLDER              on a data folder of yours
    python -m benchmarks.scorecards phantom-llava --site "projector.*"  of one site

Dictionaries of image tokens only, in the vision tower or after the projector; those of words: `benchmarks.words`.

1. Images that no training of models or dictionaries saw (phantoms of a seed used nowhere else), split by patient.
2. Activations at the dictionary's site; a twin model with random weights and a dictionary trained on it as one null.
3. `saes.scorecard`: value, null, difference with a patient-bootstrap interval. Monosemanticity is judged by the
   embeddings of another bundled model.
Writes benchmarks/results/scorecard-NAME-SITE.json, and prints the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import RESULTS
from mechinterp.activations import extract
from mechinterp.data import ImageData, open_data
from mechinterp.data.phantom import FACTORS, Phantom
from mechinterp.models import HookedVLM
from mechinterp.models.bundles import bundled_folder
from mechinterp.storage import write_json
from saes import load_sae
from saes.config import BatchTopKConfig, MatryoshkaConfig, TopKConfig
from saes.metrics.pairs import rendered_pairs
from saes.nulls.models import randomised_encoder
from saes.scorecard import scorecard

PHANTOMS = ("phantom-clip", "phantom-clip-shortcut", "phantom-llava", "phantom-llava-shortcut")
SEED = 4_000_003
KINDS = {kind.kind: kind for kind in (TopKConfig, BatchTopKConfig, MatryoshkaConfig)}


@torch.no_grad()
def embeddings_of(name: str, data: ImageData) -> np.ndarray:
    """Image embeddings by a bundled dual encoder, `[image, d]`."""
    model = HookedVLM.from_pretrained(name)
    rows = np.array_split(np.arange(len(data)), max(1, len(data) // 50))
    return torch.cat([model.encode_image(model.preprocess(data.pixels(r))) for r in rows]).numpy()


def config_of(saved: dict) -> TopKConfig | BatchTopKConfig | MatryoshkaConfig:
    """The configuration that a dictionary was trained with."""
    kind = KINDS[saved["kind"]]
    return kind(**{f.name: saved[f.name] for f in dataclasses.fields(kind) if f.name in saved})


def card(name: str, folder: Path, data: ImageData, draws: int, scratch: Path) -> None:
    """Score one dictionary of one model; print and write."""
    model, placed = HookedVLM.from_pretrained(name), load_sae(folder)
    info, site = placed.dictionary.info, str(placed.reads)  # type: ignore[attr-defined]
    phantom = None if data.truth is None else Phantom.load(data.truth.parent)
    store = extract(model, data, [site], scratch / "store", tokens=info["tokens"])
    if phantom is None:
        labels, pairs = {a.name: a.values for a in data.attributes}, None
    else:
        binary = [factor for factor, about in FACTORS.items() if about.rate is not None]
        labels = phantom.factors[binary]
        test = np.flatnonzero(data.split == "test")
        _, first = np.unique(np.array(data.patients)[test], return_index=True)
        shown, factors = phantom[test[np.sort(first)[:32]]], [name for name in binary if name != "hospital"]
        pairs = rendered_pairs(model, site, shown, factors, tokens=info["tokens"])
    random = randomised_encoder(model, data, placed, config_of(info["config"]), scratch / "random", info["tokens"])
    judge = embeddings_of("cxr-clip" if name != "cxr-clip" else "phantom-clip", data)
    found = scorecard(
        placed, store, labels, others={"randomised encoder": random}, embeddings=judge, pairs=pairs, draws=draws
    )
    print(
        f"\n== {name}, {folder.name}, {info['config']['kind']} {placed.dictionary.W_dec.shape[0]}\n{found}", flush=True
    )
    row = {"model": name, "dictionary": folder.name, "data": data.name, "seed": SEED, "draws": draws}
    whole = found.to_dict()
    means = [score for score in whole["scores"] if score["concept"] == "mean"]
    write_json(RESULTS / f"scorecard-{name}-{folder.name}.json", row | whole | {"scores": means})


def main() -> None:
    """Score the dictionaries of the named models."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scorecards")
    parser.add_argument("names", nargs="*", default=list(PHANTOMS))
    parser.add_argument("--data", type=Path, help="data folder (default: new phantoms)")
    parser.add_argument("--site", help="names of dictionaries (default: vision.* and projector.*)")
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--draws", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data or Path(scratch) / "phantom"
        if args.data is None:
            Phantom.sample(args.images, seed=SEED).write(folder)
        data = open_data(folder)
        for name in args.names:
            there = (bundled_folder(name) or Path()) / "dictionaries"
            patterns = [args.site] if args.site else ["vision.*", "projector.*"]
            for number, one in enumerate(path for pattern in patterns for path in sorted(there.glob(pattern))):
                card(name, one, data, args.draws, Path(scratch) / f"{name}-{number}")


if __name__ == "__main__":
    main()
