"""saev checkpoints, `sae.pt`: one line of JSON, then a pickled state dict (https://github.com/OSU-NLP-Group/saev).

W_enc [d, m], b_enc, W_dec [m, d], b_dec. What the header's `schema` means for the reading:

    none    `d_vit`, `exp_factor`: ReLU; `b_dec` is subtracted before encoding
    1       `cls` names the activation: Relu and TopK; `b_dec` is subtracted. With `cls` SparseAutoencoderConfig as in 2
    2 to 5  `cfg.activation` {cls, params}: Relu, TopK, BatchTopK; `b_dec` is not subtracted

saev stopped subtracting `b_dec` in July 2025 without a new schema, and its present loader reads the older files
without it too. Here a file is read by the formula that it was trained with. BatchTopK with `activation.threshold` keeps
what is above it; without one (schema 2 to 4) it is the top k of each row. Before the SAE, saev's older versions
also normalised the rows, `(x - mean) / scalar`, and kept neither in the checkpoint: see `import_dictionary`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechinterp.errors import StorageError
from saes.layouts.canonical import Architecture, Canonical, Named, Weights
from saes.layouts.pickled import read_checkpoint

__all__ = ["CHECKPOINT", "PLACES", "read_saev"]

CHECKPOINT = "sae.pt"
PLACES = (CHECKPOINT, f"checkpoint/{CHECKPOINT}")
"""Where a run's folder keeps it."""

_SCHEMAS = (None, 1, 2, 3, 4, 5)
_SIGNED = "saev keeps negative values among the k largest of a row; here, as everywhere else, they become zero"
_AMBIGUOUS = "saev's present loader does not subtract b_dec in files of this schema; it was subtracted in training"


def read_saev(path: Path) -> tuple[Canonical, list[Path]]:
    """Read a saev checkpoint; returns the dictionary and the file it came from.

    Raises:
        StorageError: the file is missing or damaged, of an unknown schema, or holds more than a state dict.
    """
    tensors, _, header = read_checkpoint(path)
    where = str(path)
    if header is None:
        raise StorageError("has no header line", where=where, hint="a saev checkpoint begins with one line of JSON")
    try:
        activation, params, centred = _activation(header, where)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"its header is damaged: {error!r}", where=where) from error
    named = Named(tensors, where)
    W_enc = named.take("W_enc", (None, None))
    d, m = W_enc.shape
    weights = Weights(W_enc, named.take("W_dec", (m, d)), named.take("b_dec", (d,)))
    vectors = {"b_enc": named.take("b_enc", (m,))}
    about: dict[str, Any] = {"class": activation, "schema": header.get("schema")}
    notes = (_AMBIGUOUS,) if centred and weights.b_dec.any() else ()
    architecture, k, more = _latents(activation, params, named, vectors, where)
    if architecture == "topk":
        notes += (_SIGNED,)
    return Canonical(architecture, weights, vectors, centred, k, {**about, **more}, notes), [path]


def _activation(header: dict[str, Any], where: str) -> tuple[str, dict[str, Any], bool]:
    """Name and parameters of the activation, and whether `b_dec` is subtracted."""
    schema = header.get("schema")
    if schema not in _SCHEMAS or isinstance(schema, bool):
        raise StorageError(f"has schema {schema!r}", where=where, hint="schemas up to 5 are read")
    if schema is None:
        if "d_vit" not in header:
            raise StorageError("its header names neither schema nor d_vit", where=where)
        return "Relu", {}, True
    if schema == 1 and header.get("cls", "SparseAutoencoderConfig") != "SparseAutoencoderConfig":
        return str(header["cls"]), dict(header["cfg"]), True
    given = header["cfg"].get("activation", {})
    if not given and schema == 1:
        return "Relu", {}, False
    return str(given["cls"]), dict(given["params"]), False


def _latents(
    activation: str, params: dict[str, Any], named: Named, vectors: dict[str, Tensor], where: str
) -> tuple[Architecture, int | None, dict[str, Any]]:
    """Architecture, k of a topk, and what else to tell; a threshold goes to `vectors`."""
    threshold = "activation.threshold"
    if activation == "Relu":
        return "standard", None, {}
    if activation not in ("TopK", "BatchTopK"):
        raise StorageError(f"activation {activation!r} is not read", where=where, hint="read: Relu, TopK, BatchTopK")
    k = params.get("top_k", 32)  # saev's own default
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise StorageError(f"top_k is {k!r}", where=where)
    if activation == "BatchTopK" and threshold in named:
        value = named.number(threshold)
        vectors["threshold"] = torch.full_like(vectors["b_enc"], max(value, 0.0))
        return "jumprelu", None, {"k": k, "threshold": value}
    k = min(k, len(vectors["b_enc"]))  # as saev does
    return "topk", k, {"k": k}
