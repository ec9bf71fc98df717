"""dictionary_learning folders: `config.json` and `ae.pt` (https://github.com/saprmarks/dictionary_learning).

What its classes keep and compute, d the width of the site, m the number of latents; `encoder.weight` is [m, d] and
`decoder.weight` [d, m], the transposes of W_enc and W_dec:

    AutoEncoder             relu(encoder(x - bias)), decoder(f) + bias. Its loader gives decoder columns unit norm.
    AutoEncoderNew          relu(encoder(x)), decoder(f) with decoder.bias
    GatedAutoEncoder        gate and magnitude from encoder(x - decoder_bias); decoder(f) + decoder_bias
    JumpReluAutoEncoder     W_enc, W_dec, b_enc, b_dec, threshold [m]; b_dec is not subtracted from x
    AutoEncoderTopK         top k of relu(encoder(x - b_dec)); its running threshold is left unused, as by `encode`
    BatchTopKSAE            relu(encoder(x - b_dec)) where above one threshold
    MatryoshkaBatchTopKSAE  the same with W_enc [d, m], W_dec [m, d], and group_sizes

Activations normalised in training: the library folds the factor into the biases when it saves (`scale_biases`), except
in the backup of an unfinished run, which keeps `norm_factor` beside the weights; there it is folded here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechinterp.errors import StorageError
from mechinterp.storage import read_json
from saes.layouts.canonical import Canonical, Named, Weights
from saes.layouts.pickled import read_checkpoint

__all__ = ["CONFIG", "PICKLE", "TENSORS", "read_dictionary_learning"]

CONFIG = "config.json"
PICKLE = "ae.pt"
TENSORS = "ae.safetensors"
"""Our export: the same names, no pickle."""

_MARKS: tuple[tuple[str, frozenset[str]], ...] = (
    ("GatedAutoEncoder", frozenset({"decoder_bias", "r_mag", "gate_bias", "mag_bias"})),
    ("MatryoshkaBatchTopKSAE", frozenset({"W_enc", "group_sizes", "threshold"})),
    ("JumpReluAutoEncoder", frozenset({"W_enc", "threshold"})),
    ("AutoEncoderNew", frozenset({"encoder.bias", "decoder.bias"})),
    ("AutoEncoder", frozenset({"encoder.bias", "bias"})),
)
"""Classes that their tensors' names give away, the most telling first. TopK and BatchTopK have the same names."""
_CLASSES = {name for name, _ in _MARKS} | {"AutoEncoderTopK", "BatchTopKSAE"}


def read_dictionary_learning(source: Path) -> tuple[Canonical, list[Path]]:
    """Read a folder, or one `.pt` or `.safetensors` file with its config.json beside or above it.

    Returns the dictionary and the files it came from.

    Raises:
        StorageError: a file is missing or damaged, its class is unknown, or it holds more than tensors.
    """
    weights = source if source.is_file() else source / (TENSORS if (source / TENSORS).is_file() else PICKLE)
    beside = [folder / CONFIG for folder in (weights.parent, weights.parent.parent)]  # above: checkpoints/ae_100.pt
    config = next((path for path in beside if path.is_file()), None)
    trainer = {} if config is None else _trainer(config)
    tensors, rest, _ = read_checkpoint(weights)
    factor = 1.0
    if rest.get("step") is not None and any(name.startswith("ae.") for name in tensors):  # an unfinished run's backup
        tensors = {name.removeprefix("ae."): t for name, t in tensors.items() if name.startswith("ae.")}
        factor = _norm_factor(rest, weights)
    named = Named(tensors, str(weights))
    kind = _class(trainer, named)
    found = _READERS[kind](named, trainer, factor)
    about = {"class": kind, **found[1]}
    if factor != 1.0:
        about["norm_factor"] = factor
    threshold_unset = "threshold" in named and kind != "AutoEncoderTopK" and about.get("threshold", 0.0) < 0
    notes = ("its threshold was never measured: every positive pre-activation counts",) if threshold_unset else ()
    architecture, w, vectors, centred, k = found[0]
    canonical = Canonical(architecture, w, vectors, centred, k, about, notes)
    return canonical, [weights] if config is None else [weights, config]


def _trainer(path: Path) -> dict[str, Any]:
    config = read_json(path)
    trainer = config.get("trainer") if isinstance(config, dict) else None
    if not isinstance(trainer, dict):
        raise StorageError("lacks the object trainer", where=str(path))
    return trainer


