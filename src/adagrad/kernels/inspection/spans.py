"""Whether the memory that a call writes to is disjoint from the rest, found by sorting the spans of its arrays."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from adagrad.kernels.runtime.memory import words
from adagrad.kernels.runtime.numba_jit import entry, jit


@jit(helper=True)
def _sort(starts: Any, order: Any) -> None:
    """Shell's sort of the positions by ``starts``: quick to compile, and only needed where the order has changed."""
    n = len(starts)
    for i in range(n):
        order[i] = i
    gap = n // 2
    while gap > 0:
        for i in range(gap, n):
            moved, j = order[i], i
            while j >= gap and starts[order[j - gap]] > starts[moved]:
                order[j] = order[j - gap]
                j -= gap
            order[j] = moved
        gap = gap * 5 // 11 if gap > 2 else gap - 1


@jit(helper=True)
def disjoint(starts: Any, ends: Any, written: int, guess: Any) -> bool:
    """See :func:`are_disjoint`. Empty spans share nothing.

    ``guess`` is the order of the spans that was found last time. If the starts strictly increase along it, it is their
    order, whatever other threads did to it; else the spans are sorted and the guess is updated.
    """
    n = len(starts)
    order, before = words(n), np.int64(-1)
    for k in range(n):
        i = guess[k]
        if i < 0 or i >= n or starts[i] <= before:
            _sort(starts, order)
            for j in range(n):
                guess[j] = order[j]
            break
        order[k] = i
        before = starts[i]
    end_of_written, end_of_any = np.int64(-1), np.int64(-1)
    for k in range(n):
        i = order[k]
        if starts[i] == ends[i]:
            continue
        if starts[i] < (end_of_any if i < written else end_of_written):
            return False
        end_of_any = max(end_of_any, ends[i])
        if i < written:
            end_of_written = max(end_of_written, ends[i])
    return True


_disjoint = entry(disjoint)


def are_disjoint(spans: np.ndarray, written: int) -> bool:
    """Whether the first ``written`` of ``spans``, (2, n) starts and ends, share no byte with any other span."""
    return bool(_disjoint(spans[0], spans[1], written, guess_of(spans.shape[1])))


def concatenate(pieces: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, int]:
    """Several pieces as one, each the spans and how many of them, the first, are written to."""
    if len(pieces) == 1:
        return pieces[0]
    parts = [spans[:, :count] for spans, count in pieces] + [spans[:, count:] for spans, count in pieces]
    return np.concatenate([np.empty((2, 0), np.int64), *parts], axis=1), sum(count for _, count in pieces)


@functools.lru_cache(maxsize=64)
def guess_of(spans: int) -> np.ndarray:
    """A guess at the order of so many spans, which :func:`disjoint` updates."""
    return np.arange(spans)
