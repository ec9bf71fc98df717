"""intervention-fidelity: ablating a factor's latents against do(factor), on the phantom, where both are known.

1. Render phantoms to fit on, phantoms of other patients to test on, and every test image again without each factor.
2. For each model and dictionary: match at most 3 latents to each factor on training patients (F-beta matching pursuit,
   thresholds from validation patients), for the dictionary and for its untrained twin.
3. On test images: ablate each factor's latents, error term kept, and compare with what removing the factor does.
4. Beside it: random sets of latents that fire as often and as strongly; mean and resample ablation; all latents set to
   what they are without the factor (how much the dictionary carries at all).

About 4 minutes on one core.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mechinterp.activations import ActivationStore, extract
from mechinterp.audit.probe import logistic_scores
from mechinterp.data.phantom import FACTORS, Phantom
from mechinterp.experiments.fidelity_parts import (
    Material,
    Reading,
    Truth,
    all_effects,
    compare,
    gain_interval,
    true_effects,
)
from mechinterp.experiments.fidelity_report import report
from mechinterp.experiments.result import Result
from mechinterp.metrics.statistics import PatientBootstrap, auroc
from mechinterp.models import HookedVLM
from mechinterp.models.bundles import bundled_folder
from mechinterp.progress import progress
from mechinterp.storage import MANIFEST
from mechinterp.types import Placed
from saes import load_sae, train_sae
from saes.config import MatryoshkaConfig, SAEConfig, TopKConfig
from saes.metrics.images import pooled_site
from saes.null import untrained
from saes.truth.cohort import Cohort, outputs, removals
from saes.truth.readings import image_acts, matches, overlaps

__all__ = ["Sizes", "Spec", "judge", "run"]

Tokens = Literal["all", "patch", "cls"]
FIT_SEED, TEST_SEED = 6_000_011, 7_000_003
FACTORS_TESTED = tuple(n for n, f in FACTORS.items() if f.rate is not None and n != "hospital")


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    models: tuple[str, ...] = ("phantom-clip", "phantom-clip-shortcut")
    fit: int = 4000
    fit_patches: int = 800
    test: int = 300
    draws: int = 500
    random_sets: int = 8
    epochs: int = 130
    shipped: bool = True
    factors: tuple[str, ...] = FACTORS_TESTED


QUICK = Sizes(("phantom-clip",), 160, 80, 40, 100, 2, 20, False, ("effusion", "edema", "scanner"))


@dataclass(frozen=True)
class Spec:
    """A dictionary to judge: stored with the model, or trained here with `config` on CLS tokens of `site`."""

    name: str
    site: str
    tokens: Tokens
    stored: Path | None = None
    config: SAEConfig | None = None


def run(seed: int = 0, quick: bool = False, sizes: Sizes | None = None) -> Result:
    """Run the experiment. `sizes` overrides both versions."""
    size = sizes or (QUICK if quick else Sizes())
    fit = Cohort.of(Phantom.sample(size.fit, seed=FIT_SEED + seed), every=4)
    test = Cohort.of(Phantom.sample(size.test, seed=TEST_SEED + seed), split="test")
    bootstrap = PatientBootstrap.of(test.patients, draws=size.draws, seed=seed)
    material = Material(fit, test, removals(test, size.factors), outputs(), bootstrap, seed)
    readings: list[Reading] = []
    for name in size.models:
        model = HookedVLM.from_pretrained(name)
        truth = true_effects(model, material)
        with tempfile.TemporaryDirectory() as scratch:
            for spec in progress(specs(model, size), f"dictionaries of {name}", unit="dictionary"):
                readings += judge(model, spec, material, truth, size, Path(scratch))
    return report(readings, [target.name for target in material.targets])


def specs(model: HookedVLM, size: Sizes) -> list[Spec]:
    """The dictionaries stored with the model, and narrow ones of the last block's CLS token, trained here."""
    folder = bundled_folder(model.label)
    found = []
    for path in sorted(folder.glob(f"dictionaries/*/{MANIFEST}")) if folder and size.shipped else []:
        placed = load_sae(path.parent)
        tokens = getattr(placed.dictionary, "info", {}).get("tokens", "all")
        found.append(Spec(f"shipped {path.parent.name.split('.hook')[0]}", str(placed.reads), tokens, path.parent))
    last = f"vision.blocks.{model.n_layers('vision') - 1}.hook_resid_post"
    common = {"epochs": size.epochs, "batch_size": 512, "lr": 2e-3, "dead_after": 50}
    found.append(Spec("TopK 32", last, "cls", config=TopKConfig(k=6, width=32, **common)))
    if size.shipped:
        nested = MatryoshkaConfig(k=4, width=256, levels=(16, 32, 64, 256), **common)
        found.append(Spec("Matryoshka 256", last, "cls", config=nested))
    return found


