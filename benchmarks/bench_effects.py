"""`effects` against the loop that a TransformerLens user would write: one full forward per feature, with a hook."""

from __future__ import annotations

from typing import Any

import numpy as np
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
    """All features of each dictionary. The loop is timed on evenly spaced features and scaled to all of them."""
    n_images, n_timed, repeats = (8, 4, 1) if quick else (32, 16, 3)
    pixels = subject.images(n_images)
    return [row for it in subject.subjects(pixels) for row in _compare(*it, pixels, n_timed, repeats)]


def _compare(model: HookedVLM, placed: Placed, name: str, pixels: np.ndarray, n_timed: int, repeats: int) -> list[Row]:
    width = placed.dictionary.W_dec.shape[0]
    batch = model.prepare(pixels, subject.TARGETS)
    kept: dict[str, Any] = {}

    def ours() -> None:
        kept["ours"] = effects(model, placed, batch, subject.TARGETS)

    ours()  # warms both up, and says which features fire
    counts = kept["ours"].n_images()
    live = counts.nonzero()[:, 0]
    spaced = torch.linspace(0, 1, n_timed)
    half = n_timed // 2
    # half of the timed features are spread over all, half over those that fire, so that the comparison is not of zeros
    timed = (spaced[:half] * (width - 1)).long().tolist() + live[(spaced[half:] * (len(live) - 1)).long()].tolist()

    def peer() -> None:
        kept["peer"] = loop(model, placed, batch, timed)

    seconds = interleaved({"ours": ours, "peer": peer}, repeats)
    differ = float((kept["ours"].dense()[timed] - kept["peer"]).abs().max())
    share = len(kept["ours"].row) / (width * len(batch))
    case = f"{name}, {width} features at {placed.reads}, {len(batch)} images; {share:.0%} of the pairs fire"
    peers = {f"a full forward for each of {width} features": width, f"for the {len(live)} that fire": len(live)}
    rows = []
    for peer_name, n_features in peers.items():
        loop_seconds = seconds["peer"] / n_timed * n_features
        rows.append(Row(case, seconds["ours"], loop_seconds, peer_name, "s", loop_seconds / seconds["ours"], differ))
    return rows
