"""Threads that share a training step out, each with one thread of torch.

A step is many short operations. torch's own threads divide each of them and then wait for the next one by spinning,
which takes the cores from whatever is not torch's: here the choice among the entries of the encoder product, in NumPy.
So torch has one thread during a step, and a team of threads divides rows or latents. What is computed of one row or
one latent does not depend on how they are divided.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import local
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Team", "around", "own_threads", "team"]

T = TypeVar("T")
R = TypeVar("R")

_here = local()


class Team:
    """The calling thread and `size - 1` others."""

    def __init__(self, size: int):
        self.size = size

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """The function of each item, in their order; whoever is free takes the next one.

        Raises what the function raised first, once all threads have stopped; they then take no further item.
        """
        helpers = min(self.size, len(items)) - 1
        if helpers < 1:
            return [function(item) for item in items]
        found: dict[int, R] = {}
        errors: list[BaseException] = []
        numbers = itertools.count()

        def work() -> None:
            while not errors and (number := next(numbers)) < len(items):
                try:
                    found[number] = function(items[number])
                except BaseException as error:  # raised below, in the thread that called
                    errors.append(error)

        others = [_pool(self.size).submit(work) for _ in range(helpers)]
        _here.team = ALONE  # the others are busy with this
        work()
        _here.team = self
        for other in others:
            other.result()
        if errors:
            raise errors[0]
        return [found[number] for number in range(len(items))]

    def parts(self, of: Tensor, most: int | None = None) -> list[slice]:
        """The rows of a tensor in parts of `most` at most, one for each thread at least; all in one off the CPU."""
        count = len(of)
        if of.device.type != "cpu" or count < self.size:
            return [slice(0, count)]
        number = max(self.size, -(-count // (most or count)))
        ends = [count * i // number for i in range(number + 1)]
        return [slice(first, last) for first, last in itertools.pairwise(ends)]

    def each(self, function: Callable[[slice], R], of: Tensor, most: int | None = None) -> list[R]:
        """The function of each of these parts."""
        return self.map(function, self.parts(of, most))


ALONE = Team(1)


@contextmanager
def team() -> Iterator[Team]:
    """As many threads as torch has, while it has one. Inside another one of the same thread: that one."""
    outer = getattr(_here, "team", None)
    if outer is not None:
        yield outer
        return
    threads = torch.get_num_threads()
    _here.team = Team(threads)
    try:
        if threads > 1:
            torch.set_num_threads(1)
        yield _here.team
    finally:
        _here.team = None
        if threads > 1:
            torch.set_num_threads(threads)


def around() -> Team:
    """The team that the calling thread is in; where there is none, one of itself, as torch has its own threads then."""
    return getattr(_here, "team", None) or ALONE


@contextmanager
def own_threads() -> Iterator[None]:
    """Inside a team: torch has the threads of the team for what follows, large operations that it divides itself."""
    outer = getattr(_here, "team", None)
    if outer is None or outer.size == 1:
        yield
        return
    _here.team = None
    torch.set_num_threads(outer.size)
    try:
        yield
    finally:
        torch.set_num_threads(1)
        _here.team = outer


@cache
def _pool(size: int) -> ThreadPoolExecutor:
    """Threads that begin when torch has one thread, and so keep to one."""
    return ThreadPoolExecutor(size - 1, thread_name_prefix="team")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of the threads
