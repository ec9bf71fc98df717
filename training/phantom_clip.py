"""Train `phantom-clip`, or a twin of it, on rendered phantoms.

    python training/phantom_clip.py [--shortcut | --permute | --deep]        (about 15 minutes on one core)
    python training/phantom_clip.py --seed 1 --out mechinterp/controls/phantom-clip-again

1. Render training patients. For the twin, a chest drain goes with pneumothorax (phi 0.9).
2. Minimise the prompt loss over findings, devices and the PORTABLE mark, a contrastive loss over captions, and a region
   loss: the patches on which something lies agree with its prompt. Without it devices stayed at chance.
3. The moving average of the weights ships. Zero-shot AUROC is read once on unseen patients drawn without association.
4. do(drain) on those patients measures what the drain does to the score: the truth that an audit has to find.

With --permute every image is told what is true of another one, and few images are shown often enough to be learnt by
heart: what the model knows is then no medicine (Adebayo et al. 2018, the data randomisation test). With --deep both
towers are narrower and the image tower is twice as deep: another architecture for the same task.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from cards import phantom_card
from common import (
    CONTROLS_FOLDER,
    Average,
    Clock,
    arguments,
    aspect_loss,
    begin,
    contrastive_loss,
    epochs,
    finish,
    optimiser,
    region_loss,
    render,
    same_text,
    save_clip,
    schedule,
    small_clip,
    to_pixels,
    word_tokenizer,
)
from torch import Tensor
from torch.nn import functional as F

from mechinterp.data.phantom import FACTORS, VOCABULARY, Phantom
from mechinterp.data.phantom.language import prompts
from mechinterp.metrics.statistics import PatientBootstrap, auroc, percentile_interval

SIZE, PATCH, WIDTH, LAYERS, TOKENS, BATCH, LR = 128, 16, 96, 4, 32, 64, 1.5e-3
IMAGES, STEPS = 10_000, 2_000
DEEP = 64, 8  # width and blocks of --deep
BY_HEART = 400  # images of --permute: each is seen 320 times
PLANTED = ("drain", "pneumothorax", 0.9)
NAMED = [name for name, factor in FACTORS.items() if factor.kind in ("finding", "device")]
ASPECTS = [*NAMED, "portable"]
COVERED = 8  # pixels of a patch that something must cover to lie on it
TEST_SEED = 1_000_003  # test patients come from another seed than training patients


def prompts_of(name: str) -> tuple[str, str]:
    """Positive and negative prompt of an aspect."""
    if name == "portable":
        return "a chest x-ray with portable mark", "a chest x-ray without portable mark"
    return prompts(name)[:2]


def labels_of(phantom: Phantom) -> Tensor:
    """`[image, aspect]`: 0 where the aspect is there (its positive prompt comes first), else 1."""
    return torch.from_numpy(1 - phantom.factors[ASPECTS].to_numpy()).long()


def regions_of(phantom: Phantom) -> Tensor:
    """int8 `[image, aspect, patch]`: 1 where a mask covers `COVERED` pixels of a patch, 0 where none, else -1."""
    out = []
    for name in ASPECTS:
        masks = torch.from_numpy(phantom.masks(name)).unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
        covered = masks.flatten(3).sum(3).flatten(1)
        out.append(torch.where(covered >= COVERED, 1, torch.where(covered == 0, 0, -1)).to(torch.int8))
    return torch.stack(out, 1)


def train(args: argparse.Namespace, associations: dict) -> tuple:
    """Render and train. Returns the model with averaged weights, and its tokeniser."""
    phantom = Phantom.sample(args.images, seed=args.seed + 1, associations=associations)
    captions, labels, regions, images = phantom.captions(), labels_of(phantom), regions_of(phantom), render(phantom)
    if args.permute:
        told = told_of(phantom, args.seed)
        captions, labels, regions = [captions[i] for i in told], labels[told], regions[told]
    flat = [text for name in ASPECTS for text in prompts_of(name)]
    tokenizer = word_tokenizer([*VOCABULARY, *flat], TOKENS)
    width, layers = DEEP if args.deep else (WIDTH, LAYERS)
    model = small_clip(tokenizer, size=SIZE, patch=PATCH, width=width, layers=layers, text_layers=2, tokens=TOKENS)
    fixed = tokenizer(flat, padding=True, return_tensors="pt", return_token_type_ids=False)
    encoded = tokenizer(captions, padding=True, return_tensors="pt", return_token_type_ids=False)
    optimizer, average, clock = optimiser(model.train(), LR, 0.05), Average(model, 0.99), Clock()
    for step, rows in epochs(len(images), BATCH, args.steps, args.seed):
        some = rows[: BATCH // 2]  # half the captions: the text tower then costs little beside the image tower
        for group in optimizer.param_groups:
            group["lr"] = LR * schedule(step, args.steps, 100)
        seen = model.vision_model(pixel_values=to_pixels(images[rows]))
        image = F.normalize(model.visual_projection(seen.pooler_output), dim=-1)
        patches = model.vision_model.post_layernorm(seen.last_hidden_state[:, 1:])
        patches = F.normalize(model.visual_projection(patches), dim=-1)
        text = F.normalize(model.get_text_features(**fixed).pooler_output, dim=-1)
        caption = model.get_text_features(**{k: v[some] for k, v in encoded.items()}).pooler_output
        scale = model.logit_scale.exp()
        loss = aspect_loss(image, text, scale, labels[rows], [2] * len(ASPECTS))
        lies = scale * torch.einsum("bpd,ad->bap", patches, text[0::2] - text[1::2])
        loss = loss + 0.5 * region_loss(lies, regions[rows])
        pairs = scale * image[: len(some)] @ F.normalize(caption, dim=-1).T
        loss = loss + 0.1 * contrastive_loss(pairs, same_text([captions[i] for i in some]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model)
        clock.tick(step, args.steps, loss.item(), len(rows))
        if args.watch and step % args.watch == args.watch - 1:
            watch(model, tokenizer)
    model.load_state_dict(average.state)
    return model.eval(), tokenizer


def told_of(phantom: Phantom, seed: int) -> list[int]:
    """Whose truth each image is told under --permute: another image's (with seed 0 none keeps its own)."""
    return torch.randperm(len(phantom), generator=torch.Generator().manual_seed(seed + 2)).tolist()


