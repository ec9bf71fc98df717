"""One audit: a model, a data folder, a target -> report.html, audit.json, manifest.json and figures/.

1. Score every labelled image and encode it with the dictionary (one pass).
2. Performance: overall, metadata alone, subgroups.
3. Choose each attribute's features on train and val patients; everything after uses test patients.
4. Sweep the effect of every live feature; remove each attribute's features together; compare with random sets.
5. Correct for the number of candidates, measure harm, rule.
6. Drivers, feature cards, galleries, failures; on a phantom the truth; the margin, where unnamed marks stand; how the
   model got to its score on a few images, as attribution graphs tested by ablation.
7. Write.
"""

from __future__ import annotations

import logging
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mechinterp.audit.asking import word_caution
from mechinterp.audit.candidates import candidates
from mechinterp.audit.catalogue import Heat, feature_row, heat_maps
from mechinterp.audit.causal import Trial, stage
from mechinterp.audit.cohort import cohort
from mechinterp.audit.defaults import is_default, stand_in
from mechinterp.audit.dictionary import dictionary_of, tokens_of, training_record
from mechinterp.audit.drivers import find_drivers, judge
from mechinterp.audit.evidence import Evidence, collect, prepare
from mechinterp.audit.explainers import audit_section
from mechinterp.audit.explainers.figures import maps_picture
from mechinterp.audit.failures import failures
from mechinterp.audit.features import Selectivity, measure_selectivity
from mechinterp.audit.graphing import graph_section
from mechinterp.audit.margin import margin_evidence
from mechinterp.audit.performance import performance_rows
from mechinterp.audit.questions import power_of, questions
from mechinterp.audit.settings import Settings
from mechinterp.audit.shortcuts import Case, choose_features, shortcut_row, try_candidates
from mechinterp.audit.sizes import one_size
from mechinterp.audit.truth import measure_truth
from mechinterp.audit.untested import untested
from mechinterp.data import ImageData
from mechinterp.errors import DataError, UsageError
from mechinterp.metrics.statistics import PatientBootstrap
from mechinterp.models import HookedVLM
from mechinterp.types import FeatureId, Placed, Target

__all__ = ["AuditResult", "audit"]

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
DEFAULT = Settings()


@dataclass(frozen=True)
class AuditResult:
    """What an audit found. `record` is the content of audit.json; `folder` holds the files."""

    record: dict[str, Any]
    folder: Path

    def summary(self) -> str:
        """The verdict box as plain text."""
        lines = [f"{self.record['model']['id']} on {self.record['data']['id']}, target {self.record['target']}"]
        lines += [f"  CAUTION: {caution}" for caution in self.record["cautions"]]
        lines += [f"  {q['verdict']:10} {q['question']} {q['answer']}" for q in self.record["questions"]]
        return "\n".join(lines)

    def verdict(self, candidate: str) -> str:
        """Verdict of one candidate attribute. Raises UsageError when there is none of that name."""
        for row in self.record["shortcuts"]:
            if row["candidate"] == candidate:
                return row["verdict"]
        known = ", ".join(row["candidate"] for row in self.record["shortcuts"])
        raise UsageError(f"no candidate {candidate!r}", hint=f"there are: {known or 'none'}")


