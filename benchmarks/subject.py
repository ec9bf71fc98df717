"""What is measured: the bundled dual encoders with their dictionaries, and a larger random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mechinterp.audit.dictionary import default_site
from mechinterp.models import HookedVLM
from mechinterp.types import Placed, Target
from saes import load_sae
from saes.dictionary import SparseDictionary, TopK

BUNDLED = Path(__file__).parent.parent / "mechinterp" / "bundled"
SIZE, PATCH, LAYERS, D_MODEL, WIDTH, K = 128, 16, 6, 128, 1024, 16
NAMES = ("phantom-clip", "cxr-clip")
RANDOM = f"random CLIP, {LAYERS} blocks of {D_MODEL}"
TARGETS = [
    Target(name, f"a chest x-ray with {name}", f"a chest x-ray without {name}")
    for name in ("effusion", "pneumothorax", "consolidation", "cardiomegaly")
]


def images(n: int, seed: int = 0) -> np.ndarray:
    """Phantom radiographs, float32 `[n, 128, 128]` in [0, 1]."""
    from mechinterp.data.phantom import Phantom

    return Phantom.sample(n, seed=seed, size=SIZE).render().astype(np.float32) / 255


def write_folder(folder: Path, n: int, seed: int = 0) -> None:
    """A phantom data folder on disk."""
    from mechinterp.data.phantom import Phantom

    Phantom.sample(n, seed=seed, size=SIZE).write(folder, masks=False)


def model(seed: int = 0) -> tuple[HookedVLM, str]:
    """The first bundled model that is there, else a random one; and which it is."""
    for name in NAMES:
        if (BUNDLED / name / "config.json").exists():
            return HookedVLM.from_pretrained(str(BUNDLED / name)), name
    return HookedVLM(*random_clip(seed)), RANDOM


def subjects(pixels: np.ndarray) -> list[tuple[HookedVLM, Placed, str]]:
    """Model, dictionary, and a word on them: what is bundled, then a larger random model with two sampled ones."""
    found: list[tuple[HookedVLM, Placed, str]] = []
    for name in NAMES:
        model = HookedVLM.from_pretrained(str(BUNDLED / name))
        found.append((model, load_sae(BUNDLED / name / "dictionaries" / default_site(model)), name))
    clip = HookedVLM(*random_clip(0))
    for layer in (LAYERS - 2, LAYERS - 3):
        site = f"vision.blocks.{layer}.hook_resid_post"
        found.append((clip, Placed.sae(sampled_dictionary(clip, site, pixels[:16]), site), RANDOM))
    return found


def random_clip(seed: int) -> tuple[Any, Any]:
    """A CLIPModel with random weights, and a processor."""
    from types import SimpleNamespace

    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = sorted({word for t in TARGETS for word in f"{t.positive} {t.negative}".split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "<unk>", *words, "</s>"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", len(vocabulary) - 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    shape = {"hidden_size": D_MODEL, "intermediate_size": 4 * D_MODEL, "num_attention_heads": 4}
    vision = {**shape, "num_hidden_layers": LAYERS, "image_size": SIZE, "patch_size": PATCH}
    text = {**shape, "num_hidden_layers": 2, "vocab_size": len(vocabulary), "max_position_embeddings": 32}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": len(vocabulary) - 1}
    torch.manual_seed(seed)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=D_MODEL))
    square = {"height": SIZE, "width": SIZE}
    pixels = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=square)
    return clip.eval(), SimpleNamespace(image_processor=pixels, tokenizer=tokenizer)


@torch.no_grad()
def sampled_dictionary(vlm: HookedVLM, site: str, pixels: np.ndarray, seed: int = 0) -> SparseDictionary:
    """TopK over `WIDTH` directions between two token activations, so that features differ in when they fire."""
    _, cache = vlm.run_with_cache(vlm.preprocess(pixels), names_filter=site)
    rows = cache[site].flatten(0, 1)
    generator = torch.Generator().manual_seed(seed)
    mean = rows.mean(0)
    one, other = torch.randint(len(rows), (2, WIDTH), generator=generator)
    directions = rows[one] - rows[other]
    directions = directions / directions.norm(dim=1, keepdim=True).clamp(min=1e-9)
    return SparseDictionary(directions.T.clone(), directions.clone(), torch.zeros(WIDTH), mean, TopK(K))
