"""Reproducible experiments: each writes result.json, table.md, figure.png and a manifest.

from mechinterp.experiments import run_experiment
run_experiment("superposition", out, quick=True)
"""

from mechinterp.experiments.registry import EXPERIMENTS, Experiment, experiment, run_experiment

__all__ = ["EXPERIMENTS", "Experiment", "experiment", "run_experiment"]
