"""`mechinterp graph` and the graph section of an audit, on a bundled model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mechinterp.audit import graphing
from mechinterp.audit.dictionary import dictionary_of, tokens_of, transcoders_of
from mechinterp.audit.evidence import collect
from mechinterp.audit.feature_names import stored_names
from mechinterp.audit.graphing import graph_of, graph_section, seen_by, target_of
from mechinterp.cli import main
from mechinterp.data.phantom import Phantom
from mechinterp.models import HookedVLM
from mechinterp.models.bundles import bundled
from mechinterp.storage import verify_folder
from mechinterp.types import FeatureId

FILES = {"graph.png", "graph.html", "graph.json", "graph.safetensors", "circuit_tracer.json", "manifest.json"}


@pytest.fixture(scope="module")
def model():
    return HookedVLM.from_pretrained("phantom-clip")


@pytest.fixture(scope="module")
def phantom():
    return Phantom.sample(40, seed=77)


@pytest.fixture(scope="module")
def picture(phantom, tmp_path_factory):
    row = int(np.flatnonzero(phantom.factors["consolidation"])[0])
    path = tmp_path_factory.mktemp("graph") / "chest.png"
    Image.fromarray(phantom[row].render()[0]).save(path)
    return path


def test_the_command_writes_a_whole_folder(picture, tmp_path, capsys):
    out = tmp_path / "graph"
    said = ["graph", "phantom-clip", "--image", str(picture), "--target", "consolidation", "--max-features", "200"]
    assert main([*said, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "every row adds up to" in printed and "graph.html" in printed
    assert {p.name for p in out.iterdir()} >= FILES and verify_folder(out) == []
    graph = json.loads((out / "graph.json").read_text())
    assert graph["max_relative_residual"] < 1e-5 and 0 < graph["replacement"] <= 1
    assert "vision.blocks.0.attn.hook_pattern" in graph["freezes"] and 0 < graph["completeness"] <= 1
    assert {"id", "type", "tower", "layer", "position", "feature", "activation", "influence", "label"} <= set(
        graph["nodes"][0]
    )
    again = tmp_path / "again"
    assert main([*said, "--out", str(again)]) == 0
    assert all((out / name).read_bytes() == (again / name).read_bytes() for name in FILES), "same seed, same bytes"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (("--image", "nowhere.png"), "nowhere.png"),
        (("--node", "2"), "between 0 and 1"),
        (("--max-features", "-1"), "-1"),
    ],
)
def test_a_mistake_is_one_line(picture, tmp_path, capsys, changed, words):
    said = {"--image": str(picture), "--target": "consolidation", "--max-features": "20", changed[0]: changed[1]}
    out = tmp_path / "out"
    assert main(["graph", "phantom-clip", *(part for pair in said.items() for part in pair), "--out", str(out)]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and words in error and not out.exists()


def test_what_a_target_means(model):
    finding = target_of(model, "effusion")
    assert (finding.positive, finding.negative) == (
        "a chest x-ray with pleural effusion",
        "a chest x-ray without pleural effusion",
    )
    unknown = target_of(model, "a mass")
    assert unknown.positive == "a chest x-ray with a mass" and unknown.asked() == "is there a mass ?"
    pair = target_of(model, "an ap chest x-ray", "a pa chest x-ray")
    assert (pair.positive, pair.negative) == ("an ap chest x-ray", "a pa chest x-ray")
    alone = target_of(model, "a frontal chest x-ray with a pacemaker")
    assert alone.negative is None and alone.positive.startswith("a frontal")
    assert target_of(model, "is there a drain ?").question == "is there a drain ?"


def test_the_picture_is_what_the_model_sees(model, phantom):
    pixels = phantom[0].render() / np.float32(255)
    batch = model.prepare(pixels, [target_of(model, "effusion")])
    assert np.abs(seen_by(model, batch) - pixels[0]).max() < 0.01


def test_an_audit_gets_a_tested_graph(model, phantom, tmp_path, monkeypatch):
    from mechinterp.data import open_data

    monkeypatch.setattr(graphing, "IMAGES", 1)
    monkeypatch.setattr(graphing, "EFFECTS", 16)
    phantom.write(tmp_path / "data", masks=False)
    data = open_data(tmp_path / "data")
    target = data.targets["effusion"]
    placed, _ = dictionary_of(model, data, 0)
    evidence = collect(model, data, target, placed, tokens_of(placed))
    record, png = graph_section(model, data, target, evidence, 0)
    assert record is not None and png is not None and png.startswith(b"\x89PNG")
    assert {"nodes", "edges", "completeness", "completeness_counting_inputs", "replacement"} <= set(record)
    assert record["max_relative_residual"] < 1e-5 and -1 <= record["free_spearman"] <= 1
    assert record["completeness"] <= record["completeness_counting_inputs"]
    row = data.images.index(record["image"])
    assert data.split[row] == "test" and data.labels("effusion")[row] == 1
    monkeypatch.setattr(graphing, "transcoders_of", lambda model: [])
    assert graph_section(model, data, target, evidence, 0) == (None, None)


@pytest.mark.parametrize("name", bundled())
def test_every_bundled_model_has_transcoders_and_names(name):
    model = HookedVLM.from_pretrained(name)
    placed = transcoders_of(model)
    assert len(placed) == sum(model.n_layers(tower) for tower in model.towers)
    for feature in stored_names(model):
        at = FeatureId.parse(feature)
        (one,) = [p for p in placed if p.writes == at.site]
        assert at.index < one.dictionary.W_dec.shape[0]


def test_a_budget_of_one_still_adds_up(model, phantom):
    made = graph_of(
        model,
        phantom[1].render()[0] / np.float32(255),
        target_of(model, "drain"),
        transcoders_of(model),
        max_features=1,
    )
    assert made.whole.meta["certificate"]["holds"]
