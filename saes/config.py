"""What can be trained, as small frozen records."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mechinterp.errors import UsageError

__all__ = ["BatchTopKConfig", "SAEConfig", "TopKConfig"]


@dataclass(frozen=True)
class TopKConfig:
    """TopK SAE (Gao et al. 2024, arXiv:2406.04093): each row keeps its `k` largest latents.

    Args:
        k: latents that fire per row.
        width: number of latents.
        epochs: passes over the training split.
        lr: peak learning rate of Adam; warmed up over the first 5 % of the steps, decayed to 0 over the last 20 %.
        batch_size: rows per step; a smaller training split is one batch.
        dead_after: a latent that has not fired for so many steps gets the auxiliary loss (ibid., appendix A.2).
        checkpoint_every: steps between checkpoints.
    """

    k: int = 16
    width: int = 1024
    epochs: int = 20
    lr: float = 1e-3
    batch_size: int = 1024
    dead_after: int = 100
    checkpoint_every: int = 200

    kind = "topk"

    def __post_init__(self):
        _check(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain fields and the kind."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class BatchTopKConfig:
    """BatchTopK SAE (Bussmann et al. 2024, arXiv:2412.06410): a batch keeps `k` latents per row on average.

    It is stored as a JumpReLU SAE whose threshold is the running mean of the smallest latent that was kept. Fields as
    in `TopKConfig`.
    """

    k: int = 16
    width: int = 1024
    epochs: int = 20
    lr: float = 1e-3
    batch_size: int = 1024
    dead_after: int = 100
    checkpoint_every: int = 200

    kind = "batchtopk"

    def __post_init__(self):
        _check(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain fields and the kind."""
        return {"kind": self.kind, **asdict(self)}


SAEConfig = TopKConfig | BatchTopKConfig


def _check(config: SAEConfig) -> None:
    """Raise UsageError for numbers that cannot mean anything."""
    for name in ("k", "width", "epochs", "batch_size", "dead_after", "checkpoint_every"):
        if getattr(config, name) < 1:
            raise UsageError(f"{name} is {getattr(config, name)}", where=type(config).__name__, hint="at least 1")
    if config.k > config.width:
        raise UsageError(f"k is {config.k} of {config.width} latents", where=type(config).__name__)
    if not 0 < config.lr < 1:
        raise UsageError(f"lr is {config.lr}", where=type(config).__name__, hint="between 0 and 1")
