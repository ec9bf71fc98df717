"""Train `cxr-clip`: a small CLIP from scratch on the training patients of the NIH ChestX-ray14 subset.

    python training/cxr_clip.py --data FOLDER        (about 13 minutes on one core)

1. Captions say findings, view, sex and age; prompts of one aspect (with / without pneumonia, PA / AP, ...) compete.
2. Train on the patients of split "train" only, with affine, grey-level and erasing augmentation.
3. The moving average of the weights ships. Zero-shot AUROC is read once on the patients of split "test".
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from common import (
    BUNDLED,
    Average,
    Clock,
    aspect_loss,
    contrastive_loss,
    epochs,
    finish,
    optimiser,
    same_text,
    save_clip,
    schedule,
    small_clip,
    to_pixels,
    word_tokenizer,
)
from torch import Tensor
from torch.nn import functional as F

from mechinterp.data import ImageData, open_data
from mechinterp.metrics.statistics import PatientBootstrap, auroc, percentile_interval

SIZE, PATCH, WIDTH, LAYERS, TOKENS, BATCH, STEPS, LR = 128, 16, 96, 4, 32, 96, 900, 1e-3
FINDINGS = {
    "Pneumonia": "pneumonia",
    "Infiltration": "infiltration",
    "Atelectasis": "atelectasis",
    "Edema": "pulmonary edema",
    "Effusion": "pleural effusion",
    "Consolidation": "consolidation",
}


def aspects(data: ImageData) -> tuple[list[list[str]], Tensor]:
    """Prompts of each aspect, and `[image, aspect]` which of them holds."""
    prompts, labels = [], []
    for finding, phrase in FINDINGS.items():
        prompts.append([f"a chest x-ray with {phrase}", f"a chest x-ray without {phrase}"])
        labels.append(1 - data.attribute(f"findings:{finding}").values)
    prompts.append(["an ap chest x-ray", "a pa chest x-ray"])
    labels.append(1 - data.attribute("view=AP").values)
    prompts.append(["a chest x-ray of a man", "a chest x-ray of a woman"])
    labels.append(1 - data.attribute("sex=M").values)
    return prompts, torch.from_numpy(np.stack(labels, 1)).long()


def captions(data: ImageData, rng: np.random.Generator) -> list[str]:
    """One full sentence an image: view, sex, and up to three findings in random order."""
    named = {phrase: data.attribute(f"findings:{finding}").values for finding, phrase in FINDINGS.items()}
    ap, man = data.attribute("view=AP").values, data.attribute("sex=M").values
    age = next(a for a in data.attributes if a.column == "age")
    texts = []
    for i in range(len(data)):
        found = [phrase for phrase, values in named.items() if values[i] == 1]
        rng.shuffle(found)
        who = f"{'an old' if age.values[i] else 'a young'} {'man' if man[i] else 'woman'}"
        texts.append(
            f"{'an ap' if ap[i] else 'a pa'} chest x-ray of {who} with {' and '.join(found[:3]) or 'no finding'}"
        )
    return texts


def augment(x: Tensor) -> Tensor:
    """Random affine, contrast, brightness, gamma and erased boxes for `[n, h, w]` in [0, 1]. No flips: sides matter."""
    n, size = len(x), x.shape[-1]
    angle, zoom = (torch.rand(n) - 0.5) * 0.26, 1 + (torch.rand(n) - 0.5) * 0.24
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0], affine[:, 0, 1] = zoom * angle.cos(), -zoom * angle.sin()
    affine[:, 1, 0], affine[:, 1, 1] = zoom * angle.sin(), zoom * angle.cos()
    affine[:, :, 2] = (torch.rand(n, 2) - 0.5) * 0.16
    grid = F.affine_grid(affine, [n, 1, size, size], align_corners=False)
    x = F.grid_sample(x[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
    contrast, shift = 1 + (torch.rand(n, 1, 1) - 0.5) * 0.5, (torch.rand(n, 1, 1) - 0.5) * 0.25
    x = ((x - 0.5) * contrast + 0.5 + shift).clamp(0, 1) ** torch.exp((torch.rand(n, 1, 1) - 0.5) * 0.5)
    for i in torch.nonzero(torch.rand(n) < 0.4)[:, 0]:
        height, width = torch.randint(8, size // 3, (2,)).tolist()
        top, left = int(torch.randint(0, size - height, (1,))), int(torch.randint(0, size - width, (1,)))
        x[i, top : top + height, left : left + width] = torch.rand(1)
    return x


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=BUNDLED / "cxr-clip")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    data = open_data(args.data)
    images = torch.from_numpy(data.pixels(size=SIZE))
    prompts, labels = aspects(data)
    flat, sizes = [p for group in prompts for p in group], [len(group) for group in prompts]
    tokenizer = word_tokenizer(flat + captions(data, rng), TOKENS)
    model = small_clip(
        tokenizer, size=SIZE, patch=PATCH, width=WIDTH, layers=LAYERS, text_layers=2, tokens=TOKENS
    ).train()
    fixed = tokenizer(flat, padding=True, return_tensors="pt", return_token_type_ids=False)
    optimizer, average, clock = optimiser(model, LR, 0.1), Average(model, 0.99), Clock()
    train = np.flatnonzero(data.split == "train")

    for step, picked in epochs(len(train), BATCH, args.steps, args.seed):
        rows = train[picked]
        texts = captions(data.subset(rows), rng)
        full = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        for group in optimizer.param_groups:
            group["lr"] = LR * schedule(step, args.steps, 80)
        pixels = to_pixels(augment(images[rows]))
        image = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        text = F.normalize(model.get_text_features(**fixed).pooler_output, dim=-1)
        caption = F.normalize(model.get_text_features(**full).pooler_output, dim=-1)
        scale = model.logit_scale.exp()
        loss = aspect_loss(image, text, scale, labels[rows], sizes)
        loss = loss + 0.1 * contrastive_loss(scale * image @ caption.T, same_text(texts))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model)
        clock.tick(step, args.steps, loss.item(), len(rows))

    model.load_state_dict(average.state)
    facts = {
        "script": "training/cxr_clip.py",
        "seed": args.seed,
        "steps": args.steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "data_sha256": data.sha256,
        "train_patients": len({data.patients[i] for i in train}),
        "zero_shot": evaluate(model.eval(), tokenizer, data, images, args.seed),
    }
    save_clip(model, tokenizer, SIZE, args.out)
    finish(args.out, CARD.format(**facts, table=table(facts["zero_shot"])), facts)


@torch.no_grad()
def evaluate(model, tokenizer, data: ImageData, images: Tensor, seed: int) -> list[dict]:
    """Zero-shot AUROC on the unseen patients of split "test", with patient-bootstrap intervals."""
    rows = np.flatnonzero(data.split == "test")
    image = F.normalize(model.get_image_features(pixel_values=to_pixels(images[rows])).pooler_output, dim=-1)
    patients = PatientBootstrap.of([data.patients[i] for i in rows], seed=seed)
    prompts, labels = aspects(data)
    out = []
    for group, truth in zip(prompts, labels[rows].T, strict=True):
        tokens = tokenizer(group, padding=True, return_tensors="pt", return_token_type_ids=False)
        text = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
        score, y = (image @ (text[0] - text[1])).double().numpy(), (truth == 0).double().numpy()
        interval = percentile_interval(patients.auroc(score, y))
        out.append({"prompt": group[0], "n": len(rows), "auroc": auroc(score, y), "ci95": interval})
    return out


def table(rows: list[dict]) -> str:
    """The evaluation as Markdown."""
    lines = [
        f"| {r['prompt']} | {r['n']} | {r['auroc']:.3f} | {r['ci95'][0]:.3f} to {r['ci95'][1]:.3f} |" for r in rows
    ]
    return "\n".join(["| prompt | images | AUROC | 95 % interval |", "| --- | --- | --- | --- |", *lines])


CARD = """---
license: apache-2.0
tags: [clip, chest-x-ray, research-only]
---
# cxr-clip

A small CLIP ({parameters} parameters, 128 px) trained from scratch on {train_patients} patients of a subset of NIH
ChestX-ray14, with captions made from findings, view, sex and age. It exists so that the toolkit can be tried on real
radiographs. It is not a diagnostic model.

- Script: `python training/cxr_clip.py --data FOLDER`, seed {seed}, {steps} steps.
- Data: NIH Clinical Center, ChestX-ray14 (https://nihcc.app.box.com/v/ChestXray-NIHCC); cite Wang et al., CVPR 2017.
  The images are not part of this project. Labels are text-mined and noisy; the subset is enriched for pneumonia.
- Train, validation and test are disjoint by patient (60 / 15 / 25 %).

Zero-shot AUROC on the test patients, 95 % patient-bootstrap intervals:

{table}
"""


if __name__ == "__main__":
    main()
