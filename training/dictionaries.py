"""Train the dictionaries that ship with the bundled models.

    python training/dictionaries.py MODEL [--data FOLDER]        (about 2 minutes on one core)
    python training/dictionaries.py MODEL --class-token          (about 1 minute; CLIP only)

The first is a TopK SAE on all tokens of the stream after the last vision block but one: what an audit removes. The
second is a Matryoshka SAE on the class token after the last block: 256 latents of which 4 fire, in which a factor has
few latents (docs/dictionaries.md).

1. Extract activations on training patients (phantoms of a seed used nowhere else, or a data folder).
2. Train in our data order; R2, L0 and dead latents are read on test patients.
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
from saes import MatryoshkaConfig, TopKConfig, evaluate, train_sae

SEED_OF_IMAGES = 2_000_003
# chosen by hand on phantoms of another seed, of widths 64, 128 and 256 (docs/dictionaries.md)
CLASS_TOKEN = MatryoshkaConfig(
    k=4, width=256, levels=(16, 32, 64, 256), epochs=130, batch_size=512, lr=2e-3, dead_after=50
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, help="default: phantoms drawn without association")
    parser.add_argument("--class-token", action="store_true", help="the dictionary of the class token")
    parser.add_argument("--images", type=int, help="phantoms to render (default 3000; 4000 for the class token)")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = HookedVLM.from_pretrained(args.model)
    site = f"vision.blocks.{model.n_layers() - 1}.hook_resid_post" if args.class_token else default_site(model)
    tokens, images = ("cls", args.images or 4000) if args.class_token else ("all", args.images or 3000)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data
        if folder is None:
            folder = Path(scratch) / "phantom"
            Phantom.sample(images, seed=SEED_OF_IMAGES).write(folder, masks=False)
        store = extract(model, open_data(folder), [site], Path(scratch) / "store", tokens=tokens, seed=args.seed)
        config = TopKConfig(k=args.k, width=args.width, epochs=args.epochs)
        if args.class_token:
            config = CLASS_TOKEN
        out = BUNDLED / args.model / "dictionaries" / site
        placed = train_sae(store, site, config, out=out, seed=args.seed)
        write_manifest(BUNDLED / args.model, {"kind": "model", "name": args.model})
        print(args.model, site, evaluate(placed, store, split="test"))


if __name__ == "__main__":
    main()
