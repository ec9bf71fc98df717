"""Several dictionaries in one pass over a store, and the table that says which width and which L0 to take.

sweep.json is `{site, seed, split, rows: [{name, kind, width, l0, r2, r2_untrained, dead, c_dec, config}], picked}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mechinterp.activations import ActivationStore
from mechinterp.errors import UsageError
from mechinterp.storage import write_json
from mechinterp.types import Placed, Site
from saes.config import SAEConfig
from saes.dictionary import SparseDictionary
from saes.folder import load_sae
from saes.metrics.fidelity import c_dec
from saes.train import Run, train_together

__all__ = ["SWEEP", "Sweep", "SweepRow", "train_sweep"]

SWEEP = "sweep.json"

DEAD = 0.1
"""A width with a larger share of dead latents is not picked while another has fewer."""

NEAR = 0.01
"""A narrower dictionary is picked when its R2 is no more than this below the best."""


@dataclass(frozen=True)
class SweepRow:
    """One dictionary: its folder's name, what it is, and its metrics on the held-out split.

    `c_dec` is the mean |cos| between decoder rows, which is least near the true L0 (arXiv:2508.16560).
    """

    name: str
    kind: str
    width: int
    l0: float
    r2: float
    r2_untrained: float
    dead: float
    c_dec: float


@dataclass(frozen=True)
class Sweep:
    """The dictionaries, their table, and the name of the one to take (`pick`)."""

    placed: dict[str, Placed]
    rows: tuple[SweepRow, ...]
    picked: str

    def table(self) -> str:
        """The rows as text, the picked one marked."""
        head = ("", "name", "width", "L0", "R2", "R2 untrained", "dead", "c_dec")
        body = [
            (
                "*" if row.name == self.picked else "",
                row.name,
                str(row.width),
                f"{row.l0:.1f}",
                f"{row.r2:.4f}",
                f"{row.r2_untrained:.4f}",
                f"{row.dead:.3f}",
                f"{row.c_dec:.4f}",
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        lines = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in (head, *body))
        return "\n".join(line.rstrip() for line in lines)


def train_sweep(
    store: ActivationStore,
    site: str | Site,
    configs: Sequence[SAEConfig],
    out: Path | str,
    seed: int = 0,
    tokens: str | None = None,
    device: str = "cpu",
) -> Sweep:
    """Train a dictionary for each configuration, reading each batch once for all that share a batch size.

    Every dictionary lies in a folder of its own below `out` and has the bytes that `train_sae` gives it alone. An
    interrupted sweep is resumed exactly, each dictionary from its own checkpoint. `out/sweep.json` holds the table.

    Args:
        store, site, seed, tokens, device: as in `train_sae`.
        configs: what to train; no two alike.
        out: folder of the sweep.

    Raises what `train_sae` raises, and UsageError for configurations that are the same.
    """
    out, names = Path(out), [name_of(config) for config in configs]
    if not configs or len(set(names)) < len(names):
        names = [f"{name}-{number}" for number, name in enumerate(names)]
        if len({str(config.to_dict()) for config in configs}) < max(1, len(configs)):
            raise UsageError("two configurations are the same, or there is none", where="configs")
    runs = [
        Run(store, site, site, config, out / name, seed, tokens, device)
        for name, config in zip(names, configs, strict=True)
    ]
    for size in sorted({config.batch_size for config in configs}):
        train_together([run for run in runs if run.config.batch_size == size])
    placed = {name: load_sae(out / name) for name in names}
    rows = tuple(_row(name, placed[name], config) for name, config in zip(names, configs, strict=True))
    sweep = Sweep(placed, rows, pick(rows))
    first = placed[names[0]].dictionary
    assert isinstance(first, SparseDictionary)
    write_json(
        out / SWEEP,
        {
            "site": str(Site.parse(site)),
            "seed": seed,
            "split": first.info["metrics"]["split"],
            "rows": [asdict(row) | {"config": c.to_dict()} for row, c in zip(rows, configs, strict=True)],
            "picked": sweep.picked,
        },
    )
    return sweep


def pick(rows: Sequence[SweepRow]) -> str:
    """Which dictionary to take: L0 by `c_dec`, then width by R2.

    1. At each width the row with the least `c_dec` has the L0 to take, among rows that beat their untrained twin.
    2. Of these, widths with more than a tenth of dead latents are left out, if others remain.
    3. The narrowest whose R2 is within 0.01 of the best is picked.
    """
    useful = [row for row in rows if row.r2 > row.r2_untrained] or list(rows)
    by_width = [
        min((row for row in useful if row.width == width), key=lambda row: row.c_dec)
        for width in sorted({row.width for row in useful})
    ]
    alive = [row for row in by_width if row.dead <= DEAD] or by_width
    best = max(row.r2 for row in alive)
    return next(row.name for row in alive if row.r2 >= best - NEAR)


def name_of(config: SAEConfig) -> str:
    """A short folder name: kind, width, and what sets the sparsity."""
    sparsity = {
        field: value
        for field, value in config.to_dict().items()
        if field in ("k", "target_l0", "l0_coefficient", "l1_coefficient") and value is not None
    }
    if "target_l0" in sparsity:
        sparsity.pop("l0_coefficient")
    return "-".join([config.kind, f"w{config.width}", *(f"{field}{value:g}" for field, value in sparsity.items())])


def _row(name: str, placed: Placed, config: SAEConfig) -> SweepRow:
    dictionary = placed.dictionary
    assert isinstance(dictionary, SparseDictionary)
    scores: dict[str, Any] = dictionary.info["metrics"]
    return SweepRow(
        name=name,
        kind=config.kind,
        width=config.width,
        l0=scores["l0"],
        r2=scores["r2"],
        r2_untrained=dictionary.info["metrics_untrained"]["r2"],
        dead=scores["dead"],
        c_dec=c_dec(dictionary.W_dec),
    )
