"""The outcomes of a call of compiled code on a list of updates, and how it is repeated until it has one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from adagrad.kernels.runtime.interrupts import mark_late
from adagrad.kernels.runtime.threads import NOTES, WORK, new_notes, on_threads

# A compiled call returns four integers. The first is one of these outcomes, or a number >= 0: nothing was done, because
# the worker of that number has not been compiled yet. The second is the position of the update concerned, the others
# are what the outcome adds, or 0.
DONE = -5
"""The whole list is updated."""
NOT_SMALL = -4
"""Nothing was done: this was a trial on the calling thread, but the list is worth several threads."""
NOT_PLAIN = -3
"""Nothing was done: the list is left to the general path."""
OUT_OF_RANGE = -2
"""Nothing was done: a row id is outside its weight. Adds its position and its value."""
NO_MEMORY = -1
"""Only the row-sparse updates before this one were done: no memory was left for its sums. Adds its number of ids."""


LISTS_DONE = NOTES
"""One more word after the notes of a launch: how many lists compiled code has finished. In such notes, WORK is 0 if
one thread is enough; it stays from one list to the next."""


class Remembered(NamedTuple):
    """What is remembered from one list of a kind, of one thread and length, to the next."""

    known: np.ndarray
    """The addresses of the compiled workers, which all threads share."""
    compile_worker: Callable[[int], None]
    """Compiles the worker of a number, and puts its address there."""
    notes: np.ndarray
    """See :data:`adagrad.kernels.runtime.threads.NOTES` and LISTS_DONE."""
    read_notes: memoryview
    """The same memory for Python, which takes longer to read a number from an array."""
    guess: np.ndarray
    """The order of its spans, for :func:`adagrad.kernels.inspection.spans.disjoint`."""


Workers = Callable[[bool], tuple[np.ndarray, Callable[[int], None]]]
"""Returns ``known`` and ``compile_worker`` of lists, by whether their histories are row-wise."""


@functools.lru_cache(maxsize=256)
def remembered(workers: Workers, row_wise: bool, thread: int, spans: int) -> Remembered:
    """Return what is remembered of lists with so many spans of memory.

    All of it is in one place, because a step that finds the caches cold pays for each that it looks at.
    """
    notes = np.append(new_notes(0), 0)
    return Remembered(*workers(row_wise), notes, notes.data, np.arange(spans))


def attempt(function: Callable[..., Any], given: tuple[Any, ...], notes: memoryview, threads: int | None,
            compile_worker: Callable[[int], None]) -> tuple[int, int, int, int]:  # fmt: skip
    """Call ``function(*given)``, compiling workers and adding threads as it asks; returns its final outcome.

    ``notes`` are :attr:`Remembered.read_notes`, which the function writes. The last of ``given`` is the number of
    threads: 0 for a trial on the calling thread, made if one was enough for the last list; else it is replaced. An
    interrupt that comes after the list is done is marked as late.
    """
    is_trial, done_before = not notes[WORK], notes[LISTS_DONE]
    try:
        while True:
            if is_trial:
                found = function(*given)
            else:
                found = on_threads(function, given[:-1], notes, threads)
            if found[0] >= 0:
                compile_worker(found[0])
            elif found[0] == NOT_SMALL:
                is_trial = False
            else:
                return found  # type: ignore[no-any-return]
    except BaseException as interrupt:
        if notes[LISTS_DONE] != done_before:
            mark_late(interrupt)
        raise
    finally:
        notes[LISTS_DONE] = done_before  # a list whose call a signal interrupted must not take this one for itself
