"""A dictionary folder of ours, written for dictionary_learning.

`config.json` and the state dict of the class that computes the same, as `ae.safetensors`: there is no pickle to open.
`class.load_state_dict(safetensors.torch.load_file("ae.safetensors"))` puts it into their class. (sae-lens needs no
export: a dictionary folder is a sae-lens folder.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechinterp.errors import StorageError
from mechinterp.storage import read_json, save_tensors, verify_folder, write_json, write_manifest
from saes.layouts.canonical import Canonical
from saes.layouts.dictionary_learning import CONFIG, TENSORS
from saes.layouts.lens import read_lens

__all__ = ["export_dictionary_learning"]

_INFO = "mechinterp.json"


def export_dictionary_learning(folder: Path | str, out: Path | str) -> str:
    """Write the dictionary in `folder` to `out` in dictionary_learning's layout; returns the name of its class there.

    A topk dictionary becomes AutoEncoderTopK; gated GatedAutoEncoder; standard AutoEncoder where b_dec is subtracted
    and decoder rows have unit norm (their loader would make it so), else AutoEncoderNew; jumprelu BatchTopKSAE or
    MatryoshkaBatchTopKSAE where its latents share one threshold and k (with the group sizes) is known, else
    JumpReluAutoEncoder. `b_dec` moves into the encoder's bias where the class treats it otherwise.

    Raises:
        StorageError: `folder` is damaged or of a kind their library has no class for, or `out` is taken.
    """
    folder, out = Path(folder), Path(out)
    problems = verify_folder(folder)
    if problems:
        raise StorageError("; ".join(problems[:3]), where=str(folder))
    info = read_json(folder / _INFO)
    if not isinstance(info, dict):
        raise StorageError("is not a JSON object", where=str(folder / _INFO))
    if info.get("reads") != info.get("writes"):
        raise StorageError("is a transcoder, which the layout has no class for", where=str(folder))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError("is not an empty folder", where=str(out), hint="choose another folder")
    found, _ = read_lens(folder)
    name, tensors = _state(found, _latents_meant(info))
    trainer: dict[str, Any] = {"dict_class": name, "activation_dim": found.d_in, "dict_size": found.d_sae}
    if "k" in tensors:
        trainer["k"] = int(tensors["k"])
    if "group_sizes" in tensors:
        trainer["group_sizes"] = tensors["group_sizes"].tolist()
    save_tensors(out / TENSORS, tensors)
    write_json(out / CONFIG, {"trainer": {**trainer, "submodule_name": str(info.get("reads"))}})
    write_manifest(out, {"kind": "dictionary_learning"})
    return name


def _latents_meant(info: dict[str, Any]) -> dict[str, Any]:
    """k and group sizes behind a threshold, where training here (nested `levels`) or an import kept them."""
    imported, config = (info.get(name) if isinstance(info.get(name), dict) else {} for name in ("imported", "config"))
    assert imported is not None and config is not None
    ends = config.get("levels") or []
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    return {"k": imported.get("k") or config.get("k"), "group_sizes": imported.get("group_sizes") or sizes}


def _state(found: Canonical, meant: dict[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Class name and state dict."""
    match found.architecture:
        case "topk":
            return "AutoEncoderTopK", {**_linear(found.with_centring(True)), **_counts(found.k, -1.0)}
        case "gated":
            found = found.with_centring(True)
            v, linear = found.vectors, _linear(found, bias=None, b_dec="decoder_bias")
            gates = {"gate_bias": v["b_gate"], "mag_bias": v["b_mag"], "r_mag": v["r_mag"]}
            return "GatedAutoEncoder", {**linear, **{name: tensor.float() for name, tensor in gates.items()}}
        case "standard":
            norm = found.weights.W_dec.float().norm(dim=-1)
            if found.centred and torch.allclose(norm, torch.ones_like(norm)):
                return "AutoEncoder", _linear(found, b_dec="bias")
            return "AutoEncoderNew", _linear(found.with_centring(False), b_dec="decoder.bias")
        case "jumprelu":
            return _jumprelu(found, meant)


def _jumprelu(found: Canonical, meant: dict[str, Any]) -> tuple[str, dict[str, Tensor]]:
    threshold, k, sizes = found.vectors["threshold"], meant["k"], meant["group_sizes"]
    shared = bool((threshold == threshold[0]).all()) and float(threshold[0]) >= 0
    if not shared or not isinstance(k, int | float) or k != int(k):
        found = found.with_centring(False)
        return "JumpReluAutoEncoder", {**_direct(found), "threshold": found.vectors["threshold"].float()}
    found, counts = found.with_centring(True), _counts(int(k), float(threshold[0]))
    if sizes and sum(sizes) == found.d_sae:
        return "MatryoshkaBatchTopKSAE", {**_direct(found), **counts, "group_sizes": torch.tensor(sizes)}
    return "BatchTopKSAE", {**_linear(found), **counts}


def _counts(k: int | None, threshold: float) -> dict[str, Tensor]:
    return {"k": torch.tensor(k, dtype=torch.int32), "threshold": torch.tensor(threshold, dtype=torch.float32)}


def _linear(found: Canonical, bias: str | None = "encoder.bias", b_dec: str = "b_dec") -> dict[str, Tensor]:
    """As torch.nn.Linear keeps weights: [out, in]."""
    w = found.weights
    named = {"encoder.weight": w.W_enc.T, "decoder.weight": w.W_dec.T, b_dec: w.b_dec}
    named |= {} if bias is None else {bias: found.vectors["b_enc"]}
    return {name: tensor.float().contiguous() for name, tensor in named.items()}


def _direct(found: Canonical) -> dict[str, Tensor]:
    w = found.weights
    named = {"W_enc": w.W_enc, "W_dec": w.W_dec, "b_dec": w.b_dec, "b_enc": found.vectors["b_enc"]}
    return {name: tensor.float().contiguous() for name, tensor in named.items()}
