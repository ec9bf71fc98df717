"""The command line: one short function a command. Heavy imports happen inside the function that needs them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mechinterp.errors import MechInterpError, UsageError
from mechinterp.storage import check_writable, discard_earlier, write_manifest

if TYPE_CHECKING:
    from mechinterp.data import ImageData
    from mechinterp.models import HookedVLM

DEFAULT_MODEL = "phantom-clip-shortcut"
DEFAULT_IMAGES = 600
READ_ONLY = ("models", "doctor", "verify")  # commands that write nothing of their own
TARGET = "up to four words: a finding, held against its absence; longer: a prompt; with a question mark: a question"

Command = Callable[..., argparse.ArgumentParser]


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns 0 on success and 2 on wrong use or bad input (one line on stderr, no traceback)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return 2
    try:
        if args.seed < 0:
            raise UsageError(f"is {args.seed}", where="--seed", hint="0 or more")
        if args.out or (args.needs_out not in READ_ONLY and getattr(args, "name", "") != "list"):
            check_writable(_out(args))
        args.run(args)
    except MechInterpError as error:
        print(f"mechinterp: {error}".replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mechinterp: stopped; what was finished is kept", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All commands with their arguments."""
    parser = argparse.ArgumentParser(
        prog="mechinterp",
        description="How does a medical vision-language model reason? Research use; not a medical device.",
        epilog="example: mechinterp audit phantom-clip-shortcut --out out/audit",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], summary: str, example: str):
        sub = commands.add_parser(name, help=summary, description=summary, epilog=f"example: mechinterp {example}")
        sub.add_argument("--seed", type=int, default=0, help="seed of everything random (default 0)")
        sub.add_argument("--out", type=Path, default=None, metavar="DIR", help="folder for the results")
        sub.set_defaults(run=run, needs_out=name)
        return sub

    _data_and_models(command)
    _dictionaries(command)
    _questions(command)
    return parser


def _data_and_models(command: Command) -> None:
    command("models", _models, "bundled models, and the families that can be loaded", "models")
    sub = command("data", _data, "write a phantom data folder, with truth", "data phantom --n 200 --out data/phantom")
    sub.add_argument("what", choices=["phantom"])
    sub.add_argument("--n", type=int, default=200, help="number of images (default 200)")
    sub.add_argument("--associate", action="append", default=[], metavar="SHORTCUT:FINDING:RHO", help="plant one")

    sub = command("audit", _audit, "does the model rely on a shortcut, and how sure are we?", "audit phantom-clip")
    sub.add_argument("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL")
    sub.add_argument("--data", metavar="DATA", help=f"data folder (default: a phantom of {DEFAULT_IMAGES} images)")
    sub.add_argument("--target", help="target in dataset.json (default: the one the model's card names)")
    sub.add_argument("--thresholds", type=Path, metavar="FILE", help="JSON: thresholds of the grades other than ours")

    sub = command("extract", _extract, "write activations to a store", "extract phantom-clip --data D --site S")
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--data", metavar="DATA", required=True)
    sub.add_argument("--site", action="append", required=True, metavar="SITE", help="hook name; may be repeated")
    sub.add_argument("--tokens", default="all", choices=["all", "patch", "cls", "text", "pooled"])


def _dictionaries(command: Command) -> None:
    sub = command("train", _train, "train dictionaries on a store", "train STORE --kind topk --k 8,16,32 --out sae")
    sub.add_argument("store", type=Path, metavar="STORE")
    kinds = ["topk", "batchtopk", "matryoshka", "jumprelu", "gated", "transcoder"]
    sub.add_argument("--kind", default="topk", choices=kinds)
    sub.add_argument("--site", metavar="SITE", help="which site of the store (default: its only one)")
    sub.add_argument("--reads", metavar="SITE", help="of a transcoder: what it reads")
    sub.add_argument("--writes", metavar="SITE", help="of a transcoder: what it writes")
    sub.add_argument("--skip", action="store_true", help="of a transcoder: a linear path beside the latents")
    sub.add_argument("--sparsity", choices=["topk", "batchtopk"], help="of a transcoder (default topk)")
    sub.add_argument("--width", type=_numbers, default=[1024], help="number of latents (default 1024), or several: A,B")
    sub.add_argument("--k", type=_numbers, default=[16], help="active latents per token (default 16), or several: A,B")
    sub.add_argument("--penalty", type=float, help="of jumprelu (then without --k) and gated: weight of the sparsity")
    sub.add_argument("--epochs", type=int, default=None, help="passes over the store")
    sub.add_argument("--tokens", choices=["all", "patch", "cls", "pooled", "text"], help="rows of this kind only")

    sub = command("import", _import, "read somebody's dictionary", "import their_sae --site S --out sae")
    sub.add_argument("source", type=Path, metavar="FOLDER", help="sae-lens, dictionary_learning or saev; or one file")
    sub.add_argument("--site", metavar="SITE", required=True, help="hook name of the place it was trained on")
    sub.add_argument("--layout", metavar="NAME", help="sae_lens, dictionary_learning or saev (default: recognised)")
    sub.add_argument("--tokens", choices=["all", "patch", "cls", "pooled"], help="what it was trained on, if known")

    sub = command("features", _features, "catalogue and gallery of named features", "features phantom-clip --out f")
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--data", metavar="DATA", help=f"data folder (default: a phantom of {DEFAULT_IMAGES} images)")
    sub.add_argument("--target", help="what effects are measured on (default: the one the model's card names)")
    sub.add_argument("--top", type=int, default=40, metavar="N", help="features shown with pictures (default 40)")
    about = "dictionary of another seed; repeatable"
    sub.add_argument("--other", action="append", default=[], type=Path, metavar="DIR", help=about)


