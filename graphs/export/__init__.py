"""Graphs for other programs: circuit-tracer's JSON, networkx and GraphML, and the whole graph folder."""
