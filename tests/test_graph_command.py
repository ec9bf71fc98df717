"""`mechinterp graph` and the graph section of an audit, on a bundled model."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from graphs.causal import Lab, report
from graphs.draw.scene import feature_names, written_sites
from graphs.graph import AttributionGraph
from graphs.influence import known_effect
from graphs.nodes import NodeType
from graphs.supernodes import Supernodes
from mechinterp.audit import graph_command, graph_pictures, graphing
from mechinterp.audit.dictionary import dictionary_of, stream_saes_of, tokens_of, transcoders_of
from mechinterp.audit.evidence import collect
from mechinterp.audit.feature_names import stored_names
from mechinterp.audit.graph_command import Wishes
from mechinterp.audit.graph_groups import fitted, members_of
from mechinterp.audit.graph_pictures import gallery_of
from mechinterp.audit.graphing import graph_of, graph_section, seen_by, target_of
from mechinterp.cli import main
from mechinterp.data.phantom import Phantom
from mechinterp.errors import UsageError
from mechinterp.models import HookedVLM
from mechinterp.models.bundles import bundled
from mechinterp.storage import verify_folder, write_manifest
from mechinterp.types import FeatureId
from tests.tiny_models import tiny

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


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    monkeypatch.setattr(graph_pictures, "IMAGES", 12)
    monkeypatch.setattr(graph_pictures, "FEATURES", 6)


def test_the_command_writes_a_whole_folder(picture, tmp_path, capsys):
    out = tmp_path / "graph"
    said = ["graph", "phantom-clip", "--image", str(picture), "--target", "consolidation", "--max-features", "200"]
    said += ["--paths", "3", "--attention", "2"]
    assert main([*said, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "every row adds up to" in printed and "graph.html" in printed
    assert len(printed.partition("strongest paths")[2].partition("  heads that bring")[0].splitlines()) == 4
    paths = json.loads((out / "paths.json").read_text())["paths"]
    assert len(paths) == 3 and paths[0]["share"] >= paths[1]["share"] >= paths[2]["share"] > 0
    assert all(len(p["nodes"]) == len(p["labels"]) >= 2 and p["nodes"][-1].startswith("out.") for p in paths)
    reads = json.loads((out / "attention.json").read_text())["reads"]
    assert len(reads) == 2 and all(abs(r["pairs"][0]["value"]) >= abs(r["pairs"][-1]["value"]) > 0 for r in reads)
    edges = json.loads((out / "attention.json").read_text())["edges"]
    drawn = AttributionGraph.load(out)
    assert len(edges) == graph_command.EDGES and "strongest edges through one attention layer" in printed
    assert [edge["share"] for edge in edges] == sorted((edge["share"] for edge in edges), reverse=True)
    for edge in edges:
        sources, weights = drawn.in_edges(drawn.nodes.index(edge["target"]))
        stored = float(weights[sources == drawn.nodes.index(edge["source"])])
        assert stored == pytest.approx(edge["weight"], rel=1e-4) and len({h["layer"] for h in edge["heads"]}) == 1
        assert edge["direct"]["part"] + sum(h["part"] for h in edge["heads"]) == pytest.approx(1, abs=1e-3)
        assert edge["source"] in printed and edge["target"] in printed
    page = (out / "graph.html").read_text()
    shown = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert 0 < len(shown["gallery"]) <= 6 and all(len(shots) <= 4 for shots in shown["gallery"].values())
    known = {node["id"] for node in shown["nodes"]}
    assert shown["supernodes"] and all(known >= set(group["members"]) for group in shown["supernodes"])
    assert {p.name for p in out.iterdir()} >= FILES and verify_folder(out) == []
    graph = json.loads((out / "graph.json").read_text())
    assert graph["max_relative_residual"] < 1e-5 and 0 < graph["replacement"] <= 1
    assert graph["meta"]["mediation"] == "NOT TESTED"  # by interventions
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
        (("--paths", "-1"), "--paths: is -1"),
        (("--suppress", "the moon"), "'the moon' is no group, name or feature here"),
        (("--groups", "nowhere.json"), "nowhere.json: no such file"),
    ],
)
def test_a_mistake_is_one_line(picture, tmp_path, capsys, changed, words):
    said = {"--image": (str(picture),), "--target": ("consolidation",), "--max-features": ("20",)}
    said[changed[0]] = changed[1:]
    out = tmp_path / "out"
    parts = [part for name, values in said.items() for part in (name, *values)]
    assert main(["graph", "phantom-clip", *parts, "--out", str(out)]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and words in error and not out.exists()


def test_a_second_run_leaves_nothing_of_the_first(picture, tmp_path, capsys):
    """Files of an earlier graph would be sealed as this one's; other files, and artefacts of other kinds, are kept."""
    out = tmp_path / "graph"
    said = ["graph", "phantom-clip", "--image", str(picture), "--target", "consolidation", "--max-features", "40"]
    assert main([*said, "--paths", "1", "--attention", "1", "--out", str(out)]) == 0
    (out / "notes.txt").write_text("mine")
    assert (out / "attention.json").exists() and (out / "paths.json").exists()
    assert main([*said, "--paths", "0", "--out", str(out)]) == 0
    assert not (out / "attention.json").exists() and not (out / "paths.json").exists()
    assert (out / "notes.txt").read_text() == "mine" and (out / "graph.png").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept.txt").write_text("kept")
    write_manifest(other, {"kind": "dictionary"})
    capsys.readouterr()
    assert main([*said, "--out", str(other)]) == 2
    assert "'dictionary'" in capsys.readouterr().err and verify_folder(other) == []


