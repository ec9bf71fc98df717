"""A name for each feature, chosen on train and val patients, and a score for it on patients that played no part.

1. *Chance line.* Every concept is offered to the features of an untrained twin (`saes.naming.twin`). The line of a
   concept is the |z| that only a share of `ERROR / number of concepts` of the twin's live features exceed, so that a
   feature that has learnt nothing gets any name at all with probability 5 % at most.
2. *Proposal*, one for each feature, on train and val patients. Of the attributes whose line it passes, and whose AUROC
   within strata of their rivals is at least `LEAST_AUROC` (or at most one minus that: "not X"), the one it follows
   best. Where there is none, the phrase that the text tower says, under the same conditions.
3. *Proof*, on test patients: AUROC (plain, and within strata of the rival that weakened it most on train) with
   patient-bootstrap intervals. The name stands when the latter is at least `LEAST_AUROC` and the proposals' one-sided p
   (bootstrap standard error), adjusted over all proposals after Benjamini and Hochberg, is below `FALSE_DISCOVERIES`.
   Everything else is unnamed. Test patients can take a name away; they cannot give or change one.
4. *Decoys.* A second untrained twin goes through 2 and 3. The share of its features that come out named is printed:
   random directions of a good representation do detect what it holds, so their share is not 0, and a dictionary that
   does not name more than they do has not shown that training it helped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from mechinterp.metrics.statistics import Interval, PatientBootstrap, auroc, benjamini_hochberg, percentile_interval
from saes.naming.association import Association, associate, rivals
from saes.naming.concepts import Concept
from saes.naming.proof import auroc_draws

__all__ = ["FALSE_DISCOVERIES", "LEAST_AUROC", "UNNAMED", "Chance", "Name", "Naming", "chance_of", "name_features"]

UNNAMED = "unnamed"
LEAST_AUROC = 0.70
ERROR = 0.05
FALSE_DISCOVERIES = 0.05
LEAST_FIRED = 8  # train and val images in which a feature must fire to be offered a name
DRAWS = 1000
NAN = (float("nan"), float("nan"))


@dataclass(frozen=True)
class Name:
    """What one feature is called, and what speaks for it.

    Fields:
        feature: its index.
        name: the concept, "not" and the concept where the feature fires without it, or "unnamed".
        proposal: what was proposed on train and val patients (None: nothing), whether or not it stood.
        concept: index of the proposed concept among those on offer.
        source: "attribute" or "text".
        present: True where the feature fires with the concept.
        fit: AUROC within strata of the rival, on train and val patients.
        auroc, ci95: detection AUROC on test patients, nothing held fixed.
        within, within_ci95: the same within strata of `rival`, the concept held fixed ("" where there is none).
        precision: of the tenth of the test images in which it is strongest, the share with the concept (without it
            for "not").
        q: adjusted p of `within` > 0.5.
        said: the phrase that the text tower proposed, with its alignment, whether or not it was used.
        nearest: the attribute that fits best on train and val patients, also where it was not good enough, with its
            AUROC there (within strata) and on test patients (plain).
        beats: share of the untrained twin's features that follow the proposal (or else the nearest) less closely.
    """

    feature: int
    name: str = UNNAMED
    proposal: str | None = None
    concept: int = -1
    source: str = ""
    present: bool = True
    fit: float = float("nan")
    auroc: float = float("nan")
    ci95: Interval = NAN
    within: float = float("nan")
    within_ci95: Interval = NAN
    rival: str = ""
    precision: float = float("nan")
    q: float = float("nan")
    said: str = ""
    alignment: float = float("nan")
    nearest: str = ""
    nearest_fit: float = float("nan")
    nearest_auroc: float = float("nan")
    beats: float = float("nan")


@dataclass(frozen=True)
class Chance:
    """What the features of an untrained twin reach: the line of each concept, and |z| of all features, sorted."""

    lines: Float[np.ndarray, " c"]
    z: Float[np.ndarray, "c g"]

    def beaten(self, concept: int, z: float) -> float:
        """Share of the twin's features with a smaller |z|; nan for a twin that never fires."""
        known = self.z[concept]
        return float(np.searchsorted(known, abs(z)) / len(known)) if len(known) else float("nan")


