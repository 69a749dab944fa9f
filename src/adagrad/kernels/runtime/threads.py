"""How many threads a launch uses: one launch on several at a time, and none for a while after launches have stalled."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from adagrad.kernels.runtime.memory import exchange
from adagrad.kernels.runtime.numba_jit import jit

# ------------------------------------------------------------------------------------------------- one launch at a time

_layer = np.zeros(1, np.int64)
# Never freed: a daemon thread may give it back when the interpreter has already freed all modules.
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_layer))

LAYER = _layer.ctypes.data
"""The address of a word: 1 while a launch has claimed Numba's parallel layer, and ever after in a forked child, else 0.

Numba's workqueue layer ends the process when two threads enter. GNU OpenMP's threads do not survive a fork: a parallel
kernel would kill the child. The word is claimed and given back within one compiled call, in which no exception is
raised and no signal handler runs.
"""


def _after_fork_in_child() -> None:
    _layer[0] = 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


# The notes of a launch, int64: its elements as far as known, which compiled code may correct; how many threads it was
# granted; LAYER, because compiled code is kept for other processes, where it is another address.
WORK, CLAIMED, LAYER_AT, NOTES = range(4)


def new_notes(work: int) -> np.ndarray:
    """The notes of a launch of ``work`` elements."""
    return np.array([work, 0, LAYER], np.int64)


@jit(helper=True)
def claim(notes: Any, workers: int) -> Any:
    """How many threads, of ``workers``, may be used until they are given back."""
    notes[CLAIMED] = 1 if workers > 1 and exchange(notes[LAYER_AT], 1) != 0 else workers
    return notes[CLAIMED]


@jit(helper=True)
def give_back(notes: Any) -> None:
    if notes[CLAIMED] > 1:
        exchange(notes[LAYER_AT], 0)


# --------------------------------------------------------------------------------------------------------------- stalls

STALL_SECONDS, SECONDS_PER_ELEMENT = 2e-3, 5e-9
"""Seconds, fixed and per element: a launch that takes longer has waited for a thread without a core, spinning.

It may have slept instead, for the GIL or for memory. The launch after a long one is therefore timed by the calling
thread's CPU time; others are not, because reading it is a system call.
"""

_CLOCK_IS_FINE = sys.platform != "win32"
"""Whether a thread's CPU time is counted finely enough to see stalls; on Windows, in ticks of 16 ms."""

BACKOFF_LAUNCHES = 100
"""Launches that stay on the calling thread after two stalls in a row."""

ALWAYS_PARALLEL = 4_000_000
"""Elements from which several threads are worth a stall."""

_stalls, _backoff = 0, 0


def on_threads(function: Callable[..., Any], given: tuple[Any, ...], notes: memoryview, threads: int | None) -> Any:
    """Return ``function(*given, workers)``, which may claim ``workers`` threads: by default as many as Numba may use.

    It is one, unless there is much work, for a while after launches have stalled: with all cores busy, each waits for
    the scheduler, milliseconds for microseconds of work. ``notes`` are those of the launch; without work, nothing can
    stall, nor where another launch had claimed the threads. The results do not depend on ``workers``.
    """
    global _stalls, _backoff
    workers = threads or max_threads()
    if workers > 1 and _backoff > 0 and notes[WORK] < ALWAYS_PARALLEL:
        workers, _backoff = 1, _backoff - 1
    clock = time.thread_time if _stalls else time.perf_counter
    notes[CLAIMED], started = 0, clock()
    result = function(*given, workers)
    if notes[CLAIMED] > 1 and notes[WORK] and _CLOCK_IS_FINE:
        stalled = clock() - started > STALL_SECONDS + SECONDS_PER_ELEMENT * notes[WORK]
        _stalls = _stalls + 1 if stalled else 0
        _backoff = BACKOFF_LAUNCHES if _stalls > 1 else 0
    return result


def max_threads() -> int:
    """The number of threads that Numba may use: ``NUMBA_NUM_THREADS``, ``numba.set_num_threads``, or all cores."""
    global _num_threads
    if _num_threads is None:
        numba.get_num_threads()  # loads the function
        _num_threads = getattr(numba.np.ufunc.parallel, "_get_num_threads", numba.get_num_threads)
    return int(_num_threads())


_num_threads: Callable[[], int] | None = None
"""The C function that ``numba.get_num_threads`` calls after taking a lock between processes, which is slow."""
