"""Row-sparse updates on the CPU: each row present is updated once, with the sum of its occurrences.

``keys`` name the rows in ascending order (see :mod:`adagrad.kernels.row_order`). A worker takes the runs of equal rows
that start in its share. Runs of more than ``LONG`` occurrences, the frequent rows, are first summed chunk by chunk by
all workers, so that no worker is left with one such row alone; the order of the additions is the same either way.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from adagrad.kernels.cpu_dense import elements, row
from adagrad.kernels.formats import TOKENS, load, pointer, prefetch
from adagrad.kernels.numba_jit import jit, workers
from adagrad.rule import CHUNK, LANES

WEIGHT, HISTORY, MASTER, VALUES = range(4)
"""Columns of ``base`` and ``stride``: where row 0 of each operand is, and the bytes from a row to the next."""

LONG = 4 * CHUNK
AHEAD = 8
"""How many keys ahead of the current one its rows are asked for."""

LINE = 64
SMALL = 16_384
"""Elements below which starting the threads costs more than they save."""


@jit(helper=True)
def _ask(address: Any, size: int) -> None:
    for offset in range(0, size, LINE):
        prefetch(address + offset)


@jit(helper=True)
def _sum_chunk(keys: Any, first: int, last: int, mask: Any, base: int, stride: int, tv: Any, out: Any) -> None:
    """``out`` = sum of the values at the positions of ``keys[first:last]``, one after the other."""
    values = pointer(base + np.int64(keys[first] & mask) * stride, tv)
    for j in range(len(out)):
        out[j] = load(values, j)
    for i in range(first + 1, last):
        if i + AHEAD < last:
            _ask(base + np.int64(keys[i + AHEAD] & mask) * stride, len(out) * tv.itemsize)
        values = pointer(base + np.int64(keys[i] & mask) * stride, tv)
        for j in range(len(out)):
            out[j] += load(values, j)


@jit(helper=True)
def _apply(row_id: Any, base: Any, stride: Any, g: Any, tw: Any, th: Any, tm: Any, length: int, row_wise: bool,
           hyper: Any, scalars: Any, lanes: Any) -> None:  # fmt: skip
    w = pointer(base[WEIGHT] + row_id * stride[WEIGHT], tw)
    h = pointer(base[HISTORY] + row_id * stride[HISTORY], th)
    m = pointer(base[MASTER] + row_id * stride[MASTER], tm)
    if row_wise:
        row(w, g, h, m, 0, length, 0, hyper, scalars, lanes)
    else:
        elements(w, g, h, m, 0, length, hyper, scalars, lanes.dtype.type)


@jit(helper=True)
def _share(keys: Any, first: int, last: int, shift: int, base: Any, stride: Any, tw: Any, tv: Any, th: Any, tm: Any,
           length: int, row_wise: bool, hyper: Any, scalars: Any, long: Any, sums: Any) -> None:  # fmt: skip
    """Update the rows whose run of keys starts in ``[first, last)``."""
    n = len(keys)
    mask = np.uint64((1 << shift) - 1)
    low = np.uint64(shift)
    lanes = np.empty(LANES, th.dtype)
    total, chunk = np.empty(length, th.dtype), np.empty(length, th.dtype)
    summed = pointer(np.int64(total.ctypes.data), th)
    history_bytes = th.itemsize if row_wise else length * th.itemsize
    next_long = 0
    i = first
    while i > 0 and i < n and keys[i] >> low == keys[i - 1] >> low:
        i += 1
    while i < last:
        row_id = keys[i] >> low
        end = i + 1
        while next_long < long.shape[0] and long[next_long, 0] < i:
            next_long += 1
        if next_long < long.shape[0] and long[next_long, 0] == i:
            end = long[next_long, 1]
            at = long[next_long, 2]
            total[:] = sums[at]
            for c in range(1, (end - i + CHUNK - 1) // CHUNK):
                for j in range(length):
                    total[j] += sums[at + c, j]
        else:
            while end < n and keys[end] >> low == row_id:
                end += 1
            if end - i > 1:
                _sum_chunk(keys, i, min(i + CHUNK, end), mask, base[VALUES], stride[VALUES], tv, total)
                for start in range(i + CHUNK, end, CHUNK):
                    _sum_chunk(keys, start, min(start + CHUNK, end), mask, base[VALUES], stride[VALUES], tv, chunk)
                    for j in range(length):
                        total[j] += chunk[j]
        if end + AHEAD < n:
            ahead = np.int64(keys[end + AHEAD] >> low)
            _ask(base[WEIGHT] + ahead * stride[WEIGHT], length * tw.itemsize)
            _ask(base[HISTORY] + ahead * stride[HISTORY], history_bytes)
            _ask(base[VALUES] + np.int64(keys[end + AHEAD] & mask) * stride[VALUES], length * tv.itemsize)
        if end - i > 1:
            _apply(np.int64(row_id), base, stride, summed, tw, th, tm, length, row_wise, hyper, scalars, lanes)
        else:
            values = pointer(base[VALUES] + np.int64(keys[i] & mask) * stride[VALUES], tv)
            _apply(np.int64(row_id), base, stride, values, tw, th, tm, length, row_wise, hyper, scalars, lanes)
        i = end


@jit()
def long_runs(keys: Any, shift: int) -> Any:
    """The runs of more than ``LONG`` keys: first key, end, and the number of chunks in the long runs before."""
    n = len(keys)
    low = np.uint64(shift)
    found = np.empty((n // LONG + 1, 3), np.int64)
    count, chunks, i = 0, 0, 0
    while i + LONG < n:
        # Equal keys are neighbours, so a long run that begins at i reaches i + LONG.
        if keys[i] >> low == keys[i + LONG] >> low and (i == 0 or keys[i] >> low != keys[i - 1] >> low):
            end = i + LONG + 1
            while end < n and keys[end] >> low == keys[i] >> low:
                end += 1
            found[count] = i, end, chunks
            chunks += (end - i + CHUNK - 1) // CHUNK
            count += 1
            i = end
        else:
            i += 1
    return found[:count], chunks


@jit()
def serial(keys: Any, shift: int, base: Any, stride: Any, tw: Any, tv: Any, th: Any, tm: Any, length: int,
           row_wise: bool, hyper: Any, scalars: Any) -> None:  # fmt: skip
    none, no_sums = np.empty((0, 3), np.int64), np.empty((0, 0), th.dtype)
    _share(keys, 0, len(keys), shift, base, stride, tw, tv, th, tm, length, row_wise, hyper, scalars, none, no_sums)


@jit(helper=True)
def _border(short: int, long: Any) -> int:
    """The position of the ``short``-th key that is in no long run."""
    for r in range(long.shape[0]):
        if short < long[r, 0]:
            break
        short += long[r, 1] - long[r, 0]
    return short


@jit(parallel=True)
def parallel(keys: Any, shift: int, base: Any, stride: Any, tw: Any, tv: Any, th: Any, tm: Any, length: int,
             row_wise: bool, hyper: Any, scalars: Any, count: int) -> None:  # fmt: skip
    n = len(keys)
    mask = np.uint64((1 << shift) - 1)
    long, chunks = long_runs(keys, shift)
    sums = np.empty((chunks, length), th.dtype)
    for k in numba.prange(count):
        r = 0
        for c in range(chunks * k // count, chunks * (k + 1) // count):
            while r + 1 < long.shape[0] and long[r + 1, 2] <= c:
                r += 1
            start = long[r, 0] + (c - long[r, 2]) * CHUNK
            end = min(start + CHUNK, long[r, 1])
            _sum_chunk(keys, start, end, mask, base[VALUES], stride[VALUES], tv, sums[c])
    rest = n
    for r in range(long.shape[0]):
        rest -= long[r, 1] - long[r, 0]
    for k in numba.prange(count):
        first = 0 if k == 0 else _border(rest * k // count, long)
        last = n if k == count - 1 else _border(rest * (k + 1) // count, long)
        _share(keys, first, last, shift, base, stride, tw, tv, th, tm, length, row_wise, hyper, scalars, long, sums)


def launch(keys: Any, shift: int, base: Any, stride: Any, formats: tuple[str, str, str, str | None], length: int,
           row_wise: bool, hyper: Any, scalars: Any, threads: int) -> None:  # fmt: skip
    """Update the rows that ``keys`` name; formats of weight, values, history and master copy (None for none)."""
    tw, tv, th, tm = (None if name is None else TOKENS[name] for name in formats)
    if len(keys) * length < SMALL or threads < 2:
        serial(keys, shift, base, stride, tw, tv, th, tm, length, row_wise, hyper, scalars)
        return
    with workers(threads) as count:
        if count < 2:
            serial(keys, shift, base, stride, tw, tv, th, tm, length, row_wise, hyper, scalars)
        else:
            parallel(keys, shift, base, stride, tw, tv, th, tm, length, row_wise, hyper, scalars, count)
