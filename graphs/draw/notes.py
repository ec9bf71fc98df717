"""What a picture or page of a graph says about the graph as a whole, under its title."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphs.graph import AttributionGraph

__all__ = ["halves_of", "notes_of"]


def notes_of(graph: AttributionGraph) -> list[str]:
    """How the outputs belong together, and whether interventions found what the graph cannot show; empty for neither.

    The verdict of interventions is `meta["mediation"]` (`graphs.causal.Mediation` as JSON); a graph that was not tested
    has no line about it.
    """
    tested = graph.meta.get("mediation")
    verdict = f"Tested by interventions: {tested['note']}." if isinstance(tested, dict) and tested.get("note") else ""
    return [said for said in (halves_of(graph), verdict) if said]


def halves_of(graph: AttributionGraph) -> str:
    """That the outputs are one score taken apart in two ways, where they are; else empty."""
    wholes = {output.name.partition(" (")[0] for output in graph.outputs}
    parts = [output.name.partition(" (")[2] for output in graph.outputs]
    if len(wholes) != 1 or len(parts) < 2 or not all(part.startswith(("image half", "text half")) for part in parts):
        return ""
    texts = "so is the text half" if len(parts) == 2 else "so are the text halves together"
    return f"One score: the image half is all of it, and {texts}."
