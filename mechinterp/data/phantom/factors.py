"""The table of factors, their causal graph, and how a population of patients is drawn from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from mechinterp.data.phantom._random import normal, uniform
from mechinterp.errors import UsageError

__all__ = ["DETAILS", "FACTORS", "OLD", "Factor", "check_associations", "sample_factors"]

OLD = 55  # years; the median age, and where ("age", finding) cuts

Kind = Literal["finding", "device", "acquisition", "anatomy", "demographic"]


@dataclass(frozen=True)
class Factor:
    """One cause of pixels.

    Args:
        kind: what sort of cause it is.
        phrase: how captions and questions name it ("" where they never do).
        rate: marginal probability of the value 1 when no association names it; None for a number.
        parents: the factors it depends on in the causal graph.
        scope: "local" (its mask bounds its pixels) or "global" (its mask is the whole image).
        per: "patient" (shared by a patient's images) or "image".
        values: what 0 and 1 mean in metadata.csv, where they are categories.
    """

    kind: Kind
    phrase: str
    rate: float | None
    parents: tuple[str, ...] = ()
    scope: Literal["local", "global"] = "local"
    per: Literal["patient", "image"] = "image"
    values: tuple[str, str] | None = None


FACTORS: dict[str, Factor] = {
    "effusion": Factor("finding", "pleural effusion", 0.3),
    "pneumothorax": Factor("finding", "pneumothorax", 0.25),
    "consolidation": Factor("finding", "consolidation", 0.3),
    "nodule": Factor("finding", "lung nodule", 0.25),
    "cardiomegaly": Factor("finding", "cardiomegaly", 0.3, parents=("age",), per="patient"),
    "edema": Factor("finding", "pulmonary edema", 0.25),
    "atelectasis": Factor("finding", "atelectasis", 0.25),
    "drain": Factor("device", "chest drain", 0.3),
    "pacemaker": Factor("device", "pacemaker", 0.3, per="patient"),
    "ecg_leads": Factor("device", "ecg leads", 0.4),
    "line": Factor("device", "central line", 0.35),
    "view": Factor("acquisition", "", 0.5, parents=("hospital",), scope="global", values=("PA", "AP")),
    "portable": Factor("acquisition", "", 0.5, parents=("hospital",)),
    "letter": Factor("acquisition", "", 0.5, values=("R", "L")),
    "scanner": Factor("acquisition", "", 0.5, parents=("hospital",), scope="global", values=("alpha", "beta")),
    "hospital": Factor("acquisition", "", 0.5, per="patient", values=("north", "south")),
    "exposure": Factor("acquisition", "", None, scope="global"),
    "noise": Factor("acquisition", "", None, scope="global"),
    "sex": Factor("demographic", "", 0.5, scope="global", per="patient", values=("F", "M")),
    "age": Factor("demographic", "", None, scope="global", per="patient"),
    "breast": Factor("anatomy", "", None, parents=("sex",), per="patient"),
}

# Details of findings and devices. They are drawn whether or not the finding is there, so that do() needs no new draw.
# side: 0 right, 1 left, 2 both (of the patient); zone: 0 upper, 1 middle, 2 lower; size: 0 smallest to 1 largest.
DETAILS: dict[str, tuple[float, float]] = {
    "effusion_side": (0, 2),
    "effusion_size": (0, 1),
    "pneumothorax_side": (0, 1),
    "pneumothorax_size": (0, 1),
    "consolidation_side": (0, 1),
    "consolidation_zone": (0, 2),
    "consolidation_size": (0, 1),
    "nodule_side": (0, 1),
    "nodule_zone": (0, 1),
    "nodule_size": (0, 1),
    "cardiomegaly_size": (0, 1),
    "edema_size": (0, 1),
    "atelectasis_side": (0, 1),
    "atelectasis_size": (0, 1),
    "drain_side": (0, 1),
    "pacemaker_side": (0, 1),
    "line_side": (0, 1),
}

_HOSPITAL_PULL = {"view": 0.15, "portable": 0.15, "scanner": 0.3}


def check_associations(associations: Mapping[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """Read the dials. Raises UsageError for a pair that is not (shortcut, finding) or a dial that cannot be met."""
    budget: dict[str, float] = {}
    for (shortcut, finding), rho in associations.items():
        where = f"associations[({shortcut!r}, {finding!r})]"
        cause = FACTORS.get(shortcut)
        if cause is None or cause.kind == "finding" or (cause.rate is None and shortcut != "age"):
            known = [n for n, f in FACTORS.items() if f.kind != "finding" and (f.rate is not None or n == "age")]
            raise UsageError(f"{shortcut!r} cannot be a shortcut", where=where, hint=f"one of {', '.join(known)}")
        if finding not in FACTORS or FACTORS[finding].kind != "finding":
            known = [n for n, f in FACTORS.items() if f.kind == "finding"]
            raise UsageError(f"{finding!r} is not a finding", where=where, hint=f"one of {', '.join(known)}")
        if FACTORS[finding].per == "patient" and FACTORS[shortcut].per == "patient" and finding == shortcut:
            raise UsageError("a factor cannot be its own shortcut", where=where)
        if not -1.0 <= rho <= 1.0:
            raise UsageError(f"dial {rho} is outside [-1, 1]", where=where)
        effect = finding if cause.per == "patient" else shortcut
        budget[effect] = budget.get(effect, 0.0) + abs(rho)
        if budget[effect] > 1.0 + 1e-9:
            raise UsageError(
                f"the dials on {effect!r} sum to {budget[effect]:.2f}", where=where, hint="keep their sum at most 1"
            )
    return {pair: float(rho) for pair, rho in associations.items() if rho == rho}


def sample_factors(n: int, seed: int, associations: Mapping[tuple[str, str], float]) -> pd.DataFrame:
    """Draw `n` images with their patients; row i does not depend on n. Columns: patient, every factor, every detail."""
    dials = check_associations(associations)
    patient = _patients(n, seed)
    image = np.arange(n)
    table: dict[str, np.ndarray] = {"patient": patient, "image": image}
    age = np.floor(20 + 70 * uniform(seed, "age", patient)).astype(int)
    table["age"] = age
    for name in ("sex", "hospital", "pacemaker"):
        rate = 0.5 if any(name == shortcut for shortcut, _ in dials) else FACTORS[name].rate or 0.5
        table[name] = (uniform(seed, name, patient) < rate).astype(int)
    for name, factor in FACTORS.items():
        if factor.kind == "finding":
            table[name] = _finding(name, factor, seed, table, dials)
    for name, factor in FACTORS.items():
        if name not in table and factor.rate is not None:
            table[name] = _shortcut(name, factor, seed, table, dials)
    table["exposure"] = np.round(np.clip(normal(seed, ["exposure"], image)[0] * 0.4, -1, 1), 4)
    table["noise"] = np.round(uniform(seed, "noise", image), 4)
    size = 0.35 + 0.65 * uniform(seed, "breast", patient)
    table["breast"] = np.where(table["sex"] == 0, np.round(size, 4), 0.0)
    table |= _details(seed, image, patient)
    return pd.DataFrame({name: table[name] for name in ("patient", "image", *FACTORS, *DETAILS)})


def _patients(n: int, seed: int) -> np.ndarray:
    """Patient of each image: 70 % have one image, 20 % two, 10 % three."""
    draw = uniform(seed, "images", np.arange(n))
    counts = 1 + (draw > 0.7).astype(int) + (draw > 0.9)
    return np.repeat(np.arange(n), counts)[:n]


def _old(age: np.ndarray) -> np.ndarray:
    return (age >= OLD).astype(int)


def _finding(name: str, factor: Factor, seed: int, table: Mapping[str, np.ndarray], dials: Mapping) -> np.ndarray:
    """A finding given the patient-level shortcuts that are dialled to it.

    A dialled finding has prevalence 1/2: with both marginals at 1/2, P(f|s) = 1/2 + rho (s - 1/2) has phi = rho.
    """
    mine = {shortcut: rho for (shortcut, finding), rho in dials.items() if finding == name}
    chance = np.full(len(table["patient"]), 0.5 if mine else factor.rate)
    for shortcut, rho in mine.items():
        if FACTORS[shortcut].per == "patient":
            cause = _old(table["age"]) if shortcut == "age" else table[shortcut]
            chance += rho * (cause - 0.5)
    if name == "cardiomegaly" and ("age", name) not in mine:
        spent = sum(abs(r) for s, r in mine.items() if FACTORS[s].per == "patient")
        chance += 0.25 * (1.0 - spent) * ((table["age"] - 20) / 35.0 - 1.0)
    # a patient's heart is the same in all images of the patient, other findings come and go
    return (uniform(seed, name, table[factor.per]) < chance).astype(int)


def _shortcut(name: str, factor: Factor, seed: int, table: Mapping[str, np.ndarray], dials: Mapping) -> np.ndarray:
    """An image-level device or acquisition factor given the findings dialled to it, and its hospital.

    P(s|f) = 1/2 + sum_j rho_j (f_j - 1/2): findings are independent, so that each phi is its own rho.
    """
    mine = {finding: rho for (shortcut, finding), rho in dials.items() if shortcut == name}
    chance = np.full(len(table["patient"]), 0.5 if mine else factor.rate)
    for finding, rho in mine.items():
        chance += rho * (table[finding] - 0.5)
    spent = sum(abs(rho) for rho in mine.values())
    chance += _HOSPITAL_PULL.get(name, 0.0) * (1.0 - spent) * (2 * table["hospital"] - 1)
    return (uniform(seed, name, table["image"]) < chance).astype(int)


def _details(seed: int, image: np.ndarray, patient: np.ndarray) -> dict[str, np.ndarray]:
    """Sides, zones and sizes, placed so that no finding can hide another (see the module text of `findings`)."""

    def pick(name: str, key: np.ndarray, chances: tuple[float, ...]) -> np.ndarray:
        return np.searchsorted(np.cumsum(chances)[:-1], uniform(seed, name, key), side="right")

    d = {name: np.round(uniform(seed, name, image), 4) for name in DETAILS if name.endswith("_size")}
    d["cardiomegaly_size"] = np.round(uniform(seed, "cardiomegaly_size", patient), 4)
    d["effusion_side"] = pick("effusion_side", image, (0.4, 0.4, 0.2))
    for name in ("pneumothorax", "consolidation", "nodule", "atelectasis", "drain"):
        d[f"{name}_side"] = pick(f"{name}_side", image, (0.5, 0.5))
    d["pacemaker_side"] = pick("pacemaker_side", patient, (0.15, 0.85))
    d["line_side"] = pick("line_side", image, (0.75, 0.25))
    zone = pick("consolidation_zone", image, (0.3, 0.3, 0.4))
    drowned = (d["effusion_side"] == 2) | (d["effusion_side"] == d["consolidation_side"])
    d["consolidation_zone"] = np.where(drowned & (zone == 2), 1, zone)
    zone = pick("nodule_zone", image, (0.5, 0.5))
    covered = (d["nodule_side"] == d["consolidation_side"]) & (d["consolidation_zone"] < 2)
    d["nodule_zone"] = np.where(covered, 1 - d["consolidation_zone"], zone)
    return d
