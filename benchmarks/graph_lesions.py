"""Does a graph's path start at the lesion? Where the patches' influence lies, against the mask and deletion.

    python -m benchmarks.graph_lesions phantom-llava --images 50

For each phantom image with a consolidation, seen by no training, and each output (the answer; of a generative model
also the token of its own report that names the finding):

- the share of what all patches have that lies inside the true mask, over the mask's share of the area, by three
  measures of a patch: "influence" (sizes of all paths), "support" (paths of positive edges, `graphs.support`) and
  "total effect" (size of the signed effect);
- the same for the model itself: each patch in turn is replaced by the image's mean, and the output read. Sizes of the
  changes stand against influence and total effect, falls against support; Pearson and Spearman over patches say how
  well a measure knows them;
- the same for models with random weights (another one for each image), each beside the trained model's graph of the
  same kind: through attention alone, MLPs being errors ("random weights" beside "attention alone"); through the MLPs
  too, their gates held ("random weights, MLPs held" beside "MLPs held"); and in SAE mode, through the features of the
  trained model's residual SAEs and held MLPs ("random weights, SAEs" beside "SAEs"; what they fail to explain of a
  random model is error). Transcoders stand for MLPs, which random weights do not have: "transcoders" has no null.

How support was chosen: on 48 development images of other patients (`--seed 91000` and `--seed 92000`, 24 images each),
by agreement with deletion. `SEED` is the seed of the images that are reported, which no choice has seen.

Writes benchmarks/results/graph-lesions-MODEL.json and prints the table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from benchmarks.common import RESULTS, machine, write_json
from benchmarks.graph_causal import FINDING, MAX_FEATURES, SEED, batch_of, cohort, summary, target
from graphs.build import build_graph
from graphs.causal.legs import legs_of, read_outputs
from graphs.causal.relations import spearman
from graphs.frozen import freeze
from graphs.graph import AttributionGraph
from graphs.influence import influence, total_effect
from graphs.nodes import NodeType
from graphs.support import support
from graphs.targets import Contrast, Output, ReportToken
from mechinterp.models import HookedVLM
from mechinterp.progress import progress
from mechinterp.types import ImageTextBatch, Placed

CHUNK = 33
"""Images that go through the model at a time while patches are deleted."""


def measures(graph: AttributionGraph) -> dict[str, Float[np.ndarray, " patch"]]:
    """What each patch has, by measure; none is negative."""
    patches = (graph.nodes.type == NodeType.PATCH).nonzero()[:, 0]
    found = {"influence": influence(graph), "support": support(graph), "total effect": total_effect(graph).abs()}
    return {name: values[patches].numpy() for name, values in found.items()}


def cover_of(mask: Bool[np.ndarray, "height width"], grid: tuple[int, int]) -> Float[np.ndarray, " patch"]:
    """How much of each patch the mask covers, in [0, 1]."""
    (rows, columns), (height, width) = grid, mask.shape
    return mask.reshape(rows, height // rows, columns, width // columns).mean((1, 3)).reshape(-1)


def concentration(sizes: Float[np.ndarray, " patch"], cover: Float[np.ndarray, " patch"]) -> float:
    """What lies inside the mask, as a share of all, over the mask's share of the area; nan without either."""
    known = bool(sizes.sum() and cover.sum())
    return float((sizes * cover).sum() / sizes.sum() / cover.mean()) if known else float("nan")


