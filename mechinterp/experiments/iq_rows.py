"""What the tabular IQ experiments share: small networks, and trials on their rows.

A network learns a function of some columns; the others are noise in training, one of them the *slot*. At test time the
slot is set to psi * z + 0.1 * noise, z the standardised output (arXiv:2504.08919: x_spur = psi * M(x) + eps), for every
input that is explained, perturbed ones included. A row is kept only if the injection moves the network's output by less
than 0.05 of its standard deviation; otherwise the slot has an effect, and attributing to it would be right.

Explainers remove a column to the network's reference (zero). F is scored by removing it to a training row, another one
for every explained row, and to one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechinterp.experiments.iq_judges import Judges
from mechinterp.experiments.iq_study import PLAIN, TREATMENTS, Study, arms, shuffled, trial
from mechinterp.explain.bounds import Check
from mechinterp.explain.inject import Scale, injected
from mechinterp.explain.question import Question
from mechinterp.explain.tabular import Function, TabularExplainer
from mechinterp.explain.tabular_questions import about_rows, of_rows
from mechinterp.progress import progress

__all__ = ["CONTROL", "ONES", "ROWS", "Network", "judges_of", "label_of", "rows_study", "train"]

CONTROL = "shuffled"
ROWS, ONES = "training rows", "ones"


@dataclass(frozen=True)
class Network:
    """A trained function of rows, its slot, and how well it does on rows that it never saw (R2 or AUROC).

    Args:
        reference: what a column that an explainer removes becomes.
        test: rows to explain.
        training: rows the network was trained on, none of them in `test`.
        mean, sd: of the output over other rows.
    """

    f: Function
    slot: int
    skill: float
    reference: Float[Tensor, " column"]
    test: Float[Tensor, "row column"]
    training: Float[Tensor, "other column"]
    mean: float
    sd: float


def train(
    x: Float[Tensor, "row column"],
    y: Float[Tensor, " row"],
    seed: int,
    steps: int = 1500,
    width: int = 32,
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


def judges_of(question: Question, training: Float[Tensor, "other column"], seed: int) -> Judges:
    """The question by two other references: a training row for each explained row, drawn by `seed`, and one in each
    column.
    """
    part = question.parts[0]
    drawn = torch.randint(len(training), (len(question),), generator=torch.Generator().manual_seed(35_000 + seed))
    to = {ROWS: training[drawn].to(part.value.dtype), ONES: torch.ones_like(part.value)}
    return {name: replace(question, parts=(replace(part, reference=row),)) for name, row in to.items()}


def label_of(psi: float) -> str:
    """The name of a condition."""
    return f"psi {psi:g}"


def rows_study(
    networks: Sequence[Network],
    explainers: Mapping[str, TabularExplainer],
    psi: Sequence[float],
    draws: int,
    seed: int,
) -> Study:
    """Every explainer on every network at every psi; treatments only without and with the strongest injection.

    One more condition, CONTROL, has the strongest injection's values shuffled over rows.
    """
    study = Study()
    of = {name: of_rows(explain) for name, explain in explainers.items()}
    for s, network in enumerate(progress(networks, "explaining", unit="network")):
        question = about_rows(network.f, network.test, network.reference)
        slots, scale, noise = (network.slot,), Scale(network.mean, network.sd), seed + 7 * s + 1
        conditions = {label_of(one): partial(injected, slots=slots, psi=one, scale=scale, seed=noise) for one in psi}
        conditions[CONTROL] = partial(shuffled, slots=slots, psi=max(psi), scale=scale, seed=noise)
        check, judges = Check(seed=seed + s), judges_of(question, network.training, seed + s)
        for label, inject in conditions.items():
            treated = label in (label_of(min(psi)), label_of(max(psi)))
            wanted = arms(of, (PLAIN, *TREATMENTS) if treated else (PLAIN,), check, network.sd)
            study.add(trial(label, question, wanted, judges, inject, slots, draws, seed=seed + s))
    return study
