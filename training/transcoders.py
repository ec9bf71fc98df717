"""Train the transcoders that ship with a bundled model: one for the MLP of every block of both towers.

    python training/transcoders.py MODEL                        (about 5 minutes on one core)
    python training/transcoders.py cxr-clip --data FOLDER --longer 5
    python training/transcoders.py MODEL --measure-only         (measure again what is stored, and print it)
    python training/transcoders.py MODEL --sweep vision.3       (one block, several widths and k; validation)

1. Extract what every MLP reads (normalised) and writes, at every token: patches, class token, words. Phantoms of a seed
   that trained no model, or the patients of a data folder. Each image has one text beside it (`texts_of`).
2. Train a TopK transcoder for each block. Rare kinds of token are repeated: without it the class token, one row of 65,
   has R2 0.84 after the last block where patches have 0.97 (docs/dictionaries.md).
3. Measure on test patients, by kind of token, and with all MLPs replaced by their transcoders at once.
4. Save at the model's folder, transcoders/SITE_WRITTEN, and rewrite the card's section.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import folder_of
from cxr_clip import FINDINGS as CXR
from cxr_clip import captions as cxr_captions
from replaced import Line, Whole, measure, whole

from mechinterp.activations import ActivationStore, extract
from mechinterp.audit.dictionary import transcoders_of
from mechinterp.data import ImageData, open_data
from mechinterp.data.phantom import FACTORS, Phantom
from mechinterp.data.phantom.language import prompts
from mechinterp.models import HookedVLM
from mechinterp.storage import write_manifest
from mechinterp.types import Target
from saes import TranscoderConfig, load_sae
from saes.train import Run, train_together, train_transcoder

SEED_OF_IMAGES = 2_000_003
QUESTIONS = 0.75  # of the texts that a generative model is given are questions, the rest reports
PROMPTS = 0.5  # of the texts of a dual encoder are prompts, the rest captions
NAMED = [name for name, factor in FACTORS.items() if factor.kind in ("finding", "device")]
# chosen by `--sweep` on validation patients
VISION = TranscoderConfig(k=16, width=512, epochs=6, lr=5e-3, least_share=0.25)
WORDS = TranscoderConfig(k=8, width=256, epochs=20, lr=5e-3)
LANGUAGE = TranscoderConfig(k=16, width=512, epochs=6, lr=5e-3, least_share=0.5)


def texts_of(model: HookedVLM, data: ImageData, phantom: Phantom | None, seed: int) -> list[str]:
    """One text for each image: what the model is asked, or is shown beside images.

    A generative model gets a question about a finding or device, or "write a report" and the image's report, so that
    the tokens of reports are among the rows. A dual encoder gets a prompt, or the image's caption.
    """
    rng = np.random.default_rng(seed)
    asked = targets_of(data, phantom)
    if generates(model):
        assert phantom is not None
        start = model.hf.config.report_prompt
        written = [f"{start} {report}" for report in phantom.reports()]
        questions = [target.asked() for target in asked]
        return [rng.choice(questions) if rng.random() < QUESTIONS else text for text in written]
    shown = cxr_captions(data, rng) if phantom is None else phantom.captions()
    fixed = [text for target in asked for text in (target.positive, target.negative) if text]
    return [rng.choice(fixed) if rng.random() < PROMPTS else text for text in shown]


def targets_of(data: ImageData, phantom: Phantom | None) -> list[Target]:
    """What is asked of a model: findings, and in phantoms devices, as the model was taught to be asked."""
    if phantom is None:
        return [
            Target(name, f"a chest x-ray with {phrase}", f"a chest x-ray without {phrase}")
            for name, phrase in CXR.items()
        ]
    return [Target(name, *prompts(name)) for name in NAMED]


def generates(model: HookedVLM) -> bool:
    """Whether the language side is a language model."""
    return "text.hook_logits" in model.sites()


def pairs(model: HookedVLM, tower: str) -> list[tuple[str, str]]:
    """(site read, site written) of the MLP of every block."""
    blocks = [f"{tower}.blocks.{layer}" for layer in range(model.n_layers(tower))]
    return [(f"{block}.ln2.hook_normalized", f"{block}.hook_mlp_out") for block in blocks]


def config_of(model: HookedVLM, tower: str, longer: int = 1) -> TranscoderConfig:
    """Width, k and schedule for a tower."""
    config = VISION if tower == "vision" else LANGUAGE if generates(model) else WORDS
    return replace(config, epochs=config.epochs * longer)


def sections(model: HookedVLM, lines: list[Line], total: Whole, command: str, seed: int, of: str) -> str:
    """The card's section."""
    shown = {tower: config_of(model, tower) for tower in ("vision", "text")}
    sizes = "; ".join(f"{tower}: width {c.width}, k {c.k}" for tower, c in shown.items())
    note = (
        ""
        if generates(model)
        else "\nThe text tower is shown short captions and prompts of one vocabulary; what its transcoders make of "
        "other sentences was not measured.\n"
    )
    return "\n".join(
        [
            "## Transcoders",
            "",
            f"For the MLP of every block, in `transcoders/`: TopK ({sizes}), by `{command}`, "
            f"seed {seed}, on {of}. On test patients:",
            "",
            Line.head,
            "| --- " * (Line.head.count("|") - 1) + "|",
            *(line.row() for line in lines),
            "",
            "R2 is of what the MLP writes, about its mean; *explained* is of what it writes, the mean included: "
            "1 - sum |error|^2 / sum |output|^2. Dead: share of latents that fire on no test token. Linear: the "
            "best line from what the MLP reads to what it writes.",
            note,
            total.text(),
            "",
        ]
    )


