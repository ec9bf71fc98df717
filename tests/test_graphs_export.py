"""Files for other programs: what their readers ask for, unique names, and text that stays text."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import networkx
import pytest
import torch

from graphs.export.circuit_tracer import to_circuit_tracer
from graphs.export.folder import write_folder
from graphs.export.schema import problems_of
from graphs.graph import AttributionGraph
from graphs.influence import influence
from graphs.nodes import NodeType
from graphs.prune import prune
from graphs.scores import scores
from graphs.supernodes import Supernodes
from graphs.views import to_networkx, write_graphml
from mechinterp.storage import verify_folder
from tests.graph_scenes import WORDS, lot, radiograph

HOSTILE = '"><script>alert(1)</script>\u202e\x00&amp;'


def hostile_names(graph):
    nodes = graph.nodes
    rows = nodes.is_type(NodeType.FEATURE).nonzero()[:, 0].tolist()
    sites = [f"{nodes.towers[int(nodes.tower[i])]}.blocks.{int(nodes.layer[i])}.hook_mlp_out" for i in rows]
    return {f"{site}:{int(nodes.feature[i])}": HOSTILE for site, i in zip(sites, rows, strict=True)}


def test_words_of_the_prompt_are_what_entered():
    """An output that is read at a position is no word, and a position that lost its nodes keeps its word."""
    graph = lot(0)
    nodes, outputs = graph.nodes, [output.node for output in graph.outputs]
    pos = nodes.pos.clone()
    pos[outputs] = 1
    graph = replace(graph, nodes=replace(nodes, pos=pos))
    words = to_circuit_tracer(graph)["metadata"]["prompt_tokens"]
    assert words[0] == "CLS" and words[1] == "patch 0,0" and list(WORDS) == words[17 : 17 + len(WORDS)]
    pruned = prune(graph, 0.3)
    assert len(pruned.nodes) < len(graph.nodes) / 2
    kept = to_circuit_tracer(pruned, whole=graph)["metadata"]["prompt_tokens"]
    assert kept[: 17 + len(WORDS)] == words[: 17 + len(WORDS)]


@pytest.mark.parametrize("case", [{"seed": 0}, {"seed": 1, "chained": True}, {"seed": 2, "outputs": 3}])
def test_circuit_tracer_json(case):
    graph = prune(lot(**case), 0.95)
    made = json.loads(json.dumps(to_circuit_tracer(graph), allow_nan=False))
    assert problems_of(made) == []
    nodes = {node["node_id"]: node for node in made["nodes"]}
    assert len(nodes) == len(made["nodes"]) == len(graph.nodes) and len(made["links"]) == graph.n_edges
    assert sum(link["weight"] for link in made["links"]) == pytest.approx(float(graph.weights.values().sum()))
    kinds = [node["feature_type"] for node in made["nodes"]]
    types = graph.nodes.type.tolist()
    assert kinds.count("cross layer transcoder") == types.count(int(NodeType.FEATURE))
    assert kinds.count("mlp reconstruction error") == types.count(int(NodeType.ERROR))
    assert kinds.count("logit") == len(graph.outputs)
    assert sum(node["token_prob"] for node in made["nodes"]) == pytest.approx(1, abs=1e-3)
    # an edge goes up in their layers, too
    height = {name: -1 if n["layer"] == "E" else int(n["layer"]) for name, n in nodes.items()}
    assert all(height[link["source"]] < height[link["target"]] for link in made["links"])
    # what the viewer shows under a node is where it is
    for i, node in enumerate(made["nodes"]):
        if node["feature_type"] in ("cross layer transcoder", "mlp reconstruction error"):
            assert graph.nodes.labels[i].endswith(" at " + made["metadata"]["prompt_tokens"][node["ctx_idx"]])
    # their id of a feature: layer and latent in one number (Cantor)
    i = types.index(int(NodeType.FEATURE))
    n = int(made["nodes"][i]["feature"])
    w = int(((8 * n + 1) ** 0.5 - 1) // 2)
    assert (n - w * (w + 1) // 2) == int(graph.nodes.feature[i])


def test_the_names_that_collide_in_circuit_tracer_do_not():
    graph = lot(0)
    made = to_circuit_tracer(graph)
    theirs = []
    for node in made["nodes"]:
        first = f"0_{node['layer']}" if node["feature_type"] == "mlp reconstruction error" else None
        theirs.append(f"{first}_{node['ctx_idx']}" if first else node["node_id"])
    assert len(set(theirs)) < len(theirs)
    assert len({node["node_id"] for node in made["nodes"]}) == len(theirs)


def test_what_the_viewer_needs_is_checked():
    made = to_circuit_tracer(prune(lot(0)))
    edits = {
        "two nodes have this id": lambda v: v["nodes"].append(v["nodes"][0]),
        "there is no node nowhere": lambda v: v["links"].append({"source": "nowhere", "target": "x", "weight": 1.0}),
        "nodes[0].layer: is int": lambda v: v["nodes"][0].update(layer=3),
        "metadata.prompt: missing": lambda v: v["metadata"].pop("prompt"),
        "links: missing": lambda v: v.pop("links"),
        "has no token": lambda v: v["nodes"][0].update(ctx_idx=10**6),
        "reads (p=...)": lambda v: v["nodes"][-1].update(clerp="Output"),
        "holds markup": lambda v: v["nodes"][0].update(clerp="<b>"),
        "weight: is nan": lambda v: v["links"][0].update(weight=float("nan")),
        "there is no node gone": lambda v: v["qParams"]["supernodes"].append(["a", "gone"]),
        "is_target_logit: is int": lambda v: v["nodes"][0].update(is_target_logit=1),
        "run_idx: is bool": lambda v: v["nodes"][0].update(run_idx=True),
        "feature_type is 'bias'": lambda v: v["nodes"][0].update(feature_type="bias"),
    }
    assert problems_of(made) == []
    for message, edit in edits.items():
        broken = copy.deepcopy(made)
        edit(broken)
        assert any(message in line for line in problems_of(broken)), message


def test_names_and_groups_go_along_as_text():
    graph = prune(lot(0), 0.95)
    ids = [graph.nodes.ids[i] for i in graph.nodes.is_type(NodeType.FEATURE).nonzero()[:3, 0].tolist()]
    groups = Supernodes().add(HOSTILE, [*ids, "not.here"]).add("absent", ["also.not.here"])
    made = to_circuit_tracer(graph, names=hostile_names(graph), supernodes=groups)
    text = json.dumps(made, ensure_ascii=False)
    assert "<" not in text and "\u202e" not in text and "alert(1)" in text
    (group,) = made["qParams"]["supernodes"]
    assert len(group) == 4


def test_networkx_is_the_graph():
    graph = prune(lot(1, chained=True), 0.95)
    made = to_networkx(graph)
    assert (len(made), made.number_of_edges()) == (len(graph.nodes), graph.n_edges)
    assert networkx.is_directed_acyclic_graph(made)
    output = graph.nodes.ids[graph.outputs[0].node]
    sources, weights = graph.in_edges(graph.outputs[0].node)
    for s, w in zip(sources.tolist(), weights.tolist(), strict=True):
        assert made[graph.nodes.ids[s]][output]["weight"] == w
    least = 0.01
    few = to_networkx(graph, least)
    kept = {n for n, v in zip(graph.nodes.ids, graph.nodes.influence.tolist(), strict=True) if v >= least}
    assert set(few) == kept | {output} and few.number_of_edges() < made.number_of_edges()
    whole = lot(1)
    assert to_networkx(whole).nodes[whole.nodes.ids[0]]["influence"] == pytest.approx(float(influence(whole)[0]))


def test_graphml_can_be_read_again(tmp_path):
    graph = prune(lot(0), 0.95)
    labels = [HOSTILE + "\ttab" for _ in graph.nodes.ids]
    graph = graph.with_nodes(graph.nodes.with_labels(labels))
    found = networkx.read_graphml(write_graphml(graph, tmp_path / "g.graphml"))
    mine = to_networkx(graph)
    assert set(found) == set(mine) and set(found.edges) == set(mine.edges)
    edge = next(iter(mine.edges))
    assert found.edges[edge]["weight"] == pytest.approx(mine.edges[edge]["weight"])
    assert "<script>" in found.nodes[edge[0]]["label"]


def test_the_folder(tmp_path):
    """A folder has all its files, sealed, and they say what the graph, its scores and its groups say."""
    graph = lot(0, dtype=torch.float32)
    pruned = prune(graph)
    groups = Supernodes().add("g", [pruned.nodes.ids[int(pruned.nodes.is_type(NodeType.FEATURE).nonzero()[0, 0])]])
    out = write_folder(graph, pruned, radiograph(), tmp_path / "out", supernodes=groups)
    assert verify_folder(out) == []
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "graph.safetensors",
        "graph.json",
        "graph.png",
        "graph.html",
        "circuit_tracer.json",
        "graph.graphml",
    }
    assert Supernodes.load(out / "supernodes.json") == groups
    assert [g["mixed_signs"] for g in json.loads((out / "supernodes.json").read_text())["supernodes"]] == [False]
    again = AttributionGraph.load(out)
    assert torch.equal(again.weights.values(), graph.weights.values())
    about = json.loads((out / "graph.json").read_text())
    assert about["completeness"] == pytest.approx(scores(graph).completeness)
    assert about["replacement"] == pytest.approx(scores(graph).replacement)
    assert about["max_relative_residual"] == graph.meta["max_relative_residual"]
    assert problems_of(json.loads((out / "circuit_tracer.json").read_text())) == []
    assert json.loads((out / "manifest.json").read_text())["kind"] == "graph"
    (out / "graph.png").write_bytes(b"x")
    assert verify_folder(out) == ["graph.png: does not match its sha256"]
