"""The cards of the shown features: facts, subgroups and pictures, ready for the template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from mechinterp.pages.heat import LARGE, SMALL, heat_picture
from mechinterp.pages.place import place_of
from saes.gallery.examples import GROUPS, Shot, choose_shots
from saes.gallery.overlap import Overlap, coverage, overlap
from saes.naming import UNNAMED, Name

if TYPE_CHECKING:
    import pandas as pd

    from saes.gallery.build import Catalogue

__all__ = ["cards_of", "overlaps_of", "places_of"]

SUBGROUPS = 8
HEARD = 3.0  # spreads by which a phrase must stand out to be shown
LEAST_GROUP = 10  # test images a subgroup needs to be shown


def places_of(made: Catalogue) -> dict[int, str]:
    """Where each live feature fires on test images, in words; empty where the site has no place in the image."""
    observed = made.observed
    if observed.patches is None:
        return {}
    size = observed.grid[0] * observed.grid[1]
    held = np.repeat(observed.test, size)
    patches = observed.patches[np.flatnonzero(held)]
    summed = np.zeros((size, patches.shape[1]))
    coo = patches.tocoo()
    np.add.at(summed, (coo.row % size, coo.col), coo.data)
    return {n.feature: place_of(summed[:, n.feature].reshape(observed.grid)) for n in made.naming.names}


def overlaps_of(made: Catalogue) -> dict[int, Overlap]:
    """Overlap of each named feature with the masks of its attribute, on test images, where there are masks."""
    observed, concepts = made.observed, made.naming.concepts
    if observed.patches is None:
        return {}
    found: dict[int, Overlap] = {}
    wanted = sorted({n.concept for n in made.naming.named if n.present and concepts[n.concept].labelled})
    for index in wanted:
        concept = concepts[index]
        images = np.flatnonzero(observed.test & (concept.values == 1))
        covered = coverage(made.model, made.data, concept.name, observed.rows, [int(i) for i in images])
        if covered is None:
            continue
        for name in made.naming.named:
            if name.concept == index and name.present:
                measured = overlap(observed.heat(name.feature, [int(i) for i in covered.images]), covered)
                if measured is not None:
                    found[name.feature] = measured
    return found


def cards_of(made: Catalogue, table: pd.DataFrame, overlaps: dict[int, Overlap]) -> list[dict[str, Any]]:
    """One card for each shown feature, in order."""
    names = {name.feature: name for name in made.naming.names}
    lines = {int(row["index"]): row for row in table.to_dict("records")} if len(table) else {}
    pictures = _Pictures(made)
    return [
        {
            **lines[f],
            "held_fixed": names[f].rival,
            "text": names[f].said if names[f].alignment >= HEARD else "",
            "named": names[f].name != UNNAMED,
            "ci95": list(names[f].ci95),
            "within_ci95": list(names[f].within_ci95),
            "prevalence": _prevalence(made, names[f]),
            "overlap": overlaps.get(f),
            "groups": pictures.groups(names[f]),
            "subgroups": _subgroups(made, lines[f]),
        }
        for f in made.shown
    ]


def _prevalence(made: Catalogue, name: Name) -> float | None:
    if name.concept < 0:
        return None
    values = made.naming.concepts[name.concept].values[made.observed.test]
    values = values[np.isfinite(values)]
    share = float(values.mean()) if len(values) else 0.0
    return share if name.present else 1 - share


def _subgroups(made: Catalogue, line: dict[str, Any]) -> list[dict[str, Any]]:
    """Share of test images in which the feature fires, with and without each attribute that is no finding."""
    rows = made.observed.rows[made.observed.test]
    found = []
    for attribute in made.data.attributes:
        values = attribute.values[rows]
        if attribute.kind == "finding" or min((values == 1).sum(), (values == 0).sum()) < LEAST_GROUP:
            continue
        one, zero = line[f"fires_with:{attribute.name}"], line[f"fires_without:{attribute.name}"]
        found.append({"name": attribute.name, "kind": attribute.kind, "with": one, "without": zero})
    order = {"demographic": 0, "acquisition": 1, "other": 2}
    found.sort(key=lambda row: (order[row["kind"]], -abs(row["with"] - row["without"])))
    return found[:SUBGROUPS]


class _Pictures:
    """Draws the pictures of features, reading each image once."""

    def __init__(self, made: Catalogue):
        self.made = made
        self.kept: dict[int, np.ndarray] = {}
        self.owner: dict[tuple[int, ...], Int[np.ndarray, "height width"]] = {}

    def groups(self, name: Name) -> list[dict[str, Any]]:
        """The four groups of a feature's gallery."""
        observed, f = self.made.observed, name.feature
        closest = None if observed.closest is None else observed.closest[:, f]
        shots = choose_shots(observed.strongest[:, f], closest, observed.patients, observed.test)
        heat = observed.heat(f, [shot.image for shot in shots])
        largest = float(heat.max()) if len(shots) else 0.0
        drawn = [
            {"group": shot.group, **self._shot(shot, name, h, largest)} for shot, h in zip(shots, heat, strict=True)
        ]
        return [{"name": group, "shots": [d for d in drawn if d["group"] == group]} for group in GROUPS]

    def _shot(self, shot: Shot, name: Name, heat: np.ndarray, largest: float) -> dict[str, Any]:
        made = self.made
        row = int(made.observed.rows[shot.image])
        truth = None
        if name.concept >= 0:
            value = made.naming.concepts[name.concept].values[shot.image]
            truth = None if not np.isfinite(value) else bool(value)
        shown = {"image": made.data.images[row], "share": shot.share, "truth": truth, "jpeg": None}
        if made.data.may_show[row]:
            pixels = self._pixels(row)
            box = None
            if shot.group == "near misses" and made.observed.closest_at is not None:
                box = int(made.observed.closest_at[shot.image, name.feature])
            shown["jpeg"] = heat_picture(
                pixels,
                heat,
                largest,
                self._owner(pixels.shape),
                self._outline(name, row, truth),
                box,
                side=LARGE if shot.group == "strongest" else SMALL,
            )
        return shown

    def _pixels(self, row: int) -> np.ndarray:
        if row not in self.kept:
            self.kept[row] = self.made.data.pixels([row])[0]
        return self.kept[row]

    def _owner(self, shape: tuple[int, ...]) -> Int[np.ndarray, "height width"]:
        if shape not in self.owner:
            model = self.made.model
            tokens = model.grid(shape[0], shape[1]).cpu().numpy()
            self.owner[shape] = np.where(tokens >= 0, tokens - (model.patch_tokens().start or 0), -1)
        return self.owner[shape]

    def _outline(self, name: Name, row: int, truth: bool | None) -> Bool[np.ndarray, "h w"] | None:
        """The mask of the attribute that a feature is named after, where there is one."""
        if not truth or name.name == UNNAMED or not self.made.naming.concepts[name.concept].labelled:
            return None
        mask = self.made.data.mask(self.made.naming.concepts[name.concept].name, row)
        return mask if mask is not None and mask.any() else None
