"""What simulatability found: rows, claims, tables and the figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from mechinterp.experiments.canvas import COLOURS, GREY, axes_of, canvas, heat, png
from mechinterp.experiments.result import Claim, Result, Row, Table
from mechinterp.experiments.seeds import seed_interval
from mechinterp.metrics.statistics import Interval

if TYPE_CHECKING:
    from mechinterp.experiments.simulatability import Findings

__all__ = ["report"]

CONTROLS = ("random", "leak")
NOTHING = 0.05  # of R2: a gain that is surely below this counts as none
Seeds = Float[np.ndarray, " seed"]


def report(found: Findings) -> Result:
    """Everything that is written."""
    notes = [
        "The explanation carries so many points of information about the model's output for this agent, beyond "
        "no-explanation, random, shuffled and label-leak controls. Nothing here says that people trust, understand or "
        "perform better: no person was asked.",
        f"Intervals of students are over {found.size.seeds} seeds (initial weights and training images), Student's t, "
        "on the same test patients. The model says yes to "
        f"{found.balance:.0%} of the test images; a student that always gives the commoner answer has accuracy "
        f"{max(found.balance, 1 - found.balance):.2f}.",
        "The weight of an explanation in the student's loss, and the training step at which a student was taken, were "
        "chosen on validation patients, for each explanation and control alike.",
        "The reader's skill (d' 1.5), the acceptance rule, and conviction and oddness as read off maps are "
        "assumptions. Persuasion and detection are unknown, which is why there is a surface and no number.",
        "A map of a wrong yes points at a place without the finding, whatever the map: detection alone helps with any "
        "map, so read methods beside edges, which know nothing of the model.",
    ]
    return Result(_rows(found), _claims(found), _tables(found), _figure(found), notes)


def _gain(found: Findings, name: str, over: str, n: int, score: str = "r2") -> Seeds:
    """Paired by seed; accuracy in points."""
    of = found.students[n]
    difference = getattr(of[name], score) - getattr(of[over], score)
    return difference * (100 if score == "accuracy" else 1)


def _rows(found: Findings) -> list[Row]:
    rows = []
    for n, of in found.students.items():
        for name, student in of.items():
            setting = {"explanation": name, "told": n, "strength": student.strength}
            for score in ("r2", "accuracy"):
                values = getattr(student, score)
                rows.append(Row(score, float(values.mean()), len(values), _interval(values), setting))
            if name != "none":
                for score, label in (("r2", "gain in r2"), ("accuracy", "gain in points of accuracy")):
                    gain = _gain(found, name, "none", n, score)
                    rows.append(Row(label, float(gain.mean()), len(gain), _interval(gain), setting))
    for name, student in found.shown.items():
        rows.append(
            Row(
                "accuracy, map shown at test",
                float(student.accuracy.mean()),
                len(student.accuracy),
                _interval(student.accuracy),
                {"explanation": name},
            )
        )
    for name, surface in found.readers.items():
        for i, persuasion in enumerate(surface.persuasion):
            for j, detection in enumerate(surface.detection):
                at = {"explanation": name, "persuasion": float(persuasion), "detection": float(detection)}
                for score in ("accuracy", "over_reliance", "under_reliance", "brier", "calibration_error"):
                    value = float(getattr(surface, score)[i, j])
                    rows.append(Row(f"team {score}", value, found.size.shown, None, at))
    return rows


def _claims(found: Findings) -> list[Claim]:
    n, methods = max(found.students), found.size.methods
    truth = _gain(found, "truth", "none", n)
    over = {
        name: [_gain(found, name, other, n) for other in ("none", "random", f"{name}, shuffled", "leak")]
        for name in methods
        if name != "edges"
    }
    carries = {name: all(_above(g) for g in gains) for name, gains in over.items()}
    spelt = {
        name: "; ".join(f"{_said(g)} beyond {o}" for g, o in zip(gains, _OTHERS, strict=True))
        for name, gains in over.items()
    }
    leaks = _gain(found, "leak", "none", n)
    shown = {name: float(s.accuracy.mean()) for name, s in found.shown.items()}
    lure = found.readers["lure"].gain
    ranges = {k: s.gain for k, s in found.readers.items() if k != "lure"}
    return [
        Claim(
            "telling students where the finding is helps them to predict the model",
            _above(truth),
            f"R2 {_said(truth)} beyond no explanation, {n} images told",
        ),
        Claim(
            "every explanation carries information about the model's output, beyond no explanation, random, shuffled "
            "and label-leak controls",
            all(carries.values()),
            f"{sum(carries.values())} of {len(carries)} do, in R2 at {n} images: "
            + " | ".join(f"{name}: {spelt[name]}" for name in over),
        ),
        Claim(
            "a leaked answer does not help students who see no explanation at test time",
            _interval(leaks)[1] < NOTHING,
            f"R2 {_said(leaks)} beyond no explanation",
        ),
        Claim(
            "a leaked answer wins where explanations are shown at test time",
            all(shown["leak"] > v for k, v in shown.items() if k != "leak"),
            "accuracy " + ", ".join(f"{k} {v:.2f}" for k, v in shown.items()),
        ),
        Claim(
            "an explanation that convinces where the AI is wrong lowers the simulated pair's accuracy",
            bool((lure[1:, :] < 0).all()),
            f"{lure[1:].min():+.1f} to {lure[1:].max():+.1f} points",
        ),
        Claim(
            "some explanation helps the simulated pair wherever it persuades or is checked",
            any((np.delete(g.ravel(), 0) > 0).all() for g in ranges.values()),
            "; ".join(f"{k} {g.min():+.1f} to {g.max():+.1f} points" for k, g in ranges.items()),
        ),
    ]


_OTHERS = ("none", "random", "shuffled", "leak")


def _interval(values: Seeds) -> Interval:
    return seed_interval(values.tolist())


def _above(gain: Seeds) -> bool:
    return bool(_interval(gain)[0] > 0)


def _said(values: Seeds) -> str:
    low, high = _interval(values)
    return f"{values.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def _cell(values: Seeds, digits: int = 2) -> str:
    ci: Interval = _interval(values)
    return f"{values.mean():.{digits}f} [{ci[0]:.{digits}f}, {ci[1]:.{digits}f}]"


def _tables(found: Findings) -> list[Table]:
    n = max(found.students)
    plain = [name for name in found.students[n] if not name.endswith("shuffled")]
    levels = Table(
        "R2 of the students' prediction of the model, unseen patients",
        ("explanation", *(f"{k} images told" for k in found.students), f"points of accuracy beyond none, {n}"),
        tuple(
            (
                name,
                *(_cell(of[name].r2) for of in found.students.values()),
                "" if name == "none" else _cell(_gain(found, name, "none", n, "accuracy"), 1),
            )
            for name in plain
        ),
    )
    against = [name for name in plain if name not in ("none", *CONTROLS)]
    gains = Table(
        f"R2 gained, {n} images told; paired over seeds, 95 %",
        ("explanation", "beyond none", "beyond random", "beyond itself shuffled", "beyond leak", "accuracy, map shown"),
        (
            *(
                (
                    name,
                    *(_said(_gain(found, name, o, n)) for o in ("none", "random", f"{name}, shuffled", "leak")),
                    _cell(found.shown[name].accuracy) if name in found.shown else "",
                )
                for name in against
            ),
            ("leak", _said(_gain(found, "leak", "none", n)), "", "", "", _cell(found.shown["leak"].accuracy)),
        ),
    )
    first = next(iter(found.readers.values()))
    reader = Table(
        f"The simulated pair: accuracy gained by the explanation, in points (reader alone {first.alone:.2f}, AI alone "
        f"{first.ai:.2f}, pair without explanation {first.unexplained:.2f})",
        ("explanation", "persuasion 4, detection 0", "persuasion 0, detection 4", "both 4", "least", "most"),
        tuple(
            (k, *(float(s.gain[at]) for at in ((-1, 0), (0, -1), (-1, -1))), float(s.gain.min()), float(s.gain.max()))
            for k, s in found.readers.items()
        ),
    )
    return [levels, gains, reader]


def _figure(found: Findings) -> bytes:
    figure, axes = canvas(1, 4, 15, 3.9)
    told, n = list(found.students), max(found.students)
    axes_of(axes[0, 0], "students, R2 of the model's score", "images told")
    lines = ["none", "random", "leak", "truth", *(m for m in found.size.methods)]
    for i, name in enumerate(lines):
        control = name in ("none", *CONTROLS, "truth")
        style = {"none": "-", "random": ":", "leak": "-.", "truth": "--"}.get(name, "-")
        axes[0, 0].plot(
            told,
            [max(-1.0, found.students[k][name].r2.mean()) for k in told],
            marker="o",
            markersize=3,
            linewidth=1.3,
            linestyle=style,
            color=GREY if control else COLOURS[(i - 4) % len(COLOURS)],
            label=name.replace("_", " "),
        )
    axes[0, 0].set_xticks(told)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(lines), fontsize=7.5, frameon=False)
    axes_of(axes[0, 1], f"R2 beyond none, {n} told", "own maps; grey: on the wrong images")
    for at, name in enumerate(("truth", *found.size.methods)):
        for shift, key, colour in ((0.12, name, COLOURS[0]), (-0.16, f"{name}, shuffled", GREY)):
            gain = _gain(found, key, "none", n)
            low, high = _interval(gain)
            axes[0, 1].errorbar(
                [gain.mean()],
                [-at + shift],
                xerr=[[gain.mean() - low], [high - gain.mean()]],
                fmt="o",
                ms=3.5,
                color=colour,
                linewidth=1.1,
            )
    axes[0, 1].axvline(0, color=GREY, linewidth=0.8)
    names = [m.replace("_", " ") for m in ("truth", *found.size.methods)]
    axes[0, 1].set_yticks([-i for i in range(len(names))], names, fontsize=7.5)
    best = found.size.methods[0]
    for ax, name in ((axes[0, 2], best), (axes[0, 3], "lure")):
        surface = found.readers[name]
        limit = max(1.0, float(np.abs([s.gain for s in found.readers.values()]).max()))
        ticks = ([f"persuasion {p:g}" for p in surface.persuasion], [f"detection {d:g}" for d in surface.detection])
        heat(figure, ax, surface.gain, *ticks, f"pair's accuracy, points: {name}", limit)
    return png(figure)
