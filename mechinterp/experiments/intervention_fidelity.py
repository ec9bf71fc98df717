"""intervention-fidelity: ablating a factor's latents against do(factor), on the phantom, where both are known.

1. Render phantoms to fit on, phantoms of other patients to test on, every test image again without each factor, and
   pairs that differ in one factor and one other.
2. For each model, site and kind of dictionary: match at most 3 latents to each factor on training patients (F-beta
   matching pursuit, thresholds from validation patients), for the dictionary and for its untrained twin.
3. On test images: ablate each factor's latents, error term kept, and compare with what removing the factor does.
4. On the pairs: swap each factor's latents, and see whether its score follows and the other factor's stays (RAVEL).
5. Beside it: random sets of latents that fire as often and as strongly; mean and resample ablation; all latents set to
   what they are without the factor (how much the dictionary carries at all).

Generative models are asked all questions in one pass behind one copy of the image, on fewer images; the table says how
many. Estimated from its parts, 10 to 15 minutes of one core.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mechinterp.activations import ActivationStore, extract
from mechinterp.audit.probe import logistic_scores
from mechinterp.data.phantom import FACTORS, Phantom
from mechinterp.experiments.fidelity_parts import (
    Budget,
    Material,
    Reading,
    Truth,
    all_effects,
    all_swaps,
    compare,
    gain_interval,
    live_features,
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
from saes.config import BatchTopKConfig, GatedConfig, JumpReLUConfig, MatryoshkaConfig, SAEConfig, TopKConfig
from saes.metrics.images import pooled_site
from saes.null import untrained
from saes.truth.asking import generative
from saes.truth.causes import factor_pairs
from saes.truth.cohort import Cohort, outputs, removals
from saes.truth.readings import image_acts, matches, overlaps

__all__ = ["Sizes", "Spec", "judge", "run"]

Tokens = Literal["all", "patch", "cls"]
FIT_SEED, TEST_SEED = 6_000_011, 7_000_003
FACTORS_TESTED = tuple(n for n, f in FACTORS.items() if f.rate is not None and n != "hospital")
KINDS = ("topk", "batchtopk", "matryoshka", "jumprelu", "gated")


DUAL = Budget(test=200, pairs=60, random_sets=20, random_swaps=4)
ASKED = Budget(test=48, pairs=24, random_sets=5, random_swaps=2, other_ablations=False)
L1 = 1.0


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Args:
        models: bundled models.
        fit, fit_patches: images to fit on, for class tokens and for patches.
        test: images on which latents are scored.
        dual, asked: what a dual encoder and what a generative model can afford.
        draws: of the patient bootstrap.
        epochs, patch_epochs: of the dictionaries trained here.
        kinds: trained at the last site before the readout; patch_kinds: of dual encoders, where the shipped one stands.
        shipped: whether the dictionaries that ship are judged.
        factors: which.
    """

    models: tuple[str, ...] = ("phantom-clip", "phantom-clip-shortcut", "phantom-llava", "phantom-llava-shortcut")
    fit: int = 4000
    fit_patches: int = 800
    test: int = 300
    dual: Budget = DUAL
    asked: Budget = ASKED
    draws: int = 500
    epochs: int = 130
    patch_epochs: int = 10
    kinds: tuple[str, ...] = KINDS
    patch_kinds: tuple[str, ...] = ("batchtopk", "jumprelu")
    shipped: bool = True
    factors: tuple[str, ...] = FACTORS_TESTED


_SMALL = Budget(test=40, pairs=8, random_sets=2, random_swaps=1)
QUICK = Sizes(
    *(("phantom-clip", "phantom-llava"), 120, 40, 40, _SMALL, Budget(8, 4, 1, 1, False), 100, 15, 1, ("topk",), ()),
    shipped=False,
    factors=("effusion", "edema", "scanner"),
)


@dataclass(frozen=True)
class Spec:
    """A dictionary to judge: stored with the model, or trained here with `config` on `tokens` of `site`."""

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
    asked = [target.name for target in outputs()]
    pairs = factor_pairs(test, [name for name in size.factors if name in asked], size.dual.pairs, seed)
    whole = Material(fit, test, removals(test, size.factors), pairs, outputs(), bootstrap, size.dual, seed)
    readings: list[Reading] = []
    for name in size.models:
        model = HookedVLM.from_pretrained(name)
        truth = Truth(model, whole.within(size.asked if generative(model) else size.dual))
        with tempfile.TemporaryDirectory() as scratch:
            for spec in progress(specs(model, size), f"dictionaries of {name}", unit="dictionary"):
                readings += judge(spec, truth, whole, size, Path(scratch))
    return report(readings, asked)


def specs(model: HookedVLM, size: Sizes) -> list[Spec]:
    """The dictionaries that ship with the model, and narrow ones of several kinds that are trained here.

    These stand where the readout begins: on the class token after the last block of a dual encoder, on its patches in
    a generative model, whose projector reads them. For a dual encoder, also on patches after the block before.
    """
    folder, last = bundled_folder(model.label), model.n_layers("vision") - 1
    found = []
    for path in sorted(folder.glob(f"dictionaries/*/{MANIFEST}")) if folder and size.shipped else []:
        placed = load_sae(path.parent)
        info: Any = getattr(placed.dictionary, "info", {})
        tokens, config = info.get("tokens", "all"), info.get("config", {})
        if placed.reads.tower == "vision" and placed.reads == placed.writes:
            label = f"{_short(str(placed.reads), tokens)} {config.get('kind', '')} {placed.dictionary.W_dec.shape[0]}"
            found.append(Spec(f"{label} (ships)", str(placed.reads), tokens, path.parent))
    site, before = (f"vision.blocks.{layer}.hook_resid_post" for layer in (last, last - 1))
    if generative(model):
        return found + [_to_train(site, "patch", _config(kind, 128, size.patch_epochs)) for kind in size.kinds]
    found += [_to_train(site, "cls", _config(kind, 64, size.epochs)) for kind in size.kinds]
    return found + [_to_train(before, "patch", _config(kind, 128, size.patch_epochs)) for kind in size.patch_kinds]


