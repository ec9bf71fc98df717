"""Transcoders: how good one is, and its export to what sae-lens can load.

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
from saes.metrics import Evaluation

__all__ = ["evaluate_transcoder", "export_transcoder"]


@torch.no_grad()
def evaluate_transcoder(placed: Placed, store: ActivationStore, split: str = "val") -> Evaluation:
    """R2 of what is written given what is read, L0, dead latents and frequencies over all rows of a split.

    `R2 = 1 - sum_n ||y_n - f(x_n)||^2 / sum_n ||y_n - mean(y)||^2`, the mean per dimension over the rows; in float64.
    """
    dictionary = placed.dictionary
    assert isinstance(dictionary, SparseDictionary)
    source, target, rows = store.site(placed.reads), store.site(placed.writes), store.rows(placed.reads, split)
    if len(rows) == 0:
        raise UsageError(f"has no row in split {split!r}", where=str(store.folder))
    mean = sum(chunk.double().sum(0) for chunk in target.chunks(rows)) / len(rows)
    error = spread = 0.0
    fired = torch.zeros(dictionary.d_sae, dtype=torch.float64)
    for x, y in zip(source.chunks(rows), target.chunks(rows), strict=True):
        acts = dictionary.encode(x)
        written = dictionary.decode(acts) + (0.0 if dictionary.W_skip is None else x @ dictionary.W_skip)
        error += (y - written).double().square().sum().item()
        spread += (y.double() - mean).square().sum().item()
        fired += (acts > 0).double().sum(0)
    return Evaluation(
        split=split,
        rows=len(rows),
        r2=1 - error / spread if spread > 0 else float("nan"),
        l0=fired.sum().item() / len(rows),
        dead=(fired == 0).double().mean().item(),
        frequency=fired / len(rows),
    )


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
    again = evaluate_transcoder(Placed(exported, placed.reads, placed.writes), store, split).to_dict()
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