def test_an_sae_does_not_get_the_names_of_a_transcoder(model, picture):
    """Names belong to a dictionary: latents of an SAE in the same block have the same numbers and other meanings."""
    named = {"vision.blocks.0.hook_mlp_out:3": "wrong", "vision.blocks.0.hook_resid_post:3": "right"}
    pixels, target = np.asarray(Image.open(picture), dtype=np.float32) / 255, target_of(model, "consolidation")
    for mode, placed, said in (("sae", stream_saes_of(model), "right"), ("transcoder", transcoders_of(model), "wrong")):
        graph = graph_of(model, pixels, target, placed, "chest.png", 40, 0.8, 0.98, mode).whole
        assert feature_names(named, graph) == {("vision", 0, 3): said}
        assert all(key.startswith(("vision.blocks.", "text.blocks.")) for key in written_sites(graph).values())


def test_what_a_target_means(model):
    finding = target_of(model, "effusion")
    assert (finding.positive, finding.negative) == (
        "a chest x-ray with pleural effusion",
        "a chest x-ray without pleural effusion",
    )
    other = target_of(model, "a round opacity")
    assert other.positive == "a chest x-ray with a round opacity" and other.asked() == "is there a round opacity ?"
    pair = target_of(model, "a portable chest x-ray", "a normal chest x-ray")
    assert (pair.positive, pair.negative) == ("a portable chest x-ray", "a normal chest x-ray")
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
    made = graph_section(model, data, target, evidence, 0)
    assert not isinstance(made, str)
    record, png = made
    assert png.startswith(b"\x89PNG") and 0 < record["lines_drawn"] <= 180 and 0 < record["flow_drawn"] < 1
    assert {"nodes", "edges", "completeness", "completeness_counting_inputs", "replacement"} <= set(record)
    assert record["max_relative_residual"] < 1e-5 and -1 <= record["free_spearman"] <= 1
    assert record["completeness"] <= record["completeness_counting_inputs"]
    row = data.images.index(record["image"])
    assert data.split[row] == "test" and data.labels("effusion")[row] == 1
    hidden = replace(data, may_show=np.zeros(len(data), dtype=bool))
    assert graph_section(model, hidden, target, evidence, 0) == "no test image with effusion may be shown"
    monkeypatch.setattr(graphing, "transcoders_of", lambda model: [])
    why = graph_section(model, data, target, evidence, 0)
    assert isinstance(why, str) and "no transcoder is stored" in why
    silent = HookedVLM(*tiny("dinov2"))
    assert "a dinov2 model scores nothing" in str(graph_section(silent, data, target, evidence, 0))


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


@pytest.fixture(scope="module")
def made(model, phantom):
    row = int(np.flatnonzero(phantom.factors["consolidation"])[0])
    pixels = phantom[row].render()[0] / np.float32(255)
    return graph_of(model, pixels, target_of(model, "consolidation"), transcoders_of(model), max_features=30)