def _to_train(site: str, tokens: Tokens, config: SAEConfig) -> Spec:
    return Spec(f"{_short(site, str(tokens))} {config.kind} {config.width}", site, tokens, config=config)


def _short(site: str, tokens: str) -> str:
    return f"block {site.split('.')[2]} {tokens}"


def _config(kind: str, width: int, epochs: int) -> SAEConfig:
    """About 6 active latents a token."""
    common: dict[str, Any] = {"width": width, "epochs": epochs, "batch_size": 512, "lr": 2e-3, "dead_after": 50}
    match kind:
        case "topk":
            return TopKConfig(k=6, **common)
        case "batchtopk":
            return BatchTopKConfig(k=6, **common)
        case "matryoshka":
            return MatryoshkaConfig(k=6, levels=(width // 4, width // 2, width), **common)
        case "jumprelu":
            return JumpReLUConfig(target_l0=6, **common)
        case _:
            return GatedConfig(l1_coefficient=L1, **common)


def judge(spec: Spec, truth: Truth, whole: Material, size: Sizes, scratch: Path) -> list[Reading]:
    """Measure one dictionary and its untrained twin on every factor.

    Latents are matched and scored on the `whole` material, effects measured on `truth.material`, which may be less.
    `scratch` keeps stores of activations.
    """
    model, material = truth.model, truth.material
    fit, test = whole.fit if spec.tokens == "cls" else whole.fit.head(size.fit_patches), whole.test
    stores = [
        extract(model, cohort, [spec.site], scratch / f"{spec.site}-{spec.tokens}-{kind}", spec.tokens, batch_size=100)
        for kind, cohort in (("fit", fit), ("test", test))
    ]
    placed = _dictionary(spec, stores[0], scratch / spec.name, material.seed)
    l0 = _l0(placed, stores[0])
    pair = {"trained": placed, "untrained": _twin(placed, stores[0], l0, material.seed)}
    acts = {kind: image_acts(one, *stores) for kind, one in pair.items()}
    probes = pooled_site(stores[0], spec.site, "train"), pooled_site(stores[1], spec.site, "test")
    train, val = fit.split == "train", fit.split == "val"
    labels = {n: np.r_[fit.has(n)[train], fit.has(n)[val], test.has(n)].astype(np.float64) for n in size.factors}
    found = {kind: matches(a, labels) for kind, a in acts.items()}
    zero = {kind: matches(a, labels, thresholds="zero") for kind, a in acts.items()}
    has, single = {n: test.has(n) for n in size.factors}, matches(acts["trained"], labels, k=1)
    shape = overlaps(found["trained"], single, acts["trained"].of("test"), has)
    sets = {kind: {name: m.latents for name, m in f.items()} for kind, f in found.items()}
    lists, live = {k: list(s.values()) for k, s in sets.items()}, live_features(truth, placed, spec.tokens)
    effects = all_effects(truth, pair, spec.tokens, size.factors, lists, live)
    swaps = all_swaps(truth, pair, spec.tokens, sets, live)
    readings = []
    for number, name in enumerate(size.factors):
        mine, true = {kind: f[name] for kind, f in found.items()}, truth.effects[name]
        readings.append(
            Reading(
                model=model.label,
                dictionary=spec.name,
                site=spec.site,
                kind=spec.name.split()[3],
                l0=l0,
                factor=name,
                images=len(test),
                latents=mine["trained"].latents,
                f1={kind: m.f1 for kind, m in mine.items()},
                f1_zero={kind: f[name].f1 for kind, f in zero.items()},
                gain_ci95=gain_interval(mine, acts, test.has(name), whole.bootstrap),
                probe=_probe(probes, fit.has(name)[train], has[name]),
                shape=shape[name],
                effect=compare(name, {how: e[:, number] for how, e in effects.items()}, material, true),
                swap=swaps.get(name, {}),
                own=material.own(name),
                present=material.test.has(name),
                true=true / truth.spread,
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


def _l0(placed: Placed, store: ActivationStore) -> float:
    """Latents that fire on a row."""
    rows = store.site(placed.reads)[store.rows(placed.reads, "train")[:2000]]
    return float((placed.dictionary.encode(rows) > 0).sum(1).float().mean())


def _twin(placed: Placed, store: ActivationStore, l0: float, seed: int) -> Placed:
    """The untrained dictionary of the same width and sparsity, centred on the data."""
    rows = store.rows(placed.reads, "train")
    mean = store.site(placed.reads)[rows].mean(0)
    d_in, width = placed.dictionary.W_enc.shape
    config = TopKConfig(k=max(1, round(l0)), width=width)
    return Placed.sae(untrained(config, d_in, seed, mean=mean), placed.reads)
