"""Measure explainers of a function of rows: perturb, explain again, remove columns one by one."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.explain.tabular import Function, TabularExplainer, effects
from mechinterp.metrics.iq.scores import Measurement

__all__ = ["measure_rows", "perturbed_rows", "seed_of"]

DRAWS, NOISE, FLOOR = 30, 0.05, 0.05


def perturbed_rows(
    x: Float[Tensor, "row column"], draws: int = DRAWS, noise: float = NOISE, floor: float = FLOOR, seed: int = 0
) -> Float[Tensor, "row draw column"]:
    """x + noise * max(|x|, floor) * N(0, 1): the perturbation of `iq-reading-1`."""
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(len(x), draws, x.shape[1], generator=generator, dtype=x.dtype)
    return x[:, None] + noise * x.abs().clamp(min=floor)[:, None] * eps


def seed_of(name: str, seed: int) -> int:
    """The seed of a method's own draws: of its name and `seed`, whichever other methods stand beside it."""
    return 1_000_003 * seed + zlib.crc32(name.encode())


def measure_rows(
    f: Function,
    explainers: Mapping[str, TabularExplainer],
    x: Float[Tensor, "row column"],
    reference: Float[Tensor, " column"],
    draws: int = DRAWS,
    noise: float = NOISE,
    seed: int = 0,
) -> dict[str, Measurement]:
    """A Measurement for each explainer, on the same rows, draws and reference; one call of it explains all inputs."""
    around = perturbed_rows(x, draws, noise, seed=seed)
    both = torch.cat([x[:, None], around], dim=1)  # [row, 1 + draw, column]: x stands first
    flat = both.flatten(0, 1)
    with torch.no_grad():
        output = _numpy(f(flat)).reshape(len(x), -1)
    effect = _numpy(effects(f, both, reference))
    found, eps = {}, torch.finfo(x.dtype).eps
    for name, explain in explainers.items():
        generator = torch.Generator().manual_seed(seed_of(name, seed))
        a = _numpy(explain(f, flat, reference, generator)).reshape(effect.shape)
        found[name] = Measurement(a[:, 0], output[:, 0], a[:, 1:], output[:, 1:], effect[:, 0], effect[:, 1:], eps=eps)
    return found


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().double().cpu().numpy()
