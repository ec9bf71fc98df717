"""From the words of a command line to configurations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mechinterp.errors import UsageError
from saes.config import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    TopKConfig,
    TrainConfig,
    TranscoderConfig,
)

__all__ = ["KINDS", "chosen"]

KINDS: dict[str, type[TrainConfig]] = {
    config.kind: config
    for config in (TopKConfig, BatchTopKConfig, MatryoshkaConfig, JumpReLUConfig, GatedConfig, TranscoderConfig)
}


def chosen(
    kind: str,
    widths: Sequence[int],
    ks: Sequence[int],
    epochs: int | None = None,
    penalty: float | None = None,
    skip: bool = False,
    sparsity: str | None = None,
) -> list[TrainConfig]:
    """A configuration for each width and each k.

    Args:
        kind: one of `KINDS`.
        widths, ks: numbers of latents, and how many fire per row. For JumpReLU, k is `target_l0`, unless there is a
            penalty; a gated SAE has none.
        epochs: passes over the store; None for the default.
        penalty: `l0_coefficient` of JumpReLU, `l1_coefficient` of gated.
        skip, sparsity: of a transcoder.

    Raises UsageError for an option that the kind does not have.
    """
    if penalty is not None and kind not in ("jumprelu", "gated"):
        raise UsageError(f"{kind} has no penalty", where="--penalty", hint="set --k")
    if (skip or sparsity) and kind != "transcoder":
        raise UsageError(f"{kind} has neither --skip nor --sparsity", hint="--kind transcoder has")
    configs = []
    for width in widths:
        for k in ks:
            options: dict[str, Any] = {"width": width} | ({} if epochs is None else {"epochs": epochs})
            if kind == "jumprelu":
                options |= {"target_l0": k} if penalty is None else {"l0_coefficient": penalty}
            elif kind == "gated":
                options |= {} if penalty is None else {"l1_coefficient": penalty}
            else:
                options["k"] = k
            if kind == "transcoder":
                options |= {"skip": skip} | ({} if sparsity is None else {"sparsity": sparsity})
            config = KINDS[kind](**options)
            configs += [config] if config not in configs else []
    return configs
