"""HookedVLM: an unchanged transformers model, seen and edited through TransformerLens hook points.

With no hook in use its output is the plain model's, bit for bit, because it is the plain model that runs. Where hooks
are in use, PyTorch hooks are put on the modules concerned for the length of one call and are taken off again, also
after an error (`taps.py`). Names are TransformerLens's, one set for each tower: `vision.blocks.3.hook_resid_post`,
`text.blocks.0.attn.hook_pattern`, `projector.hook_out`, `text.hook_logits`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule

from mechinterp.errors import ModelError, UsageError
from mechinterp.models import attention, scoring
from mechinterp.models.grid import Grid
from mechinterp.models.heads import inputs_of
from mechinterp.models.scoring import TextSide
from mechinterp.models.tables import Dual, Family, Generative
from mechinterp.models.taps import attached, in_use
from mechinterp.models.wiring import family_of, wire_up
from mechinterp.types import ImageTextBatch, Target

__all__ = ["HookedVLM"]

Names = str | Sequence[str] | Callable[[str], bool] | None


class HookedVLM(HookedRootModule):
    """A transformers vision-language model with hook points, its own preprocessing, and scores for targets.

    Args:
        hf: a built transformers model of a known family (`mechinterp.models.tables()`). It stays as it is.
        processor: its transformers processor, or anything with an `image_processor` and, for models that read text,
            a `tokenizer`.
        name: what to call it in reports.

    Raises ModelError when the family is unknown, a part is missing, or preprocessor and model do not fit together.
    """

    def __init__(self, hf: nn.Module, processor: Any, name: str = "model"):
        super().__init__()
        self._family = family_of(hf)
        wiring = wire_up(hf, self._family)
        self.hf: Any = hf
        self.processor = processor
        self.label = name
        self.hook_dict = wiring.points
        self.mod_dict: dict[str, nn.Module] = dict(wiring.points)
        self._taps, self._blocks = wiring.taps, wiring.blocks
        self._attached = False
        self.image_processor, self.tokenizer = scoring.parts_of(processor, self._family)
        self._grid = Grid.of(hf, self._family, self.image_processor)
        self._text = TextSide()
        implementation = hf.config._attn_implementation  # type: ignore[union-attr]
        if implementation != "sdpa":
            raise ModelError(
                f"uses the attention implementation {implementation!r}",
                where=type(hf).__name__,
                hint='call hf.set_attn_implementation("sdpa") first',
            )
        attention.register()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        allow_moving: bool = False,
    ) -> HookedVLM:
        """Open a bundled name, a transformers folder, or a hub id pinned to a commit. See `loading.load`."""
        from mechinterp.models.loading import load

        hf, processor = load(model, revision=revision, dtype=dtype, allow_moving=allow_moving)
        return cls(hf, processor, name=str(model) if not Path(model).is_dir() else Path(model).resolve().name)

    # ------------------------------------------------------------------------------------------ what there is

    @property
    def family(self) -> str:
        """Name of the family: clip, siglip, llava, gemma3, dinov2 or vit."""
        return self._family.name

    @property
    def table(self) -> Family:
        """The family's table."""
        return self._family

    @property
    def towers(self) -> tuple[str, ...]:
        """The towers that have blocks: vision, and text where there is one."""
        return tuple(self._blocks)

    def sites(self, pattern: str = "*") -> list[str]:
        """Hook names that match a glob, in the order in which a value meets them."""
        return [name for name in self.hook_dict if fnmatchcase(name, pattern)]

    def blocks(self, tower: str = "vision") -> Sequence[nn.Module]:
        """The transformer blocks of a tower that can matter to the output."""
        if tower not in self._blocks:
            raise UsageError(f"the {self.family} family has no {tower} tower", hint=f"it has {', '.join(self.towers)}")
        return self._blocks[tower]

    def n_layers(self, tower: str = "vision") -> int:
        """Number of blocks with hook points (a LLaVA projector may leave the last vision blocks unread)."""
        return len(self.blocks(tower))

    def d_model(self, tower: str = "vision") -> int:
        """Width of the residual stream of a tower."""
        self.blocks(tower)  # raises where there is no such tower
        return int(getattr(self.hf.config, f"{tower}_config", self.hf.config).hidden_size)

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self._grid.shape

    @property
    def cls_token(self) -> int | None:
        """Position of the CLS token in the vision tower, or None."""
        return self._grid.cls

    def patch_tokens(self, batch: ImageTextBatch | None = None) -> slice:
        """Positions of the patch tokens in the vision tower, row by row from the upper left."""
        return self._grid.tokens

    def grid(self, height: int, width: int) -> Int[Tensor, "height width"]:
        """Position (in the vision tower) of the patch token that owns each pixel of an image; -1: cropped away."""
        return self._grid.owners(height, width)

    @property
    def sha256(self) -> str:
        """Hash of the weights: names, dtypes, shapes and bytes."""
        return scoring.weights_hash(self.hf)

    # ------------------------------------------------------------------------------------------------ inputs

    def preprocess(
        self, pixels: np.ndarray | Tensor, texts: Sequence[str] | None = None, ids: Sequence[str] = ()
    ) -> ImageTextBatch:
        """Images `[n, h, w]` or `[n, h, w, 3]` in [0, 1], with a caption each (or one for all), to a batch.

        Raises DataError when the pixels are out of range, UsageError when the numbers do not match.
        """
        values = self.image_processor(pixels)
        self._grid.check(values)
        rows = len(values)
        if ids and len(ids) != rows:
            raise UsageError(f"{len(ids)} ids for {rows} images")
        if texts is None:
            return ImageTextBatch(values, ids=tuple(ids))
        if len(texts) not in (1, rows):
            raise UsageError(f"{len(texts)} texts for {rows} images", hint="give one for each, or one for all")
        found = scoring.text_inputs(self, list(texts) * (rows if len(texts) == 1 else 1))
        return ImageTextBatch(values, found["input_ids"], found.get("attention_mask"), tuple(ids))

    def prepare(
        self, pixels: np.ndarray | Tensor, targets: Sequence[Target], ids: Sequence[str] = ()
    ) -> ImageTextBatch:
        """The batch that `score(batch, targets)` needs: for a generative model, with the targets' question.

        Raises UsageError when the targets ask a generative model different questions.
        """
        batch = self.preprocess(pixels, ids=ids)
        if not isinstance(self._family.head, Generative):
            return batch
        return scoring.with_prompt(self, batch, scoring.one_question(targets))

    # ----------------------------------------------------------------------------------------------- running

    def forward(self, batch: ImageTextBatch) -> Any:
        """The transformers model's own output. A dual encoder given no text runs its image side alone."""
        with self.attached():
            inputs = inputs_of(self.hf, self._family, batch)
            if isinstance(self._family.head, Dual) and batch.input_ids is None:
                return self.hf.get_image_features(**inputs)
            if isinstance(self._family.head, Generative) and batch.input_ids is None:
                raise UsageError("a generative model needs a prompt", hint="make the batch with prepare()")
            return self.hf(**inputs)

    def score(self, batch: ImageTextBatch, targets: Sequence[Target]) -> Float[Tensor, "batch target"]:
        """One number per image and target, larger means more of it; differentiable on the image side.

        The text side of a dual encoder is computed once and kept, without gradient, unless a text hook is in use.
        """
        with self.attached():
            return scoring.score(self, batch, targets)

    def run_from(
        self,
        site: str,
        value: Float[Tensor, "batch pos d_model"],
        batch: ImageTextBatch,
        targets: Sequence[Target],
    ) -> Float[Tensor, "batch target"]:
        """Scores with a vision block's `hook_resid_pre` or `hook_resid_post` set to `value`.

        Computes only what comes after. `batch` gives the prompts, one row per row of `value`; its pixels are not read.
        """
        from mechinterp.models.resume import run_from

        with self.attached():
            return run_from(self, site, value, batch, targets)

    def encode_image(self, batch: ImageTextBatch) -> Float[Tensor, "batch d"]:
        """Image embedding, unnormalised: projected (dual), mean of the image tokens (generative), or pooled."""
        with self.attached():
            return scoring.encode_image(self, batch)

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "text d"]:
        """Text embedding of a dual encoder, projected and unnormalised."""
        with self.attached():
            return scoring.encode_text(self, texts)

    def generate_report(self, batch: ImageTextBatch, max_new_tokens: int = 96, prompt: str | None = None) -> list[str]:
        """Greedy answer to the batch's prompt, or to `prompt`, or to the model's own report prompt."""
        with self.attached():
            return scoring.generate(self, batch, max_new_tokens, prompt)

    def verify(self, batch: ImageTextBatch) -> dict[str, Any]:
        """Compare this model with the plain transformers model on a batch, with every hook point being read."""
        from mechinterp.models.doctor import parity

        return parity(self, batch)

    # ------------------------------------------------------------------------------------------------- hooks

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Put the hook points in use onto the modules, for the length of one call (inner calls share it)."""
        if self._attached:
            yield
            return
        self._attached = True
        try:
            with attached(self._taps):
                yield
        finally:
            self._attached = False

    def hooked(self, pattern: str = "*") -> bool:
        """Whether a hook is in use on any point that matches the glob."""
        return any(in_use(p) for name, p in self.hook_dict.items() if fnmatchcase(name, pattern))

    def point(self, name: str) -> HookPoint:
        """The hook point of that name. Raises ModelError naming the nearest ones."""
        if name not in self.hook_dict:
            near = difflib.get_close_matches(name, self.hook_dict, n=3) or list(self.hook_dict)[:3]
            raise ModelError(
                f"has no hook point {name!r}", where=self.label, hint=f"such as {', '.join(near)}; sites() lists all"
            )
        return self.hook_dict[name]

    def _enable_hook_with_name(self, name: str, hook: Callable, dir: Literal["fwd", "bwd"]) -> None:
        self.point(name).add_hook(hook, dir=dir, level=self.context_level)

    def run_with_cache(self, *args: Any, names_filter: Names = None, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """Run and keep activations: `names_filter` is a name, a glob, several of them, or a predicate.

        Raises ModelError for an unknown name, UsageError when a named point was not reached (no text in the batch).
        """
        if names_filter is None or callable(names_filter):
            return super().run_with_cache(*args, names_filter=names_filter, **kwargs)
        names = self._named([names_filter] if isinstance(names_filter, str) else names_filter)
        output, cache = super().run_with_cache(*args, names_filter=names, **kwargs)
        missed = [name for name in names if name not in cache]
        if missed:
            raise UsageError(f"the run did not reach {', '.join(missed[:3])}", hint="does the batch hold text?")
        return output, cache

    def _named(self, patterns: Sequence[str]) -> list[str]:
        """Hook names of names and globs. Raises ModelError where nothing answers to one."""
        names: list[str] = []
        for pattern in patterns:
            found = self.sites(pattern) if "*" in pattern else []
            if not found:
                self.point(pattern)
            names += found or [pattern]
        return names
