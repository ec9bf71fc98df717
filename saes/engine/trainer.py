"""A training run in memory: weights, Adam, the schedule, and which latents have not fired for how long.

What sae-lens's SAETrainer does in a step (gradient norm clipped to 1, Adam with betas 0.9 and 0.999, linear warm-up
and decay of the learning rate), without autograd. It holds no data and writes no file.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import zip_longest
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saes.config import BatchTopKConfig, GatedConfig, JumpReLUConfig, MatryoshkaConfig, TrainConfig, TranscoderConfig
from saes.engine.select import Encoder
from saes.engine.step import gradients
from saes.engine.team import around, team
from saes.engine.weights import Weights, initial

__all__ = ["Trainer"]

MAX_NORM = 1.0


class Trainer:
    """One dictionary in training.

    Args:
        config: what to train.
        d_in: width of the rows that are read.
        b_dec: where `b_dec` begins, `[d_out]`: the mean of the rows that are written.
        steps: how many there will be; the schedules depend on it.
        seed: of the weights.
        device: where to train.
        weights: to begin with others than the seed's.
    """

    def __init__(
        self,
        config: TrainConfig,
        d_in: int,
        b_dec: Float[Tensor, " d_out"],
        steps: int,
        seed: int = 0,
        device: str | torch.device = "cpu",
        weights: Weights | None = None,
    ):
        self.config, self.steps, self.done = config, steps, 0
        begin = initial(config, d_in, b_dec, seed) if weights is None else weights
        self.weights = {name: tensor.detach().to(device).contiguous() for name, tensor in begin.items()}
        self.since_fired = torch.zeros(config.width, dtype=torch.int64, device=device)
        self.threshold = 0.0
        self._encoder = Encoder()
        self._moments = {
            f"{moment}.{name}": torch.zeros_like(weight)
            for moment in ("exp_avg", "exp_avg_sq")
            for name, weight in self.weights.items()
        }

    @property
    def dead(self) -> Bool[Tensor, " latent"]:
        """Latents that have not fired for more than `dead_after` steps."""
        return self.since_fired > self.config.dead_after

    @torch.no_grad()
    def step(self, x: Float[Tensor, "row d_in"], y: Float[Tensor, "row d_out"] | None = None) -> float:
        """Train on a batch; returns its loss.

        Raises FloatingPointError, with the weights as they were, when the loss or a gradient is not finite.
        """
        gated = isinstance(self.config, JumpReLUConfig | GatedConfig)  # whose operations are large at first
        with nullcontext() if gated else team():
            return self._step(x, x if y is None else y)

    def _step(self, x: Float[Tensor, "row d_in"], y: Float[Tensor, "row d_out"]) -> float:
        if "threshold" in self.weights:
            self.weights["threshold"].clamp_(min=0.0)
        found = gradients(self.config, self.weights, x, y, self.dead, self._warm(), self._encoder)
        norm = torch.linalg.vector_norm(torch.stack([_length(g) for g in found.gradients.values()]))
        if not (math.isfinite(found.loss) and bool(torch.isfinite(norm))):
            raise FloatingPointError("the loss or a gradient is not finite")
        self._update(found.gradients, norm)
        self.since_fired = torch.where(found.fired, 0, self.since_fired + 1)
        if found.smallest > 0:
            rate = self._threshold_rate()
            self.threshold = (1 - rate) * self.threshold + rate * found.smallest
        self.done += 1
        return found.loss

    def _update(self, gradients: dict[str, Tensor], norm: Tensor) -> None:
        """Adam on gradients whose norm is clipped, by the kernel of `torch.optim.Adam(fused=True)`.

        It divides the gradients by `grad_scale` as it reads them, which is the clipping, without another pass. The
        optimizer class itself is left out: making one imports torch's compiler, which takes two seconds.
        """
        device, scale = norm.device, ((norm + 1e-6) / MAX_NORM).clamp(min=1.0)

        def update(parts: list[tuple[str, slice]]) -> None:
            torch.ops.aten._fused_adam_(
                [self.weights[name][part] for name, part in parts],
                [gradients[name].contiguous()[part] for name, part in parts],
                [self._moments[f"exp_avg.{name}"][part] for name, part in parts],
                [self._moments[f"exp_avg_sq.{name}"][part] for name, part in parts],
                [],
                [torch.full((), self.done + 1.0, device=device) for _ in parts],
                lr=self.config.lr * self._rate(),
                beta1=0.9,
                beta2=0.999,
                weight_decay=0.0,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
                grad_scale=scale,
                found_inf=None,
            )

        workers = around()
        split = [[(name, part) for part in workers.parts(weight)] for name, weight in self.weights.items()]
        workers.map(update, [[one for one in parts if one] for parts in zip_longest(*split)])

    def _rate(self) -> float:
        """Learning rate of this step beside the peak: up over the first 5 % of the steps, down over the last 20 %."""
        up, down = self.steps // 20, self.steps // 5
        rising = (self.done + 1) / up if up > 1 else 1.0
        falling = (self.steps - self.done) / down if down else 1.0
        return min(1.0, rising, falling)

    def _warm(self) -> float:
        """Factor of the sparsity penalty."""
        up = self.steps // 20
        return min(1.0, self.done / up) if up > 1 else 1.0

    def _threshold_rate(self) -> float:
        """The threshold of a batch top-k starts at 0; a short run needs a faster mean to arrive."""
        return min(0.5, max(0.01, 10 / self.steps))

    @property
    def by_batch(self) -> bool:
        """Whether the dictionary will fire by a threshold that the batches taught."""
        config = self.config
        return isinstance(config, BatchTopKConfig | MatryoshkaConfig) or (
            isinstance(config, TranscoderConfig) and config.sparsity == "batchtopk"
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on: tensors, and numbers that JSON keeps exactly."""
        tensors = {f"weight.{name}": tensor for name, tensor in self.weights.items()}
        tensors["since_fired"] = self.since_fired
        tensors |= {f"adam.{name}": tensor for name, tensor in self._moments.items()}
        return tensors, {"n_training_steps": self.done, "threshold": self.threshold}

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Go back to a saved state."""
        for name, weight in self.weights.items():
            weight.copy_(tensors[f"weight.{name}"])
        for name, moment in self._moments.items():
            moment.copy_(tensors[f"adam.{name}"])
        self.since_fired = tensors["since_fired"].to(self.since_fired.device, copy=True)
        self.done, self.threshold = int(numbers["n_training_steps"]), float(numbers["threshold"])


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(around().each(lambda part: x[part].norm(), x)))
