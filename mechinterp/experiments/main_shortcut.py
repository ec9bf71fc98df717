"""Which methods show a planted shortcut: relevance in its mask, in the model that learnt it and in its clean twin.

Maps only, no perturbations, so it affords more images than the rest of iq-main: one of each test patient, all with the
shortcut, the same for both models. Every claim is a paired sign-flip test, corrected over methods (Holm), and is NOT
TESTED where so few images could not reach 0.05 even if all agreed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from mechinterp.audit.evidence import prepare
from mechinterp.audit.explainers.choose import chosen_rows, masks_of
from mechinterp.data import ImageData
from mechinterp.experiments.result import Claim, Row, Table
from mechinterp.explain.ask import about_image
from mechinterp.explain.methods import Method, applies
from mechinterp.metrics.localisation import mass_ratio
from mechinterp.metrics.statistics import PatientBootstrap, holm, percentile_interval, sign_flip_p
from mechinterp.models import HookedVLM

__all__ = ["Shown", "least_p", "needed", "relevance_on", "shortcut_claims", "shortcut_rows", "shortcut_table"]

ALPHA = 0.05
TWIN = "-shortcut"
Masses = dict[str, Float[np.ndarray, " image"]]


@dataclass(frozen=True)
class Shown:
    """Relevance in the mask over its share of the area (1: chance), of one model: by method, an image each.

    `anchors`: the methods that explain nothing.
    """

    mass: Masses
    patients: tuple[str, ...]
    anchors: frozenset[str] = frozenset()

    @property
    def real(self) -> tuple[str, ...]:
        """The methods that claims are about."""
        return tuple(m for m in self.mass if m not in self.anchors)


def relevance_on(
    model: HookedVLM,
    data: ImageData,
    finding: str,
    shortcut: str,
    methods: Mapping[str, Method],
    images: int,
    seed: int = 0,
) -> Shown | None:
    """Explain `images` test images that have the shortcut's mask, half with the finding as far as there are any.

    The choice depends on labels, masks and the seed, not on the model. None where no test image has the mask.
    """
    test = np.flatnonzero(data.split == "test")
    marked = data.subset([int(row) for row in test if data.mask(shortcut, int(row)) is not None])
    if not len(marked):
        return None
    rows = chosen_rows(marked, finding, images, seed)
    target = data.targets[finding]
    question = about_image(model, prepare(model, marked, rows, target), target, "grey")
    inside, known = masks_of(model, marked, shortcut, rows)
    mass = {}
    for name, method in methods.items():
        if applies(method, question):
            found = method.explain(question, torch.Generator().manual_seed(seed)).detach().double().numpy()
            mass[name] = np.where(known, mass_ratio(found, inside), np.nan)
    anchors = frozenset(name for name in mass if methods[name].anchor)
    return Shown(mass, tuple(marked.patients[int(row)] for row in rows), anchors)


def least_p(images: int, methods: int) -> float:
    """The smallest p after Holm that `methods` sign-flip tests of so many pairs can reach, if every pair agrees."""
    return min(1.0, methods * 2.0 ** (1 - images))


def needed(methods: int) -> int:
    """Pairs from which on `least_p` is below 0.05."""
    return next(n for n in range(1, 64) if least_p(n, methods) < ALPHA)


def shortcut_claims(shown: Mapping[str, Shown], shortcut: str) -> list[Claim]:
    """Of every twin that learnt the shortcut: does each map lie on it, and more than in the model that did not?"""
    claims = []
    for name, twin in shown.items():
        if not name.endswith(TWIN):
            continue
        words = f"{name}: every explainer puts more than chance on the planted {shortcut}"
        claims.append(_tested(words, {m: twin.mass[m] - 1 for m in twin.real}, twin.patients))
        clean = shown.get(name.removesuffix(TWIN))
        if clean is None or clean.patients != twin.patients:
            continue
        words = f"{name}: every explainer puts more on the planted {shortcut} than in {name.removesuffix(TWIN)}"
        paired = {m: twin.mass[m] - clean.mass[m] for m in twin.real if m in clean.mass}
        claims.append(_tested(words, paired, twin.patients))
    return claims


def shortcut_rows(shown: Mapping[str, Shown], shortcut: str) -> list[Row]:
    """Means and intervals of every model, and of the twins' differences from the clean model with p after Holm."""
    rows = [
        _row(f"mass {shortcut}, images with one", values, s.patients, {"model": name, "explainer": m})
        for name, s in shown.items()
        for m, values in s.mass.items()
    ]
    for name, clean, twin in _pairs(shown):
        paired = {m: twin.mass[m] - clean.mass[m] for m in twin.real if m in clean.mass}
        for m, p in _adjusted(paired).items():
            of = {"model": name, "explainer": m, "p": p}
            rows.append(_row(f"mass {shortcut}, less that of the clean model", paired[m], twin.patients, of))
    return rows


