"""confounding-dose: at which association do the finding's and the shortcut's latents merge?

1. Render phantoms with and without the chest drain, everything else the same; for each dose rho pick, image by image,
   which of the two is seen, so that drain and pneumothorax have phi = rho (the dial of `Phantom.sample`).
2. For each model, dose, kind, width and seed: train a dictionary on CLS tokens of the last block, match latents to
   pneumothorax and to drain on the same data, naively and with the association balanced away.
3. Judge both on phantoms of other patients with rho = 0: do the two sets of latents come apart, what would the
   finding's first latent be called, and would latents chosen there (an oracle) do better?

About 9 minutes on one core.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8

from mechinterp.data.phantom import Phantom
from mechinterp.experiments.confounding_report import Dose, report
from mechinterp.experiments.result import Result
from mechinterp.metrics.statistics import PatientBootstrap
from mechinterp.models import HookedVLM
from mechinterp.progress import progress
from saes import train_sae
from saes.config import BatchTopKConfig, JumpReLUConfig, MatryoshkaConfig, SAEConfig, TopKConfig
from saes.truth.arrays import SITE, store_of
from saes.truth.cohort import BATCH, NAMED
from saes.truth.merging import Separation, chosen_latents, separation, within

__all__ = ["FINDING", "SHORTCUT", "Sizes", "run"]

FINDING, SHORTCUT = "pneumothorax", "drain"
TRAIN_SEED, TEST_SEED = 8_000_009, 9_000_011


@dataclass(frozen=True)
class Sizes:
    """How much of everything. `doses` holds the associations that are tried at each width."""

    models: tuple[str, ...] = ("phantom-clip", "phantom-clip-shortcut")
    doses: tuple[tuple[int, tuple[float, ...]], ...] = (
        (32, (0.0, 0.3, 0.6, 0.8, 0.9, 0.95, 1.0)),
        (128, (0.0, 0.6, 0.9, 1.0)),
    )
    kinds: tuple[str, ...] = ("topk", "batchtopk", "matryoshka", "jumprelu")
    train: int = 2000
    test: int = 500
    seeds: int = 3
    epochs: int = 90
    draws: int = 200


QUICK = Sizes(("phantom-clip",), ((32, (0.0, 1.0)),), ("topk",), 150, 80, 2, 15, 50)


@dataclass(frozen=True, eq=False)
class Images:
    """One population: its factor table, and the CLS rows of each image without (0) and with (1) the shortcut."""

    phantom: Phantom
    rows: Float[np.ndarray, "version n d"]

    def at(self, rho: float) -> tuple[Float[np.ndarray, "n d"], Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Rows, finding and shortcut of the population drawn with the dial at `rho`."""
        drawn = Phantom.sample(len(self.phantom), self.phantom.seed, associations={(SHORTCUT, FINDING): rho}).factors
        shortcut = drawn[SHORTCUT].to_numpy()
        return self.rows[shortcut, np.arange(len(shortcut))], drawn[FINDING].to_numpy() == 1, shortcut == 1


def run(seed: int = 0, quick: bool = False, sizes: Sizes | None = None) -> Result:
    """Run the experiment. `sizes` overrides both versions."""
    size = sizes or (QUICK if quick else Sizes())
    drawn = {
        name: Phantom.sample(n, seed=at + seed, associations={(SHORTCUT, FINDING): 0.0})
        for name, n, at in (("train", size.train, TRAIN_SEED), ("test", size.test, TEST_SEED))
    }
    rendered = {k: [p.do(**{SHORTCUT: v}).render() for v in (0, 1)] for k, p in drawn.items()}
    doses: list[Dose] = []
    for name in size.models:
        model = HookedVLM.from_pretrained(name)
        images = {k: Images(p, np.stack([_cls_rows(model, x) for x in rendered[k]])) for k, p in drawn.items()}
        settings = [
            (rho, _config(kind, width, size.epochs), s)
            for width, rhos in size.doses
            for rho in rhos
            for kind in size.kinds
            for s in range(size.seeds)
        ]
        for rho, config, number in progress(settings, f"doses, {name}", unit="dictionary"):
            doses.append(_dose(name, images, rho, config, seed * 100 + number, size.draws))
    return report(doses, FINDING)


