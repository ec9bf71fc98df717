"""iq-shapley-rbp: which stability does RBP need, is our own mitigation better, and what can IS be bought with?

1. On *development* functions, candidates for our own mitigation are tried. The one that gains most F_dist less
   R_excess, both of which compare with true effects, is taken.
2. On *other* functions (exactly known ones, and networks trained on further ones) it and bounds, which ship, stand
   beside RBP (as written; on shares; with lambda 10), and, for Shapley values, beside a shrinkage by variance over
   coalition sizes instead of over perturbed inputs.
3. Controls: scaling to shares alone, RBP's shrinkage dealt to the wrong elements, 10 % of noise, the check alone.

The removal in our mitigation is of random sets of at least two columns, to zero or to other rows; F is scored by
removing one at a time, to one on the development functions, as candidates use both other fills; on the test functions
to a training row too, where the chosen form does not use those.
About 2 minutes on one core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn.functional import softplus

from mechinterp.experiments.iq_judges import RBP_SAME
from mechinterp.experiments.iq_rows import ONES, ROWS, judges_of, train
from mechinterp.experiments.iq_shapley_page import Judged, shapley_result
from mechinterp.experiments.iq_study import PLAIN, Arm, Study, trial
from mechinterp.experiments.iq_treatments import (
    FROM_ROWS,
    Treatment,
    check_alone,
    forms,
    jittered,
    shares_only,
    shuffled_rbp,
)
from mechinterp.experiments.result import Result
from mechinterp.explain.bounds import Check
from mechinterp.explain.inject import GATE
from mechinterp.explain.question import Values
from mechinterp.explain.rbp import shapley_rbp, with_rbp
from mechinterp.explain.tabular import EXPLAINERS, Function
from mechinterp.explain.tabular_questions import about_rows, of_rows
from mechinterp.metrics.faithfulness import Removal, scored_by
from mechinterp.progress import progress

__all__ = ["DEVELOPMENT", "TESTS", "Sizes", "choose", "run"]

REAL = ("shapley", "kernel_shap", "lime", "gradient_times_input", "integrated_gradients")
ANCHORS = ("random", "echo")
COLUMNS = 6

DEVELOPMENT: dict[str, Function] = {
    "x1^2/2 + x2 x3": lambda x: x[:, 0] ** 2 / 2 + x[:, 1] * x[:, 2],
    "tanh(2 x1) + x2 - x3 x4 / 2": lambda x: torch.tanh(2 * x[:, 0]) + x[:, 1] - x[:, 2] * x[:, 3] / 2,
    "softplus(2 x1 + 2 x2) - x3": lambda x: softplus(2 * (x[:, 0] + x[:, 1])) - x[:, 2],
}
TESTS: dict[str, Function] = {
    "x1 sin(x2)": lambda x: x[:, 0] * torch.sin(x[:, 1]),
    "2 x1 - x2 + x3 / 2": lambda x: 2 * x[:, 0] - x[:, 1] + x[:, 2] / 2,
    "x1 x2 x3 + cos(x4)": lambda x: x[:, 0] * x[:, 1] * x[:, 2] + torch.cos(x[:, 3]),
}
LEARNT: dict[str, Function] = {
    "network of x1 sin(x2)": TESTS["x1 sin(x2)"],
    "network of |x1| + x2 x3": lambda x: x[:, 0].abs() + x[:, 1] * x[:, 2],
    "network of exp(-x1^2) x2 + x3": lambda x: torch.exp(-(x[:, 0] ** 2)) * x[:, 1] + x[:, 2],
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything; `few` cuts the functions and explainers to one or two of each."""

    rows: int = 40
    draws: int = 30
    steps: int = 800
    few: bool = False


QUICK = Sizes(rows=8, draws=5, steps=30, few=True)


