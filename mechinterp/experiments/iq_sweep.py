"""iq-sweep: how much do IS and the ranking of explainers depend on settings that the paper leaves open?

1. RBP with 1, 3, 5 and 10 perturbations of 1, 5 and 10 %: IS under each, as written and on shares.
2. The multiverse of IS itself: size of the perturbation, number of draws, reference to which explainers remove columns
   (F removes to the other one), p, kind of correlation, rule for undefined correlations, form of F. In every cell all
   explainers are compared, pair by pair.
3. The same on x1 sin(x2) itself, where four columns do nothing and the rule for undefined correlations has work to do.
4. What a study must be able to see: rows needed for a difference, and the smallest difference seen here.

Networks (several seeds) that learnt x1 sin(x2), four columns of noise; no injection. About 5 minutes on one core.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor

from mechinterp.experiments.iq_judges import check_judges
from mechinterp.experiments.iq_multiverse import Cell, Multiverse, Shrinkage
from mechinterp.experiments.iq_rows import ROWS, Network, judges_of
from mechinterp.experiments.iq_study import two_level
from mechinterp.experiments.iq_sweep_page import sweep_result
from mechinterp.experiments.iq_tabular import network_of
from mechinterp.experiments.result import Result
from mechinterp.explain.rbp import STRENGTH, rbp, shares
from mechinterp.explain.shake import shaken
from mechinterp.explain.tabular import EXPLAINERS
from mechinterp.explain.tabular_questions import about_rows, of_rows
from mechinterp.metrics.iq import Measurement, iq
from mechinterp.metrics.iq.ask import Bench, stage
from mechinterp.metrics.iq.measure import seed_of
from mechinterp.metrics.iq.scores import inversion, movement
from mechinterp.progress import progress

__all__ = ["DEFAULT", "GRID", "Sizes", "run", "scores_of"]

EXPLAINED = (
    "gradient",
    "gradient_times_input",
    "integrated_gradients",
    "occlusion",
    "shapley",
    "kernel_shap",
    "lime",
    "lime_times_input",
    "random",
    "echo",
)
COUNTS, SIZES_OF_NOISE = (1, 3, 5, 10), (0.01, 0.05, 0.10)
GRID: dict[str, tuple] = {
    "noise": SIZES_OF_NOISE,
    "draws": (3, 5, 10, 30),
    "reference": ("zero", "a training row"),
    "p": (1, 2, 4),
    "correlation": ("Pearson", "Spearman"),
    "undefined": ("skip", "zero"),
    "F": ("F_dist", "F_corr"),
}
OTHER = {"zero": "a training row", "a training row": "zero"}  # F is never by the explainers' own reference
EXACT_GRID = {**GRID, "noise": (0.05,), "reference": ("zero",)}
DEFAULT = (0.05, 30, "zero", 2, "Pearson", "skip", "F_dist")


@dataclass(frozen=True)
class Sizes:
    """How much of everything; `few` takes three explainers."""

    rows: int = 30
    seeds: int = 8
    steps: int = 1500
    few: bool = False


QUICK = Sizes(rows=6, seeds=1, steps=40, few=True)


def run(seed: int = 0, quick: bool = False, sizes: Sizes | None = None) -> Result:
    """Run the experiment. `sizes` overrides both versions."""
    size = sizes or (QUICK if quick else Sizes())
    names = ("gradient_times_input", "shapley", "random") if size.few else EXPLAINED
    networks = [network_of(seed * 100 + s, size.steps, size.rows) for s in range(size.seeds)]
    universe: list[dict[tuple[Cell, str], np.ndarray]] = []
    known: list[dict[tuple[Cell, str], np.ndarray]] = []
    shrunk: list[dict[tuple[str, str, int, float], np.ndarray]] = []
    for s, network in enumerate(progress(networks, "sweeping", unit="network")):
        universe.append(_multiverse(network, names, seed + s, GRID))
        known.append(_multiverse(replace(network, f=exact), names, seed + s, EXACT_GRID))
        shrunk.append(_shrinkage(network, names, seed + s))
    weights = two_level(np.repeat(np.arange(size.seeds), size.rows))
    cells, known_cells, treated = _joined(universe), _joined(known), _joined(shrunk)
    skills = [n.skill for n in networks]
    return sweep_result(
        Multiverse(names, GRID, DEFAULT, cells, weights),
        Multiverse(names, EXACT_GRID, DEFAULT, known_cells, weights),
        Shrinkage(COUNTS, SIZES_OF_NOISE, treated, weights),
        skills,
    )


def exact(x: Float[Tensor, "row 6"]) -> Float[Tensor, " row"]:
    """What the networks learn; four columns do nothing at all."""
    return x[:, 0] * torch.sin(x[:, 1])


def _joined(parts: list[dict]) -> dict:
    """Rows of all networks one after another."""
    return {key: np.concatenate([one[key] for one in parts]) for key in parts[0]}


def _multiverse(
    network: Network, names: tuple[str, ...], seed: int, grid: dict[str, tuple]
) -> dict[tuple[Cell, str], np.ndarray]:
    """IS of every row in every cell; one call of each explainer for each size of noise and reference."""
    references = {"zero": network.reference, "a training row": _training_row(network, seed)}
    found = {}
    for noise, where in itertools.product(grid["noise"], grid["reference"]):
        question = about_rows(network.f, network.test, references[where])
        judge = about_rows(network.f, network.test, references[OTHER[where]])
        check_judges(question, {OTHER[where]: judge})
        bench = stage(question, judge, max(GRID["draws"]), noise, seed, co_movement=False)
        for name in names:
            measured = bench.measurement(bench.explain(of_rows(EXPLAINERS[name]), seed_of(name, seed))[0])
            for (draws, *rest), values in scores_of(measured).items():
                found[(noise, draws, where, *rest), name] = values
    return found


def _training_row(network: Network, seed: int) -> torch.Tensor:
    """One of the rows that the network was trained on."""
    chosen = torch.randint(len(network.training), (1,), generator=torch.Generator().manual_seed(seed))
    return network.training[int(chosen)]


def scores_of(measured: Measurement) -> dict[Cell, np.ndarray]:
    """IS by row for every choice of (draws, p, correlation, undefined, F); fewer draws are the first of all."""
    scores = iq(measured, powers=(2,))
    faithful = {"F_dist": scores.F_dist, "F_corr": scores.F_corr}
    found = {}
    for draws, how in itertools.product(GRID["draws"], GRID["correlation"]):
        size = np.abs(_movement(measured, draws, how))
        defined = np.isfinite(size)
        total = np.where(defined, size, 0.0).sum(1)
        for rule, p, f in itertools.product(GRID["undefined"], GRID["p"], GRID["F"]):
            count = defined.sum(1) if rule == "skip" else np.full(len(size), size.shape[1])
            R = np.divide(total, count, out=np.full(len(size), np.nan), where=count > 0)
            found[draws, p, how, rule, f] = inversion(R, faithful[f], p)
    return found


def _movement(measured: Measurement, draws: int, how: str) -> np.ndarray:
    """Correlation of every element with the output over the first draws; nan where it does not move."""
    change = measured.attributions[:, :draws] - measured.attribution[:, None]
    dy = measured.outputs[:, :draws] - measured.output[:, None]
    r = movement(change, dy, measured.attributions[:, :draws], measured.eps)
    if how == "Pearson":
        return r
    ranked = movement(rankdata(change, axis=1), rankdata(dy, axis=1))
    return np.where(np.isfinite(r), ranked, np.nan)  # ranks of rounding errors are no movement


def _shrinkage(network: Network, names: tuple[str, ...], seed: int) -> dict[tuple[str, str, int, float], np.ndarray]:
    """IS (undefined r skipped) under RBP by explainer, form, number of perturbations and their size."""
    question = about_rows(network.f, network.test, network.reference)
    judges = judges_of(question, network.training, seed)
    check_judges(question, judges)
    bench = stage(question, judges[ROWS], max(GRID["draws"]), seed=seed, co_movement=False)
    found = {}
    for name in names:
        explain = of_rows(EXPLAINERS[name])
        for noise in SIZES_OF_NOISE:
            generator = torch.Generator().manual_seed(seed_of(name, seed))
            near = shaken(bench.near, max(COUNTS), noise, generator)
            seen = explain(near, generator).view(len(bench.near), 1 + max(COUNTS), -1)
            for n in COUNTS:
                for form, as_written in (("as written", True), ("on shares", False)):
                    a = rbp(seen[:, 0], seen[:, 1 : 1 + n], STRENGTH, as_written=as_written)
                    found[name, form, n, noise] = _inversion(bench, a)
            found[name, "plain", 0, noise] = _inversion(bench, seen[:, 0])
            found[name, "shares only", 0, noise] = _inversion(bench, shares(seen[:, 0]))
    return found


def _inversion(bench: Bench, attributions: torch.Tensor) -> np.ndarray:
    values = attributions.detach().numpy().reshape(*bench.output.shape, -1)
    return iq(bench.measurement(values)).IS[2]
