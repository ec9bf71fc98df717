"""What stands under the title of a graph: how its outputs belong together, and what interventions said of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graphs.draw.html import page_of
from graphs.draw.notes import halves_of, notes_of
from graphs.draw.png import figure_of
from graphs.graph import Outputs
from tests.graph_scenes import lot

FLAG = "attention-mediated, graph incomplete"


def named(*names):
    """A graph with outputs of these names."""
    graph = lot(0, outputs=len(names))
    return replace(graph, outputs=Outputs(replace(o, name=n) for o, n in zip(graph.outputs, names, strict=True)))


def shown(graph):
    """All text of the picture, and of the page."""
    return ["\n".join(text.get_text() for text in figure_of(graph, None).figure.axes[0].texts), page_of(graph, None)]


@pytest.mark.parametrize("mediation", [{"note": FLAG, "flag": True}, "NOT TESTED", None])
def test_the_verdict_of_interventions_is_shown_where_there_is_one(mediation):
    """Picture and page say what the causal report found, and nothing of the sort where none was made."""
    graph = lot(0)
    graph = replace(graph, meta={**graph.meta, **({} if mediation is None else {"mediation": mediation})})
    tested = isinstance(mediation, dict)
    for text in shown(graph):
        assert (f"Tested by interventions: {FLAG}." in text) == tested
        assert ("ested by interventions" in text) == tested and "NOT TESTED" not in text


def test_halves_are_one_score():
    """The halves of one similarity are said to be one score; outputs by themselves are not."""
    halves = named("p (image half)", "p (text half: with)", "p (text half: without)")
    assert halves_of(halves) == "One score: the image half is all of it, and so are the text halves together."
    assert halves_of(named("p (image half)", "p (text half: p)")).endswith("and so is the text half.")
    assert all(halves_of(halves) in text for text in shown(halves))
    for names in (["p"], ["p", "q"], ["p (image half)", "q (image half)"], ["p (left)", "p (right)"]):
        assert notes_of(named(*names)) == []


def test_the_legend_tells_lines_from_frames():
    """A line's colour is its effect on the next node; only a frame's is that on the output."""
    for text in shown(lot(0)):
        assert "raises the output" not in text and "the next node, directly" in text and "the output, in total" in text