def audit(
    model: HookedVLM,
    data: ImageData,
    target: str | None = None,
    out: Path | str = Path("out/audit"),
    seed: int = 0,
    placed: Placed | None = None,
    settings: Settings = DEFAULT,
) -> AuditResult:
    """Audit `model` on `data`, and write the report to `out`.

    Args:
        model: any family that can score the target.
        data: a data folder; what its missing columns make impossible is NOT TESTED.
        target: name of one of `data.targets`; default what the model's card names, else the first.
        out: folder for report.html, audit.json, manifest.json and figures/.
        seed: of the bootstrap, the random sets and any training; the same seed gives the same audit.json, times aside.
        placed: the dictionary; default one stored with the model, else one trained now and kept.
        settings: the lines that verdicts are drawn at.

    Raises:
        UsageError: no such target. DataError: no labels, or no test or train patients. NonFiniteError: names images.
    """
    from mechinterp.audit.report import write_report

    started = time.perf_counter()
    asked = choose_target(model, data, target)
    data = one_size(model, data)
    placed, source = (placed, "given") if placed is not None else dictionary_of(model, data, seed)
    tokens = tokens_of(placed)
    evidence = collect(model, data, asked, placed, tokens)
    _enough(evidence, data, asked)
    bootstrap = PatientBootstrap.of(evidence.patients[evidence.test], draws=settings.draws, seed=seed)
    people = candidates(evidence, data, asked.name)
    selectivity = measure_selectivity(people, evidence, asked.name)
    cases = choose_features(people, selectivity)
    trial = _trial(model, placed, tokens, asked, data, evidence, selectivity, settings, seed)
    try_candidates(cases, trial, evidence, bootstrap, settings, seed)
    rows = [shortcut_row(case, trial, settings) for case in cases]
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": {"id": model.label, "family": model.family, "sha256": model.sha256},
        "data": _about_data(data, evidence) | {"default": is_default(data, seed)},
        "cautions": _cautions(model, data, asked),
        "cohort": cohort(evidence, data),
        "target": asked.name,
        "prompts": asdict(asked),
        "dictionary": {"site": str(placed.writes), "tokens": tokens, "width": len(selectivity.live), "source": source},
        "settings": asdict(settings),
        "seed": seed,
        "score_sd": evidence.sd,
        "performance": performance_rows(evidence, list(data.attributes), bootstrap, settings),
    }
    driver_rows, cards, heats = _features(cases, trial, data, evidence, selectivity, settings, seed)
    traced = graph_section(model, data, asked, evidence, seed)
    graph, picture = (None, None) if isinstance(traced, str) else traced
    compared = audit_section(model, data, asked, rows, settings.explainer_images, seed, settings.grades)
    record |= {"shortcuts": rows + driver_rows, "features": cards, "graph": graph}
    record["explainers"] = compared.rows if compared else []
    record["explained"] = compared.record["images"] if compared else []
    record["failures"] = failures(trial, data, evidence, cases)
    record["power"] = power_of(rows, settings)
    record["truth"] = measure_truth(model, data, asked, evidence, rows, settings, seed)
    record["margin"] = margin_evidence(model, data, asked, evidence, bootstrap)
    record["not_tested"] = untested(record, data, traced if isinstance(traced, str) else None)
    record["questions"] = questions(record, settings)
    record["versions"] = _versions()
    record = _rounded(record) | {"seconds": round(time.perf_counter() - started, 2)}
    maps = maps_picture(compared.made, data, images=1) if compared else None
    folder = write_report(Path(out), record, data, heats, {"graph": picture, "maps": maps})
    return AuditResult(record, folder)


def choose_target(model: HookedVLM, data: ImageData, name: str | None) -> Target:
    """The target called `name`; without a name the one in the model's training.json, else the first of the data.

    Warns, before anything is computed, where the data stand in for images that nobody named. Raises DataError for data
    without a target, UsageError for a name that is none, and for a target with a word that the model does not know.
    """
    if not data.targets:
        raise DataError("defines no target", where=data.name, hint="add targets to dataset.json")
    if name is not None and name not in data.targets:
        raise UsageError(f"no target {name!r}", where="target", hint=f"there are: {', '.join(data.targets)}")
    wanted = training_record(model).get("target") if name is None else name
    asked = data.targets[wanted] if wanted in data.targets else next(iter(data.targets.values()))
    for caution in _cautions(model, data, asked):
        log.warning(caution)
    return asked


def _cautions(model: HookedVLM, data: ImageData, asked: Target) -> list[str]:
    return [said for said in (stand_in(model, data), word_caution(model, asked)) if said is not None]


def _enough(evidence: Evidence, data: ImageData, target: Target) -> None:
    for part, rows in (("test", evidence.test), ("train or val", ~evidence.test)):
        if len(np.unique(evidence.labels[rows])) < 2:
            raise DataError(
                f"the {part} patients do not hold both values of {target.name!r}",
                where=data.name,
                hint="an audit needs images with and without the target on both sides of the split",
            )
    if not evidence.sd > 0:
        raise DataError(f"the model gives every test image the same score for {target.name!r}", where=data.name)


