"""Suppress what a graph holds responsible for a finding, on one phantom image, and draw what happens.

    python -m benchmarks.graph_suppress phantom-clip --image 0

The supernode: vision features below the last block, those with the largest total effect on the score of consolidation
beyond their mean effect on the scores of the other findings (`--own`: without that; then general features win).
Watched: features that the graph says should fall and rise, the score, and the scores of other findings. Beside each,
100 random supernodes that match in layer, kind of position, activation and decoder norm.

Writes graph-suppress-MODEL.json and .png to benchmarks/results.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, write_json
from benchmarks.graph_causal import FINDING, MAX_FEATURES, cohort, target
from graphs.build import build_graph
from graphs.causal.figure import draw_suppression
from graphs.causal.lab import Lab
from graphs.causal.suppression import predicted, suppress
from graphs.frozen import freeze
from graphs.influence import total_effect
from graphs.nodes import NodeType
from graphs.targets import Contrast
from mechinterp.data.phantom import prompts
from mechinterp.models import HookedVLM
from mechinterp.types import Target

OTHERS = ("atelectasis", "effusion", "nodule", "pneumothorax", "cardiomegaly", "pacemaker")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, write, draw, print."""
    from mechinterp.audit.dictionary import transcoders_of

    parser = argparse.ArgumentParser(prog="python -m benchmarks.graph_suppress")
    parser.add_argument("model", help="phantom-clip or its twin: a dual encoder scores several findings at once")
    parser.add_argument("--image", type=int, default=0, help="which of the phantom images with the finding")
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--own", action="store_true", help="rank by the effect on the finding alone")
    parser.add_argument("--factor", type=float, default=-1.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    model = HookedVLM.from_pretrained(args.model)
    dictionaries = transcoders_of(model)
    pixels = cohort(args.image + 1)[args.image].render() / 255.0
    targets = [target(), *(Target(name, *prompts(name)) for name in OTHERS)]
    batch = model.prepare(pixels, targets[:1])
    outputs = [Contrast(t) for t in targets]
    graph = build_graph(freeze(model, batch, outputs), dictionaries, max_features=MAX_FEATURES)
    halves = [k for k, output in enumerate(graph.outputs) if "image half" in output.name]
    effects = torch.stack([total_effect(graph, k) for k in halves])
    effect = effects[0] if args.own else effects[0] - effects[1:].mean(0)
    nodes = graph.nodes
    last = model.n_layers("vision") - 1
    ours = nodes.is_type(NodeType.FEATURE) & (nodes.tower == nodes.towers.index("vision")) & (nodes.layer < last)
    members = effect.masked_fill(~ours, 0.0).topk(args.members).indices.tolist()
    lab = Lab(model, batch, dictionaries, outputs)
    found = suppress(
        lab, graph, members, predicted(graph, members), name=f"{FINDING} supernode", factor=args.factor, n_random=100
    )
    args.out.mkdir(parents=True, exist_ok=True)
    named = {"model": args.model, "image": args.image, "member_ids": [nodes.ids[i] for i in members]}
    write_json(args.out / f"graph-suppress-{args.model}.json", named | found.to_dict())
    draw_suppression(found, args.out / f"graph-suppress-{args.model}.png")
    for row in found.measured:
        print(f"{row.name:16} {row.kind:10} {row.before:9.3f} -> {row.after:9.3f}   p {row.p:.3f}")
    return named | found.to_dict()


if __name__ == "__main__":
    main()