def judge(
    model: HookedVLM,
    spec: Spec,
    material: Material,
    truth: Truth,
    size: Sizes,
    scratch: Path,
) -> list[Reading]:
    """Measure one dictionary and its untrained twin on every factor; `scratch` keeps stores of activations."""
    fit, test = material.fit if spec.tokens == "cls" else material.fit.head(size.fit_patches), material.test
    stores = [
        extract(model, cohort, [spec.site], scratch / f"{spec.site}-{spec.tokens}-{kind}", spec.tokens, batch_size=100)
        for kind, cohort in (("fit", fit), ("test", test))
    ]
    placed = _dictionary(spec, stores[0], scratch / spec.name, material.seed)
    pair = {"trained": placed, "untrained": _twin(placed, spec, stores[0], material.seed)}
    acts = {kind: image_acts(one, *stores) for kind, one in pair.items()}
    probes = pooled_site(stores[0], spec.site, "train"), pooled_site(stores[1], spec.site, "test")
    train, val = fit.split == "train", fit.split == "val"
    labels = {n: np.r_[fit.has(n)[train], fit.has(n)[val], test.has(n)].astype(np.float64) for n in size.factors}
    found = {kind: matches(a, labels) for kind, a in acts.items()}
    zero = {kind: matches(a, labels, thresholds="zero") for kind, a in acts.items()}
    has, single = {n: test.has(n) for n in size.factors}, matches(acts["trained"], labels, k=1)
    shape = overlaps(found["trained"], single, acts["trained"].of("test"), has)
    sets = {kind: [m.latents for m in f.values()] for kind, f in found.items()}
    effects = all_effects(model, pair, spec.tokens, material, sets, size.random_sets)
    readings = []
    for number, name in enumerate(size.factors):
        mine = {kind: f[name] for kind, f in found.items()}
        readings.append(
            Reading(
                model=model.label,
                dictionary=spec.name,
                site=spec.site,
                factor=name,
                latents=mine["trained"].latents,
                f1={kind: m.f1 for kind, m in mine.items()},
                f1_zero={kind: f[name].f1 for kind, f in zero.items()},
                gain_ci95=gain_interval(mine, acts, test.has(name), material.bootstrap),
                probe=_probe(probes, fit.has(name)[train], has[name]),
                shape=shape[name],
                effect=compare(name, {how: e[:, number] for how, e in effects.items()}, material, truth.effects[name]),
                own=material.own(name),
                present=test.has(name),
                true=truth.effects[name] / truth.spread,
                ablated=effects["zero"][0, number] / truth.spread,
            )
        )
    return readings


def _dictionary(spec: Spec, store: ActivationStore, out: Path, seed: int) -> Placed:
    if spec.stored is not None:
        return load_sae(spec.stored)
    assert spec.config is not None
    return train_sae(store, spec.site, spec.config, out, seed=seed)


def _probe(rows: tuple[np.ndarray, np.ndarray], labels: np.ndarray, held_out: np.ndarray) -> float:
    """AUROC on test patients of a linear probe of the site."""
    return auroc(logistic_scores(rows[0], labels.astype(np.float64), rows[1]), held_out.astype(np.float64))


def _twin(placed: Placed, spec: Spec, store: ActivationStore, seed: int) -> Placed:
    """The untrained dictionary of the same width and sparsity, centred on the data."""
    rows = store.rows(spec.site, "train")
    mean = store.site(spec.site)[rows].mean(0)
    d_in, width = placed.dictionary.W_enc.shape
    k = max(1, round(float((placed.dictionary.encode(store.site(spec.site)[rows[:2000]]) > 0).sum(1).float().mean())))
    return Placed.sae(untrained(TopKConfig(k=k, width=width), d_in, seed, mean=mean), spec.site)
