"""Open a model folder, or say exactly why not.

1. Find the folder: a bundled name, a folder, or a hub id pinned to a commit.
2. Read config.json; refuse remote code, unknown families and sizes that the weight files cannot fill.
3. Check the safetensors headers against the model that the config describes, built without memory (meta device).
4. Load; refuse weights that are unused, uninitialised, of another shape, or not finite.
5. Read the tokenizer and the preprocessor that belong to it.

Whatever a damaged file makes a library raise comes out as ModelError with the file in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mechinterp.errors import MechInterpError, ModelError
from mechinterp.models.bundles import bundled, bundled_folder
from mechinterp.models.preprocess import Preprocessor
from mechinterp.models.tables import Dual, Family, Generative, families
from mechinterp.models.weights import check_config_sizes, check_fit, weight_shapes

__all__ = ["Processor", "load"]

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_MAX_JSON = 64 * 2**20
_COMPUTED = ("position_ids", "inv_freq")  # buffers that old checkpoints stored and that the model computes itself


@dataclass(frozen=True)
class Processor:
    """The preprocessing and tokenizer that belong to a model (`tokenizer` is None for a vision model)."""

    image_processor: Preprocessor
    tokenizer: Any = None


def load(
    model: str | Path, *, revision: str | None = None, dtype: torch.dtype = torch.float32, allow_moving: bool = False
) -> tuple[Any, Processor]:
    """The transformers model (eval mode, weights frozen) and its processor.

    Only safetensors are read and no code of the folder runs. `revision` is for hub ids and must be a full commit hash,
    unless `allow_moving`. Raises ModelError, with the file and what to do, for everything that is not in order.
    """
    folder = _folder(model, revision, allow_moving)
    config = read_config(folder)
    family = _family(config, folder)
    shapes = weight_shapes(folder)
    check_config_sizes(config, shapes, folder)
    with _quiet():
        with guard(folder / "config.json", "the config does not describe a model of its family"):
            built = _architecture(family)
            parsed = built.config_class.from_pretrained(folder, local_files_only=True)
            parsed._attn_implementation = "sdpa"
            check_fit(built, parsed, shapes, folder)
        hf = _load_weights(built, parsed, folder, dtype)
        preprocessor = _preprocessor(folder)
        tokenizer = _tokenizer(folder, hf) if isinstance(family.head, Dual | Generative) else None
    return hf, Processor(preprocessor, tokenizer)


@contextmanager
def guard(where: Path | str, hint: str) -> Iterator[None]:
    """Turn whatever a library raises on a damaged file into ModelError."""
    try:
        yield
    except MechInterpError:
        raise
    except BaseException as error:
        # a panic inside a Rust library (tokenizers, safetensors) arrives as a BaseException of that name
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())[:300]
        raise ModelError(f"{type(error).__name__}: {said}", where=str(where), hint=hint) from error


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON object from the folder. Raises ModelError when it is missing, damaged, or asks for remote code."""
    path = folder / name
    if not path.is_file():
        raise ModelError("is missing", where=str(path), hint="a model folder holds config.json, model.safetensors, ...")
    with guard(path, "the file is damaged: fetch it again"):
        if path.stat().st_size > _MAX_JSON:
            raise ModelError(f"is {path.stat().st_size} bytes long", where=str(path))
        read = json.loads(path.read_bytes())
    if not isinstance(read, dict):
        raise ModelError("is not a JSON object", where=str(path), hint="the file is damaged: fetch it again")
    if "auto_map" in read:
        raise ModelError(
            "asks to run code from the folder (auto_map)", where=str(path), hint="remote code is never run here"
        )
    return read