def shortcut_table(shown: Mapping[str, Shown], shortcut: str) -> Table | None:
    """Relevance on the shortcut in every twin and its clean model; None without a pair."""
    pairs = _pairs(shown)
    if not pairs:
        return None
    header, lines = ["explainer"], {m: [f"*{m}*" if m in pairs[0][2].anchors else m] for m in pairs[0][2].mass}
    for name, clean, twin in pairs:
        header += [name, name.removesuffix(TWIN), "difference", "p (Holm)"]
        p = _adjusted({m: twin.mass[m] - clean.mass[m] for m in twin.real if m in clean.mass})
        for m, line in lines.items():
            own, other = (s.mass.get(m, np.full(len(s.patients), np.nan)) for s in (twin, clean))
            line += [_said(v, s.patients) for v, s in ((own, twin), (other, clean), (own - other, twin))]
            line.append("" if m in twin.anchors else f"{p[m]:.3f}" if np.isfinite(p.get(m, np.nan)) else "not tested")
    images = len(pairs[0][2].patients)
    title = f"Relevance on the {shortcut} over its share of the image (1: chance), {images} images with one"
    return Table(title, tuple(header), tuple(tuple(line) for line in lines.values()))


def _pairs(shown: Mapping[str, Shown]) -> list[tuple[str, Shown, Shown]]:
    """(name of the twin, clean, twin) where both explained the same patients."""
    found = [(n, shown.get(n.removesuffix(TWIN)), s) for n, s in shown.items() if n.endswith(TWIN)]
    return [(n, clean, s) for n, clean, s in found if clean is not None and clean.patients == s.patients]


def _adjusted(differences: Masses) -> dict[str, float]:
    p = [sign_flip_p(d[np.isfinite(d)]) for d in differences.values()]
    return dict(zip(differences, holm(np.array(p)).tolist(), strict=True))


def _tested(words: str, differences: Masses, patients: tuple[str, ...]) -> Claim:
    p = _adjusted(differences)
    right = [m for m, d in differences.items() if p[m] < ALPHA and np.nanmean(d) > 0]
    wrong = [m for m, d in differences.items() if p[m] < ALPHA and np.nanmean(d) < 0]
    fewest = min((int(np.isfinite(d).sum()) for d in differences.values()), default=0)
    least = least_p(fewest, len(differences))
    power = ""
    if least >= ALPHA:
        power = f" (NOT TESTED: with {fewest} images no p after Holm is below {least:.2f}; {needed(len(p))} would do)"
    said = "; ".join(f"{m} {_said(d, patients)} p {p[m]:.3f}" for m, d in differences.items())
    evidence = f"{len(right)} of {len(differences)} do, {len(wrong)} the opposite{power}: {said}"
    return Claim(words, bool(differences) and not power and len(right) == len(differences), evidence)


def _row(name: str, values: np.ndarray, patients: tuple[str, ...], of: dict) -> Row:
    kept = np.isfinite(values)
    value = float(values[kept].mean()) if kept.any() else float("nan")
    return Row(name, value, int(kept.sum()), _interval(values, patients), of)


def _interval(values: np.ndarray, patients: tuple[str, ...]) -> tuple[float, float] | None:
    kept = np.isfinite(values)
    if kept.sum() < 5:
        return None
    owners = [p for p, k in zip(patients, kept, strict=True) if k]
    return percentile_interval(PatientBootstrap.of(owners).mean(values[kept]))


def _said(values: np.ndarray, patients: tuple[str, ...]) -> str:
    if not np.isfinite(values).any():
        return "not tested"
    ends = _interval(values, patients)
    return f"{np.nanmean(values):.2f}" + (f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else "")
