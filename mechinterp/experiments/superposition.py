"""superposition: do dictionaries recover the features of models whose features are known?

1. Train the toy model of superposition at several sparsities and correlations; train each kind of SAE on its hidden
   layer; compare decoder rows with the true directions (MCC beside that of random directions) and count how many
   features drive one latent, and one neuron (polysemanticity).
2. The same on activations that sae-lens's synthetic models make, as a check by others' code; there a TopK SAE that
   sae-lens's own trainer trained on the same rows stands beside ours.

About 5 minutes on one core.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechinterp.experiments.canvas import COLOURS, GREY, axes_of, canvas, log_ticks, png
from mechinterp.experiments.result import Claim, Result, Row, Table
from mechinterp.metrics.statistics import Interval, PatientBootstrap, percentile_interval
from mechinterp.progress import progress
from saes import train_sae
from saes.config import BatchTopKConfig, MatryoshkaConfig, SAEConfig, TopKConfig
from saes.metrics.recovery import mcc, mcc_floor
from saes.truth.arrays import SITE, store_of
from saes.truth.synthetic import sae_lens_mcc, synthetic, trained_by_sae_lens
from saes.truth.toy import (
    Toy,
    draw_features,
    latent_responses,
    matched_cosines,
    polysemanticity,
    train_toy,
)

__all__ = ["Sizes", "run"]

RECALL, NEAR = 0.9, 0.05
PEER = "topk by sae-lens"


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    features: int = 40
    hidden: int = 12
    probabilities: tuple[float, ...] = (0.3, 0.1, 0.03)
    correlations: tuple[float, ...] = (0.0, 0.5, 0.9)
    kinds: tuple[str, ...] = ("topk", "batchtopk", "matryoshka")
    seeds: int = 2
    toy_steps: int = 1500
    rows: int = 16_000
    epochs: int = 15
    synthetic: tuple[int, int] = (64, 24)


QUICK = Sizes(12, 5, (0.3, 0.05), (0.0, 0.9), ("topk",), 1, 250, 1500, 6, (16, 8))


@dataclass(frozen=True, eq=False)
class Cell:
    """One setting: `source` "toy" or "sae-lens", its dictionaries' matched cosines over all seeds, and the floor."""

    source: str
    probability: float
    correlation: float
    kind: str
    cosines: np.ndarray
    floor: float
    poly_latents: float
    poly_neurons: float
    per_dimension: float
    peer: float  # largest difference of our MCC and sae-lens's

    @property
    def mcc(self) -> float:
        """Mean matched cosine."""
        return float(self.cosines.mean())

    @property
    def corrected(self) -> float:
        """`(MCC - floor) / (1 - floor)`: 0 for random directions, 1 for the true ones."""
        return (self.mcc - self.floor) / (1 - self.floor)

    @property
    def interval(self) -> Interval:
        """95 % bootstrap interval of the MCC over features."""
        draws = PatientBootstrap.of([str(i) for i in range(len(self.cosines))], draws=1000)
        return percentile_interval(draws.mean(self.cosines))


def run(seed: int = 0, quick: bool = False, sizes: Sizes | None = None) -> Result:
    """Run the experiment. `sizes` overrides both versions."""
    size = sizes or (QUICK if quick else Sizes())
    grid = [("toy", p, c) for p in size.probabilities for c in size.correlations]
    grid += [("sae-lens", size.probabilities[-2 if len(size.probabilities) > 2 else -1], c) for c in size.correlations]
    cells: list[Cell] = []
    for source, probability, correlation in progress(grid, "toy models", unit="setting"):
        made = [
            (_toy if source == "toy" else _synthetic)(size, probability, correlation, seed * 1000 + s)
            for s in range(size.seeds)
        ]
        kinds = (*size.kinds, PEER) if source == "sae-lens" else size.kinds
        cells += [_cell(source, probability, correlation, kind, made, size) for kind in kinds]
    return Result([row for cell in cells for row in _rows(cell)], _claims(cells), _tables(cells), _figure(cells), NOTES)


@dataclass(frozen=True, eq=False)
class Made:
    """Activations with truth: `directions [feature, d]`, `rows [row, d]`."""

    directions: Tensor
    rows: Tensor
    l0: float
    per_dimension: float
    poly_neurons: float
    seed: int


