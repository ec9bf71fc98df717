"""Train the dictionary that ships with each bundled model: a TopK SAE on the stream after the last block but one.

    python training/dictionaries.py MODEL [--data FOLDER]        (about 1 minute on one core)

1. Extract activations of all tokens on training patients (phantoms of a seed used nowhere else, or a data folder).
2. Train with sae-lens's trainer in our data order; R2, L0 and dead latents are read on test patients.
3. Save in sae-lens's layout at mechinterp/bundled/MODEL/dictionaries/SITE.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from common import BUNDLED

from mechinterp.activations import extract
from mechinterp.audit.dictionary import default_site
from mechinterp.data import open_data
from mechinterp.data.phantom import Phantom
from mechinterp.models import HookedVLM
from mechinterp.storage import write_manifest
from saes import TopKConfig, evaluate, train_sae

SEED_OF_IMAGES = 2_000_003


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, help="default: phantoms drawn without association")
    parser.add_argument("--images", type=int, default=3000, help="phantoms to render")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = HookedVLM.from_pretrained(args.model)
    site = default_site(model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data
        if folder is None:
            folder = Path(scratch) / "phantom"
            Phantom.sample(args.images, seed=SEED_OF_IMAGES).write(folder, masks=False)
        store = extract(model, open_data(folder), sites=[site], out=Path(scratch) / "store", seed=args.seed)
        config = TopKConfig(k=args.k, width=args.width, epochs=args.epochs)
        out = BUNDLED / args.model / "dictionaries" / site
        placed = train_sae(store, site, config, out=out, seed=args.seed)
        write_manifest(BUNDLED / args.model, {"kind": "model", "name": args.model})
        print(args.model, site, evaluate(placed, store, split="test"))


if __name__ == "__main__":
    main()
