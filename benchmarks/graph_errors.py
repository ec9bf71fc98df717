"""What do a transcoder's errors cost a graph? Where the influence that ends in errors ends, by tower and layer.

    python -m benchmarks.graph_errors --images 20                                        # the four phantom models
    python -m benchmarks.graph_errors cxr-clip --data FOLDER --images 20                 # test patients of the folder

For each model and image (with the finding, seen by no training) the whole graph of the finding's score, and of all its
influence the share that ends in the error nodes of each MLP's transcoder (`graphs.scores`, `errors_by_layer`), beside
completeness and replacement: what a perfect transcoder of that layer could win at most. Medians over images, 95 %
intervals by bootstrap over patients.

Writes benchmarks/results/graph-errors-MODEL.json and prints a table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, machine, write_json
from benchmarks.graph_causal import FINDING, MAX_FEATURES, SEED, cohort, summary
from benchmarks.graph_causal import target as phantom_target
from graphs.build import build_graph
from graphs.frozen import freeze
from graphs.scores import scores
from graphs.targets import Contrast
from mechinterp.models import HookedVLM
from mechinterp.progress import progress
from mechinterp.types import ImageTextBatch

MODELS = ("phantom-clip", "phantom-clip-shortcut", "phantom-llava", "phantom-llava-shortcut")


def cases(model: HookedVLM, folder: str | None, images: int) -> Iterator[tuple[str, ImageTextBatch, Contrast]]:
    """(patient, batch, output) of each image: phantoms with the finding, or test images with the folder's target."""
    if folder is None:
        drawn, asked = cohort(images, SEED), phantom_target()
        for patient, pixels in zip(drawn.patients, drawn.render(), strict=True):
            yield patient, model.prepare(pixels[None] / 255.0, [asked]), Contrast(asked)
        return
    from mechinterp.data import open_data

    data = open_data(folder)
    asked = next(iter(data.targets.values()))
    rows = np.flatnonzero((data.split == "test") & (data.labels(asked.name) == 1))[:images]
    for row in rows:
        yield data.patients[row], model.prepare(data.pixels([row]), [asked]), Contrast(asked)


def study(model: HookedVLM, folder: str | None, images: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The scores of each image's graph."""
    from mechinterp.audit.dictionary import transcoders_of

    dictionaries = transcoders_of(model)
    rows, patients = [], []
    for patient, batch, output in progress(cases(model, folder, images), f"{model.label}: graphs", total=images):
        graph = build_graph(freeze(model, batch, [output]), dictionaries, max_features=MAX_FEATURES)
        rows.append(scores(graph).to_dict())
        patients.append(patient)
    return rows, patients


def lines(rows: Sequence[dict[str, Any]], patients: Sequence[str]) -> list[dict[str, Any]]:
    """One line for the graph and one for each layer that has errors."""
    ends = {
        "inputs": ("patch", "token", "position", "cls", "bias"),
        "errors": ("error",),
        "unexpanded": ("unexpanded",),
    }
    found = [{"name": name} | summary([r[name] for r in rows], patients) for name in ("completeness", "replacement")]
    for name, types in ends.items():
        values = [sum(r["influence_by_type"][t] for t in types) for r in rows]
        found.append({"name": f"influence that ends in {name}"} | summary(values, patients))
    for layer in rows[0]["errors_by_layer"]:
        values = [r["errors_by_layer"][layer] for r in rows]
        found.append({"name": f"influence that ends in errors of {layer}"} | summary(values, patients))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The study, a file and a table for each model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.graph_errors")
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--data", help="data folder of radiographs; default phantoms with consolidation")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    for name in args.models:
        start = time.perf_counter()
        model = HookedVLM.from_pretrained(name)
        rows, patients = study(model, args.data, args.images)
        found = lines(rows, patients)
        write_json(
            args.out / f"graph-errors-{name}.json",
            {
                "name": f"graph-errors-{name}",
                "machine": machine(),
                "model": {"label": name, "sha256": model.sha256},
                "seconds": round(time.perf_counter() - start, 1),
                "settings": {"max_features": MAX_FEATURES, "images": args.images, "finding": FINDING},
                "summary": found,
                "rows": rows,
            },
        )
        print(name)
        for entry in found:
            low, high = entry["ci95"]
            print(f"  {entry['name']:46} {entry['median']:6.3f}  [{low:.3f}, {high:.3f}]  n={entry['n']}")


if __name__ == "__main__":
    main()
