"""The folder of a trained dictionary: sae-lens's own layout, our `mechinterp.json` beside it, closed by a manifest.

cfg.json and sae_weights.safetensors are what `sae_lens.SAE.load_from_disk` reads. mechinterp.json says where the
dictionary stands (`reads`, `writes`), from which store, configuration and seed it was made, and how good it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechinterp.errors import StorageError, UsageError
from mechinterp.storage import load_tensors, read_json, save_tensors, verify_folder, write_json, write_manifest
from mechinterp.types import Placed, Site
from saes.dictionary import Activation, Gated, JumpReLU, ReLU, SparseDictionary, TopK

__all__ = ["load_sae", "read_dictionary", "read_weights", "save_sae"]

CFG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
INFO = "mechinterp.json"
SCHEMA_VERSION = 1


def load_sae(folder: Path | str) -> Placed:
    """Read a trained dictionary and where it stands, without importing sae_lens.

    `placed.dictionary` is a `SparseDictionary`; its `info` is the content of mechinterp.json.

    Raises:
        StorageError: a file is missing, does not match its sha256, or is not of a kind that can be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StorageError("no such folder", where=str(folder), hint="train a dictionary with `mechinterp train`")
    problems = verify_folder(folder)
    if problems:
        raise StorageError("; ".join(problems[:3]), where=str(folder), hint="restore it or train it again")
    info = read_json(folder / INFO)
    try:
        if info["schema_version"] != SCHEMA_VERSION:
            raise StorageError(f"has schema_version {info['schema_version']!r}", where=str(folder / INFO))
        reads, writes = Site.parse(info["reads"]), Site.parse(info["writes"])
    except (KeyError, TypeError, UsageError) as error:
        raise StorageError(f"is damaged: {error}", where=str(folder / INFO)) from error
    return Placed(read_dictionary(folder, info), reads, writes)


def read_dictionary(folder: Path, info: dict[str, Any] | None = None) -> SparseDictionary:
    """Read cfg.json and sae_weights.safetensors: sae-lens's layout, and ours of a TopK transcoder (saes.transcoder)."""
    return read_weights(read_json(folder / CFG), load_tensors(folder / WEIGHTS), folder, info)


def read_weights(
    cfg: dict[str, Any], weights: dict[str, Tensor], folder: Path, info: dict[str, Any] | None = None
) -> SparseDictionary:
    """A dictionary from sae-lens's inference configuration and weights; `folder` names them in errors."""
    try:
        weights = {name: tensor.to(torch.float32) for name, tensor in weights.items()}
        activation, transcodes, skips = _architecture(cfg, folder)
        if isinstance(activation, Gated):
            weights["b_enc"] = weights["b_gate"]
        if cfg.get("rescale_acts_by_decoder_norm"):
            _fold_decoder_norm(weights)
        d_in, d_sae = weights["W_enc"].shape
        d_out = int(cfg["d_out"]) if transcodes else d_in
        shapes = {"W_dec": (d_sae, d_out), "b_enc": (d_sae,), "b_dec": (d_out,)}
        extra = {JumpReLU: ("threshold",), Gated: ("r_mag", "b_mag")}.get(type(activation), ())
        shapes |= dict.fromkeys(extra, (d_sae,)) | ({"W_skip": (d_out, d_in)} if skips else {})
        for name, shape in shapes.items():
            if weights[name].shape != shape:
                raise ValueError(f"{name} has shape {tuple(weights[name].shape)}, not {shape}")
        return SparseDictionary(
            weights["W_enc"],
            weights["W_dec"],
            weights["b_enc"],
            weights["b_dec"],
            activation,
            centred=bool(cfg.get("apply_b_dec_to_input", True)) and not transcodes,
            info=info,
            W_skip=weights["W_skip"].T.contiguous() if skips else None,
            **{name: weights[name] for name in extra},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"is damaged: {error}", where=str(folder), hint="train it again") from error


def save_sae(folder: Path, cfg: dict[str, Any], weights: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Write a dictionary folder; the manifest comes last."""
    save_tensors(folder / WEIGHTS, weights)
    write_json(folder / CFG, cfg)
    write_json(folder / INFO, {"schema_version": SCHEMA_VERSION, **info})
    write_manifest(folder, {"kind": "dictionary"})


def _architecture(cfg: dict[str, Any], folder: Path) -> tuple[Activation, bool, bool]:
    """Activation function of a configuration, whether it is a transcoder, and whether that has a skip.

    Raises StorageError for one that we do not read.
    """
    for field, plain in (("normalize_activations", "none"), ("reshape_activations", "none")):
        if cfg.get(field, plain) != plain:
            raise StorageError(f"{field} is {cfg[field]!r}", where=str(folder / CFG), hint="fold it into the weights")
    match cfg["architecture"]:
        case "topk":
            return TopK(int(cfg["k"])), False, False
        case "jumprelu":
            return JumpReLU(), False, False
        case "standard":
            return ReLU(), False, False
        case "gated":
            return Gated(), False, False
        case "transcoder" | "skip_transcoder" as name:
            return ReLU(), True, name != "transcoder"
        case "jumprelu_transcoder" | "jumprelu_skip_transcoder" as name:
            return JumpReLU(), True, name != "jumprelu_transcoder"
        case "topk_transcoder" | "topk_skip_transcoder" as name:
            return TopK(int(cfg["k"])), True, name != "topk_transcoder"
        case other:
            raise StorageError(f"architecture {other!r} is not read", where=str(folder / CFG), hint="use sae_lens")


def _fold_decoder_norm(weights: dict[str, Tensor]) -> None:
    """Make decoder rows of unit norm, as sae-lens's `fold_W_dec_norm` does."""
    norm = weights["W_dec"].norm(dim=-1).clamp(min=1e-8)
    weights["W_dec"] = weights["W_dec"] / norm[:, None]
    weights["W_enc"] = weights["W_enc"] * norm
    weights["b_enc"] = weights["b_enc"] * norm