def _folder(model: str | Path, revision: str | None, allow_moving: bool) -> Path:
    shipped = bundled_folder(str(model))
    if shipped is not None:
        return shipped
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) or str(model).startswith((".", "/")):
        raise ModelError(
            "is no model folder", where=str(model), hint=f"give a folder, a hub id, or one of {', '.join(bundled())}"
        )
    if not allow_moving and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise ModelError(
            f"revision {revision!r} of a hub id can move",
            where=str(model),
            hint="give the full commit hash as revision, or allow_moving=True",
        )
    with guard(str(model), "it is neither a folder here nor to be had from the hub"):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(model), revision=revision, allow_patterns=_HUB_FILES))


def _family(config: dict[str, Any], folder: Path) -> Family:
    architectures = config.get("architectures") or []
    for family in families():
        if config.get("model_type") == family.model_type and architectures in ([family.architecture], []):
            if "quantization_config" in config:
                raise ModelError(
                    "is quantised", where=str(folder / "config.json"), hint="open the full-precision model"
                )
            return family
    raise ModelError(
        f"model_type {config.get('model_type')!r}, architectures {architectures!r} belong to no known family",
        where=str(folder / "config.json"),
        hint="known: " + ", ".join(f"{f.model_type}/{f.architecture}" for f in families()),
    )


def _architecture(family: Family) -> Any:
    import transformers

    return getattr(transformers, family.architecture)


def _load_weights(built: Any, config: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Steps 4: load, and account for every weight."""
    with guard(folder, "the weights do not load"):
        hf, info = built.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    said = {
        "are not in the files and would be random": info["missing_keys"],
        "are in the files but not in the model": [k for k in info["unexpected_keys"] if not k.endswith(_COMPUTED)],
        "have another shape in the files": [str(k) for k in info["mismatched_keys"]],
        "could not be read": info["error_msgs"],
    }
    for what, keys in said.items():
        if keys:
            shown = ", ".join(sorted(map(str, keys))[:3])
            raise ModelError(
                f"{len(keys)} weights {what}: {shown}",
                where=str(folder),
                hint="the files belong to another architecture or version",
            )
    for name, tensor in hf.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{name} holds a NaN or infinity", where=str(folder), hint="the weights are damaged")
    return hf.eval().requires_grad_(False)


def _preprocessor(folder: Path) -> Preprocessor:
    """From preprocessor_config.json, or the image_processor part of processor_config.json."""
    name = "preprocessor_config.json"
    if not (folder / name).is_file() and (folder / "processor_config.json").is_file():
        found = read_config(folder, "processor_config.json").get("image_processor")
        if isinstance(found, dict):
            return Preprocessor.from_config(found, str(folder / "processor_config.json"))
    if not (folder / name).is_file():
        raise ModelError(
            "is missing",
            where=str(folder / name),
            hint="a model is only whole with its preprocessing: fetch the file from where the model came",
        )
    with guard(folder / name, "the file is damaged: fetch it again"):
        return Preprocessor.from_config(read_config(folder, name), str(folder / name))


def _tokenizer(folder: Path, hf: Any) -> Any:
    for name in ("tokenizer_config.json", "tokenizer.json"):
        if (folder / name).is_file():
            read_config(folder, name)
    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
    ):
        raise ModelError("is missing", where=str(folder / "tokenizer.json"), hint="fetch it from where the model came")
    with guard(folder / "tokenizer.json", "the tokenizer files are damaged or of an unknown kind: fetch them again"):
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not getattr(tokenizer, "chat_template", None) and (folder / "chat_template.json").is_file():
            tokenizer.chat_template = read_config(folder, "chat_template.json").get("chat_template")
        tokenizer("a chest x-ray")
        highest, rows = max(tokenizer.get_vocab().values()), hf.config.text_config.vocab_size
    image = getattr(hf.config, "image_token_id", None)
    if highest >= rows and highest != image:
        raise ModelError(
            f"gives tokens up to {highest} to a model that knows {rows}",
            where=str(folder / "tokenizer.json"),
            hint="the tokenizer belongs to another model",
        )
    return tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing bars and reports: what matters is raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(50)  # critical: nothing is logged at that level
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
