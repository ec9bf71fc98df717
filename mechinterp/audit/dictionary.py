"""The dictionary that an audit reads: given, stored beside the model, kept from last time, or trained now."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from mechinterp.activations import extract, store_folder
from mechinterp.data import ImageData
from mechinterp.errors import ModelError
from mechinterp.interventions.edits import Tokens
from mechinterp.models import HookedVLM
from mechinterp.models.bundles import bundled_folder
from mechinterp.storage import MANIFEST, sha256_file
from mechinterp.types import Placed

__all__ = ["cache_folder", "default_site", "dictionary_of", "model_folder", "tokens_of"]

log = logging.getLogger(__name__)

STEPS, BATCH, WIDTH, ACTIVE = 1500, 1024, 1024, 16
ROWS_PER_SECOND = 20_000  # of SAE training, width 1024, two cores; for the estimate that is shown only


def cache_folder() -> Path:
    """Where trained dictionaries are kept: $MECHINTERP_CACHE, else ~/.cache/mechinterp."""
    named = os.environ.get("MECHINTERP_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "mechinterp"


def model_folder(model: HookedVLM) -> Path | None:
    """The folder a model was opened from, where there is one."""
    bundled = bundled_folder(model.label)
    if bundled is not None:
        return bundled
    named = str(getattr(model.hf, "name_or_path", "") or "")
    return Path(named) if named and Path(named).is_dir() else None


def default_site(model: HookedVLM) -> str:
    """Where a dictionary is trained when none is stored: after the last vision block but one.

    The image is understood there, and one block is left to carry an edit of any token to the output.
    """
    return f"vision.blocks.{max(model.n_layers('vision') - 2, 0)}.hook_resid_post"


def tokens_of(placed: Placed) -> Tokens:
    """The tokens that a stored dictionary was trained on; "all" where it does not say."""
    said = (getattr(placed.dictionary, "info", None) or {}).get("tokens", "all")
    return said if said in ("all", "patch", "cls") else "all"


def dictionary_of(model: HookedVLM, data: ImageData, seed: int) -> tuple[Placed, str]:
    """A dictionary for `model`, and one sentence that says where it came from."""
    from saes import load_sae

    folder = model_folder(model)
    stored = sorted(folder.glob(f"dictionaries/*/{MANIFEST}")) if folder else []
    vision = [path.parent for path in stored if path.parent.name.startswith("vision")] or [p.parent for p in stored]
    if vision:
        preferred = [p for p in vision if default_site(model) in p.name]
        chosen = (preferred or vision)[0]
        return load_sae(chosen), f"stored with the model ({chosen.name}, {sha256_file(chosen / MANIFEST)[:12]})"
    return _train(model, data, seed)


def _train(model: HookedVLM, data: ImageData, seed: int) -> tuple[Placed, str]:
    """Extract and train on the train and val patients, in a cache folder named after the content of the request."""
    from saes import TopKConfig, load_sae, train_sae

    site = default_site(model)
    if site not in model.sites():
        raise ModelError(f"has no site {site}", where=model.label, hint="pass a placed dictionary")
    fitting = data.subset(data.split != "test")
    rows, columns = model.grid_shape
    n_rows = int((fitting.split == "train").sum()) * rows * columns
    width = WIDTH if n_rows >= 20 * WIDTH else max(64, 2 ** ((n_rows // 20).bit_length() - 1) if n_rows >= 1280 else 64)
    epochs = max(4, -(-STEPS // max(1, n_rows // BATCH)))
    config = TopKConfig(k=ACTIVE, width=width, epochs=epochs, batch_size=BATCH)
    cache = cache_folder()
    where = store_folder(cache / "activations", model, fitting, [site], tokens="all", seed=seed)
    out = cache / "dictionaries" / f"{where.name}-{site}-topk{config.k}-w{width}-e{epochs}-s{seed}"
    said = f"trained for this audit on {len(fitting)} train and val images (TopK, k={config.k}, width {width}, {site})"
    if (out / MANIFEST).exists():
        return load_sae(out), said
    log.warning(
        "no dictionary is stored for %s: training one at %s takes about %.0f s and is kept in %s",
        model.label,
        site,
        5 + len(fitting) / 200 + n_rows * epochs / ROWS_PER_SECOND,
        cache,
    )
    store = extract(model, fitting, [site], where, tokens="all", seed=seed)
    return train_sae(store, site, config, out, seed=seed), said
