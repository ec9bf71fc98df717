"""The few types that every room speaks."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import UsageError

__all__ = ["Dictionary", "FeatureId", "ImageTextBatch", "Placed", "Site", "Target"]

_SITE = re.compile(r"^(?P<tower>[a-z_]+)(?:\.blocks\.(?P<layer>\d+))?\.(?P<point>(?:[a-z0-9_]+\.)?hook_[a-z0-9_]+)$")


@dataclass(frozen=True, order=True)
class Site:
    """A place in a model, printed and parsed as a TransformerLens-style hook name.

    `Site("vision", 3, "hook_resid_post")` prints `vision.blocks.3.hook_resid_post`;
    `Site("projector", None, "hook_out")` prints `projector.hook_out`.
    """

    tower: str
    layer: int | None
    point: str

    def __str__(self) -> str:
        block = "" if self.layer is None else f".blocks.{self.layer}"
        return f"{self.tower}{block}.{self.point}"

    @classmethod
    def parse(cls, name: str | Site) -> Site:
        """Read a hook name. Raises UsageError when it is not one."""
        if isinstance(name, Site):
            return name
        found = _SITE.match(name)
        if found is None:
            raise UsageError(f"{name!r} is not a hook name", hint="write it like vision.blocks.3.hook_resid_post")
        layer = found["layer"]
        return cls(found["tower"], None if layer is None else int(layer), found["point"])


@dataclass(frozen=True, order=True)
class FeatureId:
    """Latent `index` of the dictionary placed at `site`; printed `SITE:12`."""

    site: Site
    index: int

    def __str__(self) -> str:
        return f"{self.site}:{self.index}"

    @classmethod
    def parse(cls, text: str) -> FeatureId:
        """Read `SITE:12`. Raises UsageError when it is not one."""
        site, _, index = text.rpartition(":")
        if not index.isdigit():
            raise UsageError(f"{text!r} is not a feature", hint="write it like vision.blocks.3.hook_resid_post:12")
        return cls(Site.parse(site), int(index))


@dataclass(frozen=True)
class Target:
    """A question that a model answers with one number per image (larger means more `name`).

    A dual encoder scores `positive` against `negative` (scaled cosine, difference when `negative` is given). A
    generative model is asked `question` and scores the answer token `yes` against `no`. A classifier scores the
    logit of the class called `name` (or `positive`), minus that of the class called `negative` where there is one.
    """

    name: str
    positive: str
    negative: str | None = None
    question: str | None = None
    yes: str = "yes"
    no: str = "no"

    def asked(self) -> str:
        """The question for a generative model, made from the name where none was written."""
        return self.question or f"is there {self.name.replace('_', ' ')} ?"


@dataclass(frozen=True)
class ImageTextBatch:
    """Model-ready inputs: pixels already preprocessed, text already tokenised.

    `ids` names the images so that an error can say which one it was.
    """

    pixel_values: Float[Tensor, "batch channel height width"]
    input_ids: Int[Tensor, "batch token"] | None = None
    attention_mask: Int[Tensor, "batch token"] | None = None
    ids: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.pixel_values.shape[0]

    def __getitem__(self, rows: slice | Int[Tensor, " row"]) -> ImageTextBatch:
        picked = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        return ImageTextBatch(
            self.pixel_values[rows],
            None if self.input_ids is None else self.input_ids[rows],
            None if self.attention_mask is None else self.attention_mask[rows],
            tuple(self.ids[i] for i in picked) if self.ids else (),
        )

    def with_pixels(self, pixel_values: Float[Tensor, "batch channel height width"]) -> ImageTextBatch:
        """The same batch with other pixels (same number of images)."""
        return replace(self, pixel_values=pixel_values)


@runtime_checkable
class Dictionary(Protocol):
    """A sparse dictionary; sae-lens SAEs and our transcoders fit as they are.

    Shapes: `W_enc [d_in, d_sae]`, `W_dec [d_sae, d_in]`, `b_enc [d_sae]`, `b_dec [d_in]`;
    `encode` maps `[..., d_in]` to `[..., d_sae]`, `decode` maps back.
    """

    W_enc: torch.nn.Parameter
    W_dec: torch.nn.Parameter
    b_enc: torch.nn.Parameter
    b_dec: torch.nn.Parameter

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations `[..., d_sae]` of `x [..., d_in]`."""
        ...

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction `[..., d_in]` of feature activations `[..., d_sae]`."""
        ...


@dataclass(frozen=True)
class Placed:
    """A dictionary and where it stands: it encodes what it `reads` and its decoder `writes` there.

    An SAE reads where it writes; a transcoder reads the MLP input and writes the MLP output.
    """

    dictionary: Dictionary
    reads: Site
    writes: Site

    @classmethod
    def sae(cls, dictionary: Dictionary, site: Site | str) -> Placed:
        """Place an SAE, which reads and writes one site."""
        where = Site.parse(site)
        return cls(dictionary, where, where)