@torch.no_grad()
def _cls_rows(model: HookedVLM, rendered: UInt8[np.ndarray, "n size size"]) -> Float[np.ndarray, "n d"]:
    """CLS token after the last block."""
    site, parts = f"vision.blocks.{model.n_layers('vision') - 1}.hook_resid_post", []
    for start in range(0, len(rendered), BATCH):
        batch = model.preprocess(rendered[start : start + BATCH].astype(np.float32) / 255)
        parts.append(model.run_with_cache(batch, names_filter=site)[1][site][:, model.cls_token])
    return torch.cat(parts).numpy()


def _config(kind: str, width: int, epochs: int) -> SAEConfig:
    """6 active latents at every width."""
    common: dict[str, Any] = {"width": width, "epochs": epochs, "batch_size": 512, "lr": 2e-3, "dead_after": 50}
    match kind:
        case "topk":
            return TopKConfig(k=6, **common)
        case "batchtopk":
            return BatchTopKConfig(k=6, **common)
        case "matryoshka":
            return MatryoshkaConfig(k=6, levels=(width // 2, width * 3 // 4, width), **common)
        case _:
            return JumpReLUConfig(target_l0=6, **common)


def _dose(model: str, images: dict[str, Images], rho: float, config: SAEConfig, seed: int, draws: int) -> Dose:
    """One dictionary trained at one dose."""
    x, finding, shortcut = images["train"].at(rho)
    with tempfile.TemporaryDirectory() as scratch:
        split = np.where(np.arange(len(x)) % 20 == 0, "val", "train")
        store = store_of(x, split, Path(scratch) / "store", images["train"].phantom.patients)
        placed = train_sae(store, SITE, config, Path(scratch) / "sae", seed=seed)

    def encode(rows: np.ndarray) -> np.ndarray:
        return placed.dictionary.encode(torch.from_numpy(rows)).detach().numpy()

    bootstrap = PatientBootstrap.of(images["test"].phantom.patients, draws=draws, seed=seed)
    held, held_finding, held_shortcut = images["test"].at(0.0)
    acts, test = encode(x), encode(held)
    clean, clean_finding, clean_shortcut = images["train"].at(0.0)
    found: dict[str, Separation | None] = {}
    names: dict[str, str | None] = {}
    for how in ("naive", "balanced", "oracle"):
        a, f, s = (encode(clean), clean_finding, clean_shortcut) if how == "oracle" else (acts, finding, shortcut)
        rule = "naive" if how == "naive" else "balanced"
        sets = chosen_latents(a, f, s, rule, seed), chosen_latents(a, s, f, rule, seed)
        if sets[0] is None or sets[1] is None:
            found[how] = names[how] = None
            continue
        found[how] = separation(test, held_finding, held_shortcut, sets[0], sets[1], bootstrap.weights)
        names[how] = _name(test, sets[0], images["test"], held_shortcut)
    return Dose(model, rho, config.kind, config.width, seed, len(held), found, names)


def _name(
    acts: Float[np.ndarray, "n latent"], latents: Sequence[int], images: Images, shortcut: Bool[np.ndarray, " n"]
) -> str:
    """The factor that the finding's first latent truly follows, among all that have names; shortcut as drawn."""
    first = acts[:, [latents[0]]]
    table = images.phantom.factors
    areas = {}
    for name in NAMED:
        has = shortcut if name == SHORTCUT else table[name].to_numpy() == 1
        other = table[FINDING].to_numpy() == 1 if name == SHORTCUT else shortcut
        areas[name] = float(within(first, has, other)[0])
    return max(areas, key=lambda name: areas[name])
