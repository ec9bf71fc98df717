"""Are attribution graphs true of the models that ship? Interventions on phantom images.

    python -m benchmarks.graph_causal phantom-clip --images 50
    python -m benchmarks.graph_causal phantom-llava --images 50

For each image with a consolidation, seen by no training: the graph of the consolidation score, and

- Spearman of node influence against |change of the score| by free ablation, beside simpler predictions, over a random
  sample of active features with influence, and over the features of the pruned graph (median over images, interval by
  bootstrap over patients; anchor 0.72, Ameisen et al. 2025);
- effects of features on features against edges and total effects, by layer distance as well; perturbations one block
  on, attention mediation, matched random features, and the faithfulness curve of the ranking.

`benchmarks.graph_lesions` asks where on the image the influence lies.

Writes benchmarks/results/graph-causal-MODEL.json and prints the table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, machine, write_json
from graphs.build import build_graph
from graphs.causal.lab import Lab
from graphs.causal.ranking import node_effects
from graphs.causal.reporting import RANKED, report
from graphs.frozen import freeze
from graphs.scores import scores
from graphs.targets import Contrast
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
COUNTS = ("images", "reports", "seed")


def cohort(n: int, seed: int = SEED) -> Phantom:
    """`n` phantom images with the finding, of unseen patients."""
    drawn = Phantom.sample(8 * n, seed=seed)
    return drawn[np.flatnonzero(drawn.factors[FINDING].to_numpy() == 1)[:n]]


def target() -> Target:
    """The finding as a target of both families."""
    return Target(FINDING, *prompts(FINDING))


def batch_of(model: HookedVLM, pixels: np.ndarray) -> ImageTextBatch:
    """One image, ready."""
    return model.prepare(pixels[None] / 255.0, [target()])


def study_image(
    model: HookedVLM, pixels: np.ndarray, counterfactual: np.ndarray, dictionaries: Sequence[Placed], whole: bool
) -> dict[str, Any]:
    """Scores and node effects of the answer's graph. `whole`: the full causal report.

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
        return row | {"node_spearman": found, "samples": samples}
    other = Lab(model, batch_of(model, counterfactual), dictionaries, output)
    return row | report(lab, graph, other=other, n_nodes=N_NODES, n_sources=16, n_watched=128).to_dict()


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
    distances = sorted({d for row in rows if "pairs" in row for d in row["pairs"]["by_distance"]})
    for kind, key in (("direct", "direct_by_distance"), ("total", "by_distance")):
        for distance in distances:
            for statistic in ("pearson", "spearman", "sign"):
                line(
                    f"{kind} effect, layer distance {distance}: {statistic}",
                    lambda row, k=key, d=distance, s=statistic: row["pairs"][k][d][s],
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
    parser.add_argument("--seed", type=int, default=SEED, help="of the images; another one for development")
    parser.add_argument("--first", type=int, default=0, help="leave out the images before this one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    start = time.perf_counter()
    model = HookedVLM.from_pretrained(args.model)
    dictionaries = transcoders_of(model)
    phantom = cohort(args.images, args.seed)
    images, without = phantom.render(), phantom.do(**{FINDING: 0}).render()
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for i in progress(range(args.first, len(phantom)), f"{args.model}: graphs and interventions"):
        row = study_image(model, images[i], without[i], dictionaries, whole=i < args.reports)
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
