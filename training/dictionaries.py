"""Train the dictionaries that ship with the bundled models.

    python training/dictionaries.py MODEL [--data FOLDER]        (about 2 minutes on one core)
    python training/dictionaries.py cxr-clip --data FOLDER --width 512 --epochs 30
    python training/dictionaries.py MODEL --class-token          (about 1 minute; CLIP only)
    python training/dictionaries.py MODEL --site SITE --tokens patch|text|all --width 512
    python training/dictionaries.py MODEL [--data FOLDER] --sisters 2 [--site SITE]

The first is a TopK SAE on the patch tokens of the stream after the last vision block but one: what an audit removes.
The class token has a Matryoshka SAE after the last block: 256 latents of which 4 fire, in which a factor has few
latents (docs/dictionaries.md). --site is any other place. --sisters trains every stored dictionary of the model (or the
one at --site) again from other seeds, keeps with it how often each of its latents comes back, and throws the sisters
away.

1. Extract activations on training patients (phantoms of a seed used nowhere else, or a data folder).
2. Train in our data order; R2, L0 and dead latents are read on test patients, beside those of an untrained dictionary.
3. Save in sae-lens's layout at the model's folder, dictionaries/SITE, and rewrite the card's section.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from common import folder_of
from transcoders import texts_of

from mechinterp.activations import ActivationStore, extract
from mechinterp.audit.dictionary import default_site
from mechinterp.data import open_data
from mechinterp.data.phantom import Phantom
from mechinterp.models import HookedVLM
from mechinterp.storage import write_manifest
from mechinterp.types import Placed
from saes import MatryoshkaConfig, TopKConfig, evaluate, load_sae, train_sae, untrained
from saes.choices import KINDS
from saes.stability import keep_stability

SEED_OF_IMAGES = 2_000_003
START = "sae-lens"  # the default of when they were trained; a better one came later (docs/dictionaries.md)
# chosen by hand on phantoms of another seed, of widths 64, 128 and 256 (docs/dictionaries.md)
CLASS_TOKEN = MatryoshkaConfig(
    k=4, width=256, levels=(16, 32, 64, 256), epochs=130, batch_size=512, lr=2e-3, dead_after=50, start=START
)


def store_of(
    model: HookedVLM, folder: Path | None, images: int, site: str, tokens: str, scratch: Path
) -> ActivationStore:
    """Activations at a site on a data folder, or on phantoms; at a language site, beside texts as in `transcoders`."""
    phantom = None
    if folder is None:
        phantom, folder = Phantom.sample(images, seed=SEED_OF_IMAGES), scratch / f"phantom-{images}"
        if not folder.exists():
            phantom.write(folder, masks=False)
    data = open_data(folder)
    texts = texts_of(model, data, phantom, 0) if site.startswith("text.") else None
    return extract(model, data, [site], scratch / f"{site}-{images}", tokens=tokens, texts=texts)  # type: ignore[arg-type]


def report(placed: Placed, store: ActivationStore, config: TopKConfig | MatryoshkaConfig, seed: int) -> str:
    """What a dictionary and its untrained twin do on test patients, in one line."""
    x = store.site(placed.reads)[store.rows(placed.reads, "train")[: 2**16]]
    twin = untrained(config, x.shape[1], seed, x.mean(0))
    twin.info |= {"token_kinds": placed.dictionary.info["token_kinds"]}  # type: ignore[attr-defined]
    own, null = evaluate(placed, store, "test"), evaluate(Placed(twin, placed.reads, placed.writes), store, "test")
    kinds = ", ".join(placed.dictionary.info["token_kinds"])  # type: ignore[attr-defined]
    return (
        f"{placed.reads}, {kinds}, {config.kind} {config.width}, k {config.k}: R2 {own.r2:.3f} (untrained "
        f"{null.r2:.3f}), L0 {own.l0:.1f}, dead {own.dead:.3f}, {own.rows} rows"
    )


def sisters(name: str, folder: Path | None, count: int, only: str | None, scratch: Path) -> None:
    """Keep with every stored dictionary, or one, how often its latents come back in `count` others of other seeds."""
    model = HookedVLM.from_pretrained(name)
    for stored in sorted((folder_of(name) / "dictionaries").glob(only or "*")):
        info = load_sae(stored).dictionary.info  # type: ignore[attr-defined]
        images, site, tokens = info["data"]["images"], info["site"], info["tokens"]
        store = store_of(model, folder, images, site, tokens, scratch)
        config = KINDS[info["config"]["kind"]](
            **{"start": START} | {k: v for k, v in info["config"].items() if k != "kind"}
        )
        made = [
            train_sae(store, site, config, scratch / f"{site}-seed{seed}", seed=seed)  # type: ignore[arg-type]
            for seed in range(info["seed"] + 1, info["seed"] + 1 + count)
        ]
        kept = keep_stability(stored, made)
        print(f"{name} {site}: reappearance {kept['mean']:.3f} over seeds {kept['seeds']}, chance {kept['chance']:.3f}")


def section(model: Path) -> str:
    """The card's section: what each stored dictionary says of itself (validation patients)."""
    lines = [
        "## Dictionaries",
        "",
        "Sparse autoencoders in `dictionaries/`, by `python training/dictionaries.py`. On validation patients:",
        "",
        "| site | tokens | kind | width, k | L0 | R2 | dead | R2 untrained | come back with another seed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for stored in sorted((model / "dictionaries").iterdir()):
        info = json.loads((stored / "mechinterp.json").read_text())
        config, own, null = info["config"], info["metrics"], info["metrics_untrained"]
        kept = info.get("stability")
        returns = f"{kept['mean']:.3f}" if kept else "not measured"
        cells = [
            info["site"],
            ", ".join(info.get("token_kinds", [info["tokens"]])),
            config["kind"],
            f"{config['width']}, {config['k']}",
        ]
        cells += [f"{own['l0']:.1f}", f"{own['r2']:.3f}", f"{own['dead']:.3f}", f"{null['r2']:.3f}"]
        lines.append(f"| {' | '.join([*cells, returns])} |")
    return "\n".join([*lines, "", "What they hold, beside what has learnt nothing: `docs/dictionaries.md`.", ""])


def write_card(model: Path) -> None:
    """Put the section before that of the transcoders, in place of an older one; close the folder."""
    path = model / "README.md"
    before, mark, after = path.read_text().partition("## Transcoders")
    path.write_text(f"{before.split('## Dictionaries')[0].rstrip()}\n\n{section(model)}\n{mark}{after}")
    write_manifest(model, {"kind": "model", "name": model.name})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, help="default: phantoms drawn without association")
    parser.add_argument("--class-token", action="store_true", help="the dictionary of the class token")
    parser.add_argument("--site", help="default: after the last vision block but one")
    parser.add_argument("--tokens", default="patch", choices=["all", "patch", "text"])
    parser.add_argument("--sisters", type=int, default=0, help="train so many other seeds of what is stored")
    parser.add_argument("--images", type=int, help="phantoms to render (default 3000; 4000 for the class token)")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: beside the model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if args.sisters:
            sisters(args.model, args.data, args.sisters, args.site, Path(scratch))
        else:
            model = HookedVLM.from_pretrained(args.model)
            last = f"vision.blocks.{model.n_layers() - 1}.hook_resid_post"
            site = last if args.class_token else args.site or default_site(model)
            tokens, images = ("cls", args.images or 4000) if args.class_token else (args.tokens, args.images or 3000)
            store = store_of(model, args.data, images, site, tokens, Path(scratch))
            config = TopKConfig(k=args.k, width=args.width, epochs=args.epochs, start=START)
            config = CLASS_TOKEN if args.class_token else config
            out = args.out or folder_of(args.model) / "dictionaries" / site
            placed = train_sae(store, site, config, out=out, seed=args.seed)
            print(args.model, report(placed, store, config, args.seed))
    if args.out is None:
        write_card(folder_of(args.model))


if __name__ == "__main__":
    main()
