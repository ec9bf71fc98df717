"""What the tabular IQ experiments share: small networks, the injected column, and paired differences.

A network learns a function of some columns; the others are noise in training, one of them the *slot*. At test time the
slot is set to `psi * output + noise` (arXiv:2504.08919: x_spur = psi * M(x) + eps), for every input that is explained,
perturbed ones included, because that is how a spurious column would arrive. A row is kept only if the injection moves
the network's output by less than 0.05 of its standard deviation; otherwise the slot has an effect, and attributing to
it would be right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechinterp.explain.tabular import Function, TabularExplainer, effects
from mechinterp.metrics.iq import IQScores, Measurement, iq
from mechinterp.metrics.iq.measure import perturbed_rows
from mechinterp.metrics.statistics import PatientBootstrap, holm, percentile_interval, sign_flip_p

__all__ = ["Difference", "Network", "compare", "inject", "measure", "paired", "train"]

GATE = 0.05  # of the standard deviation of the output


@dataclass(frozen=True)
class Network:
    """A trained function of rows, its slot, the spread of its output, and R2 (or AUROC) on rows it never saw."""

    f: Function
    slot: int
    sd: float
    skill: float
    reference: Float[Tensor, " column"]


def train(
    x: Float[Tensor, "row column"],
    y: Float[Tensor, " row"],
    seed: int,
    steps: int = 1500,
    width: int = 64,
    binary: bool = False,
    decay: float = 1e-4,
) -> nn.Module:
    """Two hidden layers of tanh, trained by Adam on all rows at once; logits when `binary`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (x.shape[1], width, width, 1)
    layers: list[nn.Module] = []
    for i, (m, n) in enumerate(pairwise(sizes)):
        layer = nn.Linear(m, n, dtype=x.dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(n, m, generator=generator, dtype=x.dtype) / m**0.5)
            layer.bias.zero_()
        layers += [layer] if i == len(sizes) - 2 else [layer, nn.Tanh()]
    net = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss_of = nn.functional.binary_cross_entropy_with_logits if binary else nn.functional.mse_loss
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(net(x)[:, 0], y).backward()
        optimizer.step()
        schedule.step()
    return net.requires_grad_(False)


def inject(
    network: Network, x: Float[Tensor, "*batch column"], psi: float, seed: int
) -> Float[Tensor, "*batch column"]:
    """The rows with the slot set to `psi * output + 0.1 sd noise`; the rows themselves for `psi` 0."""
    if psi == 0:
        return x
    flat = x.flatten(0, -2).clone()
    with torch.no_grad():
        y = network.f(flat)
    noise = torch.randn(len(flat), generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    flat[:, network.slot] = psi * y + 0.1 * network.sd * noise
    return flat.view(x.shape)


def measure(
    network: Network,
    explainers: Mapping[str, TabularExplainer],
    x: Float[Tensor, "row column"],
    psi: float,
    draws: int,
    noise: float,
    seed: int,
) -> tuple[dict[str, Measurement], np.ndarray]:
    """A Measurement of each explainer under injection `psi`, and which rows pass the gate."""
    around = perturbed_rows(x, draws, noise, seed=seed)
    both = inject(network, torch.cat([x[:, None], around], dim=1), psi, seed + 1)
    flat = both.flatten(0, 1)
    with torch.no_grad():
        output = network.f(flat).view(both.shape[:2])
        clean = network.f(x)
    effect = effects(network.f, both, network.reference).numpy()
    kept = ((output[:, 0] - clean).abs() <= GATE * network.sd).numpy()
    found = {}
    for i, (name, explain) in enumerate(explainers.items()):
        generator = torch.Generator().manual_seed(1_000 * seed + i)
        a = explain(network.f, flat, network.reference, generator).view(both.shape).detach().numpy()
        y = output.numpy()
        # an effect below a hundredth of the largest is the network's leftover, not a use of the column
        found[name] = Measurement(a[:, 0], y[:, 0], a[:, 1:], y[:, 1:], effect[:, 0], effect[:, 1:], tolerance=1e-2)
    return found, kept


def compare(
    measured: Mapping[str, Measurement],
) -> dict[str, IQScores]:
    """IQ of each explainer."""
    return {name: iq(m) for name, m in measured.items()}


@dataclass(frozen=True)
class Difference:
    """A paired mean difference over rows, its bootstrap interval, and a sign-flip p."""

    value: float
    ci95: tuple[float, float]
    p: float
    n: int


def paired(
    after: Float[np.ndarray, " row"], before: Float[np.ndarray, " row"], kept: np.ndarray, seed: int = 0
) -> Difference:
    """`after - before` over the kept rows where both are defined; nan without any."""
    both = kept & np.isfinite(after) & np.isfinite(before)
    change = (after - before)[both]
    if len(change) < 5:
        return Difference(float("nan"), (float("nan"), float("nan")), float("nan"), len(change))
    boot = PatientBootstrap.of([str(i) for i in range(len(change))], draws=2000, seed=seed)
    return Difference(
        float(change.mean()), percentile_interval(boot.mean(change)), sign_flip_p(change, seed=seed), len(change)
    )


def corrected(differences: Mapping[str, Difference]) -> dict[str, float]:
    """Holm-adjusted p of each."""
    return dict(zip(differences, holm(np.array([d.p for d in differences.values()])).tolist(), strict=True))