def _toy(size: Sizes, probability: float, correlation: float, seed: int) -> Made:
    toy = Toy(size.features, size.hidden, probability, correlation)
    model = train_toy(toy, size.toy_steps, seed=seed)
    x = draw_features(toy, size.rows, torch.Generator().manual_seed(seed + 500))
    directions = model.represented
    neurons = polysemanticity(directions).nanmean().item()
    l0 = (x[:, model.W.norm(dim=0) >= 0.5] > 0).float().sum(1).mean().item()
    return Made(directions, model.hidden(x), l0, model.per_dimension, neurons, seed)


def _synthetic(size: Sizes, probability: float, correlation: float, seed: int) -> Made:
    features, d = size.synthetic
    found = synthetic(features, d, size.rows, probability, correlation, seed)
    neurons = polysemanticity(found.directions).nanmean().item()
    return Made(found.directions, found.activations, found.true_l0, features / d, neurons, seed)


def _config(kind: str, made: Made, size: Sizes) -> SAEConfig:
    """As many latents as features are represented, as many active as are there on average."""
    common: dict[str, Any] = {
        "width": len(made.directions),
        "k": max(1, round(made.l0)),
        "epochs": size.epochs,
        "batch_size": 512,
        "lr": 3e-3,
    }
    match kind:
        case "batchtopk":
            return BatchTopKConfig(**common)
        case "matryoshka":
            half = max(1, common["width"] // 2)
            return MatryoshkaConfig(**common, levels=(half, common["width"]) if half < common["width"] else (half,))
        case _:  # ours and sae-lens's
            return TopKConfig(**common)


def _cell(source: str, probability: float, correlation: float, kind: str, made: Sequence[Made], size: Sizes) -> Cell:
    cosines, floors, poly, peer = [], [], [], 0.0
    for one in made:
        decoder, latents = _trained(kind, one, size)
        cosines.append(matched_cosines(decoder, one.directions))
        floors.append(mcc_floor(len(decoder), len(one.directions), one.directions.shape[1], draws=5, seed=one.seed))
        poly.append(latents)
        if source == "sae-lens":
            peer = max(peer, abs(mcc(decoder, one.directions) - sae_lens_mcc(decoder, one.directions)))
    return Cell(
        source,
        probability,
        correlation,
        kind,
        np.concatenate(cosines),
        float(np.mean(floors)),
        float(np.mean(poly)),
        float(np.mean([m.poly_neurons for m in made])),
        float(np.mean([m.per_dimension for m in made])),
        peer,
    )


def _trained(kind: str, one: Made, size: Sizes) -> tuple[Tensor, float]:
    """Decoder rows of a dictionary of `one`, and the mean polysemanticity of its latents (nan for the peer's)."""
    config, split = _config(kind, one, size), np.where(np.arange(len(one.rows)) % 10 == 0, "test", "train")
    if kind == PEER:
        rows, k = one.rows[torch.from_numpy(split == "train")], getattr(config, "k", 1)
        decoder = trained_by_sae_lens(rows, config.width, k, config.epochs, config.batch_size, config.lr, one.seed)
        return decoder, float("nan")
    with tempfile.TemporaryDirectory() as scratch:
        store = store_of(one.rows.numpy(), split, Path(scratch) / "store")
        placed = train_sae(store, SITE, config, Path(scratch) / "sae", seed=one.seed)
    responses = latent_responses(placed.dictionary, one.directions)
    return placed.dictionary.W_dec.detach(), polysemanticity(responses).nanmean().item()


def _rows(cell: Cell) -> list[Row]:
    of = {
        "source": cell.source,
        "probability": cell.probability,
        "correlation": cell.correlation,
        "kind": cell.kind,
    }
    n = len(cell.cosines)
    return [
        Row("mcc", cell.mcc, n, cell.interval, of),
        Row("mcc floor", cell.floor, n, of=of),
        Row("mcc corrected", cell.corrected, n, of=of),
        Row("recall", float((cell.cosines >= RECALL).mean()), n, of=of),
        *([] if cell.kind == PEER else [Row("polysemanticity of latents", cell.poly_latents, n, of=of)]),
        Row("polysemanticity of neurons", cell.poly_neurons, n, of=of),
        Row("features per dimension", cell.per_dimension, n, of=of),
    ]


def _tables(cells: Sequence[Cell]) -> list[Table]:
    header = ("source", "kind", "P(feature)", "correlation", "MCC", "95 %", "floor", "corrected", f"recall at {RECALL}")
    header = (*header, "features per dim.", "polysemanticity: latents", "neurons")
    lines = [
        (
            *(c.source, c.kind, c.probability, c.correlation, c.mcc, f"{c.interval[0]:.2f} to {c.interval[1]:.2f}"),
            *(c.floor, c.corrected, float((c.cosines >= RECALL).mean()), c.per_dimension),
            *(c.poly_latents, c.poly_neurons),
        )
        for c in cells
    ]
    return [Table("Recovery of known features", header, tuple(lines))]


NOTES = (
    "MCC: mean |cosine| of true directions and decoder rows under the best one-to-one matching. floor: the same for "
    "random directions of the same number and width. corrected = (MCC - floor) / (1 - floor).",
    "polysemanticity: 1 - max / sum of squared responses to each feature alone; 0 for a unit that one feature drives.",
    "Dictionaries have as many latents as features are represented, and as many active as are there on average: what "
    "a real user cannot know. Features are those whose column of W has a norm of at least 0.5.",
    "topk by sae-lens: a TopK SAE of the same width, k, steps and rate, trained by sae-lens's SAETrainer from its own "
    "start on the same rows of its own synthetic model.",
    "The interval is over features (all seeds pooled), not over patients: there are none here.",
)


def _claims(cells: Sequence[Cell]) -> list[Claim]:
    toy = [c for c in cells if c.source == "toy"]
    kinds = list(dict.fromkeys(c.kind for c in toy))
    rare, common = min(c.probability for c in toy), max(c.probability for c in toy)
    loose, tight = min(c.correlation for c in toy), max(c.correlation for c in toy)

    def mean(source: str, what: str, **at: float) -> float:
        chosen = [c for c in cells if c.source == source and all(getattr(c, k) == v for k, v in at.items())]
        return float(np.mean([getattr(c, what) for c in chosen]))

    sparse = [c for c in toy if c.probability == rare and c.correlation == loose]

    def fall(source: str) -> tuple[float, float]:
        """MCC at the lowest less at the highest correlation, and half its 95 % interval (features independent)."""
        at = [[c.cosines for c in cells if c.source == source and c.correlation == r] for r in (loose, tight)]
        high, low = (np.concatenate(parts) for parts in at)
        half = 1.96 * np.hypot(high.std() / len(high) ** 0.5, low.std() / len(low) ** 0.5)
        return float(high.mean() - low.mean()), float(half)

    falls = {source: fall(source) for source in ("toy", "sae-lens")}
    thin, dense = mean("toy", "per_dimension", probability=rare), mean("toy", "per_dimension", probability=common)
    worst = max(c.peer for c in cells)
    return [
        Claim(
            "the toy model puts more features in a dimension when they are rarer",
            thin > dense,
            f"features per dimension {thin:.2f} at P = {rare}, {dense:.2f} at P = {common}",
        ),
        Claim(
            "every kind recovers rare, uncorrelated features far better than chance (corrected MCC >= 0.5)",
            min(c.corrected for c in sparse) >= 0.5,
            "; ".join(f"{c.kind}: {c.corrected:.2f} (MCC {c.mcc:.2f}, floor {c.floor:.2f})" for c in sparse),
        ),
        Claim(
            f"features correlated at {tight} are recovered worse than at {loose} (MCC), in the toy and in sae-lens's",
            all(drop > half for drop, half in falls.values()),
            "; ".join(f"{s}: MCC falls by {drop:.3f} +- {half:.3f}" for s, (drop, half) in falls.items()),
        ),
        Claim(
            "latents are driven by fewer features than neurons are, in every toy setting",
            all(c.poly_latents < c.poly_neurons for c in toy),
            f"mean polysemanticity {np.mean([c.poly_latents for c in toy]):.2f} of latents, "
            f"{np.mean([c.poly_neurons for c in toy]):.2f} of neurons; kinds: {', '.join(kinds)}",
        ),
        _peer_claim(cells),
        Claim("our MCC equals sae-lens's to 1e-4", worst < 1e-4, f"largest difference {worst:.1e}"),
    ]


def _peer_claim(cells: Sequence[Cell]) -> Claim:
    """Ours beside a dictionary that sae-lens trained, on sae-lens's data: matched cosines, feature by feature."""
    mine, theirs = (
        np.concatenate([c.cosines for c in cells if (c.source, c.kind) == ("sae-lens", kind)])
        for kind in ("topk", PEER)
    )
    floor = float(np.mean([c.floor for c in cells if (c.source, c.kind) == ("sae-lens", PEER)]))
    difference = mine - theirs
    half = 1.96 * float(difference.std(ddof=1)) / len(difference) ** 0.5
    return Claim(
        f"on sae-lens's synthetic data our TopK recovers features as sae-lens's own trainer does (MCC within {NEAR})",
        abs(float(difference.mean())) <= NEAR,
        f"MCC {mine.mean():.3f} of ours, {theirs.mean():.3f} of theirs, random directions {floor:.3f}; "
        f"difference {difference.mean():+.3f} +- {half:.3f}",
    )


def _figure(cells: Sequence[Cell]) -> bytes:
    kinds = list(dict.fromkeys(c.kind for c in cells))
    ours = [kind for kind in kinds if kind != PEER]
    correlations = sorted({c.correlation for c in cells})
    figure, axes = canvas(1, 3, 12.5, 4.2)
    a, b, c = axes[0]
    toy = [cell for cell in cells if cell.source == "toy"]
    first = [cell for cell in toy if cell.kind == kinds[0]]
    axes_of(a, f"a  recovery in the toy model ({kinds[0]})", "probability of a feature", "MCC")
    for colour, correlation in zip(COLOURS, correlations, strict=False):
        line = sorted((x for x in first if x.correlation == correlation), key=lambda x: x.probability)
        x = [cell.probability for cell in line]
        a.plot(x, [cell.mcc for cell in line], "o-", color=colour, markersize=4, label=f"correlation {correlation:g}")
        a.vlines(x, *np.array([cell.interval for cell in line]).T, color=colour, linewidth=1)
        a.plot(x, [cell.floor for cell in line], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    a.plot([], [], color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="random directions")
    log_ticks(a, sorted({cell.probability for cell in toy}))
    a.set_ylim(0, 1.02)
    a.legend(fontsize=8, frameon=False)
    axes_of(b, "b  corrected MCC by correlation", "correlation of pairs", "(MCC - floor) / (1 - floor)")
    for colour, kind in zip(COLOURS, kinds, strict=False):
        for source, style in (("toy", "o-"), ("sae-lens", "s--")):
            p = sorted({x.probability for x in cells if x.source == "sae-lens"})[0]
            line = [x for x in cells if (x.kind, x.source, x.probability) == (kind, source, p)]
            values = [x.corrected for x in line]
            if not line:  # sae-lens's own trainer was asked for its own data only
                continue
            b.plot([x.correlation for x in line], values, style, color=colour, markersize=4, label=f"{kind}, {source}")
    b.set_ylim(-0.05, 1.02)
    b.legend(fontsize=8, frameon=False)
    axes_of(c, "c  features that drive one unit", "probability of a feature", "polysemanticity")
    line = sorted((x for x in first if x.correlation == correlations[0]), key=lambda x: x.probability)
    x = [cell.probability for cell in line]
    c.plot(x, [cell.poly_neurons for cell in line], "s-", color=GREY, markersize=4, label="neurons")
    for colour, kind in zip(COLOURS, ours, strict=False):
        mine = [x for x in toy if x.kind == kind and x.correlation == correlations[0]]
        mine = sorted(mine, key=lambda x: x.probability)
        c.plot(x, [cell.poly_latents for cell in mine], "o-", color=colour, markersize=4, label=f"latents, {kind}")
    log_ticks(c, sorted({cell.probability for cell in toy}))
    c.set_ylim(0, 1)
    c.legend(fontsize=8, frameon=False)
    return png(figure)
