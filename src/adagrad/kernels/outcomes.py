"""The outcomes of a call of compiled code on a list of updates, and how it is repeated until it has one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

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


@functools.lru_cache(maxsize=64)
def last_list(kind: str, row_wise: bool, thread: int) -> np.ndarray:
    """Two words about a thread's lists of one kind, for :func:`attempt`: the work of the last one, if that was much,
    else 0; how many are done."""
    return np.zeros(2, np.int64)


def attempt(function: Callable[..., Any], given: tuple[Any, ...], last: Any, threads: int | None,
            compile_worker: Callable[[int], None]) -> tuple[int, int, int, int]:  # fmt: skip
    """Call ``function(*given, count)``, compiling workers and adding threads as it asks; returns its final outcome.

    ``last`` is from :func:`last_list`. ``count`` is 0 for a trial on the calling thread, made if the last list was
    small. The function sets ``last[0]`` to the work if it is much, else 0, and adds 1 to ``last[1]`` when it has done
    all: an interrupt that comes after that is marked as late.
    """
    is_trial, done_before = not last[0], last[1]
    try:
        while True:
            if is_trial:
                found = function(*given, 0)
            else:
                held = workers(threads or max_workers(), int(last[0]))
                with held as count:
                    found = function(*given, count)
                    held.work = int(last[0])
            if found[0] >= 0:
                compile_worker(found[0])
            elif found[0] == NOT_SMALL:
                is_trial = False
            else:
                return found  # type: ignore[no-any-return]
    except BaseException as interrupt:
        if last[1] != done_before:
            mark_late(interrupt)
        raise
