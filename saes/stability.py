"""Does a latent come back when the dictionary is trained again from another seed? Measured once, kept with it.

mechinterp.json then holds `stability`: `{seeds, threshold, per_latent, mean, chance}`. `per_latent` is the share of
the other seeds that have a latent of the same direction; `chance` is its mean for untrained dictionaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mechinterp.errors import UsageError
from mechinterp.storage import read_json, write_json, write_manifest
from mechinterp.types import Dictionary, Placed
from saes.config import TopKConfig
from saes.folder import INFO, load_sae
from saes.metrics.recovery import reappearance
from saes.null import untrained

__all__ = ["SAME", "keep_stability", "seed_stability"]

SAME = 0.7  # cosine of decoder rows (Paulo and Belrose 2025, arXiv:2501.16615)


def seed_stability(dictionary: Dictionary) -> Float[np.ndarray, " latent"] | None:
    """Share of other seeds in which each latent comes back, as kept with the dictionary; None where none is."""
    kept = (getattr(dictionary, "info", None) or {}).get("stability")
    return None if kept is None else np.array(kept["per_latent"], np.float64)


def keep_stability(folder: Path | str, sisters: Sequence[Placed]) -> dict[str, Any]:
    """Measure how often the latents of a stored dictionary come back in its sisters, and keep it in its folder.

    Args:
        folder: of the dictionary.
        sisters: dictionaries of other seeds, at least two, of the same site, data and configuration.

    Returns what is kept. Raises UsageError for a sister that differs in more than its seed.
    """
    folder = Path(folder)
    placed = load_sae(folder)
    dictionaries = [placed.dictionary, *(sister.dictionary for sister in sisters)]
    infos: list[dict[str, Any]] = [dictionary.info for dictionary in dictionaries]  # type: ignore[attr-defined]
    for info in infos[1:]:
        wrong = [
            name for name in ("reads", "writes", "config", "tokens", "model", "data") if info[name] != infos[0][name]
        ]
        if wrong:
            raise UsageError(f"differs in {', '.join(wrong)}", where="sisters", hint="change the seed only")
    seeds = [int(info["seed"]) for info in infos]
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds {seeds} are not all different", where="sisters")
    found = reappearance([dictionary.W_dec for dictionary in dictionaries], SAME)
    d_sae, d_out = placed.dictionary.W_dec.shape
    nothing = [untrained(TopKConfig(k=1, width=d_sae), d_out, seed).W_dec for seed in seeds]
    kept = {
        "seeds": seeds,
        "threshold": SAME,
        "per_latent": [round(value, 4) for value in found.per_seed[0].tolist()],
        "mean": found.mean,
        "chance": reappearance(nothing, SAME).mean,
    }
    write_json(folder / INFO, {**read_json(folder / INFO), "stability": kept})
    write_manifest(folder, {"kind": "dictionary"})
    return kept
