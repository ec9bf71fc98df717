"""Taps: how a value on its way through a transformers module passes a HookPoint, and comes back changed or not.

Each tap is one PyTorch hook on one module, registered only while one of its HookPoints is in use. A value that no hook
changes is put back as the very same tensor, so reading leaves the output as it is, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, assert_never, runtime_checkable

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from mechinterp.models import attention
from mechinterp.models.norms import normalise, scale_of

__all__ = ["Heads", "Input", "Norm", "Output", "Pattern", "Residual", "Row", "Tap", "attach", "attached", "in_use"]


@runtime_checkable
class Handle(Protocol):
    """What a registered hook gives back."""

    def remove(self) -> None:
        """Undo the registration."""
        ...


@dataclass(frozen=True)
class Input:
    """The first argument of a module passes these points in turn."""

    module: nn.Module
    points: tuple[HookPoint, ...]


@dataclass(frozen=True)
class Output:
    """The (first) output of a module passes the point; `first`: before any other hook on that module sees it."""

    module: nn.Module
    points: tuple[HookPoint]
    first: bool = False


@dataclass(frozen=True)
class Row:
    """Row 0 (the CLS token) of the output of a module passes the point."""

    module: nn.Module
    points: tuple[HookPoint]


@dataclass(frozen=True)
class Residual:
    """The input of the norm before the MLP, which the block also keeps as its residual stream.

    The block holds that tensor under another name, so an edit is written into it in place.
    """

    module: nn.Module
    points: tuple[HookPoint]


@dataclass(frozen=True)
class Heads:
    """The input of an output projection, seen as `[batch, pos, head, d_head]`."""

    module: nn.Module
    points: tuple[HookPoint]
    head_width: int


@dataclass(frozen=True)
class Norm:
    """The scale of a norm, then its output."""

    module: nn.Module
    points: tuple[HookPoint, HookPoint]


@dataclass(frozen=True)
class Pattern:
    """The attention pattern `[batch, head, query, key]` of an attention module."""

    module: nn.Module
    points: tuple[HookPoint]


Tap = Input | Output | Row | Residual | Heads | Norm | Pattern


def in_use(point: HookPoint) -> bool:
    """Whether any forward or backward hook is on the point."""
    return bool(point.fwd_hooks or point.bwd_hooks)


@contextmanager
def attached(taps: Iterable[Tap]) -> Iterator[None]:
    """Register the taps whose points are in use; take them all off on leaving, also after an error."""
    with ExitStack() as stack:
        for tap in taps:
            if any(in_use(point) for point in tap.points):
                stack.callback(attach(tap).remove)
        yield


def attach(tap: Tap) -> Handle:
    """Register one tap. The caller removes it."""
    module = tap.module
    match tap:
        case Input(points=points):
            return module.register_forward_pre_hook(_on_input(lambda x: _chain(points, x)), with_kwargs=True)
        case Heads(points=(point,), head_width=width):

            def by_head(x: Tensor) -> Tensor:
                z = x.unflatten(-1, (-1, width))
                new, changed = through(point, z)
                return new.flatten(-2).to(x.dtype) if changed else x

            return module.register_forward_pre_hook(_on_input(by_head), with_kwargs=True)
        case Residual(points=(point,)):

            def in_place(x: Tensor) -> Tensor:
                # a copy goes to the hook: what it keeps or differentiates must not change under it
                new, changed = through(point, x.clone())
                return x.copy_(new) if changed else x

            return module.register_forward_pre_hook(_on_input(in_place), with_kwargs=True)
        case Output(points=(point,), first=first):
            return module.register_forward_hook(_on_output(lambda _, x: through(point, x)[0]), prepend=first)
        case Row(points=(point,)):

            def row(_: Any, x: Tensor) -> Tensor:
                new, changed = through(point, x[:, 0].clone())
                return torch.cat([new[:, None], x[:, 1:]], dim=1) if changed else x

            return module.register_forward_hook(_on_output(row))
        case Norm(points=(scale, normalized)):

            def norm(x: Tensor, out: Tensor) -> Tensor:
                if in_use(scale):
                    new, changed = through(scale, scale_of(module, x))
                    out = normalise(module, x, new) if changed else out
                return through(normalized, out)[0]

            return module.register_forward_hook(_on_output(norm))
        case Pattern(points=(point,)):
            return attention.watch(module, lambda pattern: through(point, pattern))
        case _:
            assert_never(tap)


def through(point: HookPoint, value: Tensor) -> tuple[Tensor, bool]:
    """Send a value through a HookPoint; also say whether a hook changed it (returned another, or wrote into it)."""
    if not in_use(point):
        return value, False
    if value.is_inference():  # these keep no version counter, so compare the numbers
        before = value.clone()
        new = point(value)
        return new, new is not value or not torch.equal(before, value)
    version = value._version
    new = point(value)
    return new, new is not value or value._version != version


def _chain(points: tuple[HookPoint, ...], value: Tensor) -> Tensor:
    for point in points:
        value, _ = through(point, value)
    return value


def _on_input(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A PyTorch forward pre-hook that changes the first argument, positional or named."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: change(kwargs[name])}

    return hook


def _on_output(change: Callable[[Any, Tensor], Tensor]) -> Callable[..., Any]:
    """A PyTorch forward hook that changes the output, or the first of several, given the input."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = args[0] if args else None
        if isinstance(output, tuple):
            return (change(x, output[0]), *output[1:])
        return change(x, output)

    return hook
