"""How good transcoders are: each by itself, by kind of token, and all in place of their MLPs at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.activations import ActivationStore
from mechinterp.data import ImageData
from mechinterp.metrics.statistics import auroc
from mechinterp.models import HookedVLM
from mechinterp.types import Placed, Target
from saes.metrics import evaluate, r2

IMAGES, BATCH = 300, 50


@dataclass(frozen=True)
class Line:
    """One transcoder on held-out rows: R2 of all and by kind of token, explained share, L0, dead, and what is no news.

    `linear` is the R2 of the least-squares line from what the MLP reads to what it writes, fitted on training rows.
    """

    site: str
    width: int
    k: float
    r2: float
    by_kind: dict[str, float]
    explained: float
    dead: float
    linear: float
    untrained: float

    head: ClassVar[str] = (
        "| MLP | width | L0 | R2 | R2 by kind of token | explained | dead | R2 linear | R2 untrained |"
    )

    def row(self) -> str:
        """As a line of a Markdown table."""
        kinds = ", ".join(f"{kind} {value:.3f}" for kind, value in self.by_kind.items())
        shown = (self.r2, kinds, self.explained, self.dead, self.linear, self.untrained)
        cells = [cell if isinstance(cell, str) else f"{cell:.3f}" for cell in shown]
        return "| " + " | ".join([self.site, str(self.width), f"{self.k:.1f}", *cells]) + " |"


@torch.no_grad()
def measure(placed: Placed, store: ActivationStore, split: str = "test") -> Line:
    """Measure on the patients of a split."""
    rows, kinds = store.rows(placed.reads, split), store.index_of(placed.reads)["kind"].to_numpy()
    y = store.site(placed.writes)[rows]
    y_hat = torch.cat(
        [placed.dictionary.decode(placed.dictionary.encode(x)) for x in store.site(placed.reads).chunks(rows)]
    )
    whole, fit = evaluate(placed, store, split), store.rows(placed.reads, "train")
    line = linear(store.site(placed.reads)[fit], store.site(placed.writes)[fit])
    return Line(
        site=str(placed.writes).removesuffix(".hook_mlp_out"),
        width=placed.dictionary.W_dec.shape[0],
        k=whole.l0,
        r2=whole.r2,
        by_kind={kind: r2(y[of], y_hat[of]) for kind in np.unique(kinds[rows]) for of in [kinds[rows] == kind]},
        explained=1 - ((y - y_hat).double().square().sum() / y.double().square().sum()).item(),
        dead=whole.dead,
        linear=r2(y, line(store.site(placed.reads)[rows])),
        untrained=placed.dictionary.info["metrics_untrained"]["r2"],  # type: ignore[attr-defined]
    )


def linear(x: Float[Tensor, "row d_in"], y: Float[Tensor, "row d_out"]) -> Callable[[Tensor], Tensor]:
    """The least-squares line from x to y, with an intercept; float64."""
    mean_x, mean_y = x.double().mean(0), y.double().mean(0)
    weights = torch.linalg.lstsq(x.double() - mean_x, y.double() - mean_y).solution
    return lambda new: (new.double() - mean_x) @ weights + mean_y


@contextmanager
def mlps_replaced(model: HookedVLM, placed: Sequence[Placed]) -> Iterator[None]:
    """Inside, each MLP writes what its transcoder makes of what the MLP reads."""
    read: dict[str, Tensor] = {}

    def keep(value: Tensor, hook) -> None:
        read[hook.name] = value

    def write(one: Placed):
        return lambda value, hook: one.dictionary.decode(one.dictionary.encode(read[str(one.reads)])).to(value.dtype)

    hooks = [(str(one.reads), keep) for one in placed] + [(str(one.writes), write(one)) for one in placed]
    with model.hooks(fwd_hooks=hooks):
        yield


@dataclass(frozen=True)
class Whole:
    """Scores with the MLPs of some towers replaced, against the model's own: mean over targets."""

    images: int
    auroc: float
    replaced: dict[str, tuple[float, float]]

    def text(self) -> str:
        """In words."""
        parts = [f"{name}: R2 {found[0]:.3f}, mean AUROC {found[1]:.3f}" for name, found in self.replaced.items()]
        return (
            f"With every MLP replaced by its transcoder, scores of {self.images} test images against the model's own "
            f"(mean AUROC {self.auroc:.3f}; R2 of the scores about their mean, mean over what is asked): "
            f"{'; '.join(parts)}."
        )


@torch.no_grad()
def whole(model: HookedVLM, placed: Sequence[Placed], data: ImageData, targets: Sequence[Target]) -> Whole:
    """Replace the MLPs of the vision tower, of the language side, and of both."""
    rows = np.flatnonzero(data.split == "test")[:IMAGES]
    truth = [next(a for a in data.attributes if a.name.endswith(target.name)).values[rows] for target in targets]
    own, replaced = scores(model, data, rows, targets), {}

    def mean_auroc(found: Tensor) -> float:
        return float(np.nanmean([auroc(found[:, k].numpy(), labels) for k, labels in enumerate(truth)]))

    for name, towers in (("vision", ("vision",)), ("text", ("text",)), ("both", ("vision", "text"))):
        with mlps_replaced(model, [one for one in placed if one.reads.tower in towers]):
            found = scores(model, data, rows, targets)
        same = [r2(own[:, k : k + 1], found[:, k : k + 1]) for k in range(len(targets))]
        replaced[name] = (float(np.mean(same)), mean_auroc(found))
    return Whole(len(rows), mean_auroc(own), replaced)


def scores(model: HookedVLM, data: ImageData, rows: np.ndarray, targets: Sequence[Target]) -> Tensor:
    """`[image, target]`; a dual encoder's text side is computed here, not taken from what the model keeps."""
    dual, found = "text.hook_logits" not in model.sites(), []
    if dual:
        sides = [[target.positive for target in targets], [target.negative or "" for target in targets]]
        positive, negative = (torch.nn.functional.normalize(model.encode_text(side), dim=-1) for side in sides)
    for part in np.array_split(rows, max(1, len(rows) // BATCH)):
        pixels = data.pixels(part)
        if dual:
            image = torch.nn.functional.normalize(model.encode_image(model.preprocess(pixels)), dim=-1)
            found.append(image @ (positive - negative).T)
        else:
            found.append(torch.cat([model.score(model.prepare(pixels, [t]), [t]) for t in targets], 1))
    return torch.cat(found).double()