def test_pictures_show_where_a_feature_fires(made):
    """The strongest image of a feature is the one in which its activation, computed anew, is largest."""
    gallery = gallery_of(made.model, made.pruned, made.dictionaries, made.target)
    assert 0 < len(gallery) <= 6
    drawn = Phantom.sample(12, seed=10_000)
    captions = [f"synthetic phantom {name.rpartition('/')[2].partition('.')[0]}, 100 %" for name in drawn.images]
    batch = made.model.prepare(drawn.render() / np.float32(255), [made.target])
    sites = [str(placed.reads) for placed in made.dictionaries if placed.reads.tower == "vision"]
    _, cache = made.model.run_with_cache(batch, names_filter=sites)
    for key, shots in gallery.items():
        feature = FeatureId.parse(key)
        (placed,) = [p for p in made.dictionaries if p.writes == feature.site]
        strength = placed.dictionary.encode(cache[str(placed.reads)])[..., feature.index].amax(1)
        assert shots[0][0].startswith(b"\xff\xd8") and shots[0][1] == captions[int(strength.argmax())]


def test_a_feature_has_no_pictures_where_nothing_may_be_shown(made, tmp_path):
    from mechinterp.data import open_data

    Phantom.sample(4, seed=1).write(tmp_path / "data", masks=False)
    data = open_data(tmp_path / "data")
    assert gallery_of(made.model, made.pruned, made.dictionaries, made.target, data)
    hidden = replace(data, may_show=np.zeros(len(data), dtype=bool))
    assert gallery_of(made.model, made.pruned, made.dictionaries, made.target, hidden) == {}


def test_what_suppress_means(made):
    graph = made.whole
    features = graph.nodes.is_type(NodeType.FEATURE).nonzero()[:, 0].tolist()
    node = graph.nodes[features[0]]
    same = [
        i
        for i in features
        if (graph.nodes[i].tower, graph.nodes[i].layer, graph.nodes[i].feature)
        == (node.tower, node.layer, node.feature)
    ]
    everywhere = f"{node.tower}.L{node.layer}.F{node.feature}"
    groups = Supernodes().add("a pair", [graph.nodes.ids[i] for i in features[:2]])
    key = f"{node.tower}.blocks.{node.layer}.hook_mlp_out:{node.feature}"
    assert members_of(graph, "a pair", groups, {}) == features[:2]
    assert members_of(graph, f"{node.id}, {everywhere}", groups, {}) == same
    assert members_of(graph, "drain", groups, {key: "drain"}) == same
    with pytest.raises(UsageError, match=r"'drain' is no group.*groups: a pair"):
        members_of(graph, "drain", groups, {})


def by_push(made):
    """Ids of drawn features that raise the score, and of those that lower it."""
    nodes, effect = made.pruned.nodes, known_effect(made.pruned).tolist()
    drawn = nodes.is_type(NodeType.FEATURE).nonzero()[:, 0].tolist()
    return [[nodes.ids[i] for i in drawn if way * effect[i] > 0] for way in (1, -1)]


def test_groups_of_a_user_are_fitted_to_the_graph(made, tmp_path):
    """What mixes signs, is not in the graph or is not drawn is said; all unknown, or no feature, is an error."""
    (up, other, *_), (down, *_) = by_push(made)
    drawn = set(made.pruned.nodes.ids)
    features = made.whole.nodes.is_type(NodeType.FEATURE).nonzero()[:, 0].tolist()
    weak = next(made.whole.nodes.ids[i] for i in features if made.whole.nodes.ids[i] not in drawn)
    lacking = [f"vision.L0.P0.F{10**6 + i}" for i in range(5)]
    groups = Supernodes().add("both\nways", [up, down, *lacking]).add("one", [other]).add("gone", ["a.L1.P1.F1"])
    path = tmp_path / "mine.json"
    kept, lines = fitted(groups.add("weak", [weak]), made, path)
    assert [(g.name, g.members) for g in kept] == [("both\nways", (up, down)), ("one", (other,)), ("weak", (weak,))]
    assert [g.mixed_signs for g in kept][:2] == [True, False]
    assert "3 with 4 members" in lines[0] and lines[0].endswith("lower it in both ways")
    assert "6 members are not in this graph" in lines[1] and "and 3 more" in lines[1] and weak in lines[2]
    assert all(line.isprintable() for line in lines) and len(lines) == 3
    (line,) = fitted(Supernodes().add("one", [up, other]), made, path)[1]
    assert line.endswith("none mixes signs")
    for wrong, words in (
        (lacking[:2], "none of its 2 members is in this graph"),
        (["out.0", up], "out.0 is no feature"),
    ):
        with pytest.raises(UsageError, match=f"mine.json: {words}"):
            fitted(Supernodes().add("x", wrong), made, path)
    with pytest.raises(UsageError, match="none of its 0 members"):
        fitted(Supernodes(), made, path)


