"""The order in which the rows of a row-sparse gradient are visited: ascending, each row's occurrences in their order.

A key holds a row id in its high bits and the occurrence's position in its low ``shift`` bits. Keys of a strictly
increasing list of rows are in order as they are; others go through a stable radix sort on the bits that the number of
rows needs, each digit counted and moved by all workers.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from adagrad.kernels.numba_jit import in_parallel, jit, max_workers, place, worker, workers

SMALL = 262_144
"""Keys below which one worker sorts faster than several."""

DIGIT = 11
"""Most bits sorted in one pass: the counters of a digit stay in the first-level cache."""


@jit(helper=True)
def _pack(indices: Any, first: int, last: int, rows: int, shift: int, keys: Any) -> Any:
    """Fill ``keys``; the position of the first row id outside the weight, or -1, and whether the ids increase."""
    increasing: Any = True
    before = np.int64(indices[first - 1]) if first > 0 else np.int64(-1)
    for i in range(first, last):
        row = np.int64(indices[i])
        if row < 0 or row >= rows:
            return i, False
        increasing &= row > before
        before = row
        keys[i] = (np.uint64(row) << np.uint64(shift)) | np.uint64(i)
    return -1, increasing


@jit(helper=True)
def _count(keys: Any, first: int, last: int, low: int, mask: Any, counts: Any) -> None:
    for digit in range(len(counts)):
        counts[digit] = 0
    for i in range(first, last):
        counts[(keys[i] >> np.uint64(low)) & mask] += 1


@jit()
def _offsets(counts: Any) -> None:
    """From counts to where each worker's keys of each digit go: digit by digit, within one worker by worker."""
    position = 0
    for digit in range(counts.shape[1]):
        for k in range(counts.shape[0]):
            count = counts[k, digit]
            counts[k, digit] = position
            position += count


@jit(helper=True)
def _move(keys: Any, out: Any, first: int, last: int, low: int, mask: Any, offsets: Any) -> None:
    for i in range(first, last):
        digit = (keys[i] >> np.uint64(low)) & mask
        out[offsets[digit]] = keys[i]
        offsets[digit] += 1


@jit()
def _order_serial(indices: Any, rows: int, shift: int, passes: int, digit: int, keys: Any, spare: Any) -> Any:
    n = len(keys)
    bad, increasing = _pack(indices, 0, n, rows, shift, keys)
    if bad >= 0 or increasing:
        return bad, increasing
    mask = np.uint64((1 << digit) - 1)
    counts = np.zeros((passes, 1, 1 << digit), np.int64)
    for i in range(n):  # the digits do not depend on the order, so all are counted at once
        for p in range(passes):
            counts[p, 0, (keys[i] >> np.uint64(shift + p * digit)) & mask] += 1
    for p in range(passes):
        source, target = (keys, spare) if p % 2 == 0 else (spare, keys)
        _offsets(counts[p])
        _move(source, target, 0, n, shift + p * digit, mask, counts[p, 0])
    return np.int64(-1), False


@functools.cache
def _kernels(indices: str) -> tuple[int, int, int]:
    """The workers that pack row ids of a dtype into keys, count a digit and move by it."""
    dtype = np.dtype(indices).type

    def pack(arguments: Any, k: Any, count: Any) -> None:
        a = numba.carray(place(arguments), 12, np.int64)
        ids, keys = numba.carray(place(a[0]), a[1], dtype), numba.carray(place(a[2]), a[1], np.uint64)
        found = numba.carray(place(a[4]), (count, 2), np.int64)
        found[k, 0], found[k, 1] = _pack(ids, a[1] * k // count, a[1] * (k + 1) // count, a[5], a[6], keys)

    def count_digit(arguments: Any, k: Any, count: Any) -> None:
        a = numba.carray(place(arguments), 12, np.int64)
        keys, counts = numba.carray(place(a[2]), a[1], np.uint64), numba.carray(place(a[7]), (count, a[8]), np.int64)
        _count(keys, a[1] * k // count, a[1] * (k + 1) // count, a[9], np.uint64(a[8] - 1), counts[k])

    def move(arguments: Any, k: Any, count: Any) -> None:
        a = numba.carray(place(arguments), 12, np.int64)
        keys, out = numba.carray(place(a[2]), a[1], np.uint64), numba.carray(place(a[3]), a[1], np.uint64)
        counts = numba.carray(place(a[7]), (count, a[8]), np.int64)
        _move(keys, out, a[1] * k // count, a[1] * (k + 1) // count, a[9], np.uint64(a[8] - 1), counts[k])

    return worker(pack), worker(count_digit), worker(move)


@jit()
def _arguments(indices: Any, keys: Any, spare: Any, found: Any, rows: int, shift: int, counts: Any, low: int) -> Any:
    block = np.empty(12, np.int64)
    block[0], block[1] = indices.ctypes.data, len(indices)
    block[2], block[3] = keys.ctypes.data, spare.ctypes.data
    block[4], block[5], block[6] = found.ctypes.data, rows, shift
    block[7], block[8], block[9] = counts.ctypes.data, counts.shape[1], low
    return block


def _order_parallel(
    indices: Any, rows: int, shift: int, passes: int, digit: int, keys: Any, spare: Any, count: int
) -> Any:
    pack, count_digit, move = _kernels(indices.dtype.name)
    found, counts = np.empty((count, 2), np.int64), np.empty((count, 1 << digit), np.int64)
    in_parallel(pack, _arguments(indices, keys, spare, found, rows, shift, counts, 0), count)
    bad = found[:, 0]
    if bad.max() >= 0:
        return bad[bad >= 0][0], False
    if found[:, 1].all():
        return -1, True
    for p in range(passes):
        source, target = (keys, spare) if p % 2 == 0 else (spare, keys)
        arguments = _arguments(indices, source, target, found, rows, shift, counts, shift + p * digit)
        in_parallel(count_digit, arguments, count)
        _offsets(counts)
        in_parallel(move, arguments, count)
    return -1, False


def row_order(indices: Any, rows: int, threads: int | None) -> tuple[Any, int, int, bool]:
    """The keys in order, their ``shift``, the position of a bad row id or -1, and whether the ids strictly increase.

    ``indices`` are int32 or int64, contiguous and native; ``rows`` is the number of rows of the weight.
    """
    n = len(indices)
    shift = n.bit_length()
    if shift + rows.bit_length() > 64:
        raise ValueError(f"indices: {n} row ids of a weight of {rows} rows: their bits must fit 64 together")
    bits = max((rows - 1).bit_length(), 1)
    passes = -(-bits // DIGIT)
    digit = -(-bits // passes)
    keys, spare = np.empty((2, n), np.uint64)
    sizes = indices, rows, shift, passes, digit, keys, spare
    threads = 1 if n < SMALL else threads or max_workers()
    if threads < 2:
        bad, increasing = _order_serial(*sizes)
    else:
        with workers(threads) as count:
            bad, increasing = _order_serial(*sizes) if count < 2 else _order_parallel(*sizes, count)
    return (keys if increasing or passes % 2 == 0 else spare), shift, int(bad), bool(increasing)
