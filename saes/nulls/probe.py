"""The upper bound: what a straight line through the model's own activations tells of each concept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped

from mechinterp.activations import ActivationStore
from mechinterp.types import Site
from saes.metrics.images import pooled_site
from saes.metrics.probing import LinearProbe, linear_probe

__all__ = ["ProbeBound", "probe_bound", "probe_inputs"]


@dataclass(frozen=True)
class ProbeBound:
    """One probe a concept. `encode` gives one "latent" a concept, so that every metric takes it like a dictionary."""

    probes: tuple[LinearProbe | None, ...]

    def encode(self, x: Float[np.ndarray, "image feature"]) -> Float[np.ndarray, "image concept"]:
        """Probability of each concept (0 to 1; nan for a concept that could not be probed)."""
        nothing = np.full(len(x), np.nan)
        columns = [
            nothing if probe is None else 1 / (1 + np.exp(-np.clip(probe.scores(x), -500, 500)))
            for probe in self.probes
        ]
        return np.stack(columns, 1)


def probe_inputs(store: ActivationStore, site: str | Site) -> Float[np.ndarray, "image feature"]:
    """What the probe reads of every image: mean, maximum and minimum over its tokens, 3 d numbers."""
    # small findings show in extremes, large ones in means
    return np.concatenate([pooled_site(store, site, pool=pool) for pool in ("mean", "max", "min")], axis=1)


def probe_bound(
    x: Float[np.ndarray, "image feature"],
    labels: Shaped[np.ndarray, "image concept"],
    split: Shaped[np.ndarray, " image"],
) -> ProbeBound:
    """Fit one `linear_probe` a concept: weights on training images, penalty on validation images."""
    return ProbeBound(tuple(linear_probe(x, column, split) for column in np.asarray(labels).T))
