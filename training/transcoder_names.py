"""Name the features of a bundled model's transcoders, on patients that neither model nor transcoders saw.

    python training/transcoder_names.py MODEL [--data FOLDER]        (about 2 minutes on one core, 6 for a LLaVA)

Writes mechinterp/bundled/MODEL/transcoders/names.json and prints how many features are named at each site, beside an
untrained twin's.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from common import BUNDLED

from mechinterp.audit.dictionary import transcoders_of
from mechinterp.audit.feature_names import FILE, name_transcoders
from mechinterp.data import open_data
from mechinterp.data.phantom import Phantom
from mechinterp.models import HookedVLM
from mechinterp.storage import write_json, write_manifest

SEED_OF_IMAGES = 2_000_029


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, help="default: phantoms drawn without association")
    parser.add_argument("--images", type=int, default=1200, help="phantoms to render")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = HookedVLM.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data
        if folder is None:
            folder = Path(scratch) / "phantom"
            Phantom.sample(args.images, seed=SEED_OF_IMAGES).write(folder, masks=False)
        made = name_transcoders(model, open_data(folder), transcoders_of(model), args.seed)
    target = BUNDLED / args.model / "transcoders" / FILE
    write_json(target, {"command": f"python training/transcoder_names.py {args.model}", "seed": args.seed, **made})
    write_manifest(BUNDLED / args.model, {"kind": "model", "name": args.model})
    for site, counts in made["sites"].items():
        print(site, counts)


if __name__ == "__main__":
    main()
