"""The outcomes of a call of compiled code on a list of updates, and how it is repeated until it has one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from adagrad.kernels.interrupts import mark_late
from adagrad.kernels.numba_jit import max_workers, workers

DONE = -5
"""The whole list is updated."""
NOT_SMALL = -4
"""Nothing was done: the list, tried on the calling thread alone, is worth several."""
NOT_PLAIN = -3
"""Nothing was done: the list is left to the general path."""
OUT_OF_RANGE = -2
"""Nothing was done: a row id is outside its weight."""
NO_MEMORY = -1
"""Only a part may be done: no memory was left for sums."""

# A number >= 0: nothing was done, because the worker of that number has not been compiled yet.


class Remembered(NamedTuple):
    """What is remembered from one list of a kind, of one thread and length, to the next."""

    known: np.ndarray
    """The addresses of the compiled workers, which all threads share."""
    last: np.ndarray
    """Two words: the work of the last list, if that was much, else 0; how many are done."""
    told: memoryview
    """The same memory, because reading a number from an array takes Python longer."""
    order: np.ndarray
    """The order of its spans, a guess for :func:`adagrad.kernels.spans.disjoint`."""


@functools.lru_cache(maxsize=64)
def remembered(addresses: Callable[[bool], np.ndarray], row_wise: bool, thread: int, spans: int) -> Remembered:
    """The same, of lists with so many spans of memory; ``addresses(row_wise)`` are those of their workers.

    All of it is in one place, because a step that finds the caches cold pays for each that it looks at.
    """
    last = np.zeros(2, np.int64)
    return Remembered(addresses(row_wise), last, last.data, np.arange(spans))


def attempt(function: Callable[..., Any], given: tuple[Any, ...], told: memoryview, threads: int | None,
            compile_worker: Callable[[int], None]) -> tuple[int, int, int, int]:  # fmt: skip
    """Call ``function(*given, count)``, compiling workers and adding threads as it asks; returns its final outcome.

    ``told`` is that of :class:`Remembered`. ``count`` is 0 for a trial on the calling thread, made if the last list was
    small. The function sets ``told[0]`` to the work if it is much, else 0, and adds 1 to ``told[1]`` when it has done
    all: an interrupt that comes after that is marked as late.
    """
    is_trial, done_before = not told[0], told[1]
    try:
        while True:
            if is_trial:
                found = function(*given, 0)
            else:
                held = workers(threads or max_workers(), told[0])
                with held as count:
                    found = function(*given, count)
                    held.work = told[0]
            if found[0] >= 0:
                compile_worker(found[0])
            elif found[0] == NOT_SMALL:
                is_trial = False
            else:
                return found  # type: ignore[no-any-return]
    except BaseException as interrupt:
        if told[1] != done_before:
            mark_late(interrupt)
        raise
