"""What intervention-fidelity says: rows, claims that can come out false, and tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from mechinterp.experiments.fidelity_parts import Reading
from mechinterp.experiments.result import Claim, Result, Row, Table
from saes.truth.fidelity import Leakage, leakage

__all__ = ["report"]

READABLE, F1_GAIN, MATCHED_SHARE, MEDIAN_R2, MARGIN = 0.95, 0.3, 0.8, 0.7, 0.2
SWAP_MARGIN = 0.1
Key = tuple[str, str]
Group = tuple[Key, list[Reading]]

NOTES = (
    "R2 and slope: least-squares line of the ablation's effect on the true effect over all test images; where the "
    "factor is absent the true effect is 0. 'present' counts only images with the factor. Medians are over factors "
    "that the model is asked for.",
    "Zero ablation changes a token only where the latent fires, so ablating at all of the dictionary's tokens and only "
    "where it fires are the same. Mean and resample ablation also write where it does not fire.",
    "patch matched / patch all: the matched latents, or all, take the values that they have without the factor. What "
    "patch all lacks of the true effect is in the error term or at tokens that the dictionary does not read.",
    "cause, isolation: base and source differ in the factor and in one other (do()); the factor's latents take the "
    "source's values in the base. Cause: share of the way that the factor's own score goes towards the source's. "
    "Isolation: 1 minus that share for the other factor's score. Doing nothing has 0 and 1, swapping all 1 and 0, both "
    "0.5 on average. 'said': RAVEL's reading of yes and no, on pairs that the model reads rightly.",
    "F1 counts a latent as firing above the threshold that is best on validation patients, for the dictionary and for "
    "its untrained twin alike; 'at 0' counts any activation, as MATCHScore was published.",
    "Split: several latents beat the best one by 0.05 of F1. Merged: shares a matched latent with another (where "
    "both matches beat always saying yes by 0.1 of F1). Absorbed: its latents find it less often, by 0.3 of recall, "
    "where the other factor is there.",
    "Generative models run their language model for every pass: effects are of the first images, with fewer random "
    "sets and without mean and resample ablation; F1, probe and matching use all images.",
)


def report(readings: Sequence[Reading], outputs: Sequence[str]) -> Result:
    """Rows, claims, tables and figure of all readings (in order of model and dictionary)."""
    from mechinterp.experiments.fidelity_figure import fidelity_figure

    groups = [(key, list(mine)) for key, mine in groupby(readings, lambda r: (r.model, r.dictionary))]
    rows = [row for reading in readings for row in _rows(reading)]
    leaks = {key: _leakage(mine) for key, mine in groups}
    for ((model, dictionary), leak), (_, mine) in zip(leaks.items(), groups, strict=True):
        of = {"model": model, "dictionary": dictionary}
        n = leak.true.size
        rows += [
            Row("l0", mine[0].l0, mine[0].images, of=of),
            Row("across slope", leak.slope, n, of=of),
            Row("across r2", leak.r2, n, of=of),
            Row("off-target, do()", leak.off_true, n, of=of),
            Row("off-target, ablation", leak.off_ablated, n, of=of),
        ]
    tables = [
        Table("Factors found", FOUND, tuple(_found(key, mine) for key, mine in groups)),
        Table("Ablation against removal (medians over factors)", ABLATION, tuple(_ablation(g, leaks) for g in groups)),
        Table("Cause and isolation (medians over factors)", SWAP, tuple(_swap(key, mine) for key, mine in groups)),
        *(_table(key, mine) for key, mine in groups),
    ]
    claims = [claim for model in dict.fromkeys(r.model for r in readings) for claim in _claims(model, groups)]
    return Result(rows, claims, tables, fidelity_figure(groups, leaks, outputs, median), NOTES)


def _rows(r: Reading) -> list[Row]:
    of: dict[str, Any] = {"model": r.model, "dictionary": r.dictionary, "site": r.site, "kind": r.kind}
    of["factor"] = r.factor
    n, present = len(r.present), int(r.present.sum())
    rows = [
        Row("f1", r.f1["trained"], r.images, of=of | {"latents": list(r.latents), **vars(r.shape)}),
        Row("f1 untrained", r.f1["untrained"], r.images, of=of),
        Row("f1 gain", r.f1_gain, r.images, r.gain_ci95, of),
        Row("f1 at 0", r.f1_zero["trained"], r.images, of=of),
        Row("f1 at 0 untrained", r.f1_zero["untrained"], r.images, of=of),
        Row("probe auroc", r.probe, r.images, of=of),
    ]
    for how, found in r.effect.items():
        kind = of | {"ablation": how, "sets": len(found)}
        if how == "random":  # the mean, and the range over sets
            for name in ("r2", "slope"):
                values = np.array([getattr(f, name) for f in found])
                rows.append(Row(name, float(values.mean()), n, _range(values), kind))
            continue
        f = found[0]
        rows += [
            Row("r2", f.r2, n, f.r2_ci95, kind),
            Row("slope", f.slope, n, f.slope_ci95, kind),
            Row("r2 identity", f.r2_identity, n, of=kind),
            Row("r2 present", f.r2_present, present, f.r2_present_ci95, kind),
            Row("slope present", f.slope_present, present, of=kind),
            Row("share", f.share, present, of=kind),
            Row("sign agreement", f.sign, present, of=kind),
        ]
    for how, swaps in r.swap.items():
        kind = of | {"swap": how, "sets": len(swaps)}
        for name in ("cause", "isolation"):
            values = np.array([getattr(s, name) for s in swaps])
            ci = _range(values) if how == "random" else getattr(swaps[0], f"{name}_ci95")
            rows.append(Row(name, float(values.mean()), swaps[0].pairs, ci, kind))
            said = float(np.mean([getattr(s, f"said_{name}") for s in swaps]))
            rows.append(Row(f"said {name}", said, swaps[0].read, of=kind))
    return rows


def _range(values: np.ndarray) -> tuple[float, float]:
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def _leakage(mine: list[Reading]) -> Leakage:
    """Mean effects over the images with the factor, in sd of each output over the test images."""
    asked = [r for r in mine if r.own is not None and r.present.sum() > 0]
    true = np.array([r.true[r.present].mean(0) for r in asked])
    ablated = np.array([r.ablated[r.present].mean(0) for r in asked])
    own = np.zeros(true.shape, bool)
    for i, r in enumerate(asked):
        own[i, r.own] = True
    return leakage(true, ablated, own)


def _readable(mine: list[Reading]) -> list[Reading]:
    return [r for r in mine if r.probe >= READABLE]


def median(mine: Sequence[Reading], how: str, what: str) -> float:
    """Median over factors of one number of one way of ablating ("zero") or swapping ("swap matched"); nan without."""
    if how.startswith("swap "):
        each = [r.swap[how[5:]] for r in mine if how[5:] in r.swap]
    else:
        each = [r.effect[how] for r in mine if how in r.effect]
    values = [float(np.mean([getattr(f, what) for f in found])) for found in each]
    kept = [v for v in values if np.isfinite(v)]
    return float(np.median(kept)) if kept else float("nan")


NAMED = ("model", "dictionary")
FOUND = (*NAMED, "L0", "readable", "matched", "split", "merged", "absorbed", "median F1", "twin F1", "images")


def _found(key: Key, mine: list[Reading]) -> tuple[Any, ...]:
    readable = _readable(mine)
    return (
        *key,
        f"{mine[0].l0:.1f}",
        f"{len(readable)} of {len(mine)}",
        sum(r.f1_gain >= F1_GAIN for r in readable),
        sum(r.shape.split for r in mine),
        sum(bool(r.shape.merged) for r in mine),
        sum(bool(r.shape.absorbed) for r in mine),
        float(np.median([r.f1["trained"] for r in mine])),
        float(np.median([r.f1["untrained"] for r in mine])),
        mine[0].images,
    )


ABLATION = (
    *(*NAMED, "R2", "R2 present", "slope", "sign", "share", "mean abl. R2", "resample R2", "random R2", "sets"),
    *("twin R2", "patch matched R2", "patch all R2", "across R2", "off do()", "off ablation", "images"),
)


def _ablation(group: Group, leaks: dict[Key, Leakage]) -> tuple[Any, ...]:
    key, mine = group
    columns = [("zero", what) for what in ("r2", "r2_present", "slope", "sign", "share")]
    columns += [(how, "r2") for how in ("mean", "resample", "random")]
    sets = max((len(r.effect["random"]) for r in mine if "random" in r.effect), default=0)
    after = [median(mine, how, "r2") for how in ("untrained", "patch matched", "patch all")]
    leak = leaks[key]
    first = [median(mine, how, what) for how, what in columns]
    return (*key, *first, sets, *after, leak.r2, leak.off_true, leak.off_ablated, len(mine[0].present))


SWAP = (
    *(*NAMED, "cause", "isolation", "mean", "random cause", "isolation", "mean", "sets", "twin cause", "isolation"),
    *("mean", "all latents cause", "isolation", "said cause", "said isolation", "pairs a factor"),
)


def _swap(key: Key, mine: list[Reading]) -> tuple[Any, ...]:
    three = ("cause", "isolation", "disentangle")
    matched, random, twin = (
        [median(mine, f"swap {how}", w) for w in three] for how in ("matched", "random", "untrained")
    )
    sets = max((len(r.swap["random"]) for r in mine if "random" in r.swap), default=0)
    everything = [median(mine, "swap all", w) for w in three[:2]]
    said = [median(mine, "swap matched", w) for w in ("said_cause", "said_isolation")]
    pairs = max((r.swap["matched"][0].pairs for r in mine if r.swap), default=0)
    return (*key, *matched, *random, sets, *twin, *everything, *said, pairs)


def _table(key: Key, mine: list[Reading]) -> Table:
    header = ("factor", "probe", "latents", "F1", "twin", "gain", "95 %", "split", "merged with", "absorbed by")
    header = (*header, "R2", "95 %", "slope", "R2 present", "share", "sign", "mean abl. R2", "resample R2")
    header = (*header, "random R2", "twin R2", "patch all", "cause", "isolation", "random cause")
    lines = []
    for r in mine:
        cells: list[Any] = [r.factor, r.probe, len(r.latents), r.f1["trained"], r.f1["untrained"], r.f1_gain]
        cells += [_interval(r.gain_ci95), "yes" if r.shape.split else ""]
        cells += [", ".join(r.shape.merged), ", ".join(r.shape.absorbed)]
        if r.effect:
            f = r.effect["zero"][0]
            cells += [f.r2, _interval(f.r2_ci95), f.slope, f.r2_present, f.share, f.sign]
            cells += [median([r], how, "r2") for how in ("mean", "resample", "random", "untrained", "patch all")]
            cells += [median([r], "swap matched", what) for what in ("cause", "isolation")]
            cells += [median([r], "swap random", "cause")]
        lines.append(tuple(cells + [""] * (len(header) - len(cells))))
    return Table(f"{key[0]}, {key[1]}", header, tuple(lines))


def _interval(ci: tuple[float, float]) -> str:
    return f"{ci[0]:.2f} to {ci[1]:.2f}" if np.isfinite(ci[0]) else ""


def _above(value: float, *nulls: float) -> float:
    """By how much a value is above the larger null; nulls that could not be had do not count."""
    kept = [null for null in nulls if np.isfinite(null)]
    return value - max(kept, default=0.0)


def _claims(model: str, groups: Sequence[Group]) -> list[Claim]:
    """The target lines for the best dictionary of a model, and what has to hold for them to mean something."""
    mine = {dictionary: found for (name, dictionary), found in groups if name == model}

    def each(value: Callable[[list[Reading]], float]) -> dict[str, float]:
        return {dictionary: value(found) for dictionary, found in mine.items()}

    def said(values: dict[str, float]) -> str:
        return "; ".join(f"{name}: {value:.2f}" for name, value in values.items())

    def share(found: list[Reading]) -> float:
        readable = _readable(found)
        return float(np.mean([r.f1_gain >= F1_GAIN for r in readable])) if readable else 0.0

    shares, medians = each(share), each(lambda found: median(found, "zero", "r2"))
    margins = each(lambda f: _above(median(f, "zero", "r2"), median(f, "random", "r2"), median(f, "untrained", "r2")))
    swaps = each(
        lambda f: _above(
            median(f, "swap matched", "disentangle"),
            *(median(f, f"swap {how}", "disentangle") for how in ("random", "untrained")),
        )
    )
    return [
        Claim(
            f"{model}: a dictionary matches at least {MATCHED_SHARE:.0%} of the factors that a probe reads at AUROC >= "
            f"{READABLE} with at most 3 latents and F1 at least {F1_GAIN} above its untrained twin",
            max(shares.values()) >= MATCHED_SHARE,
            f"share matched: {said(shares)}",
        ),
        Claim(
            f"{model}: a dictionary has median fidelity R2 >= {MEDIAN_R2}",
            max(medians.values()) >= MEDIAN_R2,
            f"median R2 over factors with an output: {said(medians)}",
        ),
        Claim(
            f"{model}: in every dictionary median R2 is {MARGIN} or more above that of random sets and the twin",
            min(margins.values()) >= MARGIN,
            f"margin over the larger of the two: {said(margins)}",
        ),
        Claim(
            f"{model}: in every dictionary the mean of cause and isolation is {SWAP_MARGIN} or more above that of "
            "random sets and the twin",
            min(swaps.values()) >= SWAP_MARGIN,
            f"margin over the larger of the two: {said(swaps)}",
        ),
    ]
