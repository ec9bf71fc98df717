"""sae-lens folders: `cfg.json` and `sae_weights.safetensors` (https://github.com/decoderesearch/SAELens, version 6).

Read: standard, topk, jumprelu and gated, as saved for inference by versions 3 to 6; and batchtopk and
matryoshka_batchtopk as their trainer checkpoints them, with the threshold that sae-lens itself saves for inference.
Decoder norms that the activations are rescaled by are folded in, as `fold_W_dec_norm` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechinterp.errors import StorageError
from mechinterp.storage import load_tensors, read_json
from saes.layouts.canonical import Architecture, Canonical, Named, Weights

__all__ = ["CFG", "SCALER", "WEIGHTS", "read_lens"]

CFG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"
"""Beside a checkpoint of the trainer: the factor its activations were multiplied by, not yet folded in."""

_ARCHITECTURES: dict[str, Architecture] = {
    "standard": "standard",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
}


def read_lens(folder: Path) -> tuple[Canonical, list[Path]]:
    """Read a sae-lens folder; returns the dictionary and the files it came from.

    Raises:
        StorageError: a file is missing or damaged, or the SAE normalises each row in a way that weights cannot express.
    """
    cfg = read_json(folder / CFG)
    if not isinstance(cfg, dict):
        raise StorageError("is not a JSON object", where=str(folder / CFG))
    named = Named(load_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
    try:
        found = _canonical(_of_version_6(cfg), named, str(folder / CFG))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StorageError(f"is damaged: {error}", where=str(folder / CFG)) from error
    files = [folder / CFG, folder / WEIGHTS]
    if (folder / SCALER).is_file():
        found = found.behind(None, 1 / _factor(folder / SCALER))
        if cfg.get("rescale_acts_by_decoder_norm"):  # by the norm with the factor in it, as sae-lens has it
            found = found.with_unit_rows()
        files.append(folder / SCALER)
    return found, files


def _of_version_6(cfg: dict[str, Any]) -> dict[str, Any]:
    """Names of version 6 for what versions 3 to 5 wrote (their `handle_pre_6_0_config`)."""
    cfg = dict(cfg)
    activation = cfg.get("activation_fn_str", cfg.get("activation_fn", "relu"))
    if "topk" in str(activation) and cfg.get("architecture", "standard") == "standard":
        cfg |= {"architecture": "topk", "k": (cfg.get("activation_fn_kwargs") or {})["k"]}
    elif activation not in ("relu", "topk"):
        raise ValueError(f"activation function {activation!r} is not read")
    cfg.setdefault("architecture", "standard")
    normalize = cfg.get("normalize_activations")
    if normalize is None or isinstance(normalize, bool):
        cfg["normalize_activations"] = "expected_average_only_in" if normalize else "none"
    hook = str(cfg.get("hook_name", cfg.get("hook_point", "")))
    cfg.setdefault("reshape_activations", "hook_z" if "hook_z" in hook else "none")
    return cfg


def _canonical(cfg: dict[str, Any], named: Named, where: str) -> Canonical:
    kind = cfg["architecture"]
    if kind not in _ARCHITECTURES:
        raise StorageError(f"architecture {kind!r} is not read", where=where, hint=f"read: {', '.join(_ARCHITECTURES)}")
    notes = _refuse_what_weights_cannot_say(cfg, named, where)
    architecture = _ARCHITECTURES[kind]
    d_in, d_sae = int(cfg["d_in"]), int(cfg["d_sae"])
    weights = Weights(
        named.take("W_enc", (d_in, d_sae)), named.take("W_dec", (d_sae, d_in)), named.take("b_dec", (d_in,))
    )
    names = ("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",)
    vectors = {name: named.take(name, (d_sae,)) for name in names}
    if cfg.get("rescale_acts_by_decoder_norm"):
        norm = weights.W_dec.norm(dim=-1).clamp(min=1e-8)
        weights = Weights(weights.W_enc * norm, weights.W_dec / norm[:, None], weights.b_dec)
        vectors["b_enc"] = vectors["b_enc"] * norm
    if architecture == "jumprelu":
        vectors["threshold"] = _threshold(named, d_sae)
    about: dict[str, Any] = {"class": kind}
    if kind in ("topk", "batchtopk", "matryoshka_batchtopk") and "k" in cfg:
        about["k"] = cfg["k"]
    if cfg.get("matryoshka_widths"):
        ends = [int(end) for end in cfg["matryoshka_widths"]]
        about["group_sizes"] = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    k = int(cfg["k"]) if architecture == "topk" else None
    return Canonical(architecture, weights, vectors, bool(cfg.get("apply_b_dec_to_input", True)), k, about, notes)


def _threshold(named: Named, d_sae: int) -> Tensor:
    if "log_threshold" in named:
        return named.take("log_threshold", (d_sae,)).exp()
    if "topk_threshold" in named:  # of a trainer's checkpoint: one for all latents
        return torch.full((d_sae,), named.number("topk_threshold"), dtype=torch.float64)
    return named.take("threshold", (d_sae,))


def _refuse_what_weights_cannot_say(cfg: dict[str, Any], named: Named, where: str) -> tuple[str, ...]:
    """StorageError for what happens to each row outside the weights; notes for what is only assumed to be folded."""
    if cfg["reshape_activations"] != "none":
        raise StorageError(f"reshape_activations is {cfg['reshape_activations']!r}, which is not read", where=where)
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in named and not torch.allclose(named.take(name, (None,)), torch.ones((), dtype=torch.float64)):
            raise StorageError(f"has a {name}, which is not read", where=named.where, hint="fold it with sae_lens")
    match cfg["normalize_activations"]:
        case "none":
            return ()
        case "expected_average_only_in":
            return (
                "its activations were normalised in training; read, as sae-lens reads it, as if this were folded in",
            )
        case other:
            hint = "it depends on each row, so no weights can express it; use sae_lens"
            raise StorageError(f"normalize_activations is {other!r}, which is not read", where=where, hint=hint)


def _factor(path: Path) -> float:
    content = read_json(path)
    factor = content.get("scaling_factor") if isinstance(content, dict) else None
    if factor is None:
        return 1.0
    if not isinstance(factor, int | float) or not 0 < factor < float("inf"):
        raise StorageError(f"scaling_factor is {factor!r}", where=str(path))
    return float(factor)