def _trial(
    model: HookedVLM,
    placed: Placed,
    tokens: Any,
    target: Target,
    data: ImageData,
    evidence: Evidence,
    selectivity: Selectivity,
    settings: Settings,
    seed: int,
) -> Trial:
    """Sweep every live feature over the test images, or over `max_images` of them, whole patients at random."""
    test = np.flatnonzero(evidence.test)
    if len(test) > settings.max_images:
        order = np.random.default_rng(seed).permutation(np.unique(evidence.patients[test]))
        place = {patient: i for i, patient in enumerate(order)}
        rank = np.argsort([place[p] for p in evidence.patients[test]], kind="stable")
        test = np.sort(test[rank[: settings.max_images]])
    return stage(
        model,
        placed,
        tokens,
        target,
        prepare(model, data, evidence.rows[test], target),
        test,
        evidence.labels[test],
        evidence.patients[test],
        evidence.sd,
        [int(f) for f in np.flatnonzero(selectivity.live)],
        PatientBootstrap.of(evidence.patients[test], draws=settings.draws, seed=seed),
    )


def _features(
    cases: list[Case],
    trial: Trial,
    data: ImageData,
    evidence: Evidence,
    selectivity: Selectivity,
    settings: Settings,
    seed: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Heat]]:
    """Driver rows, feature cards and galleries."""
    carried = [feature for case in cases for feature in case.features]
    drivers = find_drivers(trial, selectivity, set(carried))
    shown = list(dict.fromkeys([*_told(cases), *(d.feature for d in drivers), *_strongest(trial)]))
    heats = heat_maps(trial, data, evidence, shown)
    people = [case.candidate for case in cases]
    cards = [feature_row(f, trial, evidence, selectivity, people, heats[f].place, seed) for f in shown]
    rows = []
    for driver in drivers:
        ruling = judge(driver, heats[driver.feature].place, settings)
        name = str(FeatureId(trial.placed.writes, driver.feature))
        rows.append(
            {
                "candidate": name,
                "kind": "feature",
                "features": [name],
                "present": float((trial.of(driver.feature) != 0).mean()),
                "detectable_auroc": None,
                "association_odds_ratio": None,
                "used_share": driver.share,
                "causal_effect": driver.push,
                "causal_ci95": list(driver.ci95),
                "causal_p": None,
                "harm_auroc_gap": None,
                "location": heats[driver.feature].place.words,
                "gallery": [data.images[example.row] for example in heats[driver.feature].examples],
                "nearest_attribute": driver.best_attribute,
                "nearest_auroc": driver.best_auroc,
                "verdict": ruling.verdict,
                "reason": ruling.reason,
            }
        )
    return rows, cards, {str(FeatureId(trial.placed.writes, f)): heat for f, heat in heats.items()}


def _told(cases: list[Case], each: int = 2) -> list[int]:
    """The features to show: of the worst candidates first, a few each, more of those that failed."""
    order = {"FAIL": 0, "CONCERN": 1, "PASS": 2, "NOT TESTED": 3}
    ranked = sorted(cases, key=lambda case: order[case.ruling.verdict])
    return [feature for case in ranked for feature in case.features[: each if order[case.ruling.verdict] > 0 else 8]][
        :40
    ]


def _strongest(trial: Trial, most: int = 8) -> list[int]:
    """The features with the largest total effect, whatever they are."""
    order = np.argsort(-np.abs(trial.push).sum(1), kind="stable")[:most]
    return [trial.features[i] for i in order]


def _about_data(data: ImageData, evidence: Evidence) -> dict[str, Any]:
    return {
        "id": data.name,
        "images": len(data),
        "patients": len(set(data.patients)),
        "sha256": data.sha256,
        "labelled": len(evidence.rows),
        "test_images": int(evidence.test.sum()),
        "test_patients": len(set(evidence.patients[evidence.test])),
        "prevalence": float(evidence.labels.mean()),
        "test_prevalence": float(evidence.labels[evidence.test].mean()),
        "notes": list(data.notes),
        "skipped": dict(data.skipped),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "transformers", "transformer-lens", "sae-lens", "numpy", "scipy")
    return {
        "mechinterp": version("mechinterp"),
        "python": platform.python_version(),
        **{p: version(p) for p in packages},
    }


def _rounded(value: Any) -> Any:
    """Six significant digits: what is printed is what is stored."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{float(value):.6g}") if np.isfinite(value) else None
    return value
