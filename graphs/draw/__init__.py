"""Pictures of graphs: `graphs.draw.png` for one page, `graphs.draw.html` for an offline page to walk through."""