@dataclass(frozen=True)
class Naming:
    """Names of all live features, the chance lines, and how many features of an untrained twin were named.

    Fields:
        names: one for each live feature, by index.
        concepts: what was on offer.
        chance: for each concept, the |z| that a name needs on train and val patients.
        decoys, decoys_named: live features of the second untrained twin, and how many of them came out named.
    """

    names: tuple[Name, ...]
    concepts: tuple[Concept, ...]
    chance: Chance
    decoys: int = 0
    decoys_named: int = 0

    @property
    def named(self) -> tuple[Name, ...]:
        """Those whose name stood."""
        return tuple(name for name in self.names if name.name != UNNAMED)


def name_features(
    signal: Float[np.ndarray, "n f"],
    concepts: Sequence[Concept],
    patients: np.ndarray,
    test: Bool[np.ndarray, " n"],
    null: Float[np.ndarray, "n g"],
    decoys: Float[np.ndarray, "n g"] | None = None,
    said: Float[np.ndarray, "f c"] | None = None,
    seed: int = 0,
) -> Naming:
    """Name the features whose image-level activations are `signal`; see the module text.

    Args:
        signal: activation of each feature in each image, the largest over its tokens.
        concepts: what a feature can be called.
        patients: patient of each image. test: images of test patients.
        null: the same as `signal` for an untrained twin; it draws the chance lines.
        decoys: for a second twin; its features are named, too, and counted.
        said: alignment of each feature with each concept by the text tower, measured on train and val images; nan where
            there is none.
        seed: of the bootstrap.
    """
    bootstrap = PatientBootstrap.of(patients[test], draws=DRAWS, seed=seed) if test.any() else None
    fixed = rivals(concepts, ~test)
    chance = chance_of(null, concepts, test, fixed)
    names = _name(signal, concepts, test, fixed, chance, said, bootstrap)
    fakes = [] if decoys is None else _name(decoys, concepts, test, fixed, chance, None, bootstrap)
    return Naming(tuple(names), tuple(concepts), chance, len(fakes), sum(fake.name != UNNAMED for fake in fakes))


def chance_of(
    null: Float[np.ndarray, "n g"],
    concepts: Sequence[Concept],
    test: Bool[np.ndarray, " n"],
    held_fixed: Sequence[Sequence[int]],
) -> Chance:
    """Step 1: the |z| of each concept that a share `ERROR / len(concepts)` of the twin's live features exceed."""
    live = _live(null, test)
    if not live.any() or not concepts:
        line = stats.norm.isf(ERROR / max(len(concepts), 1) / 2)
        return Chance(np.full(len(concepts), line), np.zeros((len(concepts), 0)))
    z = np.sort(np.abs(associate(null[:, live], concepts, ~test, held_fixed).z), axis=1)
    # "higher": with few features in the twin, the largest of them
    return Chance(np.quantile(z, 1 - ERROR / len(concepts), axis=1, method="higher"), z)


def _live(signal: np.ndarray, test: np.ndarray) -> np.ndarray:
    return (signal[~test] > 0).sum(0) >= LEAST_FIRED


def _name(signal, concepts, test, fixed, chance, said, bootstrap) -> list[Name]:
    live = np.flatnonzero(_live(signal, test))
    if not len(live) or not concepts:
        return [Name(int(feature)) for feature in live]
    found = associate(signal[:, live], concepts, ~test, fixed)
    heard = np.full((len(live), len(concepts)), np.nan) if said is None else said[live]
    names = [_propose(int(f), i, concepts, found, chance, heard[i]) for i, f in enumerate(live)]
    proven = [_prove(name, signal[:, name.feature], concepts, test, bootstrap) for name in names]
    q = np.nan_to_num(benjamini_hochberg(np.array([p for _, p in proven])), nan=1.0)
    return [_rule(name, float(adjusted)) for (name, _), adjusted in zip(proven, q, strict=True)]


