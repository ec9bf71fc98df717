"""The attribution graph of an image: for `mechinterp graph`, and for the graph section of an audit."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from mechinterp.audit.asking import check_texts, target_of
from mechinterp.audit.dictionary import transcoders_of
from mechinterp.audit.feature_names import stored_names
from mechinterp.errors import UsageError
from mechinterp.models import HookedVLM
from mechinterp.models.tables import Dual, Features, Generative
from mechinterp.types import ImageTextBatch, Placed, Target

if TYPE_CHECKING:
    from graphs.graph import AttributionGraph
    from graphs.replace import Mode
    from graphs.targets import Output
    from mechinterp.audit.evidence import Evidence
    from mechinterp.data import ImageData

__all__ = ["ImageGraph", "asked_for", "graph_of", "graph_section", "output_of", "seen_by", "target_of"]

BUDGET = 1500  # features whose causes are computed: the most influential; the others stay as unexplained sources
EFFECTS = 100  # features ablated, for each image of an audit
IMAGES = 3
BOXES = 40  # features drawn in the report


@dataclass(frozen=True, eq=False)
class ImageGraph:
    """The graph of one image, whole and pruned, and what is needed to intervene on it."""

    model: HookedVLM
    batch: ImageTextBatch
    target: Target
    output: Output
    dictionaries: Sequence[Placed]
    frozen: Any
    whole: AttributionGraph
    pruned: AttributionGraph
    image: Float[np.ndarray, "height width"]


def graph_of(
    model: HookedVLM,
    pixels: Float[np.ndarray, "height width"],
    target: Target,
    dictionaries: Sequence[Placed],
    name: str = "image",
    max_features: int | None = BUDGET,
    node: float = 0.8,
    edge: float = 0.98,
    mode: Mode = "transcoder",
    output: Output | None = None,
) -> ImageGraph:
    """Trace `target` on one image.

    Args:
        pixels: grey, in [0, 1], as read.
        dictionaries: transcoders of the model's MLPs (blocks without one have only errors), or SAEs of the stream.
        name: of the image, in the graph's record.
        max_features: budget of features whose causes are computed, best first; None for all.
        node, edge: shares of the influence that pruning keeps.
        mode: what the dictionaries are.
        output: what is explained; None for the score of `target`.

    Raises UsageError for a model that scores nothing, CertificateError when the graph does not add up.
    """
    from graphs.build import build_graph
    from graphs.frozen import freeze
    from graphs.prune import prune

    if isinstance(model.table.head, Features):
        raise UsageError(f"a {model.family} model scores nothing", where="graph", hint="trace a feature from Python")
    batch = model.prepare(pixels[None], [target], ids=(name,))
    output = output or output_of(model, target)
    frozen = freeze(model, batch, [output])
    whole = build_graph(frozen, dictionaries, max_features=max_features, mode=mode)
    pruned, image = prune(whole, node, edge), seen_by(model, batch)
    return ImageGraph(model, batch, target, output, dictionaries, frozen, whole, pruned, image)


def output_of(model: HookedVLM, target: Target) -> Output:
    """The output that `model.score` reads for a target: its contrast, or a similarity with one caption alone."""
    from graphs.targets import Contrast, Similarity

    alone = isinstance(model.table.head, Dual) and target.negative is None
    return Similarity(target) if alone else Contrast(target)


def asked_for(model: HookedVLM, text: str, against: str | None = None) -> tuple[Target, Output]:
    """The target and the output of `--target TEXT [--against TEXT]`: `target_of` and `output_of`, or a prompt set.

    Several captions in `against`, separated by ";", are a set with the target's own: a dual encoder's image is then
    explained against the mean of the set (`graphs.targets.SetContrast`), and the target stands alone. Raises UsageError
    for a set of a generative model.
    """
    from graphs.targets import SetContrast

    parts = [part.strip() for part in (against or "").split(";")]
    if len(parts) > 1 and isinstance(model.table.head, Dual):
        check_texts(model, [text, *parts], "--target or --against")
        target = Target(text, text)
        return target, SetContrast(target, tuple(parts))
    if len(parts) > 1 and isinstance(model.table.head, Generative):
        hint = "take a CLIP or SigLIP model, or one text"
        raise UsageError(f"a {model.family} model has no captions to hold against", where="--against", hint=hint)
    target = target_of(model, text, against)
    return target, output_of(model, target)


def seen_by(model: HookedVLM, batch: ImageTextBatch) -> Float[np.ndarray, "height width"]:
    """The first image of a batch as the model sees it: cropped, grey, in [0, 1]."""
    processor = model.image_processor
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (processor.mean, processor.std))
    grey = (batch.pixel_values[0].float().cpu() * std + mean).mean(0)
    return grey.clamp(0, 1).numpy()


def graph_section(
    model: HookedVLM, data: ImageData, target: Target, evidence: Evidence, seed: int
) -> tuple[dict[str, Any], bytes] | str:
    """The record and the picture for an audit: graphs of the test images with the target that score highest.

    The record describes the first image's graph; `free_spearman` is the median over `IMAGES` images of the rank
    correlation of influence with what ablating a feature does to the score, nothing held. Where there can be none, why:
    the model scores nothing, no transcoder is stored, or no test image with the target may be shown.
    """
    from graphs.causal.lab import Lab
    from graphs.causal.ranking import node_effects
    from graphs.draw.png import figure_of

    transcoders = transcoders_of(model)
    chosen = _rows(evidence, data)
    if isinstance(model.table.head, Features):
        return f"a {model.family} model scores nothing, so there is no score to explain"
    if not transcoders:
        return "no transcoder is stored for this model's MLPs"
    if not chosen:
        return f"no test image with {target.name} may be shown"
    made, shown = [], None
    for place, row in enumerate(chosen):
        graph = graph_of(model, data.pixels([row])[0], target, transcoders, name=data.images[row])
        lab = Lab(model, graph.batch, transcoders, [output_of(model, target)], graph.frozen)
        found, sizes = node_effects(lab, graph.whole, EFFECTS, seed)
        made.append(_numbers(graph, found["active"], sizes["active"]))
        shown = graph if place == 0 else shown
    assert shown is not None
    first = made[0]
    values = [row["free_spearman"] for row in made if row["free_spearman"] is not None]
    record = {
        **first,
        "free_spearman": float(np.median(values)) if values else None,
        "effects": EFFECTS,
        "anchor_spearman": 0.72,
        "images": made,
    }
    drawn = figure_of(shown.pruned, shown.image, stored_names(model), most=BOXES)
    record |= {"lines_drawn": len(drawn.scene.lines), "flow_drawn": drawn.scene.line_share}
    picture = io.BytesIO()
    drawn.figure.savefig(picture, format="png", dpi=110, metadata={"Software": None}, facecolor="white")
    return record, picture.getvalue()


def _rows(evidence: Evidence, data: ImageData) -> list[int]:
    """Images of test patients with the target, the highest scores first, one a patient, that may be shown."""
    order = np.argsort(-evidence.score, kind="stable")
    rows: list[int] = []
    patients: set[str] = set()
    for i in order:
        row, patient = int(evidence.rows[i]), str(evidence.patients[i])
        if evidence.test[i] and evidence.labels[i] == 1 and data.may_show[row] and patient not in patients:
            rows.append(row)
            patients.add(patient)
        if len(rows) == IMAGES:
            break
    return rows


def _numbers(graph: ImageGraph, spearman: dict[str, float], effects: int) -> dict[str, Any]:
    """One image's row."""
    scores = graph.pruned.meta["scores"]
    ends = scores["influence_by_type"]
    value = spearman["influence"]
    return {
        "image": graph.batch.ids[0],
        "nodes": len(graph.pruned.nodes),
        "edges": graph.pruned.n_edges,
        "nodes_before_pruning": len(graph.whole.nodes),
        "edges_before_pruning": graph.whole.n_edges,
        "completeness": scores["completeness"],
        "completeness_counting_inputs": scores["completeness_circuit_tracer"],
        "replacement": scores["replacement"],
        "error_share": ends["error"],
        "max_relative_residual": graph.whole.meta["max_relative_residual"],
        "free_spearman": value if np.isfinite(value) else None,
        "free_spearman_activation": spearman["activation"],
        "free_spearman_gradient": spearman["gradient x activation"],
        "ablated": effects,
    }
