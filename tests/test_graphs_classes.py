"""Classifiers: graph, lab and command explain the number that `HookedVLM.score` gives, whatever it is held against."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from test_graphs_causal import random_transcoders
from tiny_models import tiny

from graphs.causal import Lab
from graphs.frozen import freeze
from graphs.targets import Contrast
from mechinterp.audit import graph_command
from mechinterp.audit.graph_command import Wishes
from mechinterp.audit.graphing import graph_of, output_of, target_of
from mechinterp.errors import UsageError
from mechinterp.models import HookedVLM
from mechinterp.types import Target

CAPTIONS = Target("pneumonia", "a chest x-ray with pneumonia", "a chest x-ray without pneumonia")


@cache
def vit() -> HookedVLM:
    hf, processor = tiny("vit")
    return HookedVLM(hf.requires_grad_(False), processor)


def image() -> np.ndarray:
    return np.random.default_rng(0).random((1, 32, 32), dtype=np.float32)


def logit(name: str) -> float:
    """The plain transformers model's logit of a class."""
    pixels = vit().preprocess(image()).pixel_values
    return float(vit().hf(pixels).logits[0, vit().hf.config.label2id[name]])


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: target_of(vit(), "pneumonia"), lambda: logit("pneumonia")),
        (lambda: target_of(vit(), "pneumonia", "Effusion"), lambda: logit("pneumonia") - logit("effusion")),
        (lambda: CAPTIONS, lambda: logit("pneumonia")),
        (lambda: Target("pneumonia", "", "no finding"), lambda: logit("pneumonia") - logit("no finding")),
    ],
    ids=["alone", "against", "captions of a data folder", "from Python"],
)
def test_graph_lab_and_score_give_one_number(make: Callable[[], Target], wanted: Callable[[], float]) -> None:
    """The graph's output, the lab's value and `score` are the same combination of the model's own class logits."""
    model, target = vit(), make()
    batch = model.prepare(image(), [target])
    outputs = [output_of(model, target)]
    assert float(model.score(batch, [target])[0, 0]) == pytest.approx(wanted(), abs=1e-5)
    assert freeze(model, batch, outputs).readouts[0].value == pytest.approx(wanted(), abs=1e-5)
    assert float(Lab(model, batch, [], outputs).values[0]) == pytest.approx(wanted(), abs=1e-5)


@pytest.mark.parametrize(
    ("target", "where"),
    [
        (Target("pneumonia", "pneumonia", "efusion"), "Target.negative"),
        (Target("pneumonia", "", "efusion"), "Target.negative"),
        (Target("x", "effusion", "efusion"), "Target.negative"),
        (Target("efusion", "efusion"), "Target.name"),
    ],
)
def test_a_name_of_no_class_is_one_error(target: Target, where: str) -> None:
    """A misspelt class, asked for or held against, is an error that lists the classes, from wherever it is scored."""
    model = vit()
    batch = model.preprocess(image())
    for run in (
        lambda: model.score(batch, [target]),
        lambda: freeze(model, batch, [Contrast(target)]),
        lambda: Lab(model, batch, [], [Contrast(target)]),
    ):
        with pytest.raises(UsageError, match=r"no class 'efusion'.*effusion, no finding, pneumonia") as found:
            run()
        assert found.value.where == where


def test_a_class_is_not_held_against_itself() -> None:
    """A contrast of a class with itself is refused: its graph would explain nothing."""
    with pytest.raises(UsageError, match="itself"):
        vit().score(vit().preprocess(image()), [Target("pneumonia", "pneumonia", "Pneumonia")])


def test_a_causal_report_runs_on_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interventions start from the score that the graph explains; a caption that names no class is no obstacle."""
    monkeypatch.setattr(graph_command, "EFFECTS", 8)
    model = vit()
    made = graph_of(model, image()[0], CAPTIONS, random_transcoders(model, torch.float32), max_features=40)
    lines, written = graph_command._tested(made, Wishes("pneumonia", causal=True), None, tmp_path)
    assert lines and "note" in written["report"]["mediation"]
    found = json.loads((tmp_path / "causal.json").read_text())
    assert found["report"]["pairs"]["constrained_error"] < 1e-4
    (score,) = [m for m in found["suppression"]["measured"] if m["kind"] == "output"]
    assert score["before"] == pytest.approx(logit("pneumonia"), abs=1e-5)