def test_the_command_takes_groups_back(made, picture, tmp_path, capsys):
    """A file of groups goes into the page and the folder, its mixed group is said, and it can be suppressed by name."""
    (up, *_), (down, *_) = by_push(made)
    out = tmp_path / "out"
    out.mkdir()
    mine = out / "supernodes.json"  # where an earlier graph may have left it
    mine.write_text(json.dumps({"supernodes": [{"name": "both ways", "members": [up, down, "not.here"]}]}))
    said = ["graph", "phantom-clip", "--image", str(picture), "--target", "consolidation", "--max-features", "30"]
    assert main([*said, "--groups", str(mine), "--suppress", "both ways", "--paths", "0", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "lower it in both ways" in printed and "both ways (2 nodes) set to minus" in printed
    expected = {"name": "both ways", "members": [up, down], "mixed_signs": True}
    assert json.loads(mine.read_text())["supernodes"] == [expected] and verify_folder(out) == []
    shown = json.loads((out / "graph.html").read_text().partition('id="data">')[2].partition("</script>")[0])
    assert shown["supernodes"] == [{"name": "both ways", "members": [up, down]}]


def test_a_chosen_feature_is_suppressed(made, tmp_path):
    features = made.pruned.nodes.is_type(NodeType.FEATURE).nonzero()[:, 0].tolist()
    name = made.pruned.nodes.ids[max(features, key=lambda i: float(made.pruned.nodes.influence[i]))]
    members = members_of(made.whole, name, Supernodes(), {})
    (said,), written = graph_command._tested(made, Wishes("consolidation", suppress=name), members, tmp_path)
    found = json.loads((tmp_path / "causal.json").read_text())
    assert found.keys() == written.keys()
    assert name in said and "report" not in found and (tmp_path / "suppress.png").exists()
    assert found["suppression"]["members"] == 1 and found["suppression"]["factor"] == -1.0
    (score,) = [m for m in found["suppression"]["measured"] if m["kind"] == "output"]
    assert score["name"] == "consolidation" and abs(score["after"] - score["before"]) > 0.01


def test_a_report_prints_edges_and_total_effects_by_layers_between(made):
    """The lines of a causal report have, for each distance, what its JSON has: Pearson by edge and by path."""
    lab = Lab(made.model, made.batch, made.dictionaries, [made.output], made.frozen)
    found = report(lab, made.whole, n_nodes=8, n_sources=8, n_watched=16, n_top=3, n_random=4)
    (line,) = [line for line in graph_command._reported(found) if "features on features" in line]
    pairs = json.loads(json.dumps(found.to_dict()))["pairs"]
    assert len(pairs["direct_by_distance"]) > 1 and pairs["direct_by_distance"].keys() == pairs["by_distance"].keys()
    for distance, edge in pairs["direct_by_distance"].items():
        if edge["pairs"] < 3:
            continue  # too few to be told
        said = f"{edge['pearson']:.2f} ({pairs['by_distance'][distance]['pearson']:.2f}), {edge['pairs']} pairs"
        assert f"{distance} layer" in line and said in line


def test_residual_saes_make_a_graph_too(made):
    placed = graph_command._dictionaries(made.model, Wishes("consolidation", mode="sae"), None)
    graph = graph_of(made.model, made.image, made.target, placed, max_features=30, mode="sae").whole
    assert graph.meta["mode"] == "sae" and graph.meta["max_relative_residual"] < 1e-5
    found = graph.nodes.is_type(NodeType.FEATURE)
    assert set(graph.nodes.layer[found].tolist()) == {one.writes.layer for one in placed} >= {2, 3}


def test_a_graph_of_saes_is_tested_by_interventions(model, picture, tmp_path, monkeypatch):
    """With SAEs of the stream too the causal report stands in its file, and ablation with all held is the edge."""
    monkeypatch.setattr(graph_command, "EFFECTS", 8)
    wishes = Wishes("consolidation", mode="sae", causal=True, max_features=60, paths=0)
    printed = graph_command.graph_command(model, picture, tmp_path, wishes)
    found = json.loads((tmp_path / "causal.json").read_text())["report"]
    assert found["pairs"]["constrained_error"] < 1e-4 and found["pairs"]["direct_by_distance"]["1"]["pairs"] > 20
    assert found["node_spearman"]["active"].keys() > {"influence", "activation"} and found["control"]["sets"] == 100
    assert "1 layer on" in printed and found["mediation"]["note"] in printed and (tmp_path / "suppress.png").exists()
