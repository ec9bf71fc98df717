"""Dictionaries of words beside their nulls: `python -m benchmarks.words [NAME ...]`.

A dictionary of text tokens cannot be judged by what lies in an image. It is judged by what is said at a token, which
is known, since the texts are written from templates:

- *named F*: the token is part of a name of finding or device F ("chest", "tube" of "chest tube"), affirmed or denied;
- *affirmed F*: the text, up to this token and no further, says that F is there;
- *in a denial*: the clause, up to this token, holds a negation.

The first can be read off the word itself, the other two only from what came before. So the word itself, one "latent"
for each entry of the vocabulary, stands among the nulls.

1. Texts of phantoms that no training saw, split by patient: captions (dual encoder), reports (language model).
2. Activations at the dictionary's site; of these `ROWS` tokens, drawn at random.
3. The scores of `saes.metrics.arms` with tokens in place of images: the latent is chosen on train patients, its
   threshold on val, the score is of test patients, and intervals resample patients.
Writes benchmarks/results/words-NAME.json, and prints the table.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from benchmarks.common import RESULTS
from benchmarks.scorecards import SEED, config_of
from mechinterp.activations import ActivationStore, extract
from mechinterp.data import ImageData, open_data
from mechinterp.data.phantom import MENTIONED, Phantom
from mechinterp.data.phantom.language import mentions, named
from mechinterp.metrics.statistics import percentile_interval
from mechinterp.models import HookedVLM
from mechinterp.models.bundles import bundled_folder
from mechinterp.storage import write_json
from mechinterp.types import Placed
from saes import evaluate, load_sae, train_sae
from saes.metrics.arms import Measured, Task, measure
from saes.nulls.directions import dictionary_nulls
from saes.nulls.labels import permuted_labels
from saes.nulls.models import randomised
from saes.nulls.probe import probe_bound

ROWS, LEAST, DRAWS = 16_000, 20, 300
FAMILIES = ("named", "affirmed", "in a denial")
METRICS = ("AUROC", "F1", "5-sparse probe AUROC")
NEGATION = re.compile(r"\b(?:no|not|without|absent|normal|free)\b")


def texts_of(model: HookedVLM, phantom: Phantom) -> list[str]:
    """One text for each image, as the model meets them in training."""
    if "text.hook_logits" not in model.sites():
        return phantom.captions()
    return [f"{model.hf.config.report_prompt} {report}" for report in phantom.reports()]


def tokens_of(model: HookedVLM, data: ImageData, texts: list[str]) -> dict[str, list[str]]:
    """Image name to the tokens of its text, one a position of the language side; special ones are empty."""
    special, one = set(model.tokenizer.all_special_tokens), data.pixels([0])
    found = {}
    for name, text in zip(data.images, texts, strict=True):
        ids = model.preprocess(one, [text]).input_ids
        assert ids is not None
        found[name] = ["" if t in special else t for t in model.tokenizer.convert_ids_to_tokens(ids[0].tolist())]
    return found


def facts(tokens: list[str]) -> Float[np.ndarray, "token concept"]:
    """0 or 1 for each token and concept: named (each), affirmed (each), in a denial."""
    words = [(at, word) for at, word in enumerate(tokens) if word]
    ends = np.cumsum([len(word) + 1 for _, word in words]) - 1
    text = " ".join(word for _, word in words)
    names, out = named(text), np.zeros((len(tokens), 2 * len(MENTIONED) + 1))
    for (at, word), end in zip(words, ends.tolist(), strict=True):
        so_far = text[:end]
        said = mentions(so_far)
        for i, name in enumerate(MENTIONED):
            out[at, i] = any(first < end and end - len(word) < last for first, last in names[name])
            out[at, len(MENTIONED) + i] = said[name] == 1
        clause = re.split(r" ?[.,;?:] ?|\bbut\b|\bwith\b|(?=\bwithout\b)", so_far)[-1]
        out[at, -1] = NEGATION.search(clause) is not None
    if not tokens[-1]:  # the end of a text knows all of it
        out[-1, len(MENTIONED) : -1] = out[words[-1][0], len(MENTIONED) : -1]
    return out


CONCEPTS = [f"named {n}" for n in MENTIONED] + [f"affirmed {n}" for n in MENTIONED] + ["in a denial"]


def probe(x: np.ndarray, task: Task) -> dict[str, Measured]:
    """The linear probe's scores, one concept at a time with its own output as the one latent."""
    outputs = np.nan_to_num(probe_bound(x, task.labels, task.split).encode(x))
    parts = [
        measure(outputs[:, [a]], Task(task.labels[:, [a]], task.split, task.patients, task.weights), sparse=())[0]
        for a in range(task.labels.shape[1])
    ]
    joined = {
        metric: Measured(
            np.concatenate([p[metric].value for p in parts]), np.concatenate([p[metric].draws for p in parts], 1)
        )
        for metric in ("AUROC", "F1")
    }
    return joined | {"5-sparse probe AUROC": joined["AUROC"]}


def arms_of(
    model: HookedVLM, data: ImageData, placed: Placed, store: ActivationStore, texts: list[str], scratch: Path
) -> dict[str, tuple[Placed, ActivationStore]]:
    """The dictionary ("") and every null that reads activations."""
    config = config_of(placed.dictionary.info["config"])  # type: ignore[attr-defined]
    random = extract(randomised(model), data, [placed.reads], scratch / "random", tokens="text", texts=texts)
    arms = {"": (placed, store)}
    arms |= {name: (null, store) for name, null in dictionary_nulls(placed, store).items()}
    arms["randomised model"] = (train_sae(random, placed.reads, config, scratch / "sae"), random)
    return arms


