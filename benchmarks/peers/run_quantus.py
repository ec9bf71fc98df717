"""Quantus's scores of given cases. Run by the interpreter of an environment of its own.

    PYTHON run_quantus.py CASES.safetensors

CASES: `x`, `maps`, `maps_b` [case, 1, side, side], `masks` of the same shape (0 or 1), the network `w1 w2` (tanh
between them), and `subsets` [run, case, size]: what FaithfulnessCorrelation removes, in place of its own draws. Prints
a line of JSON: a list of one number per case for each metric.
"""

from __future__ import annotations

import json
import sys
import warnings

import numpy as np
import quantus
import torch
from quantus.functions import similarity_func
from safetensors.numpy import load_file

PLAIN = {"abs": False, "normalise": False, "return_aggregate": False, "disable_warnings": True}


class Network(torch.nn.Module):
    def __init__(self, w1: np.ndarray, w2: np.ndarray):
        super().__init__()
        self.w1, self.w2 = torch.from_numpy(w1), torch.from_numpy(w2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.flatten(1).double() @ self.w1) @ self.w2


def main() -> None:
    warnings.simplefilter("ignore")
    cases = load_file(sys.argv[1])
    x, maps, masks = cases["x"], cases["maps"], cases["masks"].astype(bool)
    model = Network(cases["w1"], cases["w2"]).eval()
    y = np.zeros(len(x), int)
    common = {"model": model, "x_batch": x, "y_batch": y, "a_batch": maps, "device": "cpu", "softmax": False}
    found = {}
    draws = iter(cases["subsets"].reshape(-1, cases["subsets"].shape[-1]))
    own, np.random.choice = np.random.choice, lambda *a, **k: next(draws)
    try:
        correlation = quantus.FaithfulnessCorrelation(
            nr_runs=len(cases["subsets"]), subset_size=cases["subsets"].shape[-1], perturb_baseline=0.0, **PLAIN
        )
        found["faithfulness_correlation"] = correlation(**common, batch_size=len(x))
    finally:
        np.random.choice = own
    flipping = quantus.PixelFlipping(features_in_step=1, perturb_baseline=0.0, **PLAIN)
    found["pixel_flipping"] = np.mean(flipping(**common, batch_size=len(x)), axis=1)
    found["pointing_game"] = quantus.PointingGame(**PLAIN)(**common, s_batch=masks)
    found["top_k"] = quantus.RelevanceRankAccuracy(**PLAIN)(**common, s_batch=masks)
    positive = common | {"a_batch": np.clip(maps, 0, None)}
    found["mass"] = quantus.RelevanceMassAccuracy(**PLAIN)(**positive, s_batch=masks)
    other = cases["maps_b"]
    found["spearman"] = [
        similarity_func.correlation_spearman(a.ravel(), b.ravel()) for a, b in zip(maps, other, strict=True)
    ]
    unit = [
        [(np.abs(m) - np.abs(m).min()) / np.ptp(np.abs(m)) for m in (a[0], b[0])]
        for a, b in zip(maps, other, strict=True)
    ]
    found["ssim"] = [skimage_ssim(a, b) for a, b in unit]
    print(json.dumps({k: np.asarray(v, float).tolist() for k, v in found.items()}))


def skimage_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """What Quantus's `ssim` calls, with the range of the values given (Quantus takes that of the first map)."""
    from skimage.metrics import structural_similarity

    return float(structural_similarity(a, b, data_range=1.0))


if __name__ == "__main__":
    main()
