"""`effects` against the loop that a TransformerLens user would write: one full forward per feature, with a hook."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import subject
from benchmarks.common import Row, interleaved
from mechinterp.interventions import effects
from mechinterp.models import HookedVLM
from mechinterp.types import ImageTextBatch, Placed

NAME = "effects"


@torch.no_grad()
def loop(model: HookedVLM, placed: Placed, batch: ImageTextBatch, features: list[int]) -> torch.Tensor:
    """Zero ablation, one full forward per feature over all images; the leanest hook that does it."""
    site, W_dec = str(placed.writes), placed.dictionary.W_dec
    clean = model.score(batch, subject.TARGETS)
    found = []
    for feature in features:

        def ablate(value: torch.Tensor, hook: Any, feature: int = feature) -> torch.Tensor:
            activation = placed.dictionary.encode(value)[..., feature : feature + 1]
            return value - activation * W_dec[feature]

        with model.hooks(fwd_hooks=[(site, ablate)]):
            found.append(model.score(batch, subject.TARGETS) - clean)
    return torch.stack(found)


def run(quick: bool = False) -> list[Row]:
    """All features of a dictionary at each of three late sites. The loop is timed on evenly spaced features, scaled."""
    n_images, n_timed, repeats = (16, 8, 1) if quick else (64, 24, 3)
    model, name = subject.model()
    pixels = subject.images(n_images)
    rows = []
    for layer in (4, 3, 2):
        placed, which = subject.dictionary(model, f"vision.blocks.{layer}.hook_resid_post", name, pixels)
        width = placed.dictionary.W_dec.shape[0]
        timed = torch.linspace(0, width - 1, n_timed).round().long().tolist()
        batch = model.prepare(pixels, subject.TARGETS)
        kept: dict[str, Any] = {}

        def ours(placed: Placed = placed, batch: ImageTextBatch = batch, kept: dict[str, Any] = kept) -> None:
            kept["ours"] = effects(model, placed, batch, subject.TARGETS)

        def peer(
            placed: Placed = placed, batch: ImageTextBatch = batch, kept: dict[str, Any] = kept, timed: list = timed
        ) -> None:
            kept["peer"] = loop(model, placed, batch, timed)

        seconds = interleaved({"ours": ours, "peer": peer}, repeats)
        differ = (kept["ours"].dense()[timed] - kept["peer"]).abs().max()
        firing = int((kept["ours"].n_images() > 0).sum())
        share = len(kept["ours"].row) / (width * n_images)
        peers = {
            f"one full forward for each of {width} features": width,
            f"the same for the {firing} features that fire": firing,
        }
        case = f"{width} features at {placed.reads}, {n_images} images; {name}, {which}; fires in {share:.0%} of pairs"
        for peer_name, n_features in peers.items():
            peer_seconds = seconds["peer"] / n_timed * n_features
            rows.append(
                Row(case, seconds["ours"], peer_seconds, peer_name, "s", peer_seconds / seconds["ours"], float(differ))
            )
    return rows
