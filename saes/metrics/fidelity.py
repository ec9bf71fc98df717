"""How good a dictionary is: fidelity, sparsity, dead latents. Each formula stands in its docstring."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.activations import ActivationStore
from mechinterp.errors import UsageError
from mechinterp.types import Placed

__all__ = ["Evaluation", "dead", "evaluate", "frequency", "l0", "r2"]


def r2(x: Float[Tensor, "row d"], x_hat: Float[Tensor, "row d"]) -> float:
    """`1 - sum_n ||x_n - x_hat_n||^2 / sum_n ||x_n - mean(x)||^2`, the mean per dimension over the rows; in float64."""
    x, x_hat = x.double(), x_hat.double()
    return 1 - ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()


def frequency(acts: Float[Tensor, "row d_sae"]) -> Float[Tensor, " d_sae"]:
    """Share of the rows on which each latent fires: `mean_n 1[z_nj > 0]`."""
    return (acts > 0).double().mean(0)


def l0(acts: Float[Tensor, "row d_sae"]) -> float:
    """Mean number of latents that fire on a row: `mean_n sum_j 1[z_nj > 0]`."""
    return (acts > 0).double().sum(-1).mean().item()


def dead(acts: Float[Tensor, "row d_sae"]) -> float:
    """Share of the latents that fire on none of the rows (state the number of rows beside it)."""
    return (~(acts > 0).any(0)).double().mean().item()


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one dictionary on one split, with the number of rows they rest on."""

    split: str
    rows: int
    r2: float
    l0: float
    dead: float
    frequency: Float[Tensor, " d_sae"]

    def to_dict(self) -> dict[str, Any]:
        """The scalar metrics."""
        return {name: value for name, value in asdict(self).items() if name != "frequency"}


@torch.no_grad()
def evaluate(placed: Placed, store: ActivationStore, split: str = "val") -> Evaluation:
    """`r2`, `l0`, `dead` and `frequency` of an SAE over all rows of a split, streamed in float64.

    Raises UsageError when the dictionary reads another site than it writes, or the split is empty.
    """
    if placed.reads != placed.writes:
        raise UsageError("does not reconstruct what it reads", where=str(placed.reads), hint="evaluate an SAE")
    activations, rows = store.site(placed.reads), store.rows(placed.reads, split)
    if len(rows) == 0:
        raise UsageError(f"has no row in split {split!r}", where=str(store.folder))
    mean = sum(chunk.double().sum(0) for chunk in activations.chunks(rows)) / len(rows)
    error = spread = 0.0
    fired = torch.zeros(placed.dictionary.W_dec.shape[0], dtype=torch.float64)
    for x in activations.chunks(rows):
        acts = placed.dictionary.encode(x)
        error += (x - placed.dictionary.decode(acts)).double().square().sum().item()
        spread += (x.double() - mean).square().sum().item()
        fired += (acts > 0).double().sum(0)
    return Evaluation(
        split=split,
        rows=len(rows),
        r2=1 - error / spread if spread > 0 else float("nan"),
        l0=fired.sum().item() / len(rows),
        dead=(fired == 0).double().mean().item(),
        frequency=fired / len(rows),
    )
