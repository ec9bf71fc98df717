"""iq-tabular: does an injected column turn explanations around, and do RBP and bounds turn them back?

1. Networks (several seeds) learn y = x1 sin(x2) from six columns; x3 to x6 are noise in training.
2. At test time x3 = psi * z + noise, z the standardised output. R, F, IS, R_null and R_excess at each psi.
3. The same explainers under RBP (lambda 0.1, three perturbations, 5 %; lambda 10), and bounds.
4. Control: the injected values shuffled over rows.

The published directions are that injection raises R, lowers F and raises IS, and that RBP lowers IS (arXiv:2504.08919).
About 2 minutes on one core.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mechinterp.experiments.iq_judges import left_out_note
from mechinterp.experiments.iq_page import Layout, injection_result
from mechinterp.experiments.iq_rows import CONTROL, Network, label_of, rows_study, train
from mechinterp.experiments.result import Result
from mechinterp.explain.tabular import EXPLAINERS
from mechinterp.explain.tabular_questions import about_rows
from mechinterp.metrics.iq import expected_absolute_r
from mechinterp.progress import progress

__all__ = ["Sizes", "network_of", "run"]

ANCHORS = ("random", "constant", "echo")


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    rows: int = 24
    seeds: int = 10
    draws: int = 30
    steps: int = 1500
    psi: tuple[float, ...] = (0.0, 0.2, 0.5, 0.8)


QUICK = Sizes(rows=8, seeds=1, draws=3, steps=150, psi=(0.0, 0.8))


def network_of(seed: int, steps: int, rows: int) -> Network:
    """A network that learnt x1 sin(x2) from columns in [-2, 2]; its skill is R2 on 1,000 other rows."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    x = torch.rand(2000 + rows, 6, generator=generator, dtype=torch.float64) * 4 - 2
    y = x[:, 0] * torch.sin(x[:, 1])
    net = train(x[:1000], y[:1000], seed, steps)
    with torch.no_grad():
        out = net(x[1000:2000])[:, 0]
    skill = 1 - float((out - y[1000:2000]).square().mean() / y[1000:2000].var())
    zero = torch.zeros(6, dtype=torch.float64)
    return Network(
        lambda some: net(some)[:, 0], 2, skill, zero, x[2000:], x[:1000], float(out.mean()), float(out.std())
    )


def run(seed: int = 0, quick: bool = False, sizes: Sizes | None = None) -> Result:
    """Run the experiment. `sizes` overrides both versions."""
    size = sizes or (QUICK if quick else Sizes())
    networks = [
        network_of(seed * 100 + s, size.steps, size.rows)
        for s in progress(range(size.seeds), "networks", unit="network")
    ]
    study = rows_study(networks, EXPLAINERS, size.psi, size.draws, seed)
    real = tuple(n for n in EXPLAINERS if n not in ANCHORS)
    line = tuple((label_of(p), p) for p in size.psi)
    layout = Layout(line[0][0], line[-1][0], line, real, ANCHORS, "the injected column", ("occlusion",), (), CONTROL)
    skills = [n.skill for n in networks]
    notes = [
        f"R2 of the networks on unseen rows: {min(skills):.3f} to {max(skills):.3f} over {len(skills)} seeds.",
        f"R by chance with {size.draws} draws: {expected_absolute_r(size.draws):.3f}.",
        "F is scored by removing a column to its value in a training row ('by ones': to one); explainers remove it to "
        "zero. occlusion removes single columns as F does, though to another value, so no claim about F counts it. "
        "lime is the surrogate's coefficients; lime_times_input multiplies them by the distance from the reference.",
    ]
    notes.append(left_out_note([(about_rows(n.f, n.test, n.reference), n.sd) for n in networks], seed))
    return injection_result(study, layout, notes)