def _norm_factor(rest: dict[str, Any], where: Path) -> float:
    factor = rest.get("norm_factor", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < float("inf"):
        raise StorageError(f"norm_factor is {factor!r}", where=str(where))
    return float(factor)


def _class(trainer: dict[str, Any], named: Named) -> str:
    """Class name, from config.json or else from the tensors' names; both must agree where both speak."""
    shown = next((name for name, marks in _MARKS if all(mark in named for mark in marks)), None)
    # "AutoEncoderTopK", or as older versions wrote it, "<class 'dictionary_learning.trainers.top_k.AutoEncoderTopK'>"
    said = re.sub(r".*?(\w+)'?>?$", r"\1", str(trainer["dict_class"])) if "dict_class" in trainer else None
    if said is None and shown is None:
        hint = f"put its {CONFIG} beside it, with trainer.dict_class"
        raise StorageError("its class cannot be told from its tensors", where=named.where, hint=hint)
    if said is not None and said not in _CLASSES:
        hint = f"read: {', '.join(sorted(_CLASSES))}"
        raise StorageError(f"class {said!r} is not read", where=named.where, hint=hint)
    if said is not None and shown is not None and said != shown:
        raise StorageError(f"config.json says {said}, its tensors say {shown}", where=named.where)
    return str(said or shown)


_Parts = tuple[tuple[Any, Weights, dict[str, Tensor], bool, int | None], dict[str, Any]]


def _linear(named: Named, bias: str, factor: float) -> tuple[Weights, int]:
    """Weights kept as torch.nn.Linear keeps them, transposed."""
    encoder = named.take("encoder.weight", (None, None))
    m, d = encoder.shape
    return Weights(encoder.T, named.take("decoder.weight", (d, m)).T, named.take(bias, (d,)) * factor), m


def _direct(named: Named, factor: float) -> tuple[Weights, int]:
    """Weights kept the way we keep them."""
    W_enc = named.take("W_enc", (None, None))
    d, m = W_enc.shape
    return Weights(W_enc, named.take("W_dec", (m, d)), named.take("b_dec", (d,)) * factor), m


def _standard(named: Named, trainer: Mapping[str, Any], factor: float) -> _Parts:
    w, m = _linear(named, "bias", factor)
    b_enc = named.take("encoder.bias", (m,)) * factor
    norm = w.W_dec.norm(dim=-1)
    if not torch.allclose(norm, torch.ones_like(norm)):  # its loader's own test; the reconstruction stays the same
        if not (norm > 0).all():
            raise StorageError("a decoder column is zero", where=named.where)
        w, b_enc = Weights(w.W_enc * norm, w.W_dec / norm[:, None], w.b_dec), b_enc * norm
    return ("standard", w, {"b_enc": b_enc}, True, None), {}


def _standard_new(named: Named, trainer: Mapping[str, Any], factor: float) -> _Parts:
    w, m = _linear(named, "decoder.bias", factor)
    return ("standard", w, {"b_enc": named.take("encoder.bias", (m,)) * factor}, False, None), {}


def _gated(named: Named, trainer: Mapping[str, Any], factor: float) -> _Parts:
    w, m = _linear(named, "decoder_bias", factor)
    vectors = {
        "b_gate": named.take("gate_bias", (m,)) * factor,
        "b_mag": named.take("mag_bias", (m,)) * factor,
        "r_mag": named.take("r_mag", (m,)),
    }
    return ("gated", w, vectors, True, None), {}


def _jumprelu(named: Named, trainer: Mapping[str, Any], factor: float) -> _Parts:
    w, m = _direct(named, factor)
    vectors = {"b_enc": named.take("b_enc", (m,)) * factor, "threshold": named.take("threshold", (m,)) * factor}
    return ("jumprelu", w, vectors, False, None), {}


def _topk(named: Named, trainer: Mapping[str, Any], factor: float) -> _Parts:
    w, m = _linear(named, "b_dec", factor)
    k = _k(named, trainer)
    if k is None:
        raise StorageError("lacks k", where=named.where, hint=f"put its {CONFIG} beside it, with trainer.k")
    return ("topk", w, {"b_enc": named.take("encoder.bias", (m,)) * factor}, True, k), {"k": k}


def _batchtopk(named: Named, trainer: Mapping[str, Any], factor: float) -> _Parts:
    w, m = _linear(named, "b_dec", factor)
    return _one_threshold(named, trainer, factor, w, named.take("encoder.bias", (m,)) * factor)


def _matryoshka(named: Named, trainer: Mapping[str, Any], factor: float) -> _Parts:
    w, m = _direct(named, factor)
    sizes = [int(size) for size in named.take("group_sizes", (None,)).tolist()]
    if sum(sizes) != m or min(sizes) < 1:
        raise StorageError(f"group_sizes {sizes} do not add up to {m} latents", where=named.where)
    parts, about = _one_threshold(named, trainer, factor, w, named.take("b_enc", (m,)) * factor)
    return parts, {**about, "group_sizes": sizes}


def _one_threshold(named: Named, trainer: Mapping[str, Any], factor: float, w: Weights, b_enc: Tensor) -> _Parts:
    """A JumpReLU whose latents share one threshold. Below 0 (never measured) it lets every positive value through."""
    threshold = named.number("threshold")
    threshold = threshold * factor if threshold >= 0 else threshold
    vectors = {"b_enc": b_enc, "threshold": torch.full_like(b_enc, max(threshold, 0.0))}
    return ("jumprelu", w, vectors, True, None), {"k": _k(named, trainer), "threshold": threshold}


def _k(named: Named, trainer: Mapping[str, Any]) -> int | None:
    kept, said = (int(named.number("k")) if "k" in named else None), trainer.get("k")
    if said is not None and (isinstance(said, bool) or not isinstance(said, int)):
        raise StorageError(f"trainer.k is {said!r}", where=CONFIG)
    if kept is not None and said is not None and kept != said:
        raise StorageError(f"k is {said} in {CONFIG} and {kept} in the weights", where=named.where)
    return said if kept is None else kept


_READERS = {
    "AutoEncoder": _standard,
    "AutoEncoderNew": _standard_new,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jumprelu,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batchtopk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
}
