"""`mechinterp graph`: the graph of one image as a folder, with pictures, groups, paths, attention and interventions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechinterp.audit.dictionary import stream_saes_of, train_transcoders, transcoders_of
from mechinterp.audit.feature_names import stored_names
from mechinterp.audit.graph_groups import fitted, keys_of, members_of, named
from mechinterp.audit.graph_pictures import gallery_of
from mechinterp.audit.graphing import BUDGET, EFFECTS, ImageGraph, asked_for, graph_of
from mechinterp.errors import UsageError
from mechinterp.models import HookedVLM
from mechinterp.storage import discard_earlier, write_json
from mechinterp.types import Placed

if TYPE_CHECKING:
    from graphs.replace import Mode, Replacement
    from mechinterp.data import ImageData

__all__ = ["Wishes", "graph_command"]

PAIRS = 8  # written for each attention score
EDGES = 5  # edges that are shared out among heads


@dataclass(frozen=True)
class Wishes:
    """What is asked of one graph; see the command's help for each.

    Attributes:
        target, against: texts; several captions in `against`, separated by ";", are a prompt set.
        max_features, node, edge, mode: see `graph_of`.
        paths: how many paths to write.
        attention: how many attention scores to take apart.
        causal: test the graph by interventions on the model.
        suppress: a group, a feature's name, or ids, to be suppressed in the model; None for none.
        groups: a file of groups (supernodes.json, or what the page gives) to be taken in place of proposed ones.
        seed: of everything random.
    """

    target: str
    against: str | None = None
    max_features: int = BUDGET
    node: float = 0.8
    edge: float = 0.98
    mode: Mode = "transcoder"
    paths: int = 5
    attention: int = 0
    causal: bool = False
    suppress: str | None = None
    groups: Path | None = None
    seed: int = 0


def graph_command(model: HookedVLM, image: Path, out: Path, wishes: Wishes, data: ImageData | None = None) -> str:
    """Write the graph folder of an image below `out`; returns the lines to print.

    Args:
        data: pictures of features are taken from it, and transcoders trained on it where none are stored; default a
            phantom.

    Beside what `graphs.export.folder` writes: paths.json; attention.json, causal.json and suppress.png where asked for.
    An earlier graph in `out` goes first.
    Raises UsageError for wishes that make no sense together, and StorageError for a file of groups that is none, before
    anything is written.
    """
    from graphs.export.folder import write_folder
    from graphs.supernodes import Supernodes, suggest
    from mechinterp.data.files import open_image

    for name, value in (("--paths", wishes.paths), ("--attention", wishes.attention)):
        if value < 0:
            raise UsageError(f"is {value}", where=name, hint="a number of things to show, 0 for none")
    given = None if wishes.groups is None else Supernodes.load(wishes.groups)
    name, pixels = open_image(image)
    target, output = asked_for(model, wishes.target, wishes.against)
    placed = _dictionaries(model, wishes, data)
    sizes = (wishes.max_features, wishes.node, wishes.edge, wishes.mode)
    made = graph_of(model, pixels, target, placed, name, *sizes, output=output)
    names = stored_names(model)
    lines = _said(made)
    if given is None or wishes.groups is None:
        groups = named(made.pruned, suggest(made.pruned, placed), names)
    else:
        groups, said = fitted(given, made, wishes.groups)
        lines += said
    chosen = None if wishes.suppress is None else members_of(made.whole, wishes.suppress, groups, names)
    discard_earlier(out, "graph")
    if wishes.paths:
        lines += _paths(made, wishes.paths, names, out)
    if wishes.attention:
        lines += _attention(made, wishes, out)
    mediation: dict[str, Any] | str = "NOT TESTED"
    if wishes.causal or chosen:
        said, written = _tested(made, wishes, chosen, out)
        lines += said
        mediation = written["report"]["mediation"] if wishes.causal else mediation
    whole, pruned = (replace(graph, meta={**graph.meta, "mediation": mediation}) for graph in (made.whole, made.pruned))
    gallery = gallery_of(model, made.pruned, placed, target, data, wishes.seed)
    write_folder(whole, pruned, made.image, out, names, gallery, groups)
    return "\n".join(lines)


def _dictionaries(model: HookedVLM, wishes: Wishes, data: ImageData | None) -> list[Placed]:
    if wishes.mode == "sae":
        stored = stream_saes_of(model)
        if not stored:
            hint = "train some at hook_resid_post, or take transcoders"
            raise UsageError("no SAE of the residual stream is stored with the model", where=model.label, hint=hint)
        return stored
    stored = transcoders_of(model)
    if stored:
        return stored
    from mechinterp.audit.defaults import default_data

    return train_transcoders(model, data or default_data(seed=wishes.seed), wishes.seed)


def _said(made: ImageGraph) -> list[str]:
    from graphs.draw.notes import halves_of

    halves = halves_of(made.pruned)
    scores, most = made.pruned.meta["scores"], made.whole.meta["max_relative_residual"]
    values = ", ".join(f"{o.name} {o.value:+.3f}" for o in made.pruned.outputs)
    return [
        f"{made.model.label} on {made.batch.ids[0]}: {values}",
        *([f"  {halves}"] if halves else []),
        f"  {len(made.whole.nodes)} nodes, {made.whole.n_edges} edges; pruned to {len(made.pruned.nodes)} and "
        f"{made.pruned.n_edges}",
        f"  every row adds up to {most:.1e}; completeness {scores['completeness']:.3f} (counting inputs "
        f"{scores['completeness_circuit_tracer']:.3f}), replacement {scores['replacement']:.3f}",
    ]


def _paths(made: ImageGraph, k: int, names: Mapping[str, str], out: Path) -> list[str]:
    """paths.json, and the paths as lines."""
    from graphs.nodes import NodeType
    from graphs.paths import paths_of_score

    graph, key = made.pruned, keys_of(made.pruned)

    def said(node: int) -> str:
        label = graph.nodes.labels[node]
        if graph.nodes.type[node] != NodeType.FEATURE:
            return label
        name, at = names.get(key(node)), label.rpartition(" at ")[2]
        where = f"{graph.nodes.towers[int(graph.nodes.tower[node])]} L{int(graph.nodes.layer[node])}, {at}"
        return f"{name or f'F{int(graph.nodes.feature[node])}'} ({where})"

    found = paths_of_score(made.whole, graph, k)
    rows = [
        {"share": p.share, "contribution": p.contribution, "nodes": list(p.ids), "labels": [said(i) for i in p.nodes]}
        for p in found
    ]
    write_json(out / "paths.json", {"schema_version": 1, "paths": rows})
    total = sum(p.share for p in found)
    lines = [f"  strongest paths, {100 * total:.1f} % of all influence (contribution to the score, share):"]
    return lines + [
        f"    {row['contribution']:+.3f} {100 * row['share']:4.1f} %  {' > '.join(row['labels'])}" for row in rows
    ]


def _attention(made: ImageGraph, wishes: Wishes, out: Path) -> list[str]:
    """attention.json: the heads that bring most, why each looks where it looks, and the heads of single edges."""
    from graphs.heads import top_reads
    from graphs.qk import qk_panel
    from graphs.replace import Replacement

    replacement = Replacement(made.frozen, made.dictionaries, wishes.mode)
    lines, rows = ["  heads that bring most (share of influence), and the pair that most makes them look there:"], []
    for read in top_reads(replacement, made.pruned, wishes.attention):
        panel = qk_panel(replacement, read.tower, read.layer, read.head, read.query, read.key)
        pairs = panel.top(PAIRS, contrast=True)
        rows.append(
            {
                "tower": read.tower,
                "layer": read.layer,
                "head": read.head,
                "query": read.query,
                "key": read.key,
                "share": read.score,
                "loading": read.loading,
                "score": panel.score,
                "mean_score": panel.mean_score,
                "pairs": [{"query": pair.query, "key": pair.key, "value": pair.value} for pair in pairs],
            }
        )
        best, at = pairs[0], f"{read.tower} L{read.layer}H{read.head}, position {read.query} from {read.key}"
        lines.append(
            f"    {at}: {100 * read.score:.1f} %; score {panel.contrast:+.2f} against its mean over keys, of it "
            f"{best.value:+.2f} by {best.query} x {best.key}"
        )
    edges = _edges(made, replacement)
    write_json(out / "attention.json", {"schema_version": 1, "reads": rows, "edges": edges})
    if edges:
        lines.append("  strongest edges through one attention layer, by head (parts of the weight):")
    for edge in edges:
        parts = [f"L{head['layer']}H{head['head']} {head['part']:+.2f}" for head in edge["heads"][:3]]
        said = ", ".join([*parts, f"direct {edge['direct']['part']:+.2f}"])
        lines.append(f"    {edge['source']} to {edge['target']}, {edge['weight']:+.3f}: {said}")
    return lines


def _edges(made: ImageGraph, replacement: Replacement) -> list[dict[str, Any]]:
    """The strongest one-hop edges of the drawn graph: what each head carries, and what passes through none."""
    from graphs.heads import top_edges

    nodes = made.pruned.nodes
    return [
        {
            "source": nodes.ids[source],
            "target": nodes.ids[target],
            "weight": found.edge,
            "share": share,
            "direct": {"loading": found.no_head, "part": found.no_head / found.edge},
            "heads": [
                {"tower": tower, "layer": layer, "head": head, "loading": loading, "part": loading / found.edge}
                for (tower, layer, head), loading in found.last.items()
            ],
        }
        for target, source, share, found in top_edges(replacement, made.pruned, EDGES)
    ]


def _tested(
    made: ImageGraph, wishes: Wishes, chosen: Sequence[int] | None, out: Path
) -> tuple[list[str], dict[str, Any]]:
    """causal.json and suppress.png: the causal report where it is asked for, and the suppression of a group.

    Returns the lines to print, and what causal.json holds.
    """
    from graphs.causal import Lab, draw_suppression, predicted, report, suppress
    from graphs.nodes import NodeType

    lab = Lab(made.model, made.batch, made.dictionaries, [made.output], made.frozen)
    written: dict[str, Any] = {}
    lines: list[str] = []
    if wishes.causal:
        found = report(lab, made.whole, n_nodes=EFFECTS, n_sources=16, n_watched=128, seed=wishes.seed)
        written["report"], lines = found.to_dict(), _reported(found)
    nodes = made.whole.nodes
    strength = nodes.influence * nodes.is_type(NodeType.FEATURE)
    members, name = list(chosen or ()), wishes.suppress or ""
    if not members:
        members = [int(i) for i in strength.topk(10).indices if strength[i] > 0]
        name = f"the {len(members)} most influential features"
    watched = predicted(made.whole, members)
    done = suppress(lab, made.whole, members, watched, name=name, n_random=100, seed=wishes.seed)
    written["suppression"] = done.to_dict()
    out.mkdir(parents=True, exist_ok=True)
    draw_suppression(done, out / "suppress.png")
    write_json(out / "causal.json", written)
    changes = "; ".join(f"{m.name} {m.before:.2f} to {m.after:.2f} (p = {m.p:.3f})" for m in done.measured)
    return [*lines, f"  {name} ({len(members)} nodes) set to minus their activation: {changes}"], written


def _reported(found: Any) -> list[str]:
    """Some lines of a causal report."""
    rank, control, pairs = found.node_spearman["active"], found.control, found.pairs
    far = "; ".join(  # edges of SAEs reach the next SAE only
        f"{d} layer{'s' * (d > 1)} on {'no edges' if isnan(edge.pearson) else format(edge.pearson, '.2f')} "
        f"({pairs.by_distance[d].pearson:.2f}), {edge.pairs} pairs"
        for d, edge in pairs.direct_by_distance.items()
        if edge.pairs > 2
    )
    return [
        f"  ablation with all held against minus the edge: largest difference {pairs.constrained_error:.1e}",
        f"  features on features, nothing held, Pearson with edge (with total effect): {far or 'too few pairs'}",
        f"  influence against |effect| on the score, nothing held: Spearman {rank['influence']:.2f} (gradient x "
        f"activation {rank['gradient x activation']:.2f}, activation {rank['activation']:.2f}) over "
        f"{found.samples['active']} features",
        f"  removing the top {control.features} moves the score by {control.effect:.3f}, matched random features "
        f"by {control.random_median:.3f} (p = {control.p:.3f})",
        f"  attention: {found.mediation.note}",
    ]
