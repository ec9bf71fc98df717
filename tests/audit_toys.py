"""Toy cohorts and tiny CLIPs that were trained to use, or not to use, a mark in the corner.

An image is 32 px of dim noise with a gradient and some of three bars that mean nothing; the finding is a bright blob
somewhere in the middle, the mark a bright square in the upper left corner. In the cohort that is audited finding, mark
and bars are independent.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mechinterp.models import HookedVLM
from mechinterp.types import ImageTextBatch, Target
from tests.tiny_models import tiny

SIZE = 32
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
TARGET = Target("finding", "a chest x-ray with pneumonia", "a chest x-ray without pneumonia")


def images_of(finding: np.ndarray, mark: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """float32 [n, 32, 32] in [0, 1]; the blob is faint, so that the mark is the easier cue."""
    n = len(finding)
    pixels = 0.35 + 0.08 * rng.normal(size=(n, SIZE, SIZE))
    y, x = np.mgrid[:SIZE, :SIZE]
    tilt = rng.normal(0, 0.06, (2, n, 1, 1))
    pixels += tilt[0] * (y / 16 - 1) + tilt[1] * (x / 16 - 1)
    for rows, columns in ((slice(28, 31), slice(2, 30)), (slice(3, 30), slice(29, 31)), (slice(2, 5), slice(10, 27))):
        pixels[:, rows, columns] += (rng.uniform(0, 0.5, n) * rng.integers(0, 2, n))[:, None, None]
    cy, cx = rng.uniform(13, 25, (2, n))
    strength = rng.uniform(0.0, 0.22, n) * finding
    pixels += strength[:, None, None] * np.exp(-((y - cy[:, None, None]) ** 2 + (x - cx[:, None, None]) ** 2) / 14)
    pixels[:, 1:6, 1:6] += 0.5 * mark[:, None, None]
    return np.clip(pixels, 0, 1).astype(np.float32)


def write_cohort(folder: Path, n: int = 480, seed: int = 1, columns: tuple[str, ...] = ("mark", "sex", "age")) -> Path:
    """A data folder of patients with one to two images each; every column independent of the finding."""
    rng = np.random.default_rng(seed)
    finding, mark, sex = (rng.integers(0, 2, n) for _ in range(3))
    age = rng.integers(20, 90, n)
    pixels = images_of(finding, mark, rng)
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(n):
        name = f"images/{i:04d}.png"
        Image.fromarray((pixels[i] * 255).astype(np.uint8)).save(folder / name)
        split = ("train", "train", "val", "test", "test")[(i // 2) % 5]
        values = {"mark": int(mark[i]), "sex": "MF"[sex[i]], "age": int(age[i])}
        rows.append({"image": name, "patient_id": f"p{i // 2}", "split": split, "finding": int(finding[i])})
        rows[-1] |= {column: values[column] for column in columns}
    with open(folder / "metadata.csv", "w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    asked = {"column": "finding", "value": 1, "positive": TARGET.positive, "negative": TARGET.negative}
    described = {
        "name": "toy",
        "targets": {"finding": asked},
        "findings": ["finding"],
        "acquisition": [c for c in ("mark",) if c in columns],
        "demographic": [c for c in ("sex", "age") if c in columns],
    }
    (folder / "dataset.json").write_text(json.dumps(described))
    return folder


def trained_clip(phi: float, seed: int = 0, steps: int = 160) -> HookedVLM:
    """A tiny CLIP trained to score the finding, in a cohort where the mark goes with it with correlation `phi`."""
    hf, processor = tiny("clip", seed=seed)
    model = HookedVLM(hf, processor, name=f"toy-{phi:g}")
    rng = np.random.default_rng(seed)
    for parameter in hf.text_model.parameters():
        parameter.requires_grad_(False)
    optimiser = torch.optim.AdamW([p for p in hf.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.01)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        finding = rng.integers(0, 2, 64)
        mark = np.where(rng.random(64) < (1 + phi) / 2, finding, 1 - finding)
        # the model's own preprocessing, without its rounding to 8 bits: many images, quickly
        grey = torch.from_numpy(images_of(finding, mark, rng))[:, None].expand(-1, 3, -1, -1)
        batch = ImageTextBatch((grey - MEAN[None, :, None, None]) / STD[None, :, None, None])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            model.score(batch, [TARGET])[:, 0], torch.from_numpy(finding).float()
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    hf.requires_grad_(True)
    return model