def _questions(command: Command) -> None:
    about = "remove features and see what the output does"
    sub = command("ablate", _ablate, about, "ablate phantom-clip --features S:12")
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--data", metavar="DATA")
    sub.add_argument("--features", required=True, metavar="SITE:12,SITE:40")
    sub.add_argument("--target", help="target name from dataset.json")

    example = "explain cxr-clip --image a.png --target pneumonia --method occlusion"
    sub = command("explain", _explain, "one saliency map of one image", example)
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--image", type=Path, required=True, metavar="FILE")
    sub.add_argument("--target", required=True, metavar="TEXT", help=TARGET)
    sub.add_argument("--against", metavar="TEXT", help="the prompt (or class) to contrast with, both as they stand")
    sub.add_argument("--method", required=True, metavar="NAME", help="such as occlusion; a wrong name lists all")
    sub.add_argument("--data", metavar="DATA", help="what sae_maps and graph_patches train on where nothing is stored")
    sub.add_argument("--chunk", type=int, metavar="N", help="images through the model at once: fewer take less memory")

    about = "from patches and words through features to a score: the attribution graph of one image"
    sub = command("graph", _graph, about, "graph cxr-clip --image a.png --target pneumonia --out graph")
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--image", type=Path, required=True, metavar="FILE")
    sub.add_argument("--target", required=True, metavar="TEXT", help=TARGET)
    sub.add_argument("--against", metavar="TEXT", help="the prompt to contrast with; a set: several, with ; between")
    sub.add_argument("--data", metavar="DATA", help="images for the pictures of features (default: a phantom)")
    sub.add_argument("--max-features", type=int, default=1500, metavar="N", help="trace the N most influential (1500)")
    sub.add_argument("--mode", default="transcoder", choices=["transcoder", "sae"], help="sae: of the residual stream")
    sub.add_argument("--node", type=float, default=0.8, help="share of influence that the picture keeps (default 0.8)")
    sub.add_argument("--edge", type=float, default=0.98, help="the same for edges (default 0.98)")
    sub.add_argument("--paths", type=int, default=5, metavar="K", help="print the K strongest paths (default 5)")
    sub.add_argument("--attention", type=int, default=0, metavar="K", help="why the K strongest heads look there")
    sub.add_argument("--causal", action="store_true", help="also test the graph by interventions on the model (slower)")
    sub.add_argument("--suppress", metavar="NAME", help="suppress a group, a named feature, or ids A,B in the model")
    sub.add_argument("--groups", type=Path, metavar="FILE", help="take these groups (JSON), checked, not proposed ones")

    sub = command("iq", _iq, "explainers side by side on one model", "iq phantom-clip --methods lime,grad_cam")
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--data", metavar="DATA", help=f"data folder (default: a phantom of {DEFAULT_IMAGES} images)")
    sub.add_argument("--target", help="target in dataset.json (default: the one the model's card names)")
    sub.add_argument("--methods", metavar="A,B", help="default: all that apply")
    sub.add_argument("--masks", metavar="A,B", help="attributes whose masks maps are held beside, such as a shortcut's")
    sub.add_argument("--images", type=int, default=6, metavar="N", help="test images, one a patient (default 6)")
    sub.add_argument("--chunk", type=int, metavar="N", help="images through the model at once: fewer take less memory")
    sub.add_argument("--thresholds", type=Path, metavar="FILE", help="JSON: thresholds of the grades other than ours")
    for name, how in (("permuted", "on permuted labels"), ("again", "again"), ("other", "in another architecture")):
        sub.add_argument(f"--{name}", metavar="MODEL", help=f"the same trained {how} (default: as its card names)")

    sub = command("doctor", _doctor, "does this model hook, restore, freeze and score as it should?", "doctor my-model")
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--data", metavar="DATA")

    about = "a reproducible experiment: result.json, table.md and figure.png"
    sub = command("experiment", _experiment, about, "experiment superposition --quick --out out/superposition")
    sub.add_argument("name", metavar="NAME", help="which one; `list` names them")
    sub.add_argument("--quick", action="store_true", help="the small version: shows that it runs, is no result")
    sub.add_argument("--data", type=Path, metavar="DATA", help="real images, for the experiments that take them")

    sub = command("verify", _verify, "check every file of an artefact folder against its manifest", "verify out/audit")
    sub.add_argument("folder", type=Path, metavar="DIR")