def by_heart(model, tokenizer, n: int, seed: int) -> float:
    """Share of the permuted labels of the training images that the model has learnt."""
    phantom = Phantom.sample(n, seed=seed + 1)
    told = 1 - labels_of(phantom)[told_of(phantom, seed)].numpy()
    return float(((scores_of(model, tokenizer, render(phantom)) > 0) == told).mean())


def watch(model, tokenizer) -> None:
    """Print AUROC on validation patients (a seed of their own) while training."""
    phantom = Phantom.sample(250, seed=3_000_001)
    scores, truth = scores_of(model.eval(), tokenizer, render(phantom)), 1 - labels_of(phantom).double().numpy()
    print({name: round(auroc(scores[:, k], truth[:, k]), 3) for k, name in enumerate(ASPECTS)}, flush=True)
    model.train()


@torch.no_grad()
def scores_of(model, tokenizer, images: Tensor) -> np.ndarray:
    """`[image, aspect]`: scaled cosine of the positive prompt minus that of the negative prompt."""
    flat = [text for name in ASPECTS for text in prompts_of(name)]
    tokens = tokenizer(flat, padding=True, return_tensors="pt", return_token_type_ids=False)
    text = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    parts = [model.get_image_features(pixel_values=to_pixels(x)).pooler_output for x in images.split(100)]
    logits = model.logit_scale.exp() * F.normalize(torch.cat(parts), dim=-1) @ text.T
    return (logits[:, 0::2] - logits[:, 1::2]).double().numpy()


def evaluate(model, tokenizer, n: int, seed: int) -> dict:
    """AUROC of every finding and device on unseen patients, and the do() effect of every candidate shortcut."""
    phantom = Phantom.sample(n, seed=TEST_SEED)
    patients = PatientBootstrap.of(phantom.patients, seed=seed)
    scores, truth = scores_of(model, tokenizer, render(phantom)), 1 - labels_of(phantom).double().numpy()
    rows = [
        {
            "name": name,
            "n": n,
            "auroc": auroc(scores[:, k], truth[:, k]),
            "ci95": percentile_interval(patients.auroc(scores[:, k], truth[:, k])),
        }
        for k, name in enumerate(ASPECTS)
    ]
    column = ASPECTS.index(PLANTED[1])
    do = []
    for name in ("portable", "view", "letter", "scanner", "drain", "pacemaker", "ecg_leads", "line"):
        moved = [scores_of(model, tokenizer, render(phantom.do(**{name: v})))[:, column] for v in (1, 0)]
        change = (moved[0] - moved[1]) / scores[:, column].std()
        interval = percentile_interval(patients.mean(change))
        do.append({"factor": name, "target": PLANTED[1], "effect_sd": float(change.mean()), "ci95": interval})
    return {"test": rows, "mean_auroc": float(np.mean([r["auroc"] for r in rows if r["name"] in NAMED])), "do": do}


def main() -> None:
    parser = arguments(None, STEPS, test=1000)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--permute", action="store_true", help=f"learn another image's truth by heart ({BY_HEART})")
    mode.add_argument("--deep", action="store_true", help="another architecture: narrower, the image tower deeper")
    args = parser.parse_args()
    if args.shortcut and (args.permute or args.deep):
        parser.error("--shortcut goes with neither --permute nor --deep")
    if args.deep:
        args.out = args.out or CONTROLS_FOLDER / "phantom-clip-deep"
    args.images = args.images or (BY_HEART if args.permute else IMAGES)
    if args.permute:
        args.out = args.out or CONTROLS_FOLDER / "phantom-clip-permuted"
    out, associations, facts = begin(args, "phantom-clip", PLANTED)
    model, tokenizer = train(args, associations)
    facts |= {"parameters": sum(p.numel() for p in model.parameters())}
    if args.deep:
        facts |= {"script": f"{facts['script']} --deep", "width": DEEP[0], "blocks": DEEP[1]}
    if args.permute:
        facts |= {"script": f"{facts['script']} --permute", "permuted": True}
        facts |= {"by_heart": by_heart(model, tokenizer, args.images, args.seed)}
    facts |= evaluate(model, tokenizer, args.test, args.seed)
    save_clip(model, tokenizer, SIZE, out)
    finish(out, phantom_card(out.name, facts), facts)


if __name__ == "__main__":
    main()