def write_card(folder: Path, section: str) -> None:
    """Put the section at the end of README.md, in place of an older one; close the folder."""
    path = folder / "README.md"
    before = path.read_text().split("## Transcoders")[0].rstrip()
    path.write_text(f"{before}\n\n{section}")
    write_manifest(folder, {"kind": "model", "name": folder.name})


def stores_of(model: HookedVLM, data: ImageData, texts: list[str], scratch: Path) -> dict[str, ActivationStore]:
    """A store for each tower; a language model's holds image tokens and words."""
    return {
        tower: extract(
            model, data, [site for pair in pairs(model, tower) for site in pair], scratch / tower, "all", texts=texts
        )
        for tower in ("vision", "text")
    }


def sweep(store: ActivationStore, reads: str, writes: str, base: TranscoderConfig, seed: int, scratch: Path) -> None:
    """Print a line for each width and k at one block, and for the chosen ones without repeated tokens."""
    configs = [replace(base, width=width, k=k) for width in (256, 512, 1024) for k in (8, 16, 32)]
    configs.append(replace(base, least_share=0.0))
    runs = [
        Run(store, reads, writes, config, scratch / f"sweep-{number}", seed, "all", "cpu")
        for number, config in enumerate(configs)
    ]
    train_together(runs[:-1])
    train_together(runs[-1:])
    for run in runs:
        print(f"least share {run.config.least_share}", measure(load_sae(run.folder), store, "val").row(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, help="default: phantoms drawn without association")
    parser.add_argument("--images", type=int, default=4000, help="phantoms to render")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longer", type=int, default=1, help="times as many epochs, where there are few images")
    parser.add_argument("--measure-only", action="store_true")
    parser.add_argument("--sweep", metavar="TOWER.BLOCK")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, out = HookedVLM.from_pretrained(args.model), folder_of(args.model)
    with tempfile.TemporaryDirectory() as temporary:
        scratch, phantom = Path(temporary), None
        if args.data is None:
            phantom = Phantom.sample(args.images, seed=SEED_OF_IMAGES)
            phantom.write(scratch / "phantom", masks=False)
        data = open_data(args.data or scratch / "phantom")
        of = data.name if phantom is None else f"{len(data)} phantoms drawn without association"
        stores = stores_of(model, data, texts_of(model, data, phantom, args.seed), scratch)
        if args.sweep:
            tower, block = args.sweep.split(".")
            sweep(stores[tower], *pairs(model, tower)[int(block)], config_of(model, tower), args.seed, scratch)
            return
        lines = []
        for tower, store in stores.items():
            for reads, writes in pairs(model, tower):
                folder = out / "transcoders" / writes
                if not args.measure_only:
                    train_transcoder(
                        store, reads, writes, config_of(model, tower, args.longer), folder, seed=args.seed, tokens="all"
                    )
                lines.append(measure(load_sae(folder), store))
                print(lines[-1].row(), flush=True)
        placed = transcoders_of(model)
        command = f"python training/transcoders.py {args.model}" + (
            "" if phantom is not None else f" --data FOLDER --longer {args.longer}"
        )
        section = sections(model, lines, whole(model, placed, data, targets_of(data, phantom)), command, args.seed, of)
        write_card(out, section)
        print(section)


if __name__ == "__main__":
    main()