def _models(args: argparse.Namespace) -> None:
    from mechinterp.models import bundled, controls, families

    print("bundled models")
    for name in bundled():
        print(f"  {name}")
    print(f"controls for explanations: {', '.join(controls())}")
    print("families that can be loaded from a transformers folder")
    for family in families():
        print(f"  {family.name:8} {', '.join(family.released)}")


def _data(args: argparse.Namespace) -> None:
    from mechinterp.data.phantom import Phantom

    associations = {}
    for text in args.associate:
        parts = text.split(":")
        try:
            associations[(parts[0], parts[1])] = float(parts[2])
        except (IndexError, ValueError):
            raise UsageError(f"{text!r} is not SHORTCUT:FINDING:RHO", hint="portable:consolidation:0.9") from None
    if args.n < 1:
        raise UsageError(f"--n {args.n}: at least one image is needed")
    out = _out(args)
    discard_earlier(out, "data")
    Phantom.sample(args.n, seed=args.seed, associations=associations).write(out)
    write_manifest(out, {"kind": "data", "seed": args.seed})
    print(f"{args.n} images in {out}")


def _audit(args: argparse.Namespace) -> None:
    from mechinterp.audit import audit, settings_of

    settings, out = settings_of(args.thresholds), _out(args)
    model = _load(args.model)
    result = audit(model, _open(args.data, args.seed), args.target, out, args.seed, settings=settings)
    print(result.summary())
    print(f"report: {(out / 'report.html').resolve()}")


def _extract(args: argparse.Namespace) -> None:
    from mechinterp.activations import extract
    from mechinterp.audit.dictionary import texts_beside

    model, data = _load(args.model), _open(args.data, args.seed)
    reads_text = any(site.startswith("text.") for site in args.site)
    texts = texts_beside(model, data, args.seed) if reads_text else None
    store = extract(model, data, sites=args.site, out=_out(args), tokens=args.tokens, seed=args.seed, texts=texts)
    print(f"store: {store.folder}")


def _train(args: argparse.Namespace) -> None:
    from mechinterp.activations import ActivationStore
    from saes.choices import chosen
    from saes.config import TranscoderConfig
    from saes.metrics import evaluate
    from saes.sweep import train_sweep
    from saes.train import train_sae, train_transcoder

    store, out = ActivationStore(args.store), _out(args)
    configs = chosen(args.kind, args.width, args.k, args.epochs, args.penalty, args.skip, args.sparsity)
    options = {"seed": args.seed, "tokens": args.tokens}
    coders = [config for config in configs if isinstance(config, TranscoderConfig)]
    encoders = [config for config in configs if not isinstance(config, TranscoderConfig)]
    if coders:
        if not (args.reads and args.writes) or len(coders) > 1:
            raise UsageError("a transcoder needs --reads and --writes, one --k and one --width", where="--kind")
        placed = train_transcoder(store, args.reads, args.writes, coders[0], out, **options)
    else:
        if args.site is None and len(store.sites) != 1:
            raise UsageError(f"the store holds {', '.join(store.sites)}", where="--site", hint="name one of them")
        site = args.site or store.sites[0]
        if len(encoders) > 1:
            print(train_sweep(store, site, encoders, out, **options).table())
            print(f"dictionaries: {out} (* is the one to take)")
            return
        placed = train_sae(store, site, encoders[0], out, **options)
    split = next((name for name in ("test", "val", "train") if len(store.rows(placed.reads, name))), "train")
    print(f"dictionary: {out}")
    print(json.dumps(evaluate(placed, store, split).to_dict(), indent=2))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _import(args: argparse.Namespace) -> None:
    from saes.dictionary import SparseDictionary
    from saes.layouts import import_dictionary

    out = _out(args)
    placed = import_dictionary(args.source, args.site, out, args.layout, tokens=args.tokens)
    assert isinstance(placed.dictionary, SparseDictionary)
    about = placed.dictionary.info["imported"]
    print(f"dictionary: {out} ({placed.dictionary.d_sae} latents, {about['class']} of {about['layout']})")
    for note in about["notes"]:
        print(f"note: {note}")


