"""Vision models without text: classifiers (ViT), whose class logits are outputs, and encoders (DINOv2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from graphs.frozen.blocks import frozen_blocks, frozen_norm
from graphs.frozen.capture import recording
from graphs.frozen.inputs import image_inputs, image_labels
from graphs.frozen.parts import Readout, Stack
from graphs.frozen.readouts import RowHead
from graphs.targets import Contrast, Logit
from mechinterp.models.heads import class_index, class_pair
from mechinterp.models.hooked import HookedVLM
from mechinterp.models.tables import Classifier
from mechinterp.models.wiring import find
from mechinterp.types import ImageTextBatch

__all__ = ["freeze_classes"]


def freeze_classes(
    model: HookedVLM, batch: ImageTextBatch, outputs: Sequence[Contrast | Logit]
) -> tuple[list[Stack], list[Readout]]:
    """The vision stack, and class logits of a classifier as readouts."""
    with recording(model, ("vision",)) as cache:
        found = model(batch)
    blocks = frozen_blocks(model, "vision", cache)
    stack = Stack("vision", blocks, image_inputs(model, batch.pixel_values[0]), False, image_labels(model))
    if not outputs or not isinstance(model.table.head, Classifier):
        return [stack], []
    norm = find(model.hf, model.table.towers["vision"].ln_final or "")
    last = model.hf.classifier
    bias = None if last.bias is None else last.bias.detach()
    head = RowHead(frozen_norm(norm, cache["vision.ln_final.hook_scale"]), 0, last.weight.detach(), bias)
    logits = found.logits[0].detach()
    readouts = []
    for output in outputs:
        direction = _direction(model, output, len(logits)).to(logits)
        seed, constant = head.pull(direction)
        kind = "contrast" if isinstance(output, Contrast) else "logit"
        value = float(direction.double() @ logits.double())
        readouts.append(Readout(output.target.name, kind, 0, seed, constant, value, 1 / len(outputs)))
    return [stack], readouts


def _direction(model: HookedVLM, output: Contrast | Logit, n: int) -> Float[Tensor, " class"]:
    """The output as a combination of class logits."""
    direction = torch.zeros(n)
    if isinstance(output, Logit):
        direction[class_index(model.hf, output.target)] = 1.0
        return direction - 1.0 / n if output.demeaned else direction
    index, other = class_pair(model.hf, output.target)
    direction[index] = 1.0
    if other is not None:
        direction[other] = -1.0
    return direction