def _propose(
    feature: int,
    i: int,
    concepts: Sequence[Concept],
    found: Association,
    chance: Chance,
    heard: Float[np.ndarray, " c"],
) -> Name:
    """Step 2 for the feature in column `i`: only train and val patients are in `found` and `heard`."""
    strength = np.abs(found.within[:, i])
    good = (np.abs(found.z[:, i]) > chance.lines) & (strength >= LEAST_AUROC - 0.5)
    labelled = np.array([c.labelled for c in concepts])
    spoken = int(np.nanargmax(np.abs(heard))) if np.isfinite(heard).any() else -1
    nearest = int(np.argmax(np.where(labelled, strength, -1))) if labelled.any() else -1
    told: dict[str, Any] = {}
    if spoken >= 0:
        sign = "" if heard[spoken] > 0 else "not "
        told |= {"said": f"{sign}{concepts[spoken].name}", "alignment": float(abs(heard[spoken]))}
    if nearest >= 0:
        sign = "" if found.within[nearest, i] >= 0 else "not "
        told |= {"nearest": f"{sign}{concepts[nearest].name}", "nearest_fit": 0.5 + float(strength[nearest])}
        told |= {"beats": chance.beaten(nearest, found.z[nearest, i])}
    if (good & labelled).any():
        chosen, source = int(np.argmax(np.where(good & labelled, strength, -1))), "attribute"
    elif spoken >= 0 and good[spoken] and found.within[spoken, i] * heard[spoken] > 0:
        chosen, source = spoken, "text"
    else:
        return Name(feature, **told)
    present = bool(found.within[chosen, i] > 0)
    rival = int(found.rival[chosen, i])
    return replace(
        Name(feature, **told),
        proposal=concepts[chosen].name if present else f"not {concepts[chosen].name}",
        concept=chosen,
        source=source,
        present=present,
        fit=0.5 + float(strength[chosen]),
        rival=concepts[rival].name if rival >= 0 else "",
        beats=chance.beaten(chosen, found.z[chosen, i]),
    )


def _prove(
    name: Name,
    signal: Float[np.ndarray, " n"],
    concepts: Sequence[Concept],
    test: Bool[np.ndarray, " n"],
    bootstrap: PatientBootstrap | None,
) -> tuple[Name, float]:
    """Step 3 for one proposal: the name with its held-out numbers, and its one-sided p (nan without a proposal)."""
    name = replace(name, nearest_auroc=_plain(name.nearest, signal, concepts, test))
    if name.proposal is None or bootstrap is None:
        return name, float("nan")
    concept = concepts[name.concept]
    fixed = next((c.values for c in concepts if c.name == name.rival), np.zeros(len(signal)))
    known = concept.known[test] & np.isfinite(fixed[test])
    truth = concept.values[test][known] if name.present else 1 - concept.values[test][known]
    score, strata = signal[test][known].astype(np.float64), fixed[test][known]
    weights = bootstrap.weights[:, known]
    plain, draws = auroc_draws(score, truth, np.zeros(len(score)), weights)
    within, within_draws = auroc_draws(score, truth, strata, weights)
    error = float(np.nanstd(within_draws)) if np.isfinite(within_draws).any() else float("nan")
    # a feature that separates without a fault does so in every draw: its error is at least one image in n
    p = (
        float(stats.norm.sf((within - 0.5) / max(error, 1 / max(len(score), 1))))
        if np.isfinite(error)
        else float("nan")
    )
    top = np.argsort(-score, kind="stable")[: max(len(score) // 10, 1)]
    numbers: dict[str, Any] = {
        "auroc": plain,
        "ci95": percentile_interval(draws),
        "within": within,
        "within_ci95": percentile_interval(within_draws),
        "precision": float(truth[top].mean()) if len(top) else float("nan"),
    }
    return replace(name, **numbers), p


def _plain(
    said: str, signal: Float[np.ndarray, " n"], concepts: Sequence[Concept], test: Bool[np.ndarray, " n"]
) -> float:
    """Detection AUROC on test patients of a concept (or "not" and a concept)."""
    concept = next((c for c in concepts if c.name == said.removeprefix("not ")), None)
    if concept is None:
        return float("nan")
    rows = test & concept.known
    area = auroc(signal[rows], concept.values[rows])
    return area if concept.name == said else 1 - area


def _rule(name: Name, q: float) -> Name:
    if name.proposal is None:
        return name
    stands = q < FALSE_DISCOVERIES and name.within >= LEAST_AUROC
    return replace(name, q=q, name=name.proposal if stands else UNNAMED)
