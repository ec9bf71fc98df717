"""Transcoders: the file of those that sae-lens has no class for, and their export to one that it has.

sae-lens loads ReLU and JumpReLU transcoders (`transcoder`, `jumprelu_transcoder`, each with a `skip_` form) and trains
none. A transcoder with batch top-k sparsity is written as `jumprelu_transcoder` or `jumprelu_skip_transcoder` and can
be loaded with `sae_lens.SAE.load_from_disk`. For TopK there is no class. Such a folder has the same two files, and

- cfg.json: `architecture` is `topk_transcoder` or `topk_skip_transcoder`, `k` stands beside `d_in`, `d_sae`, `d_out`;
- sae_weights.safetensors: `W_enc [d_in, d_sae]`, `b_enc [d_sae]`, `W_dec [d_sae, d_out]`, `b_dec [d_out]`, and with a
  skip `W_skip [d_out, d_in]`, as sae-lens's skip transcoders have it.

`f(x) = topk(relu(x @ W_enc + b_enc)) @ W_dec + b_dec (+ x @ W_skip.T)`; each row keeps its k largest latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mechinterp.activations import ActivationStore
from mechinterp.errors import UsageError
from mechinterp.storage import read_json
from mechinterp.types import Placed
from saes.dictionary import JumpReLU, SparseDictionary, TopK
from saes.folder import CFG, load_sae, read_weights, save_sae
from saes.metrics import evaluate

__all__ = ["export_transcoder"]


@torch.no_grad()
def export_transcoder(folder: Path | str, out: Path | str, store: ActivationStore) -> Placed:
    """Write a TopK transcoder as a JumpReLU transcoder that sae-lens loads. Returns it.

    One threshold for all latents takes the place of the choice of k in each row: the one above which k latents fire
    per row on average over the training split of `store`. So rows differ in how many latents fire, and the two are
    not the same function; the metrics of both are in mechinterp.json (`metrics`, `metrics_topk`).

    Raises UsageError when the folder holds no TopK transcoder.
    """
    folder, out = Path(folder), Path(out)
    placed = load_sae(folder)
    dictionary, cfg = placed.dictionary, read_json(folder / CFG)
    assert isinstance(dictionary, SparseDictionary)
    if not (isinstance(dictionary.activation, TopK) and cfg["architecture"].endswith("transcoder")):
        raise UsageError("holds no TopK transcoder", where=str(folder), hint="sae-lens can load it as it is")
    threshold = _threshold(dictionary, placed, store, dictionary.activation.k)
    weights = {name: getattr(dictionary, name).detach() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    weights["threshold"] = torch.full((dictionary.d_sae,), threshold)
    if dictionary.W_skip is not None:
        weights["W_skip"] = dictionary.W_skip.T.contiguous()
    cfg = {name: value for name, value in cfg.items() if name not in ("k", "rescale_acts_by_decoder_norm")}
    cfg["architecture"] = cfg["architecture"].replace("topk", "jumprelu")
    exported = read_weights(cfg, weights, out)
    assert isinstance(exported.activation, JumpReLU)
    info: dict[str, Any] = {name: value for name, value in dictionary.info.items() if name != "schema_version"}
    split = info["metrics"]["split"]
    again = evaluate(Placed(exported, placed.reads, placed.writes), store, split).to_dict()
    save_sae(out, cfg, weights, {**info, "metrics": again, "metrics_topk": info["metrics"]})
    return load_sae(out)


def _threshold(dictionary: SparseDictionary, placed: Placed, store: ActivationStore, k: int) -> float:
    """What `k` pre-activations per row of the training split (at most 2^14 rows) exceed."""
    rows = store.order(placed.reads, seed=0, epoch=0, split="train")[: 2**14]
    largest = [
        dictionary.pre_activations(x).topk(min(4 * k, dictionary.d_sae), dim=-1).values
        for x in store.site(placed.reads).chunks(rows)
    ]
    values = torch.cat(largest).flatten()
    return max(0.0, float(values.topk(min(len(values), k * len(rows) + 1), sorted=True).values[-1]))
