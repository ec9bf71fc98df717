"""The dictionaries that an audit reads: given, stored beside the model, kept from last time, or trained now.

An SAE for features and their ablation; for attribution graphs a transcoder for the MLP of every block.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from mechinterp.activations import extract, store_folder
from mechinterp.data import ImageData
from mechinterp.errors import ModelError
from mechinterp.interventions.edits import Tokens
from mechinterp.models import HookedVLM
from mechinterp.models.bundles import bundled_folder
from mechinterp.storage import MANIFEST, read_json, sha256_file
from mechinterp.types import Placed

__all__ = [
    "cache_folder",
    "default_site",
    "dictionary_of",
    "mlps",
    "model_folder",
    "stream_saes_of",
    "texts_beside",
    "tokens_of",
    "train_transcoders",
    "training_record",
    "transcoders_of",
]

log = logging.getLogger(__name__)

STEPS, BATCH, WIDTH, ACTIVE = 1500, 1024, 1024, 16
ROWS_PER_SECOND = 20_000  # of SAE training, width 1024, two cores; for the estimate that is shown only
TRANSCODER_STEPS, RARE = 1200, 0.25  # steps of each transcoder; least share of a token kind, the class token above all


def cache_folder() -> Path:
    """Where trained dictionaries are kept: $MECHINTERP_CACHE, else ~/.cache/mechinterp."""
    named = os.environ.get("MECHINTERP_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "mechinterp"


def model_folder(model: HookedVLM) -> Path | None:
    """The folder a model was opened from, where there is one; a folder of somebody's own that is called like a bundled
    model is not that model."""
    named = str(getattr(model.hf, "name_or_path", "") or "")
    return Path(named) if named and Path(named).is_dir() else bundled_folder(model.label)


def training_record(model: HookedVLM) -> dict[str, Any]:
    """The model's training.json: seed, target, what was measured; empty where it has none."""
    folder = model_folder(model)
    card = folder / "training.json" if folder else None
    said = read_json(card) if card and card.is_file() else {}
    return said if isinstance(said, dict) else {}


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


def transcoders_of(model: HookedVLM) -> list[Placed]:
    """The transcoders stored beside a model, vision first, in the order of the blocks; [] where there are none."""
    from saes import load_sae

    folder = model_folder(model)
    stored = folder.glob(f"transcoders/*/{MANIFEST}") if folder else []
    return sorted((load_sae(path.parent) for path in stored), key=_order)


def stream_saes_of(model: HookedVLM) -> list[Placed]:
    """The SAEs of the residual stream (`hook_resid_post`) stored beside a model; [] where there are none."""
    from saes import load_sae

    folder = model_folder(model)
    stored = folder.glob(f"dictionaries/*.hook_resid_post/{MANIFEST}") if folder else []
    return sorted((load_sae(path.parent) for path in stored), key=_order)


def train_transcoders(model: HookedVLM, data: ImageData, seed: int) -> list[Placed]:
    """A transcoder for the MLP of every block, trained on train and val patients and kept in the cache folder.

    Vision blocks see all tokens of the images. Blocks of the language side see the images' reports and what the targets
    are asked with (`texts_beside`); they get none where the data has neither.

    Raises ModelError when the model has no MLP whose input and output can be read.
    """
    from saes import TranscoderConfig, load_sae
    from saes.train import train_transcoder

    fitting = data.subset(data.split != "test")
    texts, made = texts_beside(model, fitting, seed), []
    towers = {tower: pairs for tower in ("vision", "text") if (pairs := mlps(model, tower))}
    if not towers:
        raise ModelError("has no MLP with ln2.hook_normalized and hook_mlp_out", where=model.label)
    for tower, pairs in towers.items():
        if tower == "text" and texts is None:
            log.warning("no transcoder for the language side of %s: %s has no text", model.label, data.name)
            continue
        sites = [site for pair in pairs for site in pair]
        said = texts if tower == "text" else None
        where = store_folder(cache_folder() / "activations", model, fitting, sites, "all", seed=seed, texts=said)
        width = max(256, 4 * model.d_model(tower))
        outs = [cache_folder() / "dictionaries" / f"{where.name}-{writes}-w{width}-s{seed}" for _, writes in pairs]
        if not all((out / MANIFEST).exists() for out in outs):
            log.warning(
                "no transcoders are stored for the %s tower of %s: training %d takes about %.0f s; they are kept in %s",
                tower,
                model.label,
                len(pairs),
                5 + len(fitting) / 100 + len(pairs) * TRANSCODER_STEPS * BATCH / ROWS_PER_SECOND,
                cache_folder(),
            )
            store = extract(model, fitting, sites, where, "all", seed=seed, texts=said)
            rows = len(store.rows(sites[0], "train"))
            epochs = -(-TRANSCODER_STEPS // max(1, rows // BATCH))
            config = TranscoderConfig(k=ACTIVE, width=width, epochs=epochs, lr=5e-3, batch_size=BATCH, least_share=RARE)
            for (reads, writes), out in zip(pairs, outs, strict=True):
                train_transcoder(store, reads, writes, config, out, seed=seed, tokens="all")
        made += [load_sae(out) for out in outs]
    return sorted(made, key=_order)


def mlps(model: HookedVLM, tower: str) -> list[tuple[str, str]]:
    """(what it reads, what it writes) of the MLP of every block of a tower, in order."""
    found = set(model.sites(f"{tower}.blocks.*"))
    pairs = [
        (f"{tower}.blocks.{layer}.ln2.hook_normalized", f"{tower}.blocks.{layer}.hook_mlp_out")
        for layer in range(sum(name.endswith(".hook_mlp_out") for name in found))
    ]
    return [pair for pair in pairs if found.issuperset(pair)]


def texts_beside(model: HookedVLM, data: ImageData, seed: int) -> list[str] | None:
    """One text for each image, for the language side: what targets are asked with and reports, half and half.

    A generative model's report stands behind its request for one. None where the data has neither targets nor reports,
    or the model has no language side.
    """
    if not model.sites("text.blocks.*"):
        return None
    rng, targets = np.random.default_rng(seed), list(data.targets.values())
    if "text.hook_logits" in model.sites():
        asked = [target.asked() for target in targets]
        start = getattr(model.hf.config, "report_prompt", None) or "write a report"
        written = [None if text is None else f"{start} {text}" for text in data.reports]
    else:
        asked = [text for target in targets for text in (target.positive, target.negative) if text]
        written = list(data.reports)
    if not asked and not all(written):
        return None
    return [text if text and (not asked or rng.random() < 0.5) else str(rng.choice(asked)) for text in written]


def _order(placed: Placed) -> tuple[int, str, int]:
    """Vision before what reads it, then by block."""
    return placed.reads.tower != "vision", placed.reads.tower, placed.reads.layer or 0
