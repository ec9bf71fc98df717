"""What every layout is read into: sae-lens's names and orientation, in double precision, nothing left to fold.

standard   relu(pre)                                     pre = (x - b_dec if centred else x) @ W_enc + b_enc
topk       the k largest of pre, if positive
jumprelu   relu(pre) * (pre > threshold)
gated      ((u + b_gate) > 0) * relu(exp(r_mag) * u + b_mag)      u = (x - b_dec if centred else x) @ W_enc
decode     z @ W_dec + b_dec
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import StorageError, UsageError
from mechinterp.types import Site

__all__ = ["Architecture", "Canonical", "Named", "Weights"]

Architecture = Literal["standard", "topk", "jumprelu", "gated"]

_ENCODER: dict[str, tuple[str, ...]] = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
"""The per-latent vectors of each architecture, beside W_enc, W_dec and b_dec."""


class Named:
    """Tensors of a file, taken by name and shape; an error names the file and the tensor."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str):
        self.tensors, self.where = dict(tensors), where

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str, shape: tuple[int | None, ...]) -> Tensor:
        """The tensor of that name in double precision; None in `shape` is any size of at least 1."""
        if name not in self.tensors:
            raise StorageError(f"lacks {name}", where=self.where, hint=f"it holds {', '.join(sorted(self.tensors))}")
        tensor = self.tensors[name]
        fits = tensor.dim() == len(shape) and all(
            size == want if want is not None else size > 0 for size, want in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            wanted = ["any" if size is None else size for size in shape]
            raise StorageError(f"{name} has shape {list(tensor.shape)}, not {wanted}", where=self.where)
        if tensor.is_complex() or not torch.isfinite(tensor.double()).all():
            raise StorageError(f"{name} holds values that are not finite real numbers", where=self.where)
        return tensor.double()

    def number(self, name: str) -> float:
        """A tensor of one value."""
        return self.take(name, ()).item()


@dataclass(frozen=True)
class Weights:
    """Encoder and decoder as every layout has them."""

    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]


@dataclass(frozen=True)
class Canonical:
    """A dictionary read from somewhere, not yet placed.

    Args:
        vectors: `[d_sae]` each: b_enc; with threshold for jumprelu; b_gate, b_mag and r_mag for gated.
        centred: whether `b_dec` is subtracted before encoding.
        k: active latents, for topk.
        about: what else its files say (class name, k that a threshold stands for, group sizes, ...).
        notes: where what was read departs from what the library in question would compute, or needs to be known.
    """

    architecture: Architecture
    weights: Weights
    vectors: dict[str, Float[Tensor, " d_sae"]]
    centred: bool
    k: int | None = None
    about: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        w = self.weights
        d_in, d_sae = w.W_enc.shape
        shapes = {"W_dec": (w.W_dec, (d_sae, d_in)), "b_dec": (w.b_dec, (d_in,))}
        shapes |= {name: (self.vectors[name], (d_sae,)) for name in _ENCODER[self.architecture]}
        for name, (tensor, shape) in shapes.items():
            if tuple(tensor.shape) != shape:
                raise StorageError(f"{name} has shape {list(tensor.shape)}, not {list(shape)}")
        if (self.k is not None) != (self.architecture == "topk"):
            raise StorageError(f"k is {self.k} in a {self.architecture} dictionary")
        if self.k is not None and not 1 <= self.k <= d_sae:
            raise StorageError(f"k is {self.k}, and there are {d_sae} latents")

    @property
    def d_in(self) -> int:
        """Width of the site."""
        return self.weights.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.weights.W_enc.shape[1]

    def behind(self, mean: Tensor | None, scale: float) -> Canonical:
        """The dictionary for rows as they are, of one that was trained on `(x - mean) / scale`.

        Its activations stay what they were; its reconstruction is `scale * theirs + mean`.
        """
        if mean is not None and tuple(mean.shape) != (self.d_in,):
            raise UsageError(f"has shape {list(mean.shape)}, not [{self.d_in}]", where="mean")
        if not 0 < scale < float("inf"):
            raise UsageError(f"{scale} is not a positive number", where="scale")
        shift = torch.zeros(self.d_in, dtype=torch.float64) if mean is None else mean.double()
        if not torch.isfinite(shift).all():
            raise UsageError("is not finite", where="mean")
        w = self.weights
        W_enc = w.W_enc / scale
        vectors = self.vectors if self.centred else self._shifted(-(shift @ W_enc))
        return replace(self, weights=Weights(W_enc, w.W_dec * scale, w.b_dec * scale + shift), vectors=vectors)

    def with_unit_rows(self) -> Canonical:
        """The same reconstruction from activations in units of what each adds: decoder rows of norm 1."""
        w = self.weights
        norm = w.W_dec.norm(dim=-1).clamp(min=1e-8)  # sae-lens's floor
        vectors = {name: v if name == "r_mag" else v * norm for name, v in self.vectors.items()}
        return replace(self, weights=Weights(w.W_enc * norm, w.W_dec / norm[:, None], w.b_dec), vectors=vectors)

    def with_centring(self, centred: bool) -> Canonical:
        """The same function with `b_dec` subtracted before encoding, or not."""
        if centred == self.centred:
            return self
        through = self.weights.b_dec @ self.weights.W_enc
        return replace(self, centred=centred, vectors=self._shifted(through if centred else -through))

    def _shifted(self, shift: Float[Tensor, " d_sae"]) -> dict[str, Tensor]:
        """The vectors when `shift` is added to what the encoder makes of a row."""
        if self.architecture != "gated":
            return {**self.vectors, "b_enc": self.vectors["b_enc"] + shift}
        v = self.vectors
        return {**v, "b_gate": v["b_gate"] + shift, "b_mag": v["b_mag"] + shift * v["r_mag"].exp()}

    def cfg(self, site: Site) -> dict[str, Any]:
        """sae-lens's inference configuration (the layout of its version 6)."""
        cfg = {
            "architecture": self.architecture,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": self.centred,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {"hook_name": str(site), "sae_lens_version": "6.0.0"},
        }
        return cfg if self.k is None else {**cfg, "k": self.k, "rescale_acts_by_decoder_norm": False}

    def tensors(self) -> dict[str, Float[Tensor, "..."]]:
        """sae-lens's weights, in single precision."""
        named = {name: self.vectors[name] for name in _ENCODER[self.architecture]}
        named |= {"W_enc": self.weights.W_enc, "W_dec": self.weights.W_dec, "b_dec": self.weights.b_dec}
        return {name: tensor.float().contiguous() for name, tensor in named.items()}