def run(seed: int = 0, quick: bool = False, sizes: Sizes | None = None) -> Result:
    """Run the experiment. `sizes` overrides both versions."""
    size = sizes or (QUICK if quick else Sizes())
    keep = 2 if size.few else 99
    names = (*REAL[:keep], *ANCHORS)
    study = Study()
    for i, f in enumerate(list(DEVELOPMENT.values())[: keep - 1]):
        _measure(study, "development", f, names, size, seed * 100 + i, _forms, (ONES,))
    chosen, table = choose(study, names[: -len(ANCHORS)])
    tests = list(TESTS.values())[:keep] + [
        _network(f, seed * 100 + i, size.steps) for i, f in enumerate(list(LEARNT.values())[: keep - 1])
    ]
    fill = Removal(f"{ROWS}+zero" if FROM_ROWS in chosen else "zero")
    judges = tuple(by.fill for by in scored_by("subset_fill", fill, (Removal(ROWS), Removal(ONES))))
    for i, f in enumerate(progress(tests, "functions", unit="function")):
        _measure(study, "test", f, names, size, seed * 100 + 50 + i, partial(_treatments, chosen), judges)
    judged = Judged(names[: -len(ANCHORS)], ANCHORS, chosen, table, tuple(TESTS), tuple(LEARNT))
    return shapley_result(study, judged)


def _treatments(chosen: str, background: Values, sd: float, seed: int) -> dict[str, Treatment]:
    """All treatments of the test functions. "bounds" is what ships, "own" the form chosen on the development functions.

    Args:
        sd: of the output.
    """
    return {
        "RBP": partial(with_rbp, as_written=True),
        RBP_SAME: partial(with_rbp, as_written=True, tolerance=GATE * sd),
        "RBP on shares": with_rbp,
        "RBP, lambda 10": partial(with_rbp, as_written=True, strength=10.0),
        "bounds": forms(background, seed)["bounds, 2 errors"],
        "own": forms(background, seed)[chosen],
        "shares only": shares_only,
        "RBP, lambda 10, dealt at random": partial(shuffled_rbp, strength=10.0),
        "10 % of noise": jittered,
        "check alone": lambda explain: check_alone(Check(seed=seed)),
    }


def _forms(background: Values, sd: float, seed: int) -> dict[str, Treatment]:
    """The candidates; none of them asks for the output's spread."""
    return forms(background, seed)


def _measure(
    study: Study, condition: str, f: Function, names, size: Sizes, seed: int, of, judges: tuple[str, ...]
) -> None:
    generator = torch.Generator().manual_seed(30_000 + seed)
    x = torch.rand(size.rows + 256, COLUMNS, generator=generator, dtype=torch.float64) * 4 - 2
    question = about_rows(f, x[: size.rows], torch.zeros(COLUMNS, dtype=torch.float64))
    background = (x[size.rows :],)
    sd = float(f(x[size.rows :]).std())
    treatments: Mapping[str, Treatment] = of(background, sd, seed)
    judged = judges_of(question, x[size.rows :], seed)
    wanted = []
    for name in names:
        explain = of_rows(EXPLAINERS[name])
        wanted.append(Arm(name, PLAIN, explain))
        wanted += [Arm(name, label, treat(explain)) for label, treat in treatments.items()]
    if condition == "test":
        wanted += [
            Arm("shapley", f"coalition sizes, lambda {s:g}", of_rows(shapley_rbp(strength=s))) for s in (0.1, 10.0)
        ]
        exact = of_rows(EXPLAINERS["shapley"])
        wanted += [Arm("shapley", "RBP on shares, lambda 10", with_rbp(exact, strength=10.0))]
    study.add(trial(condition, question, wanted, {n: judged[n] for n in judges}, draws=size.draws, seed=seed))


def _network(f: Function, seed: int, steps: int) -> Function:
    """A network that learnt f: its columns without effect have a little of it left."""
    generator = torch.Generator().manual_seed(40_000 + seed)
    x = torch.rand(1000, COLUMNS, generator=generator, dtype=torch.float64) * 4 - 2
    net = train(x, f(x), seed, steps)
    return lambda rows: net(rows)[:, 0]


def choose(study: Study, names: tuple[str, ...]) -> tuple[str, list[tuple[str, float, float, float, float, float]]]:
    """The form with the largest mean gain of F_dist less R_excess over explainers; and the changes of every form."""
    first = study.trials["development"][0].columns
    labels = [treatment for explainer, treatment in first if explainer == names[0] and treatment != PLAIN]
    lines = []
    for label in labels:

        def gain(column: str, label: str = label) -> float:
            changes = [study.change(("development", n, label), ("development", n, PLAIN), column).value for n in names]
            return float(np.mean(changes))

        f, excess = gain("F_dist"), gain("R_excess")
        lines.append((label, f - excess, f, excess, gain("IS_p2"), gain("IS_zero_p2")))
    return max(lines, key=lambda line: line[1])[0], lines
