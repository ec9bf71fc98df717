"""The experiments that can be run by name."""

from __future__ import annotations

import importlib
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
            "does an injected column turn explanations of rows around, and does RBP turn them back?",
            "mechinterp.experiments.iq_tabular",
        ),
    )
}


def experiment(name: str) -> Experiment:
    """The experiment of that name. Raises UsageError with the names there are."""
    if name not in EXPERIMENTS:
        raise UsageError(f"no experiment {name!r}", where="NAME", hint=f"one of {', '.join(EXPERIMENTS)}, or list")
    return EXPERIMENTS[name]


def run_experiment(name: str, out: Path | str, quick: bool = False, seed: int = 0) -> Result:
    """Run an experiment and write its folder.

    Args:
        name: one of `EXPERIMENTS`.
        out: folder for result.json, table.md, figure.png and manifest.json; files of an earlier run are replaced.
        quick: the small version, which shows that it runs; its numbers are no result.
        seed: of everything random.

    Raises:
        UsageError: for an unknown name.
        StorageError: `out` cannot be written, or holds something else.
    """
    from mechinterp.experiments.result import claim_folder, write_result

    chosen = experiment(name)
    folder = claim_folder(Path(out))
    start = time.perf_counter()
    result = importlib.import_module(chosen.module).run(seed=seed, quick=quick)
    write_result(folder, result, chosen.name, chosen.question, quick, seed, time.perf_counter() - start)
    return result