def _features(args: argparse.Namespace) -> None:
    from mechinterp.audit.dictionary import dictionary_of, tokens_of
    from mechinterp.audit.pipeline import choose_target
    from mechinterp.audit.sizes import one_size
    from saes import load_sae
    from saes.gallery import catalogue

    if args.top < 1:
        raise UsageError(f"--top {args.top}: at least one feature is needed")
    out, model = _out(args), _load(args.model)
    data = one_size(model, _open(args.data, args.seed))
    target = choose_target(model, data, args.target) if data.targets or args.target else None
    placed, source = dictionary_of(model, data, args.seed)
    others = [load_sae(folder) for folder in args.other]
    made = catalogue(
        model, data, placed, target, out, args.top, args.seed, tokens=tokens_of(placed), others=others, source=source
    )
    print(made.summary())
    print(f"page: {(out / 'features.html').resolve()}")


def _ablate(args: argparse.Namespace) -> None:
    from mechinterp.audit.ablation import ablation_table

    model, data = _load(args.model), _open(args.data, args.seed)
    features, out = args.features.split(","), _out(args)
    print(ablation_table(model, data, features=features, target=args.target, out=out, seed=args.seed))


def _explain(args: argparse.Namespace) -> None:
    from mechinterp.audit.asking import target_of
    from mechinterp.audit.explaining import explain_image, write_map
    from mechinterp.data.files import open_image

    model = _load(args.model)
    target = target_of(model, args.target, args.against)
    pixels = open_image(args.image)[1]
    made = explain_image(model, pixels, target, args.method, args.seed, lambda: _open(args.data, args.seed), args.chunk)
    print(write_map(made, _out(args)))


def _graph(args: argparse.Namespace) -> None:
    from dataclasses import fields

    from mechinterp.audit.graph_command import Wishes, graph_command

    out, model = _out(args), _load(args.model)
    wishes = Wishes(**{field.name: getattr(args, field.name) for field in fields(Wishes)})
    print(graph_command(model, args.image, out, wishes, _open(args.data, args.seed) if args.data else None))
    print(f"picture: {out / 'graph.png'}, page: {(out / 'graph.html').resolve()}")


def _iq(args: argparse.Namespace) -> None:
    from mechinterp.audit.explainers.command import run

    print(run(args, _load, lambda: _open(args.data, args.seed), _out(args)))


def _doctor(args: argparse.Namespace) -> None:
    from mechinterp.models.doctor import doctor

    model = _load(args.model)
    data = _open(args.data, args.seed, images=8)
    rows = list(range(min(4, len(data))))
    target = next(iter(data.targets.values()))
    batch = model.prepare(data.pixels(rows), [target], ids=tuple(data.images[i] for i in rows))
    checks = doctor(model, batch, target=target)
    for check in checks:
        print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}")
    failed = [check.name for check in checks if not check.ok]
    if failed:
        raise MechInterpError(f"failed: {', '.join(failed)}", where=args.model, hint="do not trust its numbers")


def _experiment(args: argparse.Namespace) -> None:
    from mechinterp.experiments import EXPERIMENTS, run_experiment

    if args.name == "list":
        for entry in EXPERIMENTS.values():
            print(f"  {entry.name:24} {entry.question}")
        return
    out = args.out or Path("out") / args.name
    result = run_experiment(args.name, out, quick=args.quick, seed=args.seed, data=args.data)
    for claim in result.claims:
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.claim}: {claim.evidence}")
    print(f"experiment: {out / 'table.md'}, {out / 'figure.png'}")


def _verify(args: argparse.Namespace) -> None:
    from mechinterp.errors import StorageError
    from mechinterp.storage import verify_folder

    problems = verify_folder(args.folder)
    if problems:
        raise StorageError("; ".join(problems[:5]), where=str(args.folder), hint=f"{len(problems)} problem(s)")
    print(f"{args.folder}: every file matches its manifest")


def _out(args: argparse.Namespace) -> Path:
    return args.out or Path("out") / args.needs_out


def _load(name: str) -> HookedVLM:
    from mechinterp.models import HookedVLM

    return HookedVLM.from_pretrained(name)


def _open(folder: str | None, seed: int, images: int = DEFAULT_IMAGES) -> ImageData:
    from mechinterp.audit.defaults import default_data
    from mechinterp.data import open_data

    return open_data(Path(folder)) if folder else default_data(images, seed)


if __name__ == "__main__":
    sys.exit(main())
