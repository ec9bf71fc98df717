"""The catalogue of a dictionary's features: names, galleries, subgroups, overlap, effect; one page and one table.

1. One pass over the images (`saes.gallery.observe`).
2. Text alignment on train and val images, names on them, proof on test patients (`saes.naming`).
3. Effect of removing each live feature on the target, on test images.
4. Pictures of the features that are shown: the best of each concept, then those with the largest effect.
5. features.html, features.parquet, manifest.json.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mechinterp.data import ImageData
from mechinterp.errors import DataError
from mechinterp.interventions import Tokens
from mechinterp.models import HookedVLM
from mechinterp.models.tables import Dual, Features, Generative
from mechinterp.types import Placed, Target
from saes.gallery.facts import Push, pushes, sample, stability
from saes.gallery.observe import Observed, batch_of, choose_rows, observe
from saes.naming import (
    UNNAMED,
    Concept,
    Naming,
    Phrase,
    alignment,
    attribute_concepts,
    name_features,
    phrases,
    read_concepts,
    standardised,
)
from saes.naming.minilm import encoder, report_concepts

__all__ = ["Catalogue", "catalogue"]

SHOWN = 40
ALIGN_IMAGES = 120
EFFECT_IMAGES = 120
SPOKEN_IMAGES = 16  # the same for a generative model, where each edit costs a pass through the language model


@dataclass(frozen=True, eq=False)
class Catalogue:
    """What was found of a dictionary's features, before it is written; `folder` holds the files."""

    model: HookedVLM
    data: ImageData
    placed: Placed
    target: Target | None
    observed: Observed
    naming: Naming
    push: Push | None
    stability: Float[np.ndarray, " f"] | None
    shown: tuple[int, ...]
    source: str
    seed: int
    seconds: float
    folder: Path

    def summary(self) -> str:
        """A few lines to print."""
        naming, width = self.naming, self.observed.strongest.shape[1]
        live, named = len(naming.names), naming.named
        by_text = sum(name.source == "text" for name in named)
        lines = [
            f"{self.model.label} on {self.data.name}: {live} of {width} features are live at {self.placed.writes}",
            f"  named on unseen patients: {len(named)} of {live} ({len(named) / max(live, 1):.1%}), {by_text} of them "
            "by the text tower alone",
            f"  of an untrained dictionary: {naming.decoys_named} of {naming.decoys} "
            f"({naming.decoys_named / max(naming.decoys, 1):.1%})",
        ]
        for concept in dict.fromkeys(name.name for name in sorted(named, key=lambda n: -n.auroc)):
            mine = [name for name in named if name.name == concept]
            best = max(mine, key=lambda n: n.auroc)
            low, high = best.ci95
            lines.append(
                f"  {concept:32} {len(mine):4}   best AUROC {best.auroc:.3f} [{low:.3f}, {high:.3f}], feature "
                f"{best.feature}"
            )
        return "\n".join(lines)


def catalogue(
    model: HookedVLM,
    data: ImageData,
    placed: Placed,
    target: Target | None = None,
    out: Path | str = Path("out/features"),
    top: int = SHOWN,
    seed: int = 0,
    tokens: Tokens = "all",
    others: Sequence[Placed] = (),
    source: str = "given",
) -> Catalogue:
    """Name and show the features of a placed dictionary; write the page and the table to `out`.

    Args:
        model: any family; names from text need a dual encoder, effects need something to score.
        data: a data folder of images of one size (or squares).
        placed: the dictionary. others: those of other seeds, for stability.
        target: what effects are measured on; default the data's first target.
        top: how many features are shown with pictures. tokens: which tokens the dictionary was trained on.
        seed: of the twins, the samples and the bootstrap. source: where the dictionary came from, in words.

    Raises DataError without test patients, or without train and val patients.
    """
    from saes.gallery.page import write

    started = time.perf_counter()
    target = _scorable(model, data, target)
    rows = choose_rows(data, seed)
    test = np.asarray(data.split[rows] == "test")
    if not test.any() or test.all():
        raise DataError("has no test patients, or only those", where=data.name, hint="names need both sides of a split")
    asked = phrases(model, data) if isinstance(model.table.head, Dual) else []
    targets = ([] if target is None else [target]) + [phrase.target for phrase in asked]
    observed = observe(model, data, placed, rows, targets, tokens, seed)
    readings = observed.scores[:, len(targets) - len(asked) :]
    concepts = attribute_concepts(data, rows, test)
    embed = encoder() if any(data.reports) else None
    concepts += report_concepts(data, rows, test, embed) if embed else []
    taken = {concept.name for concept in concepts}
    concepts += [concept for concept in read_concepts(asked, readings, test) if concept.name not in taken]
    said = _said(model, data, placed, observed, asked, concepts, tokens, seed)
    naming = name_features(observed.strongest, concepts, observed.patients, test, *observed.twins, said=said, seed=seed)
    push = None
    if target is not None and naming.names:
        most = SPOKEN_IMAGES if isinstance(model.table.head, Generative) else EFFECT_IMAGES
        images = sample(observed, test, most, seed)
        live = [name.feature for name in naming.names]
        push = pushes(model, data, placed, target, observed, images, live, tokens)
    made = Catalogue(
        model,
        data,
        placed,
        target,
        observed,
        naming,
        push,
        stability(placed, others),
        _choose(naming, push, top),
        source,
        seed,
        time.perf_counter() - started,
        Path(out),
    )
    write(made)
    return made


def _scorable(model: HookedVLM, data: ImageData, target: Target | None) -> Target | None:
    """The target, where the model can score anything."""
    if isinstance(model.table.head, Features):
        return None
    return target or next(iter(data.targets.values()), None)


def _said(
    model: HookedVLM,
    data: ImageData,
    placed: Placed,
    observed: Observed,
    asked: Sequence[Phrase],
    concepts: Sequence[Concept],
    tokens: Tokens,
    seed: int,
) -> Float[np.ndarray, "f c"] | None:
    """Alignment of each feature with each concept that a phrase stands for, on train and val images."""
    at = {concept.name: i for i, concept in enumerate(concepts)}
    heard: list[tuple[Phrase, int]] = []
    for phrase in asked:
        index = at.get(phrase.attribute or phrase.name)
        if index is not None:
            heard.append((phrase, index))
    fires = (observed.strongest[~observed.test] > 0).sum(0)
    live = [int(f) for f in np.flatnonzero(fires >= 3)]
    if not heard or not live:
        return None
    images = sample(observed, ~observed.test, ALIGN_IMAGES, seed)
    batch = batch_of(model, data, observed.rows[images], heard[0][0].target)
    found = alignment(model, placed, batch, [phrase.target for phrase, _ in heard], live, tokens)
    said = np.full((observed.strongest.shape[1], len(concepts)), np.nan)
    said[np.ix_(live, [index for _, index in heard])] = standardised(found)
    return said


def _choose(naming: Naming, push: Push | None, top: int) -> tuple[int, ...]:
    """Features to show: the best-proven of each name, then the largest effect (or the next best-proven)."""
    first: dict[str, Any] = {}
    for name in sorted(naming.named, key=lambda n: -n.auroc):
        first.setdefault(name.name, name)
    chosen = [name.feature for name in first.values()]
    rest = [name.feature for name in naming.names if name.feature not in chosen]
    if push is not None:
        rest.sort(key=lambda f: -push.size[f])
    else:
        proven = {n.feature: n.auroc for n in naming.names if n.name != UNNAMED}
        rest.sort(key=lambda f: -proven.get(f, 0.0))
    return tuple([*chosen, *rest][:top])
