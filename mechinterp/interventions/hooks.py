"""Interventions as a context manager: the model is changed inside the `with` block and only there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import UsageError
from mechinterp.interventions.edits import (
    ZERO,
    Edit,
    How,
    Inject,
    Patch,
    Resample,
    Steer,
    Tokens,
    donors,
    edited,
)
from mechinterp.interventions.tokens import token_mask
from mechinterp.models import HookedVLM
from mechinterp.types import Placed

__all__ = ["ablate", "inject", "intervene", "patch", "steer"]

Hook = tuple[str | Callable, Callable]


@contextmanager
def intervene(model: HookedVLM, edits: Sequence[Edit]) -> Iterator[HookedVLM]:
    """Do `edits` in every forward pass inside the block; the model is itself again after it, also on an error.

    Edits of one placed dictionary see the same encoded activations and are written together, so their order does not
    matter unless they name the same feature (then the later one wins). Edits of different sites act where they stand:
    one downstream sees the change made upstream.

        with intervene(model, [Edit(placed, (12, 40), Zero(), "patch")]):
            scores = model.score(batch, targets)

    Raises UsageError or ModelError when a site, token choice or feature does not exist.
    """
    if not edits:
        raise UsageError("nothing to do", where="edits", hint="pass at least one Edit")
    grouped: dict[tuple[int, str, str], list[Edit]] = {}
    for edit in edits:
        key = (id(edit.placed.dictionary), str(edit.placed.reads), str(edit.placed.writes))
        grouped.setdefault(key, []).append(edit)
    fwd_hooks = [hook for group in grouped.values() for hook in _hooks(model, group)]
    with model.hooks(fwd_hooks=fwd_hooks):
        yield model


def ablate(
    model: HookedVLM, placed: Placed, features: Sequence[int], how: How = ZERO, tokens: Tokens = "all"
) -> AbstractContextManager[HookedVLM]:
    """Context in which the set `features` is ablated: Zero() (default), Mean(values) or Resample(seed)."""
    return intervene(model, [Edit(placed, tuple(features), how, tokens)])


def steer(
    model: HookedVLM, placed: Placed, features: Sequence[int], strength: float, tokens: Tokens = "all"
) -> AbstractContextManager[HookedVLM]:
    """Context in which `strength` (in activation units) of each feature's decoder direction is added."""
    return intervene(model, [Edit(placed, tuple(features), Steer(strength), tokens)])


def patch(
    model: HookedVLM,
    placed: Placed,
    features: Sequence[int],
    activations: Float[Tensor, "batch token d_sae"],
    tokens: Tokens = "all",
) -> AbstractContextManager[HookedVLM]:
    """Context in which the features take the activations of another run."""
    return intervene(model, [Edit(placed, tuple(features), Patch(activations), tokens)])


def inject(
    model: HookedVLM, placed: Placed, features: Sequence[int], value: float, tokens: Tokens = "all"
) -> AbstractContextManager[HookedVLM]:
    """Context in which the features are set to `value`, whether or not they fired."""
    return intervene(model, [Edit(placed, tuple(features), Inject(value), tokens)])


def _hooks(model: HookedVLM, group: Sequence[Edit]) -> list[Hook]:
    """The hooks of the edits of one placed dictionary: one at its read site, one at its write site."""
    placed = group[0].placed
    if placed.reads == placed.writes:
        return [(str(placed.reads), lambda value, hook: _write(value, _change(model, group, value)))]
    change: list[Tensor] = []

    def read(value: Tensor, hook: object) -> None:
        change[:] = [_change(model, group, value)]

    def write(value: Tensor, hook: object) -> Tensor:
        if not change:
            raise UsageError(
                f"{placed.writes} runs before {placed.reads}", where="Placed", hint="swap reads and writes"
            )
        return _write(value, change.pop())

    return [(str(placed.reads), read), (str(placed.writes), write)]


def _write(value: Tensor, change: Tensor) -> Tensor:
    return value + change.to(value.dtype).reshape(value.shape)


def _change(model: HookedVLM, group: Sequence[Edit], value: Tensor) -> Tensor:
    """`decode(new) - decode(old)` for a site value `[batch, token, d]` or, at a pooled site, `[batch, d]`."""
    placed = group[0].placed
    old = placed.dictionary.encode(value.to(placed.dictionary.W_enc.dtype))
    old = old[:, None] if value.ndim == 2 else old
    new = old.clone()
    for edit in group:
        columns = torch.tensor(edit.features, device=old.device)
        mask = token_mask(model, placed.reads, old.shape[1], edit.tokens).to(old.device)
        before = old[..., columns]
        donor = before[donors(len(old), edit.how.seed)] if isinstance(edit.how, Resample) else None
        wanted = edited(edit.how, before, columns, mask, donor=donor)
        # where this edit changes nothing, an earlier edit of the same feature stands
        new[..., columns] = torch.where(mask[None, :, None], wanted, new[..., columns])
    decode = placed.dictionary.decode
    return decode(new) - decode(old)
