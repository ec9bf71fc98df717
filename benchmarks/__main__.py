"""`python -m benchmarks [NAME ...] [--quick]`: print the tables and write benchmarks/results/NAME.json."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from benchmarks.common import RESULTS, save, table

BENCHMARKS = {
    "effects": "bench_effects",
    "explainers": "bench_explainers",
    "extraction": "bench_extraction",
    "graph": "bench_graph",
    "memory": "bench_memory",
    "sae": "bench_sae",
}


def main() -> None:
    """Run the named benchmarks, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default all")
    parser.add_argument("--quick", action="store_true", help="small and rough: checks that the benchmark runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    chosen = parser.parse_args()
    unknown = sorted(set(chosen.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    for name in chosen.names or BENCHMARKS:
        rows = import_module(f"benchmarks.{BENCHMARKS[name]}").run(quick=chosen.quick)
        save(name, rows, chosen.quick, chosen.out)
        print(table(name, rows), flush=True)


if __name__ == "__main__":
    main()
