"""What can be trained, as small frozen records: one for each kind, the fields they share written once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, get_args

from mechinterp.errors import UsageError

__all__ = [
    "BatchTopKConfig",
    "GatedConfig",
    "JumpReLUConfig",
    "MatryoshkaConfig",
    "SAEConfig",
    "TopKConfig",
    "TrainConfig",
    "TranscoderConfig",
]


Start = Literal["fitted", "sae-lens"]


@dataclass(frozen=True)
class _K:
    """`k`, of the kinds whose sparsity is a count."""

    k: int = 16


@dataclass(frozen=True)
class _Run:
    """What every kind has: how wide, how long, how fast. The arguments are described in `TopKConfig`."""

    width: int = 1024
    epochs: int = 20
    lr: float = 1e-3
    batch_size: int = 1024
    dead_after: int = 100
    checkpoint_every: int = 200

    kind: ClassVar[str]

    def __post_init__(self):
        for name in ("k", "width", "epochs", "batch_size", "dead_after", "checkpoint_every"):
            if getattr(self, name, 1) < 1:
                raise self._wrong(name, "at least 1")
        if getattr(self, "k", 1) > self.width:
            raise UsageError(f"k is {getattr(self, 'k', 1)} of {self.width} latents", where=type(self).__name__)
        if not 0 < self.lr < 1:
            raise self._wrong("lr", "between 0 and 1")

    def _wrong(self, name: str, hint: str) -> UsageError:
        return UsageError(f"{name} is {getattr(self, name)}", where=type(self).__name__, hint=hint)

    def to_dict(self) -> dict[str, Any]:
        """Plain fields and the kind."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class _Tied(_Run, _K):
    """Kinds whose `k` says how large a first reconstruction is; `start` is described in `TopKConfig`."""

    start: Start = field(default="fitted", kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.start not in get_args(Start):
            raise self._wrong("start", " or ".join(get_args(Start)))


@dataclass(frozen=True)
class TopKConfig(_Tied):
    """TopK SAE (Gao et al. 2024, arXiv:2406.04093): each row keeps its `k` largest latents.

    Args:
        k: latents that fire per row.
        width: number of latents.
        epochs: passes over the training split.
        lr: peak learning rate of Adam; warmed up over the first 5 % of the steps, decayed to 0 over the last 20 %.
        batch_size: rows per step; a smaller training split is one batch.
        dead_after: a latent that has not fired for so many steps gets the auxiliary loss (ibid., appendix A.2).
        checkpoint_every: steps between checkpoints.
        start: length of the rows of the encoder and of the decoder, which point the same way. "fitted": 1, and as long
            as makes the first reconstruction of a random row as large as is best (`saes.engine.weights.fitted_norm`);
            "sae-lens": both 0.1, as sae-lens has it and as the dictionaries that ship had it. From there, short runs
            end with a worse R2 and many more dead latents (docs/dictionaries.md).
    """

    kind = "topk"


@dataclass(frozen=True)
class BatchTopKConfig(_Tied):
    """BatchTopK SAE (Bussmann et al. 2024, arXiv:2412.06410): a batch keeps `k` latents per row on average.

    It is stored as a JumpReLU SAE whose threshold is the running mean of the smallest latent that was kept. Fields as
    in `TopKConfig`.
    """

    kind = "batchtopk"


@dataclass(frozen=True)
class MatryoshkaConfig(_Tied):
    """Matryoshka BatchTopK SAE (Bussmann et al. 2025, arXiv:2503.17547): nested prefixes each reconstruct the row.

    The loss is the sum of the squared errors of the reconstructions from the first `levels[0]`, `levels[1]`, ...
    latents. Stored as `BatchTopKConfig` is. Fields as in `TopKConfig`, and:

    Args:
        levels: sizes of the nested dictionaries, increasing; the last is `width`. Default: a 16th, a 4th and all.
    """

    levels: tuple[int, ...] = ()

    kind = "matryoshka"

    def __post_init__(self):
        super().__post_init__()
        if not self.levels:
            thirds = sorted({size for size in (self.width // 16, self.width // 4, self.width) if size > 0})
            object.__setattr__(self, "levels", tuple(thirds))
        object.__setattr__(self, "levels", tuple(self.levels))  # JSON gives a list
        rising = all(a < b for a, b in zip((0, *self.levels), self.levels, strict=False))
        if not rising or self.levels[-1] != self.width:
            raise self._wrong("levels", f"positive, increasing, and {self.width} at the end")


@dataclass(frozen=True)
class JumpReLUConfig(_Run):
    """JumpReLU SAE (Rajamanoharan et al. 2024, arXiv:2407.14435): a learnt threshold for every latent.

    The step form of sae-lens, not its tanh form: squared error plus a penalty on L0, whose gradient reaches the
    threshold alone, by a straight-through estimate with a rectangular kernel (equations 11 and 12). With `target_l0`
    the penalty is `l0_coefficient * mean_n 2 / target_l0 * (L0_n - target_l0)^2` (sae-lens's quadratic form), without
    it `l0_coefficient * mean_n L0_n` (equation 9). It is warmed up over the first 5 % of the steps. Other fields as
    in `TopKConfig`; there is no auxiliary loss, so `dead_after` is only counted.

    Args:
        l0_coefficient: weight of the penalty beside a squared error of rows whose mean norm is sqrt(d).
        target_l0: latents that should fire per row; None for the plain penalty.
        bandwidth: width of the kernel.
        threshold: every latent's threshold at the start.
    """

    l0_coefficient: float | int = 1.0
    target_l0: float | int | None = None
    bandwidth: float = 0.05
    threshold: float = 0.01

    kind = "jumprelu"

    def __post_init__(self):
        super().__post_init__()
        for name in ("l0_coefficient", "bandwidth", "threshold"):
            if not 0 < getattr(self, name) < float("inf"):
                raise self._wrong(name, "a positive number")
        if self.target_l0 is not None and not 0 < self.target_l0 <= self.width:
            raise self._wrong("target_l0", f"above 0, at most {self.width}")


@dataclass(frozen=True)
class GatedConfig(_Run):
    """Gated SAE (Rajamanoharan et al. 2024, arXiv:2404.16014): one path says which latents fire, one how strongly.

    Loss: squared error, plus `l1_coefficient` times the gate path's activations weighted by decoder norms, plus the
    squared error of the reconstruction from the gate path alone (equation 8). As in sae-lens, and other than in the
    paper, the decoder gets gradients from the last two as well. The L1 weight is warmed up over the first 5 % of the
    steps. Other fields as in `TopKConfig`; there is no auxiliary loss for dead latents, so `dead_after` only counts.

    Args:
        l1_coefficient: weight of the sparsity penalty beside a squared error of rows whose mean norm is sqrt(d).
    """

    l1_coefficient: float | int = 1.0

    kind = "gated"

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.l1_coefficient < float("inf"):
            raise self._wrong("l1_coefficient", "a positive number")


@dataclass(frozen=True)
class TranscoderConfig(_Run, _K):
    """Per-layer transcoder (Dunefsky et al. 2024, arXiv:2406.11944): reads one site, writes another.

    With `skip` it has a linear path beside the latents (Paulo et al. 2025, arXiv:2501.18823). Other fields as in
    `TopKConfig`.

    Args:
        sparsity: "topk" keeps `k` latents per row, "batchtopk" `k` per row on average over a batch.
        skip: whether `W_skip` is learnt.
        least_share: token kinds (cls, patch, text) that are a smaller share of the rows are repeated in an epoch until
            they are about that share. A class token is one row of 65 and may be all that the output reads.
    """

    sparsity: Literal["topk", "batchtopk"] = "topk"
    skip: bool = False
    least_share: float = 0.0

    kind = "transcoder"

    def __post_init__(self):
        super().__post_init__()
        if self.sparsity not in ("topk", "batchtopk"):
            raise self._wrong("sparsity", "topk or batchtopk")
        if not 0 <= self.least_share <= 0.5:
            raise self._wrong("least_share", "between 0 and 0.5")


SAEConfig = TopKConfig | BatchTopKConfig | MatryoshkaConfig | JumpReLUConfig | GatedConfig
TrainConfig = SAEConfig | TranscoderConfig
