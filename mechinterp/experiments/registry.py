"""The experiments that can be run by name."""

from __future__ import annotations

import importlib
import inspect
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mechinterp.errors import UsageError

if TYPE_CHECKING:
    from mechinterp.experiments.result import Result

__all__ = ["EXPERIMENTS", "Experiment", "experiment", "run_experiment"]


@dataclass(frozen=True)
class Experiment:
    """An experiment: what it asks, and the module whose `run(seed, quick)` answers with a Result."""

    name: str
    question: str
    module: str


EXPERIMENTS: dict[str, Experiment] = {
    entry.name: entry
    for entry in (
        Experiment(
            "superposition",
            "do dictionaries recover the features of a toy model, by sparsity and correlation of the features?",
            "mechinterp.experiments.superposition",
        ),
        Experiment(
            "intervention-fidelity",
            "does ablating the latents matched to a factor do to the output what removing the factor does?",
            "mechinterp.experiments.intervention_fidelity",
        ),
        Experiment(
            "confounding-dose",
            "at which association do a finding's and a shortcut's latents merge, and does deconfounded matching help?",
            "mechinterp.experiments.confounding_dose",
        ),
        Experiment(
            "iq-tabular",
            "does an injected column turn explanations of rows around, and do RBP and bounds turn them back?",
            "mechinterp.experiments.iq_tabular",
        ),
        Experiment(
            "iq-real-table",
            "the same on a real table of 30 columns (breast cancer), a column of noise following the output",
            "mechinterp.experiments.iq_real_table",
        ),
        Experiment(
            "iq-shapley-rbp",
            "stability from coalition sizes against perturbation RBP, and our own bounds; what can IS be bought with?",
            "mechinterp.experiments.iq_shapley_rbp",
        ),
        Experiment(
            "iq-image",
            "does a bright patch on shapes turn explanations of a CNN around, and do RBP and bounds turn them back?",
            "mechinterp.experiments.iq_image",
        ),
        Experiment(
            "iq-text",
            "does a neutral word that follows the output turn explanations of a text classifier around?",
            "mechinterp.experiments.iq_text",
        ),
        Experiment(
            "iq-sweep",
            "how much do IS and the ranking of explainers depend on settings that the paper leaves open?",
            "mechinterp.experiments.iq_sweep",
        ),
        Experiment(
            "iq-sanity",
            "do maps follow weights and labels, and come back in a twin and in another architecture?",
            "mechinterp.experiments.iq_sanity",
        ),
        Experiment(
            "simulatability",
            "does an explanation help an agent to predict the model, beyond none, random, shuffled and leaky ones?",
            "mechinterp.experiments.simulatability",
        ),
        Experiment(
            "iq-multimodal",
            "patches and words explained together: does injection turn them around, and what does RBP cost?",
            "mechinterp.experiments.iq_multimodal",
        ),
        Experiment(
            "iq-main",
            "every explainer on every model: reliant, faithful, well placed? which maps show the planted shortcut?",
            "mechinterp.experiments.iq_main",
        ),
    )
}


def experiment(name: str) -> Experiment:
    """The experiment of that name. Raises UsageError with the names there are."""
    if name not in EXPERIMENTS:
        raise UsageError(f"no experiment {name!r}", where="NAME", hint=f"one of {', '.join(EXPERIMENTS)}, or list")
    return EXPERIMENTS[name]


def run_experiment(name: str, out: Path | str, quick: bool = False, seed: int = 0, data: Path | None = None) -> Result:
    """Run an experiment and write its folder.

    Args:
        name: one of `EXPERIMENTS`.
        out: folder for result.json, table.md, figure.png and manifest.json; files of an earlier run are replaced.
        quick: the small version, which shows that it runs; its numbers are no result.
        seed: of everything random.
        data: a folder of real images, for the experiments that take one.

    Raises:
        UsageError: for an unknown name.
        StorageError: `out` cannot be written, or holds something else.
    """
    from mechinterp.experiments.result import claim_folder, write_result

    chosen = experiment(name)
    folder = claim_folder(Path(out))
    start = time.perf_counter()
    run = importlib.import_module(chosen.module).run
    options = {} if data is None else {"data": data}
    if options and "data" not in inspect.signature(run).parameters:
        raise UsageError(f"{name} takes no data folder", where="--data", hint="leave it out")
    result = run(seed=seed, quick=quick, **options)
    write_result(folder, result, chosen.name, chosen.question, quick, seed, time.perf_counter() - start)
    return result
