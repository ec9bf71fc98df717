"""A language model with random weights and sparse transcoders, on disk for both sides of `bench_graph`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graphs.frozen.lens import from_transformer_lens
from graphs.frozen.parts import FrozenPass
from graphs.targets import TokenLogit
from mechinterp.types import Placed, Site
from saes.dictionary import JumpReLU, SparseDictionary

VOCABULARY, WIDTH = 512, 1024


@dataclass(frozen=True)
class Shape:
    """What is built. `n_features` is how many transcoder features are active, over all layers and positions."""

    layers: int
    d_model: int
    d_head: int
    positions: int
    n_features: int
    causal: bool = True
    n_targets: int = 5

    def __str__(self) -> str:
        way = "causal" if self.causal else "bidirectional"
        return f"L{self.layers} d{self.d_model} P{self.positions} {way}"

    def config(self) -> dict[str, Any]:
        """For HookedTransformerConfig: pre-norm blocks with learned positions and biases, as in a CLIP tower."""
        return {
            "n_layers": self.layers,
            "d_model": self.d_model,
            "d_head": self.d_head,
            "n_heads": self.d_model // self.d_head,
            "d_mlp": 4 * self.d_model,
            "n_ctx": self.positions,
            "d_vocab": VOCABULARY,
            "act_fn": "gelu",
            "normalization_type": "LN",
            "attention_dir": "causal" if self.causal else "bidirectional",
        }


def _weights(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    """Random weights under TransformerLens's names. Biases and positions are not small: they are in real towers."""
    d, heads, inner = shape.d_model, shape.d_model // shape.d_head, 4 * shape.d_model

    def normal(*size: int, scale: float) -> Tensor:
        return torch.randn(*size, generator=generator) * scale

    weights = {
        "embed.W_E": normal(VOCABULARY, d, scale=0.5),
        "pos_embed.W_pos": normal(shape.positions, d, scale=0.5),
        "ln_final.w": 1 + normal(d, scale=0.1),
        "ln_final.b": normal(d, scale=0.1),
        "unembed.W_U": normal(d, VOCABULARY, scale=1 / math.sqrt(d)),
        "unembed.b_U": normal(VOCABULARY, scale=0.1),
    }
    for layer in range(shape.layers):
        block = f"blocks.{layer}"
        for name in ("ln1", "ln2"):
            weights |= {f"{block}.{name}.w": 1 + normal(d, scale=0.1), f"{block}.{name}.b": normal(d, scale=0.1)}
        for name in "QKV":
            weights[f"{block}.attn.W_{name}"] = normal(heads, d, shape.d_head, scale=1 / math.sqrt(d))
            weights[f"{block}.attn.b_{name}"] = normal(heads, shape.d_head, scale=0.1)
        weights[f"{block}.attn.W_O"] = normal(heads, shape.d_head, d, scale=1 / math.sqrt(d))
        weights[f"{block}.attn.b_O"] = normal(d, scale=0.1)
        weights |= {
            f"{block}.mlp.W_in": normal(d, inner, scale=1 / math.sqrt(d)),
            f"{block}.mlp.b_in": normal(inner, scale=0.1),
            f"{block}.mlp.W_out": normal(inner, d, scale=1 / math.sqrt(inner)),
            f"{block}.mlp.b_out": normal(d, scale=0.1),
        }
        weights |= {
            f"transcoders.{layer}.W_enc": normal(d, WIDTH, scale=1 / math.sqrt(d)),
            f"transcoders.{layer}.W_dec": normal(WIDTH, d, scale=0.5 / math.sqrt(d)),
            f"transcoders.{layer}.b_enc": normal(WIDTH, scale=0.1),
            f"transcoders.{layer}.b_dec": normal(d, scale=0.1),
        }
    return weights


def _thresholds(shape: Shape, weights: dict[str, Tensor], model: Any, tokens: Tensor) -> None:
    """Adds thresholds that let the wanted number of features pass, each in a gap so that rounding decides nothing."""
    names = [f"blocks.{layer}.ln2.hook_normalized" for layer in range(shape.layers)]
    _, cache = model.run_with_cache(tokens, names_filter=names)
    for layer, name in enumerate(names):
        own = f"transcoders.{layer}"
        read = (
            cache[name][0] * weights[f"blocks.{layer}.ln2.w"] + weights[f"blocks.{layer}.ln2.b"]
        )  # hooked before them
        pre = read @ weights[f"{own}.W_enc"] + weights[f"{own}.b_enc"]
        wanted = shape.n_features * (layer + 1) // shape.layers - shape.n_features * layer // shape.layers
        highest = pre.flatten().topk(wanted + 5).values[max(wanted - 5, 0) :]
        widest = int((highest[:-1] - highest[1:]).argmax())
        between = (highest[widest] + highest[widest + 1]) / 2
        assert between > 0, "more features are asked for than have a positive pre-activation"
        weights[f"{own}.threshold"] = between.repeat(WIDTH)


def hooked(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """Our TransformerLens's model of these weights."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    model = HookedTransformer(HookedTransformerConfig(**config, device="cpu"))
    _, unexpected = model.load_state_dict(
        {name: value for name, value in weights.items() if not name.startswith("transcoders")}, strict=False
    )
    assert not unexpected, unexpected
    return model.eval().requires_grad_(False)


@torch.no_grad()
def write(shape: Shape, folder: Path, seed: int = 0) -> None:
    """`toy.safetensors` and `toy.json`: weights, configuration, tokens, and the tokens whose logits are explained."""
    generator = torch.Generator().manual_seed(seed)
    weights = _weights(shape, generator)
    tokens = torch.randint(1, VOCABULARY, (shape.positions,), generator=generator)
    tokens[0] = 0
    _thresholds(shape, weights, hooked(shape.config(), weights), tokens[None])
    targets = torch.randperm(VOCABULARY, generator=generator)[: shape.n_targets]
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "toy.safetensors")
    told = {"config": shape.config(), "tokens": tokens.tolist(), "targets": targets.tolist()}
    (folder / "toy.json").write_text(json.dumps(told))


def read(folder: Path) -> tuple[Any, list[Placed], dict[str, Any]]:
    """The model, its transcoders where they read and write, and what `toy.json` says."""
    toy = json.loads((folder / "toy.json").read_text())
    weights = load_file(folder / "toy.safetensors")
    placed = []
    for layer in range(toy["config"]["n_layers"]):
        own = {
            name: weights[f"transcoders.{layer}.{name}"] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
        }
        dictionary = SparseDictionary(**own, activation=JumpReLU(), centred=False)
        reads, writes = (Site.parse(f"text.blocks.{layer}.{name}") for name in ("ln2.hook_normalized", "hook_mlp_out"))
        placed.append(Placed(dictionary, reads, writes))
    return hooked(toy["config"], weights), placed, toy


def freeze(model: Any, toy: dict[str, Any]) -> FrozenPass:
    """The frozen pass of the toy on its tokens, its logits demeaned over the vocabulary as circuit-tracer does."""
    outputs = [TokenLogit(token, demeaned=True) for token in toy["targets"]]
    return from_transformer_lens(model, torch.tensor(toy["tokens"]), outputs)
