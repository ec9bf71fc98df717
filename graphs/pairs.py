"""A cosine as a matrix: every image source against every text source, each pair with its share of the similarity.

`s = scale f_I . f_T / (|f_I| |f_T|) + bias`. With lengths, patterns and norm scales held, `f_I = sum_i c_i` over the
sources of the image tower and `f_T = sum_j c_j` over those of the text tower, so that
`M_ij = scale c_i . c_j / (|f_I| |f_T|)` sums to `s`. Its margins are the direct edges of the two halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from graphs.certificate import LIMITS, CertificateError
from graphs.frozen.capture import in_dtype, recording
from graphs.frozen.dual import _image_head, _text_head
from graphs.frozen.freezing import freeze
from graphs.frozen.parts import Readout
from graphs.frozen.readouts import Head
from graphs.layout import Layout
from graphs.replace import Replacement
from graphs.sweep import Sweep
from graphs.targets import Similarity
from mechinterp.errors import UsageError
from mechinterp.models.hooked import HookedVLM
from mechinterp.models.tables import Dual
from mechinterp.types import ImageTextBatch, Placed, Target

__all__ = ["CONSTANT", "PairMatrix", "pair_matrix"]

CONSTANT = "constant"
"""Row and column of what the final norm and the projection add by themselves (and of SigLIP's logit bias)."""


@dataclass(frozen=True, eq=False)
class PairMatrix:
    """`values[i, j]`: the part of `similarity` that image source `image[i]` and text source `text[j]` make together."""

    values: Float[Tensor, "image text"]
    image: tuple[str, ...]
    text: tuple[str, ...]
    similarity: float

    def strongest(self, n: int = 10) -> list[tuple[str, str, float]]:
        """The `n` largest pairs by absolute value."""
        flat = self.values.flatten()
        picked = flat.abs().topk(min(n, len(flat))).indices.tolist()
        return [(self.image[i // len(self.text)], self.text[i % len(self.text)], float(flat[i])) for i in picked]


@torch.no_grad()
def pair_matrix(
    model: HookedVLM,
    batch: ImageTextBatch,
    target: Target,
    dictionaries: Sequence[Placed],
    dtype: torch.dtype = torch.float32,
) -> PairMatrix:
    """The pairs of the similarity of one image with `target.positive`.

    Raises UsageError for a model that is no dual encoder, CertificateError when the pairs do not sum to the model's own
    similarity.
    """
    if not isinstance(model.table.head, Dual):
        raise UsageError(f"{model.family} has no similarity", where="model", hint="take a CLIP or SigLIP model")
    frozen = freeze(model, batch, [Similarity(target)], dtype)
    similarity = frozen.readouts[0].value
    model = in_dtype(model, dtype)
    with recording(model, ("vision", "text")) as cache:
        image = model.encode_image(batch)[0]
        seen = dict(cache)
        text = model.encode_text([target.positive])[0]
        read = dict(cache)
    readouts = [*_embedding(0, _image_head(model, seen), image), *_embedding(1, _text_head(model, read), text)]
    replacement = Replacement(replace(frozen, readouts=tuple(readouts)), dictionaries)
    layout = Layout(replacement)
    sources = torch.zeros(len(layout.nodes), len(readouts), dtype=dtype)
    for nodes, edges in Sweep(replacement, layout).rows(torch.arange(layout.outputs, len(layout.nodes))):
        sources[:, nodes - layout.outputs] = edges
    hf: Any = model.hf
    factor = float(hf.logit_scale.detach().double().exp()) / float(image.norm() * text.norm())
    halves = []
    for stack, (start, stop) in enumerate(((0, len(image)), (len(image), len(readouts)))):
        mine = (layout.stack_of[: layout.outputs] == stack).nonzero()[:, 0]
        constant = torch.tensor([[r.constant for r in readouts[start:stop]]], dtype=dtype)
        names = (*(layout.nodes.ids[i] for i in mine.tolist()), CONSTANT)
        halves.append((names, torch.cat([sources[mine, start:stop], constant])))
    (image_ids, c_image), (text_ids, c_text) = halves
    values = factor * c_image @ c_text.T
    if hasattr(hf, "logit_bias"):
        values[-1, -1] += float(hf.logit_bias.detach())
    found, limit = float(values.double().sum()), LIMITS[str(dtype).removeprefix("torch.")]
    if not abs(found - similarity) <= limit * max(abs(similarity), float(hf.logit_scale.detach().exp())):
        raise CertificateError(f"the pairs sum to {found:.9g}, the model says {similarity:.9g}", where=target.name)
    return PairMatrix(values, image_ids, text_ids, similarity)


def _embedding(stack: int, head: Head, vector: Float[Tensor, " d_out"]) -> list[Readout]:
    """Every dimension of an embedding as an output."""
    found = []
    for k, direction in enumerate(torch.eye(len(vector), dtype=vector.dtype)):
        seed, constant = head.pull(direction)
        found.append(Readout(f"dimension {k}", "embedding", stack, seed, constant, float(vector[k])))
    return found
