"""Pictures for the page of a graph: the images in which its features fire most, with where they fire."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.models import HookedVLM
from mechinterp.pages.heat import SMALL, heat_picture
from mechinterp.types import FeatureId, ImageTextBatch, Placed, Target

if TYPE_CHECKING:
    from graphs.draw.html import Gallery
    from graphs.graph import AttributionGraph
    from mechinterp.data import ImageData

__all__ = ["gallery_of"]

IMAGES = 96  # looked through; on two cores about two seconds, rendering included
FEATURES = 60  # the most influential ones get pictures: the page stays near one megabyte
EACH = 4
BATCH = 32


def gallery_of(
    model: HookedVLM,
    graph: AttributionGraph,
    dictionaries: Sequence[Placed],
    target: Target,
    data: ImageData | None = None,
    seed: int = 0,
) -> Gallery:
    """The `EACH` strongest of `IMAGES` images for each of the `FEATURES` most influential features that see the image.

    Args:
        graph: best pruned.
        dictionaries: of the graph.
        target: what a generative model is asked meanwhile.
        data: where images are taken from, at most one a patient and only what may be shown; default a phantom, and
            then the captions say that it is one.
        seed: which images.

    Returns JPEGs with captions (image, activation as a share of the largest) by feature
    (`vision.blocks.2.hook_mlp_out:301`). Features that fire in none of the images are not in it, nor those of a text
    tower that sees no image.
    """
    pixels, names = _images(data, seed)
    wanted = _wanted(graph, dictionaries, ("vision", "text") if model.family in ("llava", "gemma3") else ("vision",))
    if not len(pixels) or not wanted:
        return {}
    strengths, heats = _observed(model, pixels, names, target, wanted)
    owner = model.grid(*pixels[0].shape).cpu().numpy()
    owner = np.where(owner >= 0, owner - (model.patch_tokens().start or 0), -1)
    gallery = {}
    for (placed, features), strength, heat in zip(wanted, strengths, heats, strict=True):
        for column, feature in enumerate(features):
            order = np.argsort(-strength[:, column], kind="stable")[:EACH]
            order = order[strength[order, column] > 0]
            largest, peak = float(strength[:, column].max()), float(heat[order, :, column].max(initial=0))
            gallery[str(FeatureId(placed.writes, feature))] = [
                (
                    heat_picture(pixels[i], heat[i, :, column].reshape(model.grid_shape), peak, owner, side=SMALL),
                    f"{names[i]}, {100 * strength[i, column] / largest:.0f} %",
                )
                for i in order.tolist()
            ]
    return {key: shots for key, shots in gallery.items() if shots}


Wanted = Sequence[tuple[Placed, list[int]]]


def _images(data: ImageData | None, seed: int) -> tuple[Float[np.ndarray, "n height width"], tuple[str, ...]]:
    """Images in [0, 1] of one size, and their names."""
    if data is None:
        from mechinterp.data.phantom import Phantom

        drawn = Phantom.sample(IMAGES, seed=10_000 + seed)
        return drawn.render() / np.float32(255), tuple(f"synthetic phantom {Path(name).stem}" for name in drawn.images)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(data.may_show))
    first = np.unique(np.asarray(data.patients)[order], return_index=True)[1]
    rows = order[np.sort(first)][:IMAGES]
    if not len(rows):
        return np.zeros((0, 1, 1), np.float32), ()
    pixels = data.pixels(rows)
    alike = [i for i, picture in enumerate(pixels) if picture.shape == pixels[0].shape]
    return np.stack([pixels[i] for i in alike]), tuple(data.images[int(rows[i])] for i in alike)


def _wanted(graph: AttributionGraph, dictionaries: Sequence[Placed], towers: tuple[str, ...]) -> Wanted:
    """The most influential features of towers that see the image, by dictionary."""
    from graphs.nodes import NodeType

    nodes, sums = graph.nodes, {}
    for i in nodes.is_type(NodeType.FEATURE).nonzero()[:, 0].tolist():
        key = (nodes.towers[int(nodes.tower[i])], int(nodes.layer[i]), int(nodes.feature[i]))
        sums[key] = sums.get(key, 0.0) + float(nodes.influence[i])
    best = sorted((key for key in sums if key[0] in towers), key=lambda key: -sums[key])[:FEATURES]
    found = []
    for placed in dictionaries:
        mine = sorted(f for tower, layer, f in best if (tower, layer) == (placed.writes.tower, placed.writes.layer))
        if mine:
            found.append((placed, mine))
    return found


@torch.no_grad()
def _observed(
    model: HookedVLM,
    pixels: Float[np.ndarray, "n height width"],
    names: tuple[str, ...],
    target: Target,
    wanted: Wanted,
) -> tuple[list[Float[np.ndarray, "n f"]], list[Float[np.ndarray, "n patch f"]]]:
    """For each dictionary: the largest activation over all tokens, and the activation at each patch."""
    from saes.gallery.observe import patch_positions

    asks = any(placed.reads.tower == "text" for placed, _ in wanted)
    strengths, heats = [[] for _ in wanted], [[] for _ in wanted]
    for start in range(0, len(pixels), BATCH):
        some = slice(start, start + BATCH)
        batch = model.prepare(pixels[some], [target], ids=names[some])
        seen = _values(model, batch, wanted, [target] if asks else [])
        for at, ((placed, features), value) in enumerate(zip(wanted, seen, strict=True)):
            acts = placed.dictionary.encode(value.to(placed.dictionary.W_enc.dtype))[..., features].float().cpu()
            where = patch_positions(model, placed.reads, value.shape[1], batch)
            patches = acts.new_zeros(len(acts), int(np.prod(model.grid_shape)), len(features))
            strengths[at].append(acts.amax(1).numpy())
            heats[at].append((patches if where is None else acts[:, where]).numpy())
    return [np.concatenate(parts) for parts in strengths], [np.concatenate(parts) for parts in heats]


def _values(model: HookedVLM, batch: ImageTextBatch, wanted: Wanted, asked: list[Target]) -> list[Tensor]:
    """What each dictionary reads, from one forward pass."""
    seen: dict[str, Tensor] = {}
    sites = dict.fromkeys(str(placed.reads) for placed, _ in wanted)

    def keep(value: Tensor, hook: torch.nn.Module) -> None:
        seen[str(hook.name)] = value

    with model.hooks(fwd_hooks=[(site, keep) for site in sites]):
        if asked:
            model.score(batch, asked)
        else:
            model.encode_image(batch)
    return [seen[str(placed.reads)] for placed, _ in wanted]
