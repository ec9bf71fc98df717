"""circuit-tracer on weights that `benchmarks.toy` wrote. Run by the interpreter of an environment of its own.

It takes jobs from standard input, a line each. Only the package's public calls are used: `from_config`, `attribute`.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from measure import measured, serve
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformerConfig


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The replacement model with our weights, and what `toy.json` says."""
    toy = json.loads((folder / "toy.json").read_text())
    weights = load_file(folder / "toy.safetensors")
    config = HookedTransformerConfig(**toy["config"], device="cpu")
    transcoders = {}
    for layer in range(config.n_layers):
        own = {name: weights.pop(f"transcoders.{layer}.{name}") for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        threshold = JumpReLU(weights.pop(f"transcoders.{layer}.threshold"))
        width = own["W_enc"].shape[1]
        transcoder = SingleLayerTranscoder(
            config.d_model, width, threshold, layer, device=torch.device("cpu"), dtype=torch.float32
        )
        own["W_enc"] = own["W_enc"].T.contiguous()  # theirs has a row for each feature
        transcoder.load_state_dict({**transcoder.state_dict(), **own})
        transcoders[layer] = transcoder
    together = TranscoderSet(transcoders, feature_input_hook="mlp.hook_in", feature_output_hook="mlp.hook_out")
    model = ReplacementModel.from_config(config, together)
    # they wrap the MLPs and the unembedding
    renamed = {name.replace(".mlp.", ".mlp.old_mlp.").replace("unembed.", "unembed.old_unembed."): value
               for name, value in weights.items()}  # fmt: skip
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    missing = [name for name in missing if not name.endswith((".mask", ".IGNORE")) and "transcoders" not in name]
    assert not missing and not unexpected, (missing, unexpected)
    # the tokens come as numbers; the first is their special token, whose features and errors they leave out
    model.tokenizer = SimpleNamespace(
        all_special_ids=[toy["tokens"][0]], decode=str, vocab_size=config.d_vocab, padding_side="right"
    )
    return model, toy


def edges(graph: Any, toy: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Their dense adjacency in the shared form: rows and columns named by (layer, position, feature)."""
    layers, positions = toy["config"]["n_layers"], len(toy["tokens"])
    named = graph.active_features[graph.selected_features]
    n, targets = len(named), torch.tensor(toy["targets"])
    outputs = torch.stack([torch.full_like(targets, layers), torch.full_like(targets, positions - 1), targets], 1)
    matrix = torch.cat([graph.adjacency_matrix[:n], graph.adjacency_matrix[-len(targets) :]])
    return {
        "rows": torch.cat([named, outputs]).contiguous(),
        "columns": named.contiguous(),
        "features": matrix[:, :n].contiguous(),
        "errors": matrix[:, n : n + layers * positions].contiguous(),
        "tokens": matrix[:, n + layers * positions : n + (layers + 1) * positions].contiguous(),
        "total": matrix.abs().sum(1),
        "shares": graph.logit_probabilities / graph.logit_probabilities.sum(),
    }


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Build the graph of the toy in `folder`, `batch` targets at a time, `budget` features; edges go to `out`."""
    model, toy = load(Path(job["folder"]))
    tokens, targets = torch.tensor(toy["tokens"]), torch.tensor(toy["targets"])
    graph, cost = measured(
        lambda: attribute(
            tokens, model, attribution_targets=targets, batch_size=job["batch"], max_feature_nodes=job["budget"]
        )
    )
    if job["out"] is not None:
        save_file(edges(graph, toy), job["out"])
    return {**cost, "features": len(graph.active_features), "rows": len(graph.selected_features)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(answer, f"circuit-tracer {version('circuit-tracer')}")
