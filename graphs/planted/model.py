"""The planted circuit as an ordinary ViT classifier: hidden by rotations, with its MLPs as their own transcoders.

A ReLU MLP is a transcoder without error: `W_enc = W_in`, `W_dec = W_out`, biases alike. So every edge of the graph of
this model is a product of weights that were written down (`truth.py`).

What hides the circuit: concepts are random orthonormal directions of the stream, orthogonal to the ones vector, so
that LayerNorm's centring leaves them alone; neurons are shuffled among dead ones; each head works in a random basis.
LayerNorm's epsilon is so large, and its gain the square root of it, that its scale is 1 whatever the stream holds: what
is planted stays exact, and an edit of one path cannot reach another through the norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from graphs.planted.circuit import CLASSES, FINDINGS, Circuit, Head
from mechinterp.errors import UsageError
from mechinterp.models import HookedVLM
from mechinterp.models.loading import Processor
from mechinterp.models.preprocess import Preprocessor
from mechinterp.types import Dictionary, ImageTextBatch, Placed, Site

__all__ = ["GRID", "SCORE", "MLPTranscoder", "PlantedModel", "plant"]

GRID, PATCH, HEAD_WIDTH = 4, 8, 16
_EPS = 1e12
SCORE = 24.0  # attention score of "look there": e^-24 is nothing beside 1
_SPREAD = 0.2


class MLPTranscoder(nn.Module):
    """A ReLU MLP seen as a transcoder. The parameters are copies, in the layout of `mechinterp.types.Dictionary`."""

    def __init__(self, mlp: Any):
        super().__init__()
        first, second = mlp.fc1, mlp.fc2
        self.W_enc = nn.Parameter(first.weight.detach().T.clone(), requires_grad=False)
        self.b_enc = nn.Parameter(first.bias.detach().clone(), requires_grad=False)
        self.W_dec = nn.Parameter(second.weight.detach().T.clone(), requires_grad=False)
        self.b_dec = nn.Parameter(second.bias.detach().clone(), requires_grad=False)

    def encode(self, x: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest neuron"]:
        """Activations of the neurons."""
        return torch.relu(x @ self.W_enc + self.b_enc)

    def decode(self, feature_acts: Float[Tensor, "*rest neuron"]) -> Float[Tensor, "*rest d"]:
        """What the neurons write, and the output bias."""
        return feature_acts @ self.W_dec + self.b_dec


@dataclass(frozen=True)
class PlantedModel:
    """The model, its transcoders, and the key to them.

    Fields:
        directions: one row of the stream for each concept of the circuit.
        templates: one unit patch of pixels for each texture, orthonormal and without mean.
        columns: `columns[name]` is the (layer, index) at which a planted neuron stands.
    """

    model: HookedVLM
    circuit: Circuit
    dictionaries: tuple[Placed, ...]
    directions: Float[Tensor, "concept d"]
    templates: Float[Tensor, "texture height width"]
    columns: dict[str, tuple[int, int]]

    def images(self, amounts: Float[np.ndarray, "image texture row column"]) -> ImageTextBatch:
        """Images that hold `amounts` of each texture in each patch (up to about 1; 8-bit grey)."""
        if amounts.shape[1:] != (len(self.circuit.textures), GRID, GRID):
            raise UsageError(f"amounts of shape {amounts.shape}", hint="[image, texture, row, column]")
        # the preprocessor maps 0.5 to 0 and one unit of grey to two
        pixels = 0.5 + 0.5 * np.einsum("itrc,thw->irhcw", amounts, self.templates.numpy())
        size = GRID * PATCH
        return self.model.preprocess(pixels.reshape(-1, size, size).astype(np.float32))

    def amounts(self, batch: ImageTextBatch) -> Float[np.ndarray, "image texture row column"]:
        """How much of each texture the pixels of a batch hold, after their rounding to 8 bits."""
        grey = batch.pixel_values.double().mean(1).unflatten(1, (GRID, PATCH)).unflatten(3, (GRID, PATCH))
        return torch.einsum("irhcw,thw->itrc", grey, self.templates.double()).numpy()

    def random_amounts(
        self, n: int, seed: int = 0, rate: float = 0.12
    ) -> Float[np.ndarray, "image texture row column"]:
        """Random images: each finding is in two patches of half the images; distractors are in any patch at `rate`.

        The amounts are such that lesion and border together, and neither alone, reach the conjunction's threshold.
        """
        draws = np.random.default_rng(seed)
        shape = (n, len(self.circuit.textures), GRID, GRID)
        amounts = np.where(draws.random(shape) < rate, draws.uniform(0.5, 1.0, shape), 0.0).reshape(*shape[:2], -1)
        for image in amounts[:, : len(FINDINGS)]:
            for patches in image:
                patches[:] = 0.0
                if draws.random() < 0.5:
                    patches[draws.choice(GRID * GRID, 2, replace=False)] = draws.uniform(0.5, 0.8, 2)
        return amounts.reshape(shape)


def plant(
    circuit: Circuit | None = None,
    *,
    width: int = 96,
    seed: int = 0,
    spare: int = 16,
    dtype: torch.dtype = torch.float32,
) -> PlantedModel:
    """Build the model. With `width` below the number of concepts + 1 the concepts share dimensions (superposition).

    Args:
        circuit: what to plant.
        width: of the residual stream.
        seed: of the rotations, the shuffle and the spare neurons.
        spare: how many dead neurons each block has besides the planted ones.
    """
    from transformers import ViTConfig, ViTForImageClassification

    circuit = circuit or Circuit()
    draws = torch.Generator().manual_seed(seed)
    directions = _directions(len(circuit.concepts), width, draws)
    hidden = max(len(circuit.neurons_of(layer)) for layer in range(circuit.layers)) + spare
    config: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": circuit.layers,
        "num_attention_heads": len(circuit.heads),
        "head_dim": HEAD_WIDTH,
        "intermediate_size": hidden,
        "hidden_act": "relu",
        "image_size": GRID * PATCH,
        "patch_size": PATCH,
        "layer_norm_eps": _EPS,
        "id2label": dict(enumerate(CLASSES)),
        "label2id": {name: i for i, name in enumerate(CLASSES)},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf: Any = ViTForImageClassification(ViTConfig(**config)).double().eval().requires_grad_(False)
    templates = _templates(len(circuit.textures))
    columns = _write(hf, circuit, directions, templates, draws)
    hf = hf.to(dtype)
    size = GRID * PATCH
    processor = Processor(Preprocessor((size, size), None, 2, 1 / 255, (0.5,) * 3, (0.5,) * 3))
    model = HookedVLM(hf, processor, name="planted")
    placed = tuple(
        Placed(
            MLPTranscoder(block.mlp),
            Site("vision", layer, "ln2.hook_normalized"),
            Site("vision", layer, "hook_mlp_out"),
        )
        for layer, block in enumerate(model.blocks("vision"))
    )
    assert all(isinstance(p.dictionary, Dictionary) for p in placed)
    return PlantedModel(model, circuit, placed, directions, templates, columns)


def _directions(n: int, width: int, draws: torch.Generator) -> Float[Tensor, "concept d"]:
    """Unit directions orthogonal to the ones vector; orthonormal where they fit.

    In superposition the first two (class token, patch) stay orthogonal to all others, so that attention stays as it is.
    """
    ones = torch.ones(width, 1, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([ones, torch.randn(width, width - 1, generator=draws, dtype=torch.float64)], 1))[
        0
    ]
    basis = basis[:, 1:].T  # the complement of ones, in a random rotation
    if n <= len(basis):
        return basis[:n].contiguous()
    if len(basis) < 4:
        raise UsageError(f"a stream of width {width}", hint="give at least 5")
    shared = torch.randn(n - 2, len(basis) - 2, generator=draws, dtype=torch.float64)
    shared = shared / shared.norm(dim=1, keepdim=True)
    return torch.cat([basis[:2], shared @ basis[2:]])


def _templates(n: int) -> Float[Tensor, "texture height width"]:
    """Products of cosines: orthonormal, without mean, at most a quarter in size."""
    grid = (torch.arange(PATCH, dtype=torch.float64) + 0.5) * torch.pi / PATCH
    waves = torch.stack([torch.cos(k * grid) for k in range(PATCH)])
    waves = waves / waves.norm(dim=1, keepdim=True)
    pairs = sorted(((a, b) for a in range(PATCH) for b in range(PATCH) if a + b), key=lambda p: (p[0] + p[1], p))
    return torch.stack([torch.outer(waves[a], waves[b]) for a, b in pairs[:n]])


def _write(
    hf: Any, circuit: Circuit, directions: Tensor, templates: Tensor, draws: torch.Generator
) -> dict[str, tuple[int, int]]:
    """Set every weight. Returns where the neurons stand."""
    row = {name: directions[i] for i, name in enumerate(circuit.concepts)}
    for parameter in hf.parameters():
        parameter.zero_()
    for module in hf.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(_EPS**0.5)
    embeddings = hf.vit.embeddings
    conv = embeddings.patch_embeddings.projection.weight
    textures = torch.stack([row[t] for t in circuit.textures])
    conv.copy_((torch.einsum("td,thw->dhw", textures, templates) / 3)[:, None].expand_as(conv))
    embeddings.cls_token[0, 0] = row["is class token"]
    embeddings.position_embeddings[0, 1:] = row["is patch"]
    columns: dict[str, tuple[int, int]] = {}
    blocks = hf.vit.layers if hasattr(hf.vit, "layers") else hf.vit.encoder.layer
    for layer, block in enumerate(blocks):
        columns |= _write_mlp(block.mlp, circuit, layer, row, draws)
        for head in circuit.heads:
            if head.layer == layer:
                _write_head(block.attention, head, row, draws)
    for index, name in enumerate(CLASSES):
        hf.classifier.weight[index] = row[f"logit {name}"]
    return columns


def _write_mlp(
    mlp: Any, circuit: Circuit, layer: int, row: dict[str, Tensor], draws: torch.Generator
) -> dict[str, tuple[int, int]]:
    neurons = circuit.neurons_of(layer)
    places = torch.randperm(len(mlp.fc1.bias), generator=draws).tolist()
    for neuron, place in zip(neurons, places, strict=False):
        mlp.fc1.weight[place] = sum(w * row[c] for c, w in neuron.reads.items())
        mlp.fc1.bias[place] = neuron.bias
        mlp.fc2.weight[:, place] = sum(w * row[c] for c, w in neuron.writes.items())
    dead = places[len(neurons) :]
    width = mlp.fc1.weight.shape[1]
    mlp.fc1.weight[dead] = _SPREAD * torch.randn(len(dead), width, generator=draws, dtype=torch.float64) / width**0.5
    mlp.fc1.bias[dead] = -5.0
    mlp.fc2.weight[:, dead] = torch.randn(width, len(dead), generator=draws, dtype=torch.float64) / width**0.5
    return {n.name: (layer, place) for n, place in zip(neurons, places, strict=False)}


def _write_head(attention: Any, head: Head, row: dict[str, Tensor], draws: torch.Generator) -> None:
    """Queries and keys say "class token looks at patches, patches look at the class token"; OV moves the concepts."""
    rows = slice(head.index * HEAD_WIDTH, (head.index + 1) * HEAD_WIDTH)
    turn = torch.linalg.qr(torch.randn(HEAD_WIDTH, HEAD_WIDTH, generator=draws, dtype=torch.float64))[0]
    size = (SCORE * HEAD_WIDTH**0.5) ** 0.5
    query, key, value, out = (torch.zeros(HEAD_WIDTH, len(row["is patch"]), dtype=torch.float64) for _ in range(4))
    query[0], query[1] = size * row["is class token"], size * row["is patch"]
    key[0], key[1] = size * row["is patch"], size * row["is class token"]
    if head.follows is not None:
        key[0] += head.sharpness * HEAD_WIDTH**0.5 / size * row[head.follows]
    for place, (read, (written, gain)) in enumerate(head.moves.items()):
        value[place % HEAD_WIDTH] += row[read]
        out[place % HEAD_WIDTH] += gain * row[written]
    attention.q_proj.weight[rows], attention.k_proj.weight[rows] = turn @ query, turn @ key
    attention.v_proj.weight[rows] = turn @ value
    attention.o_proj.weight[:, rows] = (turn @ out).T
