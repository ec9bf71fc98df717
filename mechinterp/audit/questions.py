"""The verdict box: one line per question, each with its verdict and where the evidence stands."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from mechinterp.audit.settings import Settings
from mechinterp.audit.standing import ENOUGH
from mechinterp.audit.verdicts import worst
from mechinterp.metrics.statistics import holm

__all__ = ["power_of", "questions"]


def questions(record: dict[str, Any], settings: Settings) -> list[dict[str, str]]:
    """The lines of the verdict box from the filled record."""
    return [
        _shortcuts(record),
        _skill(record),
        _groups(record, settings),
        _drivers(record),
        _power(record, settings),
    ]


def _line(question: str, verdict: str, answer: str, link: str) -> dict[str, str]:
    return {"question": question, "verdict": verdict, "answer": answer, "link": link}


def _shortcuts(record: dict[str, Any]) -> dict[str, str]:
    rows = [row for row in record["shortcuts"] if row["kind"] == "attribute"]
    verdict = worst([row["verdict"] for row in rows])
    named = [row["candidate"] for row in rows if row["verdict"] == verdict]
    counted = {v: sum(row["verdict"] == v for row in rows) for v in ("FAIL", "CONCERN", "PASS", "NOT TESTED")}
    counts = ", ".join(f"{n} {v}" for v, n in counted.items() if n)
    match verdict:
        case "FAIL":
            answer = f"Yes: {', '.join(named)}"
        case "CONCERN":
            answer = f"Possibly: {', '.join(named)}"
        case "PASS":
            answer = "The score follows none of the candidates by more than the line"
        case _:
            answer = "No candidate failed, but some could not be tested" if rows else "There is no candidate attribute"
    if verdict == "NOT TESTED" and counted["PASS"]:
        answer += f" ({', '.join(named[:6])}{' ...' if len(named) > 6 else ''})"
    return _line(
        "Does the model lean on a shortcut?", verdict, f"{answer}. {counts}." if counts else answer, "shortcuts"
    )


def _skill(record: dict[str, Any]) -> dict[str, str]:
    question = "Does it find the target better than metadata alone would?"
    overall, metadata = record["performance"][:2]
    if overall["auroc"] is None or not np.isfinite(overall["auroc"]):
        return _line(question, "NOT TESTED", "The test patients hold one class only", "performance")
    said = f"AUROC {_area(overall)}"
    if metadata["auroc"] is None:
        return _line(question, "NOT TESTED", f"{said}; there is no metadata to compare with", "performance")
    said += f"; metadata alone {_area(metadata)}"
    low, high = metadata["model_minus_metadata_ci95"]
    said += f"; difference {metadata['model_minus_metadata']:+.3f} [{low:+.3f}, {high:+.3f}]"
    return _line(question, "PASS" if low > 0 and overall["ci95"][0] > 0.5 else "CONCERN", said, "performance")


def _groups(record: dict[str, Any], settings: Settings) -> dict[str, str]:
    question = "Does it serve every group alike?"
    rows = [r for r in record["performance"][2:] if not r["group"].startswith("not ")]
    if not rows:
        return _line(question, "NOT TESTED", "No group has enough images with and without the target", "performance")
    errors = [(r["difference_ci95"][1] - r["difference_ci95"][0]) / (2 * stats.norm.ppf(0.975)) for r in rows]
    p = holm(
        np.array(
            [
                2 * stats.norm.sf(abs(r["difference"]) / e) if e > 0 else np.nan
                for r, e in zip(rows, errors, strict=True)
            ]
        )
    )
    apart = [
        f"{r['group']} {r['difference']:+.3f}"
        for r, adjusted in zip(rows, p, strict=True)
        if adjusted < settings.alpha and abs(r["difference"]) >= settings.harm_line
    ]
    if apart:
        return _line(question, "CONCERN", f"AUROC against the rest: {', '.join(apart)} (Holm)", "performance")
    wide = [r["group"] for r in rows if not _inside(r["difference_ci95"], settings.harm_line)]
    if wide:
        return _line(
            question,
            "NOT TESTED",
            f"No difference shown, but {len(wide)} of {len(rows)} intervals reach beyond {settings.harm_line:g} AUROC",
            "performance",
        )
    return _line(
        question, "PASS", f"All {len(rows)} differences lie within {settings.harm_line:g} AUROC", "performance"
    )


def _drivers(record: dict[str, Any]) -> dict[str, str]:
    rows = [row for row in record["shortcuts"] if row["kind"] == "feature"]
    question = "Does something drive the score that nobody named?"
    if not rows:
        return _line(question, "PASS", "No unexplained feature carries 2 % or more of the score's effect", "drivers")
    share = sum(row["used_share"] for row in rows)
    look = f"{len(rows)} feature(s) with {share:.0%} of the total effect that no column explains: look at their gallery"
    return _line(question, worst([row["verdict"] for row in rows]), look, "drivers")


def _power(record: dict[str, Any], settings: Settings) -> dict[str, str]:
    question = "Could this audit have seen it?"
    power = record["power"]
    if power["median_gap"] is None:
        return _line(question, "NOT TESTED", "No candidate could be tested", "power")
    said = (
        f"Smallest detectable score gap at the same label {power['median_gap']:.2f} sd (median of "
        f"{len(power['smallest_detectable_gap'])} candidates; worst {power['largest_gap']:.2f}), line "
        f"{settings.effect_line:g}"
    )
    if power["tested"]:
        said += (
            f"; effect of the features removed {power['median']:.2f} (worst {power['largest']:.2f}), and the removal "
            f"took at least half of the attribute away for {power['stands']} of {power['tested']}"
        )
    worst_gap = max(power["largest_gap"], power["largest"] or 0.0)
    return _line(question, "PASS" if worst_gap <= settings.effect_line else "CONCERN", said, "power")


def power_of(rows: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """The `power` entry of audit.json: smallest detectable effects at alpha 0.05 and power 0.8, in sd of the score.

    An effect is of the features removed, so it says as much of the attribute as they stand for; a gap is of the score
    itself, at the same label.
    """
    each, gaps = (
        {row["candidate"]: row[key] for row in rows if row.get(key) is not None}
        for key in ("detectable_effect", "detectable_gap")
    )
    values, wide = sorted(each.values()), sorted(gaps.values())
    stands = [row["candidate"] for row in rows if (row["removed_share_ci95"][0] or 0.0) >= ENOUGH]
    return {
        "alpha": 0.05,
        "power": 0.8,
        "unit": "sd of the score over the test images",
        "formula": "(z[0.975] + z[0.8]) * patient-bootstrap standard error = 2.80 * SE",
        "effect_line": settings.effect_line,
        "smallest_detectable_effect": each,
        "tested": len(values),
        "median": float(np.median(values)) if values else None,
        "largest": values[-1] if values else None,
        "stands": len(stands),
        "smallest_detectable_gap": gaps,
        "median_gap": float(np.median(wide)) if wide else None,
        "largest_gap": wide[-1] if wide else None,
    }


def _area(row: dict[str, Any]) -> str:
    return f"{row['auroc']:.3f} [{row['ci95'][0]:.3f}, {row['ci95'][1]:.3f}]"


def _inside(interval: list[float], line: float) -> bool:
    return bool(-line < interval[0] and interval[1] < line)
