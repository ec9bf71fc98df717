"""How our graphs grow: CPU time and memory against positions, layers, features and targets, one varied at a time.

`python -m benchmarks.graph_growth` draws docs/figures/graph-scaling.png from benchmarks/results/graph.json. In the
rows the peer is growth in proportion, from the smallest size: a ratio above 1 is slower growth than that.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, Row
from benchmarks.graph_processes import Process, ours
from benchmarks.toy import Shape

BASE = Shape(6, 128, 32, 64, 1000, causal=False)
AXES: dict[str, tuple[int, ...]] = {
    "positions": (16, 32, 64, 128),
    "layers": (3, 6, 12, 24),
    "features": (500, 1000, 2000, 4000),
    "targets": (125, 250, 500, 1000),
}
"""`targets` is the budget of features that are expanded, of 1,000."""
TURNS = 3
PEER = "in proportion to the smallest"
UNITS = ("CPU s", "MiB added")
FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "graph-scaling.png"


def run(quick: bool = False) -> list[Row]:
    """Two rows for each size: seconds and memory."""
    base = replace(BASE, layers=2, d_model=32, d_head=8, positions=12, n_features=80) if quick else BASE
    axes = {"positions": (12, 24), "layers": (2, 4), "features": (40, 80), "targets": (10, 40)} if quick else AXES
    rows = []
    with ours() as worker:
        for axis, sizes in axes.items():
            costs = [_cost(worker, base, axis, size, 1 if quick else TURNS) for size in sizes]
            for unit, values in zip(UNITS, zip(*costs, strict=True), strict=True):
                for size, value in zip(sizes, values, strict=True):
                    even = values[0] * size / sizes[0]
                    rows.append(Row(f"{_told(base, axis)}: {size} {axis}", value, even, PEER, unit, even / value, None))
    return rows


def _told(base: Shape, axis: str) -> str:
    """What is held."""
    held = {"layers": base.layers, "positions": base.positions, "features": base.n_features}
    return f"d{base.d_model}, " + ", ".join(f"{value} {name}" for name, value in held.items() if name != axis)


def _cost(worker: Process, base: Shape, axis: str, size: int, turns: int) -> tuple[float, float]:
    """CPU seconds and MiB of one size. `targets` is a budget, the others are of the model."""
    field = {"features": "n_features"}.get(axis, axis)
    shape = base if axis == "targets" else replace(base, **{field: size})
    job = {"batch": None, "budget": size if axis == "targets" else None, "out": None}
    with tempfile.TemporaryDirectory() as folder:
        worker({"folder": folder, "write": asdict(shape)})
        costs = [worker({**job, "folder": folder}) for _ in range(turns)]
    added = [max(cost["peak"] - cost["before"], 1.0) for cost in costs]
    return statistics.median(cost["cpu"] for cost in costs), statistics.median(added)


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Each axis a column, each unit a line of panels, both scales logarithmic; the dashed line is proportion."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    figure, panels = plt.subplots(
        len(UNITS), len(AXES), figsize=(11, 5), sharex="col", sharey="row", layout="constrained"
    )
    for line, unit in zip(panels, UNITS, strict=True):
        for panel, axis in zip(line, AXES, strict=True):
            mine = [row for row in rows if row["case"].endswith(f" {axis}") and row["unit"] == unit]
            sizes = [int(row["case"].split()[-2]) for row in mine]
            panel.loglog(sizes, [row["ours"] for row in mine], "o-", color="tab:blue", label="measured")
            panel.loglog(sizes, [row["peer"] for row in mine], "--", color="0.6", label="in proportion")
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
            panel.minorticks_off()
            panel.spines[["top", "right"]].set_visible(False)
            panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            if unit == UNITS[0]:
                panel.set_title(mine[0]["case"].partition(":")[0], fontsize=8)
            else:
                panel.set_xlabel(axis)
        line[0].set_ylabel({"CPU s": "CPU seconds", "MiB added": "memory added (MiB)"}[unit])
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    written = json.loads((RESULTS / "graph.json").read_text())["rows"]
    figure([row for row in written if row["peer_name"] == PEER], FIGURE)
    print(FIGURE.relative_to(FIGURE.parents[2]))
