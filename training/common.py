"""What the training scripts share: tokeniser, small configurations, losses, schedule, saving with a card."""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from mechinterp.data.phantom import Phantom
from mechinterp.models.bundles import bundled_folder
from mechinterp.storage import write_json, write_manifest

BUNDLED = Path(__file__).resolve().parents[1] / "mechinterp" / "bundled"
CONTROLS_FOLDER = BUNDLED.with_name("controls")
# grey radiographs: one mean and sd for the three equal channels
MEAN, STD = 0.48, 0.25
Planted = tuple[str, str, float]
SPECIAL = ["<pad>", "<unk>", "<bos>", "<eos>"]


def words(text: str) -> list[str]:
    """The word-level tokens of a text: lower-case words and single punctuation marks."""
    return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower())


def word_tokenizer(vocabulary: Iterable[str], max_length: int, special: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A word-level tokeniser: `<bos> words <eos>`, padded on the right."""
    names = [*SPECIAL, *special]
    ordered = names + sorted({w for v in vocabulary for w in words(v)} - set(names))
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(ordered)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=list(special),
        model_max_length=max_length,
        padding_side="right",
    )


def image_processor(size: int) -> CLIPImageProcessorPil:
    """CLIP preprocessing for square grey images of `size` pixels."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )


def small_clip(
    tokenizer: PreTrainedTokenizerFast, *, size: int, patch: int, width: int, layers: int, text_layers: int, tokens: int
) -> CLIPModel:
    """A CLIP with both towers of one width, so that 1 to 2 M parameters suffice."""
    shared = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": max(2, width // 32),
        "hidden_act": "gelu",
    }
    config = CLIPConfig(
        vision_config={**shared, "num_hidden_layers": layers, "image_size": size, "patch_size": patch},
        text_config={
            **shared,
            "num_hidden_layers": text_layers,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokens,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        projection_dim=width,
        logit_scale_init_value=math.log(10.0),
    )
    return CLIPModel(config)


def render(phantom: Phantom) -> Tensor:
    """uint8 `[n, h, w]`."""
    return torch.from_numpy(phantom.render())


def to_pixels(images: Tensor) -> Tensor:
    """uint8 or [0, 1] float grey `[n, h, w]` to normalised `[n, 3, h, w]`, as the image processor does it."""
    grey = images.float() / 255.0 if images.dtype == torch.uint8 else images
    return ((grey - MEAN) / STD)[:, None].expand(-1, 3, -1, -1)


def same_text(captions: Sequence[str]) -> Tensor:
    """`[batch, batch]` bool: which captions are the same sentence."""
    codes = np.unique(np.array(captions), return_inverse=True)[1]
    return torch.from_numpy(codes[:, None] == codes[None, :])


def contrastive_loss(logits: Tensor, same: Tensor) -> Tensor:
    """Symmetric cross-entropy in which every caption equal to an image's own counts as its caption.

    Source: unified contrastive learning (Yang et al. 2022, eq. 1 to 3). Without this, a batch with two equal captions
    teaches the model to tell equal sentences apart. `logits`, `same`: `[image, text]`.
    """
    weights = same.float()
    rows = -(weights / weights.sum(1, keepdim=True) * F.log_softmax(logits, 1)).sum(1).mean()
    columns = -(weights / weights.sum(0, keepdim=True) * F.log_softmax(logits, 0)).sum(0).mean()
    return (rows + columns) / 2


def aspect_loss(image: Tensor, text: Tensor, scale: Tensor, labels: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mean over aspects of the cross-entropy of an image over that aspect's prompts: zero-shot use as a loss.

    `image [batch, d]` and `text [prompt, d]` are unit vectors; the prompts of aspect a are `sizes[a]` consecutive rows
    of `text`; `labels [batch, aspect]` picks one of them, -1 where unknown.
    """
    logits = scale * image @ text.T
    parts, at, losses = logits.split(list(sizes), dim=1), 0, []
    for at, part in enumerate(parts):
        known = labels[:, at] >= 0
        if known.any():
            losses.append(F.cross_entropy(part[known], labels[known, at]))
    return torch.stack(losses).mean()


def region_loss(logits: Tensor, regions: Tensor) -> Tensor:
    """Balanced cross-entropy of "this lies on this patch"; `logits`, `regions`: `[batch, name, patch]`.

    `regions` is 1 where it lies, 0 where not, -1 where it hardly touches. Each name weighs the same, however many
    patches it covers.
    """
    losses = F.binary_cross_entropy_with_logits(logits, regions.clamp(min=0).float(), reduction="none")
    on, off = (
        ((losses * part).sum((0, 2)) / part.sum((0, 2)).clamp(min=1)).mean() for part in (regions == 1, regions == 0)
    )
    return on + off


def optimiser(model: torch.nn.Module, lr: float, decay: float) -> torch.optim.AdamW:
    """AdamW; biases, norms, positions and the logit scale are not decayed."""
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or "position_embedding" in n]
    matrices = [p for n, p in model.named_parameters() if p.ndim >= 2 and "position_embedding" not in n]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def epochs(n: int, batch: int, steps: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """(step, rows): shuffled epochs for `steps` steps."""
    rng = np.random.default_rng(seed)
    order, at = rng.permutation(n), 0
    for step in range(steps):
        if at + batch > n:
            order, at = rng.permutation(n), 0
        yield step, np.sort(order[at : at + batch])
        at += batch


class Average:
    """Exponential moving average of the weights; what ships is the average."""

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """Move towards the current weights."""
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - self.decay)
            else:
                self.state[name].copy_(value)


def save_clip(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, size: int, out: Path) -> None:
    """Write an ordinary transformers folder: `AutoModel` and `AutoProcessor` open it."""
    out.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(out)
    CLIPProcessor(image_processor=image_processor(size), tokenizer=tokenizer).save_pretrained(out)


CONTROLS = {
    name: {"permuted": f"{name}-permuted", "again": f"{name}-again", "other": f"{name}-deep"}
    for name in ("phantom-clip", "phantom-llava")
}
"""What a bundled model's saliency maps are held beside (`mechinterp iq`)."""


def finish(out: Path, card: str, facts: dict) -> None:
    """Write the model card and the training record, then close the folder."""
    facts |= {"controls": CONTROLS[out.name]} if out.name in CONTROLS else {}
    (out / "README.md").write_text(card)
    write_json(out / "training.json", facts)
    write_manifest(out, {"kind": "model", "name": out.name})
    print(json.dumps(facts, indent=2, default=str))


def arguments(images: int | None, steps: int, test: int) -> argparse.ArgumentParser:
    """What every script that trains on phantoms can be asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shortcut", action="store_true", help="train the twin that is shown the planted shortcut")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=images)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--test", type=int, default=test, help="unseen images on which the model is measured")
    parser.add_argument("--watch", type=int, default=0, help="print validation AUROC every so many steps")
    parser.add_argument("--out", type=Path, default=None)
    return parser


def begin(args: argparse.Namespace, name: str, planted: Planted) -> tuple[Path, dict, dict]:
    """Seed torch. Returns the folder of the model or its twin, the dials of its phantoms, the head of its record."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    shortcut, finding, rho = planted
    script = f"training/{name.replace('-', '_')}.py{' --shortcut' if args.shortcut else ''}"
    facts = {"script": script, "seed": args.seed, "steps": args.steps, "images": args.images, "target": finding}
    facts["planted"] = {"shortcut": shortcut, "finding": finding, "phi": rho} if args.shortcut else None
    folder = args.out or BUNDLED / (f"{name}-shortcut" if args.shortcut else name)
    return folder, {(shortcut, finding): rho} if args.shortcut else {}, facts


def folder_of(name: str) -> Path:
    """The folder of a model that ships, to be explained or as a control."""
    folder = bundled_folder(name)
    if folder is None:
        raise SystemExit(f"no model that ships is called {name}")
    return folder


class Clock:
    """Prints the loss and the rate now and then."""

    def __init__(self, every: float = 20.0):
        self.start = self.last = time.time()
        self.every, self.seen = every, 0

    def tick(self, step: int, steps: int, loss: float, images: int) -> None:
        """Count `images`; print when it is time."""
        self.seen += images
        now = time.time()
        if now - self.last > self.every or step == steps - 1:
            self.last = now
            rate = self.seen / (now - self.start)
            print(f"step {step + 1}/{steps} loss {loss:.3f} {rate:.0f} images/s {now - self.start:.0f} s", flush=True)