def scores(name: str, folder: Path, phantom: Phantom, data: ImageData, scratch: Path) -> dict[str, Any]:
    """Every family and metric of one dictionary beside its nulls."""
    model, placed = HookedVLM.from_pretrained(name), load_sae(folder)
    texts = texts_of(model, phantom)
    store = extract(model, data, [placed.reads], scratch / "store", tokens="text", texts=texts)
    index, tokens = store.index_of(placed.reads), tokens_of(model, data, texts)
    rows = np.sort(np.random.default_rng(0).permutation(len(index))[:ROWS])
    index = index.iloc[rows]
    about = {image: facts(said) for image, said in tokens.items()}
    at = list(zip(index["image"].astype(str), index["token"], strict=True))
    labels, words = np.stack([about[i][t] for i, t in at]), [tokens[i][t] for i, t in at]
    split, patients = index["split"].to_numpy(str), index["patient"].to_numpy(str)
    few = [min(((labels[:, a] == v) & (split == s)).sum() for v in (0, 1) for s in ("train", "val", "test"))
           for a in range(len(CONCEPTS))]  # fmt: skip
    kept = np.flatnonzero(np.array(few) >= LEAST)
    task = Task.of(labels[:, kept], split, patients, DRAWS, 0)
    found, fidelity = {}, {}
    for arm, (dictionary, its) in arms_of(model, data, placed, store, texts, scratch).items():
        acts = dictionary.dictionary.encode(its.site(placed.reads)[rows]).detach().numpy()
        found[arm], fidelity[arm] = measure(acts, task)[0], evaluate(dictionary, its, "test").r2
        if arm == "":
            found["permuted labels"] = measure(acts, task.with_labels(permuted_labels(task.labels, patients, split)))[0]
        print(f"  {arm or 'dictionary'}: done", flush=True)
    vocabulary = {word: i for i, word in enumerate(sorted(set(words)))}
    found["the word itself"] = measure(np.eye(len(vocabulary), dtype=np.float32)[[vocabulary[w] for w in words]], task)[
        0
    ]
    found["linear probe"] = probe(store.site(placed.reads)[rows].numpy(), task)
    return {
        "model": name,
        "dictionary": folder.name,
        "rows": {s: int((split == s).sum()) for s in ("train", "val", "test")},
        "test_patients": len(set(patients[split == "test"])),
        "not_tested": [CONCEPTS[a] for a in range(len(CONCEPTS)) if a not in kept],
        "R2": {arm or "dictionary": r2 for arm, r2 in fidelity.items()},
        "scores": compared(found, [CONCEPTS[a] for a in kept]),
    }


def compared(found: dict[str, dict[str, Measured]], names: list[str]) -> list[dict[str, Any]]:
    """Mean over the concepts of each family: value, null, and difference with its 95 % interval."""
    out = []
    for family in FAMILIES:
        some = [i for i, name in enumerate(names) if name.startswith(family)]
        for metric in METRICS:
            for null in found:
                if null == "" or not some:
                    continue
                mine, other = found[""][metric], found[null][metric]
                value, beside = float(np.mean(mine.value[some])), float(np.mean(other.value[some]))
                low, high = percentile_interval(np.nanmean((mine.draws - other.draws)[:, some], axis=1))
                out.append(
                    {"family": family, "concepts": len(some), "metric": metric, "value": value, "null": null,
                     "null_value": beside, "difference": value - beside, "ci95": [low, high]}
                )  # fmt: skip
    return out


def table(result: dict[str, Any]) -> str:
    """The scores in Markdown: a line a family and metric, a column a null."""
    nulls = list(dict.fromkeys(s["null"] for s in result["scores"]))
    lines = [f"| family, metric | value | {' | '.join(nulls)} |", "| --- " * (len(nulls) + 2) + "|"]
    for family, metric in dict.fromkeys((s["family"], s["metric"]) for s in result["scores"]):
        line = [s for s in result["scores"] if (s["family"], s["metric"]) == (family, metric)]
        cells = [
            f"{s['null_value']:.3f}, {s['difference']:+.3f} [{s['ci95'][0]:.3f}, {s['ci95'][1]:.3f}]" for s in line
        ]
        lines.append(f"| {family} ({line[0]['concepts']}), {metric} | {line[0]['value']:.3f} | {' | '.join(cells)} |")
    r2 = ", ".join(f"{arm} {value:.3f}" for arm, value in result["R2"].items())
    return "\n".join([*lines, f"R2: {r2}", f"rows {result['rows']}, {result['test_patients']} test patients"])


def main() -> None:
    """Score the text dictionaries of the named models."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.words")
    parser.add_argument("names", nargs="*", default=["phantom-clip", "phantom-llava"])
    parser.add_argument("--images", type=int, default=1200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        phantom = Phantom.sample(args.images, seed=SEED)
        phantom.write(Path(scratch) / "phantom", masks=False)
        data = open_data(Path(scratch) / "phantom")
        for name in args.names:
            for folder in sorted((bundled_folder(name) or Path()).glob("dictionaries/text.*")):
                result = scores(name, folder, phantom, data, Path(scratch) / name)
                write_json(RESULTS / f"words-{name}.json", result | {"seed": SEED, "draws": DRAWS})
                print(f"\n== {name}, {folder.name}\n{table(result)}\nnot tested: {result['not_tested']}", flush=True)


if __name__ == "__main__":
    main()