@torch.no_grad()
def deletion(model: HookedVLM, batch: ImageTextBatch, output: Output) -> Float[np.ndarray, " patch"]:
    """How far the output falls when each patch is replaced by the image's mean, nothing held."""
    (rows, columns), pixels = model.grid_shape, batch.pixel_values
    height, width = pixels.shape[-2] // rows, pixels.shape[-1] // columns
    images = pixels.repeat(rows * columns + 1, 1, 1, 1)
    for i in range(rows * columns):
        (top, left) = (i // columns * height, i % columns * width)
        images[i, :, top : top + height, left : left + width] = pixels[0].mean((1, 2))[:, None, None]
    values = []
    for part in images.split(CHUNK):
        legs = legs_of(model, replace(batch, pixel_values=part, ids=()), [output])
        results = {leg.name: leg.run(1 if leg.name.startswith("text") else len(part)) for leg in legs}
        values.append(read_outputs(model, [output], legs, results)[0].double())
    found = torch.cat(values)
    return (found[-1] - found[:-1]).numpy()


def report_token(model: HookedVLM, batch: ImageTextBatch) -> Output | None:
    """The token of the model's own report that names the finding, or None when the report does not."""
    from graphs.frozen.generative import report_of

    prompt = getattr(model.hf.config, "report_prompt", None)
    ids, words = report_of(model, batch, prompt)
    places = [i for i, word in enumerate(words) if word.strip().lower().startswith(FINDING[:8])]
    return ReportToken(places[0], prompt, ids) if places else None


def randomised(model: HookedVLM, seed: int = 0) -> HookedVLM:
    """The same architecture with every weight matrix permuted entry by entry: same scales, no knowledge."""
    import copy

    hf: Any = copy.deepcopy(model.hf)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                flat = parameter.reshape(-1)
                parameter.copy_(flat[torch.randperm(len(flat), generator=draws)].view_as(parameter))
    return HookedVLM(hf, model.processor, name=f"{model.label}, random weights")


def asked(model: HookedVLM, pixels: np.ndarray) -> Iterator[tuple[str, ImageTextBatch, Output]]:
    """The outputs of one image: name, batch, output."""
    batch = batch_of(model, pixels)
    yield "answer", batch, Contrast(target())
    if model.family == "llava":
        alone = ImageTextBatch(batch.pixel_values, ids=batch.ids)  # the output brings its own prompt
        token = report_token(model, alone)
        if token is not None:
            yield "report token", alone, token


def graphs_of(
    model: HookedVLM,
    null: HookedVLM,
    batch: ImageTextBatch,
    output: Output,
    dictionaries: Sequence[Placed],
    saes: Sequence[Placed] = (),
) -> Iterator[tuple[str, AttributionGraph]]:
    """The graphs of one output by name: the model's own, then each kind that has a null beside it."""
    trained, random = (freeze(of, batch, [output]) for of in (model, null))
    yield "transcoders", build_graph(trained, dictionaries, max_features=MAX_FEATURES)
    if saes:
        yield "SAEs", build_graph(trained, saes, mode="sae", max_features=MAX_FEATURES)
        yield "random weights, SAEs", build_graph(random, saes, mode="sae", max_features=MAX_FEATURES)
    yield "attention alone", build_graph(trained, ())
    yield "random weights", build_graph(random, ())
    yield "MLPs held", build_graph(trained, (), mode="sae")
    yield "random weights, MLPs held", build_graph(random, (), mode="sae")


def study_image(
    model: HookedVLM,
    null: HookedVLM,
    pixels: np.ndarray,
    cover: np.ndarray,
    dictionaries: Sequence[Placed],
    saes: Sequence[Placed] = (),
) -> dict[str, float]:
    """Every number of one image by its name."""
    found: dict[str, float] = {}
    for name, batch, output in asked(model, pixels):
        fall = deletion(model, batch, output)
        truth = {"influence": np.abs(fall), "support": np.maximum(fall, 0), "total effect": np.abs(fall)}
        found[f"{name}: deletion in the model, sizes"] = concentration(truth["influence"], cover)
        found[f"{name}: deletion in the model, falls"] = concentration(truth["support"], cover)
        for place, graph in graphs_of(model, null, batch, output, dictionaries, saes):
            for measure, sizes in measures(graph).items():
                found[f"{name}: {measure}, {place}"] = concentration(sizes, cover)
                if place == "transcoders":
                    against = truth[measure]
                    found[f"{name}: {measure}, Pearson with deletion"] = float(np.corrcoef(sizes, against)[0, 1])
                    found[f"{name}: {measure}, Spearman with deletion"] = spearman(sizes, against)
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The study. Returns what is written."""
    from mechinterp.audit.dictionary import stream_saes_of, transcoders_of

    parser = argparse.ArgumentParser(prog="python -m benchmarks.graph_lesions")
    parser.add_argument("model", help="phantom-clip, phantom-llava, or a twin of theirs")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--seed", type=int, default=SEED, help="of the images; another one for development")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    start = time.perf_counter()
    model = HookedVLM.from_pretrained(args.model)
    dictionaries, saes = transcoders_of(model), stream_saes_of(model)
    phantom = cohort(args.images, args.seed)
    images, masks = phantom.render(), phantom.masks(FINDING)
    rows = []
    for i in progress(range(len(phantom)), f"{args.model}: where the path starts"):
        cover = cover_of(masks[i], model.grid_shape)
        rows.append(study_image(model, randomised(model, i), images[i], cover, dictionaries, saes))
    lines = []
    for name in dict.fromkeys(name for row in rows for name in row):
        kept = [i for i, row in enumerate(rows) if name in row]
        lines.append({"name": name} | summary([rows[i][name] for i in kept], [phantom.patients[i] for i in kept]))
    found = {
        "name": f"graph-lesions-{args.model}",
        "machine": machine(),
        "model": {"label": args.model, "sha256": model.sha256},
        "seconds": round(time.perf_counter() - start, 1),
        "settings": {"images": args.images, "seed": args.seed, "max_features": MAX_FEATURES},
        "summary": lines,
        "rows": [{"patient": patient, **row} for patient, row in zip(phantom.patients, rows, strict=True)],
    }
    write_json(args.out / f"graph-lesions-{args.model}.json", found)
    for line in lines:
        low, high = line["ci95"]
        print(f"{line['name']:56} {line['median']:7.3f}  [{low:.3f}, {high:.3f}]  n={line['n']}")
    return found


if __name__ == "__main__":
    main()
