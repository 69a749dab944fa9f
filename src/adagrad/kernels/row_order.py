"""The order in which the rows of a row-sparse gradient are visited: ascending, each row's occurrences in their order.

A key holds a row id in its high bits and the occurrence's position in its low ``shift`` bits. Keys of a strictly
increasing list of rows are in order as they are; others go through a stable radix sort on the bits that the number of
rows needs, each digit counted and moved by all workers.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from adagrad.kernels.numba_jit import jit, workers

SMALL = 16_384
"""Keys below which one worker sorts faster than several."""

DIGIT = 11
"""Most bits sorted in one pass: the counters of a digit stay in the first-level cache."""


@jit()
def pack(indices: Any, rows: int, shift: int, keys: Any) -> Any:
    """Fill ``keys``; the position of the first row id outside the weight, or -1, and whether the ids increase."""
    increasing: Any = True
    before: Any = -1
    for i in range(len(indices)):
        row = np.int64(indices[i])
        if row < 0 or row >= rows:
            return i, False
        increasing &= row > before
        before = row
        keys[i] = (np.uint64(row) << np.uint64(shift)) | np.uint64(i)
    return -1, increasing


@jit(helper=True)
def _count(keys: Any, first: int, last: int, low: int, mask: Any, counts: Any) -> None:
    counts[:] = 0
    for i in range(first, last):
        counts[(keys[i] >> np.uint64(low)) & mask] += 1


@jit(helper=True)
def _offsets(counts: Any) -> None:
    """From counts to where each worker's keys of each digit go: digit by digit, within one worker by worker."""
    position = 0
    for digit in range(counts.shape[1]):
        for worker in range(counts.shape[0]):
            count = counts[worker, digit]
            counts[worker, digit] = position
            position += count


@jit(helper=True)
def _move(keys: Any, out: Any, first: int, last: int, low: int, mask: Any, offsets: Any) -> None:
    for i in range(first, last):
        digit = (keys[i] >> np.uint64(low)) & mask
        out[offsets[digit]] = keys[i]
        offsets[digit] += 1


@jit()
def _sort_serial(keys: Any, spare: Any, shift: int, passes: int, digit: int) -> None:
    n = len(keys)
    mask = np.uint64((1 << digit) - 1)
    counts = np.empty((1, 1 << digit), np.int64)
    for p in range(passes):
        source, target = (keys, spare) if p % 2 == 0 else (spare, keys)
        _count(source, 0, n, shift + p * digit, mask, counts[0])
        _offsets(counts)
        _move(source, target, 0, n, shift + p * digit, mask, counts[0])


@jit(parallel=True)
def _sort_parallel(keys: Any, spare: Any, shift: int, passes: int, digit: int, count: int) -> None:
    n = len(keys)
    mask = np.uint64((1 << digit) - 1)
    counts = np.empty((count, 1 << digit), np.int64)
    for p in range(passes):
        source, target = (keys, spare) if p % 2 == 0 else (spare, keys)
        low = shift + p * digit
        for k in numba.prange(count):
            _count(source, n * k // count, n * (k + 1) // count, low, mask, counts[k])
        _offsets(counts)
        for k in numba.prange(count):
            _move(source, target, n * k // count, n * (k + 1) // count, low, mask, counts[k])


def row_order(indices: Any, rows: int, threads: int) -> tuple[Any, int, int, bool]:
    """The keys in order, their ``shift``, the position of a bad row id or -1, and whether all rows are distinct."""
    n = len(indices)
    shift = n.bit_length()
    if shift + rows.bit_length() > 64:
        raise ValueError(f"indices: {n} row ids of a weight of {rows} rows: their bits must fit 64 together")
    keys = np.empty(n, np.uint64)
    bad, increasing = pack(indices, rows, shift, keys)
    if bad >= 0 or increasing:
        return keys, shift, bad, increasing
    bits = max((rows - 1).bit_length(), 1)
    passes = -(-bits // DIGIT)
    digit = -(-bits // passes)
    spare = np.empty_like(keys)
    if n < SMALL or threads < 2:
        _sort_serial(keys, spare, shift, passes, digit)
    else:
        with workers(threads) as count:
            if count < 2:
                _sort_serial(keys, spare, shift, passes, digit)
            else:
                _sort_parallel(keys, spare, shift, passes, digit, count)
    return (keys if passes % 2 == 0 else spare), shift, bad, False
