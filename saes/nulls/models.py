"""An encoder that has learnt nothing: the same architecture with its weights drawn again, and an SAE on it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal, assert_never

import torch

from mechinterp.activations import ActivationStore, extract
from mechinterp.activations.layout import Tokens
from mechinterp.models import HookedVLM
from mechinterp.types import Placed
from saes.config import SAEConfig
from saes.train import train_sae

__all__ = ["randomised", "randomised_encoder"]

How = Literal["gaussian", "shuffled"]


def randomised(model: HookedVLM, seed: int = 0, how: How = "gaussian") -> HookedVLM:
    """A copy of a model with every weight tensor drawn again; the model itself is left as it is.

    Args:
        model: any model.
        seed: the same seed gives the same weights.
        how: "gaussian" draws each tensor from a Gaussian with that tensor's own mean and deviation (arXiv:2501.17727);
            "shuffled" permutes the values of each tensor, which also keeps their distribution.
    """
    hf = copy.deepcopy(model.hf)
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.data_ptr() in done or parameter.numel() < 2:
                continue  # a shared tensor is drawn once; a single number (the logit scale) has no distribution
            done.add(parameter.data_ptr())
            values = parameter.detach().float()
            match how:
                case "gaussian":
                    fresh = torch.randn(values.shape, generator=generator) * values.std() + values.mean()
                case "shuffled":
                    fresh = values.flatten()[torch.randperm(values.numel(), generator=generator)].view(values.shape)
                case _:
                    assert_never(how)
            parameter.copy_(fresh)
    return HookedVLM(hf, model.processor, name=f"{model.label}, weights drawn again (seed {seed})")


def randomised_encoder(
    model: HookedVLM,
    data: Any,
    placed: Placed,
    config: SAEConfig,
    out: Path | str,
    tokens: Tokens = "patch",
    seed: int = 0,
) -> tuple[Placed, ActivationStore]:
    """An SAE trained like `placed` on the same images as a randomised copy of the model sees them, and its store.

    What this dictionary finds, it finds in the pixels and the architecture; give it to `scorecard(others=...)`.

    Args:
        model: the model that the dictionary under test reads.
        data: the same images, an `ImageData`.
        placed: the dictionary under test, for its site.
        config: its configuration.
        out: folder; the store goes to `out/store`, the dictionary to `out/sae`. Both are resumed.
        tokens: as in the store of the dictionary under test.
        seed: of the weights and of training.
    """
    store = extract(randomised(model, seed), data, [placed.reads], Path(out) / "store", tokens=tokens)
    return train_sae(store, placed.reads, config, Path(out) / "sae", seed=seed), store
