"""Attribution graphs. Empty until the graph room is built; see docs/architecture.md."""
