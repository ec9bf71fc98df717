"""How much of a planted circuit does a graph find, as the model and the dictionary get worse?

    python -m benchmarks.planted            (writes benchmarks/results/planted.json, .md and .png)
    python -m benchmarks.planted --quick

The circuit is known (graphs/planted), so nodes and edges can be scored by AUROC against it: influence of its nodes
above that of all other active features and patches, and the same for edges.

- superposition: the model has fewer dimensions than concepts, its MLPs stay their own transcoders without error. What
  falls is not the graph (its edges stay exact) but the circuit's own distinctness: neurons interfere.
- trained transcoders: the model is intact, the dictionary is a TopK transcoder trained on its activations, of several
  widths. Latents are matched one to one to neurons by the correlation of their activations; a neuron without a latent
  counts as missed, a latent without a neuron as outside of the circuit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.common import RESULTS, machine, write_json
from graphs.build import build_graph
from graphs.frozen import freeze
from graphs.nodes import NodeType, node_id
from graphs.planted import CLASSES, PlantedModel, plant, recovery, truth
from graphs.scores import scores
from graphs.targets import Logit
from mechinterp.progress import progress
from mechinterp.types import ImageTextBatch, Placed, Target
from saes.dictionary import SparseDictionary, TopK

WIDTHS = (96, 64, 48, 40, 32, 24, 16)
LATENTS = (64, 32, 24, 16, 8)
MATCH = 0.5  # correlation above which a latent stands for a neuron


def score_images(
    planted: PlantedModel,
    dictionaries: Sequence[Placed],
    batch: ImageTextBatch,
    names: dict[tuple[int, int], int] | None = None,
) -> dict[str, float]:
    """Mean scores over images and classes whose planted circuit is active."""
    rows = []
    for i in range(len(batch)):
        image = batch[i : i + 1]
        for name in CLASSES:
            known = truth(planted, image, name, ideal=True)
            if not known.nodes:
                continue
            frozen = freeze(planted.model, image, [Logit(Target(name, name))])
            graph = build_graph(frozen, dictionaries)
            mapped = None if names is None else _called(graph.nodes.ids, names)
            found = recovery(graph, known, mapped)
            told = scores(graph)
            share = found.missing / max(1, sum(".L" in n or ".patch." in n for n in known.nodes))
            rows.append((found.node_auroc, found.edge_auroc, share, told.replacement, told.completeness))
    mean = np.nanmean(np.array(rows), axis=0)
    keys = ("node_auroc", "edge_auroc", "missed", "replacement", "completeness")
    return {k: float(v) for k, v in zip(keys, mean, strict=True)} | {"graphs": len(rows)}


def _called(ids: Sequence[str], names: dict[tuple[int, int], int]) -> dict[str, str]:
    """Ids of latents to ids of the neurons that they stand for; all other nodes keep theirs."""
    found = {}
    for name in ids:
        if ".F" not in name:
            found[name] = name
            continue
        _, layer, pos, feature = name.split(".")
        neuron = names.get((int(layer[1:]), int(feature[1:])))
        if neuron is not None:
            found[name] = node_id(NodeType.FEATURE, "vision", int(layer[1:]), int(pos[1:]), neuron)
    return found


def trained(
    planted: PlantedModel, latents: int, k: int, steps: int, n_images: int, seed: int = 0
) -> tuple[list[Placed], dict[tuple[int, int], int], float]:
    """TopK transcoders of every MLP, which neuron each latent stands for, and the mean R2 over layers."""
    batch = planted.images(planted.random_amounts(n_images, seed=seed + 999))
    points = [str(site) for p in planted.dictionaries for site in (p.reads, p.writes)]
    with torch.no_grad():
        _, cache = planted.model.run_with_cache(batch, names_filter=points)
    placed, names, quality = [], {}, []
    for layer, own in enumerate(planted.dictionaries):
        x, y = cache[str(own.reads)].flatten(0, 1), cache[str(own.writes)].flatten(0, 1)
        dictionary, r2 = _fit(x, y, latents, k, steps, seed + layer)
        placed.append(Placed(dictionary, own.reads, own.writes))
        quality.append(r2)
        names |= {(layer, a): b for a, b in _matched(dictionary.encode(x), own.dictionary.encode(x)).items()}
    return placed, names, float(np.mean(quality))


def _fit(x: Tensor, y: Tensor, latents: int, k: int, steps: int, seed: int) -> tuple[SparseDictionary, float]:
    """A TopK transcoder by Adam on the squared error; rows without output are thinned out."""
    draws = torch.Generator().manual_seed(seed)
    live = y.norm(dim=1) > 1e-6
    rows = torch.cat([live.nonzero()[:, 0], (~live).nonzero()[:, 0][: int(live.sum())]])
    d = x.shape[1]
    W_dec = torch.nn.functional.normalize(torch.randn(latents, d, generator=draws), dim=1)
    start = (W_dec.T.clone(), W_dec, torch.zeros(latents), torch.zeros(d))
    dictionary = SparseDictionary(*start, TopK(min(k, latents)), centred=False)
    weights = [dictionary.W_enc, dictionary.W_dec, dictionary.b_enc, dictionary.b_dec]
    for weight in weights:
        weight.requires_grad_(True)
    optimiser = torch.optim.Adam(weights, lr=4e-3)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 4e-3 * min(1.0, 2 * (1 - step / steps))
        picked = rows[torch.randint(len(rows), (512,), generator=draws)]
        loss = (dictionary(x[picked]) - y[picked]).pow(2).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for weight in weights:
        weight.requires_grad_(False)
    left = (dictionary(x) - y).pow(2).sum() / (y - y.mean(0)).pow(2).sum()
    return dictionary, float(1 - left)


def _matched(latents: Tensor, neurons: Tensor) -> dict[int, int]:
    """One neuron for each latent, by correlation of activations, where it exceeds MATCH."""
    a, b = (v.double() - v.double().mean(0) for v in (latents, neurons))
    norms = a.norm(dim=0)[:, None] * b.norm(dim=0)[None]
    correlation = torch.where(norms > 0, a.T @ b / norms.clamp_min(1e-12), 0.0).numpy()
    rows, columns = linear_sum_assignment(-correlation)
    return {int(r): int(c) for r, c in zip(rows, columns, strict=True) if correlation[r, c] > MATCH}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, write and print. Returns what is written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planted")
    parser.add_argument("--quick", action="store_true", help="two points of each curve, few images")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    start = time.perf_counter()
    widths, latents = ((96, 16), (32, 8)) if args.quick else (WIDTHS, LATENTS)
    n_images, seeds, steps = (2, (0,), 150) if args.quick else (8, (0, 1, 2), 1500)
    rows: list[dict[str, Any]] = []
    for width in progress(widths, "superposition"):
        for seed in seeds:
            planted = plant(width=width, seed=seed)
            found = score_images(planted, planted.dictionaries, planted.images(planted.random_amounts(n_images, seed)))
            rows.append({"curve": "superposition", "at": width, "seed": seed, "r2": 1.0} | found)
    for width in progress(latents, "trained transcoders"):
        for seed in seeds:
            planted = plant(seed=seed)
            placed, names, r2 = trained(planted, width, 8, steps, 100 if args.quick else 600, seed)
            found = score_images(planted, placed, planted.images(planted.random_amounts(n_images, seed)), names)
            rows.append({"curve": "trained transcoders", "at": width, "seed": seed, "r2": r2} | found)
    concepts = len(plant().circuit.concepts)
    found = {
        "name": "planted",
        "machine": machine(),
        "seconds": round(time.perf_counter() - start, 1),
        "concepts": concepts,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "planted.json", found)
    table = render(rows, concepts)
    (args.out / "planted.md").write_text(table)
    draw(rows, concepts, args.out / "planted.png")
    print(table)
    return found


def _means(rows: list[dict[str, Any]], curve: str) -> dict[int, dict[str, tuple[float, float, float]]]:
    """Mean, least and largest over seeds of each number at each point of a curve."""
    points: dict[int, dict[str, tuple[float, float, float]]] = {}
    for at in dict.fromkeys(r["at"] for r in rows if r["curve"] == curve):
        mine = [r for r in rows if r["curve"] == curve and r["at"] == at]
        keys = ("node_auroc", "edge_auroc", "missed", "replacement", "r2")
        points[at] = {k: (float(np.mean(v := [r[k] for r in mine])), min(v), max(v)) for k in keys}
    return points


def render(rows: list[dict[str, Any]], concepts: int) -> str:
    """A Markdown table: mean over seeds, least and largest in brackets."""
    lines = [
        f"| curve | dimensions (of {concepts}) or latents | node AUROC | edge AUROC | missed | replacement | R2 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for curve in dict.fromkeys(r["curve"] for r in rows):
        for at, values in _means(rows, curve).items():
            cells = [f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in values.values()]
            lines.append(f"| {curve} | {at} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], concepts: int, path: Path) -> None:
    """AUROC curves with the range over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    labels = {"superposition": f"dimensions of the stream ({concepts} concepts)", "trained transcoders": "latents"}
    for axis, (curve, label) in zip(axes, labels.items(), strict=True):
        points = _means(rows, curve)
        for key, colour, name in (("node_auroc", "#c0392b", "nodes"), ("edge_auroc", "#2c5f8a", "edges")):
            mean, low, high = (np.array([p[key][i] for p in points.values()]) for i in range(3))
            axis.plot(list(points), mean, "o-", color=colour, label=name, markersize=4)
            axis.fill_between(list(points), low, high, color=colour, alpha=0.18, linewidth=0)
        axis.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
        axis.set_title(curve, loc="left", fontsize=10)
        axis.set_xlabel(label)
        axis.invert_xaxis()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("AUROC of the planted circuit")
    axes[0].legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
