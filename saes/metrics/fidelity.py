"""How good a dictionary is: fidelity, sparsity, dead latents. Each formula stands in its docstring."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mechinterp.activations import ActivationStore
from mechinterp.errors import UsageError
from mechinterp.types import Placed
from saes.tokens import rows_for

__all__ = [
    "Evaluation",
    "FrequencyHistogram",
    "bias_share",
    "c_dec",
    "dead",
    "evaluate",
    "frequency",
    "frequency_histogram",
    "kl_score",
    "l0",
    "loss_recovered",
    "r2",
    "relative_reconstruction_bias",
    "shrinkage",
]


def r2(x: Float[Tensor, "row d"], x_hat: Float[Tensor, "row d"]) -> float:
    """`1 - sum_n ||x_n - x_hat_n||^2 / sum_n ||x_n - mean(x)||^2`, the mean per dimension over the rows; in float64."""
    x, x_hat = x.double(), x_hat.double()
    return 1 - ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()


def bias_share(x: Float[Tensor, "row d"], x_hat: Float[Tensor, "row d"]) -> float:
    """Share of the squared error that is a constant offset: `N ||mean(x - x_hat)||^2 / sum_n ||x_n - x_hat_n||^2`.

    What `Var(x - x_hat) / Var(x)` leaves out of the error, so that 1 minus it can exceed R2. nan without error.
    """
    error = (x - x_hat).double()
    total = error.square().sum().item()
    return len(error) * error.mean(0).square().sum().item() / total if total > 0 else float("nan")


def shrinkage(x: Float[Tensor, "row d"], x_hat: Float[Tensor, "row d"], least: float = 1e-6) -> float:
    """`mean_n ||x_hat_n|| / ||x_n||` over rows longer than `least` (sae-lens's definition); below 1 is shrinkage."""
    x, x_hat = x.double(), x_hat.double()
    norm = x.norm(dim=-1)
    long = norm > least
    return (x_hat.norm(dim=-1)[long] / norm[long]).mean().item() if long.any() else float("nan")


def relative_reconstruction_bias(x: Float[Tensor, "row d"], x_hat: Float[Tensor, "row d"]) -> float:
    """`gamma = E ||x_hat||^2 / E <x_hat, x>`; 1 is unbiased, below 1 shrinks (arXiv:2404.16014, equation 10)."""
    x, x_hat = x.double(), x_hat.double()
    along = (x * x_hat).sum(-1).mean().item()
    return x_hat.square().sum(-1).mean().item() / along if along != 0 else float("nan")


def loss_recovered(clean: float, reconstructed: float, ablated: float, least: float = 0.01) -> float:
    """`(L_ablated - L_reconstructed) / (L_ablated - L_clean)` (arXiv:2404.16014 and others).

    nan when removing the whole site hardly matters, `|L_ablated - L_clean| < least * max(|L_ablated|, |L_clean|)`:
    the quotient is then noise (a library reports 135.8 % from losses of 6.768 and 6.762).
    """
    reach = ablated - clean
    if not abs(reach) >= least * max(abs(ablated), abs(clean)) or reach == 0:
        return float("nan")
    return (ablated - reconstructed) / reach


def kl_score(reconstructed: float, ablated: float, least: float = 1e-6) -> float:
    """`1 - KL(clean || reconstructed) / KL(clean || ablated)` (SAEBench, core); nan when ablation changes nothing."""
    return 1 - reconstructed / ablated if ablated > least else float("nan")


def c_dec(W_dec: Float[Tensor, "d_sae d_out"]) -> float:
    """`mean_{i<j} |cos(D_i, D_j)|`, to be minimised over L0 (arXiv:2508.16560). Zero rows are left out."""
    unit = W_dec.double()
    unit = unit[unit.norm(dim=-1) > 0]
    if len(unit) < 2:
        return float("nan")
    unit = unit / unit.norm(dim=-1, keepdim=True)
    total = sum((unit[i : i + 1024] @ unit.T).abs().sum().item() for i in range(0, len(unit), 1024))
    return (total - len(unit)) / (len(unit) * (len(unit) - 1))


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
class FrequencyHistogram:
    """How often latents fire: `counts[i]` latents have log10 frequency in `[edges[i], edges[i + 1])`.

    Latents that never fired in `rows` rows are `dead`, not in a bin; the lowest edge is log10(1 / rows).
    """

    edges: Float[Tensor, " edge"]
    counts: Int64[Tensor, " bin"]
    dead: int
    rows: int


def frequency_histogram(frequencies: Float[Tensor, " d_sae"], rows: int, bins: int = 20) -> FrequencyHistogram:
    """Histogram of log10 firing frequency, dead latents counted apart (Bricken et al. 2023, feature density)."""
    alive = frequencies[frequencies > 0].double()
    edges = torch.linspace(math.log10(1 / rows), 0, bins + 1, dtype=torch.float64)
    place = torch.bucketize(alive.log10(), edges, right=True) - 1
    counts = torch.bincount(place.clamp(0, bins - 1), minlength=bins)
    return FrequencyHistogram(edges, counts, dead=len(frequencies) - len(alive), rows=rows)


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
    """`r2`, `l0`, `dead` and `frequency` over all rows of a split, streamed in float64.

    Of a transcoder, R2 is that of what it writes: `x_hat` is made from the site it reads.

    Rows are those of the token kinds that the dictionary was trained on.

    Raises UsageError when the two sites of a transcoder do not have the same rows, or the split is empty.
    """
    source, target = store.site(placed.reads), store.site(placed.writes)
    if placed.reads != placed.writes and not store.index_of(placed.reads).equals(store.index_of(placed.writes)):
        raise UsageError("has other rows than the site it reads", where=str(placed.writes), hint="extract both alike")
    rows = rows_for(placed, store, split)
    if len(rows) == 0:
        raise UsageError(f"has no row in split {split!r}", where=str(store.folder))
    mean = sum(chunk.double().sum(0) for chunk in target.chunks(rows)) / len(rows)
    error = spread = 0.0
    fired = torch.zeros(placed.dictionary.W_dec.shape[0], dtype=torch.float64)
    for x, y in zip(source.chunks(rows), target.chunks(rows), strict=True):
        acts = placed.dictionary.encode(x)
        y_hat = placed.dictionary.decode(acts)
        skip = getattr(placed.dictionary, "W_skip", None)
        if skip is not None:  # the linear path of a skip transcoder (arXiv:2501.18823)
            y_hat = y_hat + x @ skip
        error += (y - y_hat).double().square().sum().item()
        spread += (y.double() - mean).square().sum().item()
        fired += (acts > 0).double().sum(0)
    return Evaluation(
        split=split,
        rows=len(rows),
        r2=1 - error / spread if spread > 0 else float("nan"),
        l0=fired.sum().item() / len(rows),
        dead=(fired == 0).double().mean().item(),
        frequency=fired / len(rows),
    )
