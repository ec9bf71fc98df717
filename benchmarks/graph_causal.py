"""Are attribution graphs true of the models that ship? Interventions on phantom images, and where the influence lies.

    python -m benchmarks.graph_causal phantom-clip --images 50
    python -m benchmarks.graph_causal phantom-llava --images 50

For each image with a consolidation, seen by no training: the graph of the consolidation score, and

- Spearman of node influence against |change of the score| by free ablation, beside simpler predictions, over a random
  sample of active features with influence, and over the features of the pruned graph (median over images, interval by
  bootstrap over patients; anchor 0.72, Ameisen et al. 2025);
- effects of features on features, perturbations one block on, attention mediation, matched random features, and the
  faithfulness curve of the ranking;
- the share of the patches' influence (and of their total effects) that lies inside the true mask of the lesion, divided
  by the mask's share of the image: for the answer, and for the token of the model's own report that names the finding;
  the same for a model with random weights. That one has no dictionaries, so its graph runs through attention alone; the
  trained model's graph without dictionaries stands beside it.

Writes benchmarks/results/graph-causal-MODEL.json and prints the table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, machine, write_json
from graphs.build import build_graph
from graphs.causal.lab import Lab
from graphs.causal.ranking import node_effects
from graphs.causal.reporting import RANKED, report
from graphs.frozen import freeze
from graphs.graph import AttributionGraph
from graphs.influence import influence, total_effect
from graphs.nodes import NodeType
from graphs.scores import scores
from graphs.targets import Contrast, Output, ReportToken
from mechinterp.data.phantom import Phantom, prompts
from mechinterp.metrics.statistics import PatientBootstrap, percentile_interval
from mechinterp.models import HookedVLM
from mechinterp.progress import progress
from mechinterp.types import ImageTextBatch, Placed, Target

FINDING = "consolidation"
SEED = 77_000
ANCHOR = 0.72
MAX_FEATURES = 1000
N_NODES = 64
COUNTS = ("images", "reports", "nulls")


def cohort(n: int) -> Phantom:
    """`n` phantom images with the finding, of unseen patients."""
    drawn = Phantom.sample(8 * n, seed=SEED)
    return drawn[np.flatnonzero(drawn.factors[FINDING].to_numpy() == 1)[:n]]


def target() -> Target:
    """The finding as a target of both families."""
    return Target(FINDING, *prompts(FINDING))


def batch_of(model: HookedVLM, pixels: np.ndarray) -> ImageTextBatch:
    """One image, ready."""
    return model.prepare(pixels[None] / 255.0, [target()])


def concentration(graph: AttributionGraph, mask: np.ndarray, model: HookedVLM) -> dict[str, float]:
    """What lies inside the mask, as a share of what all patches have, over the mask's share of their area.

    "influence": of the patches' influence. "total effect": of the sizes of the patches' signed effects on the output,
    which, unlike influence, let paths of opposite sign cancel. nan where there is nothing to share out.
    """
    rows, columns = model.grid_shape
    height, width = mask.shape
    # how much of each patch the mask covers
    cover = mask.reshape(rows, height // rows, columns, width // columns).mean((1, 3)).reshape(-1)
    patches = (graph.nodes.type == NodeType.PATCH).nonzero()[:, 0]
    found = {}
    for name, values in (("influence", influence(graph)), ("total effect", total_effect(graph).abs())):
        sizes = values[patches].numpy()
        known = bool(sizes.sum() and cover.sum())
        found[name] = float((sizes * cover).sum() / sizes.sum() / cover.mean()) if known else float("nan")
    return found


def named(place: str, parts: dict[str, float]) -> dict[str, float]:
    """Concentrations with what they are of."""
    return {f"{measure} on {place}": value for measure, value in parts.items()}


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


def study_image(
    model: HookedVLM, pixels: np.ndarray, counterfactual: np.ndarray, dictionaries: Sequence[Placed], whole: bool
) -> tuple[AttributionGraph, dict[str, Any]]:
    """The answer's graph; its scores and node effects. `whole`: the full causal report.

    Resample ablation takes the same patient without the finding.
    """
    output = [Contrast(target())]
    batch = batch_of(model, pixels)
    frozen = freeze(model, batch, output)
    graph = build_graph(frozen, dictionaries, max_features=MAX_FEATURES)
    lab = Lab(model, batch, dictionaries, output, frozen=frozen)
    told = scores(graph)
    row: dict[str, Any] = {"score": float(lab.values[0]), "nodes": len(graph.nodes), "edges": graph.n_edges}
    row |= {"completeness": told.completeness, "replacement": told.replacement}
    if not whole:
        found, samples = node_effects(lab, graph, N_NODES)
        return graph, row | {"node_spearman": found, "samples": samples}
    other = Lab(model, batch_of(model, counterfactual), dictionaries, output)
    return graph, row | report(lab, graph, other=other, n_nodes=N_NODES, n_sources=16, n_watched=128).to_dict()


Placements = dict[str, Sequence[Placed]]


def where_it_looks(
    model: HookedVLM,
    pixels: np.ndarray,
    mask: np.ndarray,
    places: Placements,
    token: Output | None,
    answer: bool = True,
) -> dict[str, float]:
    """Concentration by output and by what stands in the graph. `token`: a token of a report; `answer`: the score."""
    batch = batch_of(model, pixels)
    asked: dict[str, tuple[ImageTextBatch, Output]] = {"answer": (batch, Contrast(target()))} if answer else {}
    if token is not None:
        asked["report token"] = (batch_without_prompt(batch), token)
    found: dict[str, float] = {}
    for name, (inputs, output) in asked.items():
        frozen = freeze(model, inputs, [output])
        for label, dictionaries in places.items():
            graph = build_graph(frozen, dictionaries, max_features=MAX_FEATURES)
            found |= named(f"{name}, {label}", concentration(graph, mask, model))
    return found


def batch_without_prompt(batch: ImageTextBatch) -> ImageTextBatch:
    """The image alone: outputs that bring their own prompt make one."""
    return ImageTextBatch(batch.pixel_values, ids=batch.ids)


def summary(values: Sequence[float], patients: Sequence[str]) -> dict[str, Any]:
    """Median over images with a patient bootstrap interval."""
    kept = np.isfinite(values)
    if kept.sum() < 3:
        return {"median": float("nan"), "ci95": (float("nan"), float("nan")), "n": int(kept.sum())}
    numbers = np.asarray(values)[kept]
    weights = PatientBootstrap.of(np.asarray(patients)[kept], draws=1000).weights
    draws = np.array([np.median(np.repeat(numbers, w.astype(int))) for w in weights])
    return {"median": float(np.median(numbers)), "ci95": percentile_interval(draws), "n": int(kept.sum())}


def collect(rows: Sequence[dict[str, Any]], patients: Sequence[str]) -> list[dict[str, Any]]:
    """One line for each number: median over images and its interval."""
    lines = []

    def line(name: str, pick: Callable[[dict[str, Any]], float]) -> None:
        values, owners = [], []
        for row, patient in zip(rows, patients, strict=True):
            try:
                values.append(float(pick(row)))
            except (KeyError, IndexError):
                continue
            owners.append(patient)
        if values:
            lines.append({"name": name} | summary(values, owners))

    for name in ("nodes", "completeness", "replacement"):
        line(name, lambda row, name=name: row[name])
    samples = dict.fromkeys(s for row in rows for s in row["node_spearman"])
    for sample in samples:
        for ranking in next(iter(rows[0]["node_spearman"].values())):
            line(
                f"Spearman with |effect|, {sample}: {ranking}",
                lambda row, s=sample, r=ranking: row["node_spearman"][s][r],
            )
    line("all held: ablation + edge, relative", lambda row: row["pairs"]["constrained_error"])
    for kind in ("direct", "total"):
        for statistic in ("pearson", "spearman", "sign", "sign_weighted"):
            line(
                f"features on features, {kind} effect: {statistic}", lambda row, k=kind, s=statistic: row["pairs"][k][s]
            )
    for distance in range(6):
        for statistic in ("pearson", "spearman"):
            line(
                f"total effect, {distance} layers between: {statistic}",
                lambda row, d=distance, s=statistic: row["pairs"]["by_distance"][d][s],
            )
    for name in ("cosine_stream", "nmse_stream", "cosine_mlp", "nmse_mlp"):
        line(f"one block on: {name}", lambda row, n=name: row["perturbation"][n])
    for i, which in enumerate(f"{a} ablation by {r}" for a in ("zero", "resample") for r in RANKED):
        for statistic in ("cpr", "cmd"):
            line(f"{statistic}, {which}", lambda row, i=i, s=statistic: row["curves"][i][s])
    line("free over frozen attention, top 10 together", lambda row: row["mediation"]["ratio_together"])
    line("share of images flagged attention-mediated", lambda row: float(row["mediation"]["flag"]))
    line("p, top 10 against matched random", lambda row: row["control"]["p"])
    line(
        "effect ratio, top 10 over matched random",
        lambda row: row["control"]["effect"] / row["control"]["random_median"],
    )
    for place in dict.fromkeys(key for row in rows for key in row.get("places", {})):
        line(f"mask over its area: {place}", lambda row, p=place: row["places"][p])
    return lines


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The study. Returns what is written."""
    from mechinterp.audit.dictionary import transcoders_of

    parser = argparse.ArgumentParser(prog="python -m benchmarks.graph_causal")
    parser.add_argument("model", help="phantom-clip, phantom-llava, or a twin of theirs")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument(
        "--reports", type=int, default=10, help="images with a full causal report; all have node effects"
    )
    parser.add_argument("--nulls", type=int, default=25, help="images of the random model and of attention alone")
    parser.add_argument("--first", type=int, default=0, help="leave out the images before this one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    start = time.perf_counter()
    model = HookedVLM.from_pretrained(args.model)
    dictionaries = transcoders_of(model)
    phantom = cohort(args.images)
    images, without, masks = phantom.render(), phantom.do(**{FINDING: 0}).render(), phantom.masks(FINDING)
    null = randomised(model)
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for i in progress(range(args.first, len(phantom)), f"{args.model}: graphs and interventions"):
        plain = batch_without_prompt(batch_of(model, images[i]))
        token = report_token(model, plain) if model.family == "llava" else None
        graph, row = study_image(model, images[i], without[i], dictionaries, whole=i < args.reports)
        row["places"] = named("answer, transcoders", concentration(graph, masks[i], model))
        if token is not None:
            shown: Placements = {"transcoders": dictionaries}
            row["places"] |= where_it_looks(model, images[i], masks[i], shown, token, answer=False)
        if i < args.nulls:
            row["places"] |= where_it_looks(model, images[i], masks[i], {"attention alone": ()}, token)
            random = where_it_looks(null, images[i], masks[i], {"attention alone": ()}, token)
            row["places"] |= {f"random weights: {name}": value for name, value in random.items()}
        rows.append(row | {"image": phantom.images[i], "patient": phantom.patients[i]})
        # written after every image: an hour of work is not lost to a stopped process
        found = {
            "name": f"graph-causal-{args.model}",
            "machine": machine(),
            "model": {"label": args.model, "sha256": model.sha256},
            "seconds": round(time.perf_counter() - start, 1),
            "settings": {"max_features": MAX_FEATURES, "n_nodes": N_NODES} | {k: vars(args)[k] for k in COUNTS},
            "images": len(rows),
            "anchor": ANCHOR,
            "summary": collect(rows, [r["patient"] for r in rows]),
            "rows": rows,
        }
        write_json(args.out / f"graph-causal-{args.model}.json", found)
    for entry in found["summary"]:
        low, high = entry["ci95"]
        print(f"{entry['name']:78} {entry['median']:9.3g}  [{low:.3g}, {high:.3g}]  n={entry['n']}")
    return found


if __name__ == "__main__":
    main()
