"""Row-sparse updates on the CPU: each row present is updated once, with the sum of its occurrences.

``keys`` name the rows in ascending order (see :mod:`adagrad.kernels.row_order`). A worker takes the runs of equal rows
that start in its share. Runs of more than ``LONG`` occurrences, the frequent rows, are first summed chunk by chunk by
all workers, so that no worker is left with one such row alone; the order of the additions is the same either way.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from adagrad.kernels.cpu_dense import elements, one_row
from adagrad.kernels.cpu_rule import constants
from adagrad.kernels.formats import TOKENS, load, pointer, prefetch, store
from adagrad.kernels.numba_jit import jit, max_workers, place, run, worker
from adagrad.rule import CHUNK, LANES

WEIGHT, HISTORY, MASTER, VALUES = range(4)
"""Columns of ``base`` and ``stride``: where row 0 of each operand is, and the bytes from a row to the next."""

LONG = 4 * CHUNK
AHEAD_BYTES = 1024
"""How far ahead of the current key memory is asked for, in bytes of the weight's rows."""

GATHER_AHEAD = 32
"""How many occurrences ahead of the one that is added to a row's sum its values are asked for."""

LINE = 64
SMALL = 65_536
"""Elements below which starting the threads costs more than they save."""


@jit(helper=True)
def _ask(address: Any, size: Any) -> None:
    for offset in range(0, size, LINE):
        prefetch(address + offset)


@jit(helper=True)
def _sum_chunk(keys: Any, first: int, last: int, mask: Any, values: Any, stride: Any, ahead: int, tv: Any,
               out: Any, length: int) -> None:  # fmt: skip
    """``out`` = sum of the values at the positions of ``keys[first:last]``, one after the other."""
    for i in range(first, last):
        if i + ahead < len(keys):
            _ask(values + np.int64(keys[i + ahead] & mask) * stride, length * tv.itemsize)
        row = pointer(values + np.int64(keys[i] & mask) * stride, tv, "grad")
        if i == first:
            for j in range(length):
                store(out, j, load(row, j))
        else:
            for j in range(length):
                store(out, j, load(out, j) + load(row, j))


@jit(helper=True)
def _add(total: Any, other: Any, length: int) -> None:
    for j in range(length):
        store(total, j, load(total, j) + load(other, j))


@jit(helper=True)
def _share(keys: Any, first: int, last: int, shift: int, distinct: bool, base: Any, stride: Any, tw: Any, tv: Any,
           th: Any, tm: Any, length: int, row_wise: Any, hyper: Any, scalars: Any, long: Any, sums: Any
           ) -> None:  # fmt: skip
    """Update the rows whose run of keys starts in ``[first, last)``."""
    n = len(keys)
    low, mask = np.uint64(shift), np.uint64((1 << shift) - 1)
    weights, histories, masters, values = base[WEIGHT], base[HISTORY], base[MASTER], base[VALUES]
    to_weight, to_history, to_master, to_values = stride[WEIGHT], stride[HISTORY], stride[MASTER], stride[VALUES]
    weight_bytes, history_bytes = length * tw.itemsize, length * th.itemsize if row_wise is None else th.itemsize
    ahead = min(max(AHEAD_BYTES // max(weight_bytes, 1), 4), 8)
    fixed, lanes = constants(scalars, hyper, th), np.empty(LANES, th.dtype)
    scratch = np.empty((2, max(length, 1)), th.dtype)
    own_total = pointer(np.int64(scratch.ctypes.data), th, "sum")
    total = own_total
    chunk = pointer(np.int64(scratch.ctypes.data) + length * th.itemsize, th, "sum")
    from_sums = np.int64(sums.ctypes.data)
    next_long = 0
    i = first
    while i > 0 and i < n and keys[i] >> low == keys[i - 1] >> low:
        i += 1
    asked = i
    while i < last:
        row = np.int64(keys[i] >> low)
        end = i + 1
        if not distinct:
            while next_long < long.shape[0] and long[next_long, 0] < i:
                next_long += 1
            if next_long < long.shape[0] and long[next_long, 0] == i:
                end = long[next_long, 1]
                first_sum, chunks = long[next_long, 2], (end - i + CHUNK - 1) // CHUNK
                total = pointer(from_sums + first_sum * length * th.itemsize, th, "sum")
                for c in range(first_sum + 1, first_sum + chunks):
                    _add(total, pointer(from_sums + c * length * th.itemsize, th, "sum"), length)
            else:
                while end < n and np.int64(keys[end] >> low) == row:
                    end += 1
        # Rows of weights and histories are asked for as the keys come; those of the current run have been.
        asked = max(asked, end)
        while asked < min(end + ahead, n):
            next_row = np.int64(keys[asked] >> low)
            _ask(weights + next_row * to_weight, weight_bytes)
            _ask(histories + next_row * to_history, history_bytes)
            if tm is not None:
                _ask(masters + next_row * to_master, length * th.itemsize)
            if not distinct:
                _ask(values + np.int64(keys[asked] & mask) * to_values, length * tv.itemsize)
            asked += 1
        w = pointer(weights + row * to_weight, tw, "weight")
        h = pointer(histories + row * to_history, th, "history")
        m = pointer(masters + row * to_master, tm, "master")
        if end - i == 1:
            g = pointer(values + np.int64(keys[i] & mask) * to_values, tv, "grad")
            if row_wise is None:
                elements(w, g, h, m, 0, length, fixed)
            else:
                one_row(w, g, h, m, 0, length, 0, fixed, lanes)
        else:
            if next_long >= long.shape[0] or long[next_long, 0] != i:
                total = own_total
                _sum_chunk(keys, i, min(i + CHUNK, end), mask, values, to_values, GATHER_AHEAD, tv, total, length)
                for start in range(i + CHUNK, end, CHUNK):
                    stop = min(start + CHUNK, end)
                    _sum_chunk(keys, start, stop, mask, values, to_values, GATHER_AHEAD, tv, chunk, length)
                    _add(total, chunk, length)
            if row_wise is None:
                elements(w, total, h, m, 0, length, fixed)
            else:
                one_row(w, total, h, m, 0, length, 0, fixed, lanes)
        i = end
    scratch[0, 0] = 0  # it is used by address above: this keeps it alive until here


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
            found[count, 0], found[count, 1], found[count, 2] = i, end, chunks
            chunks += (end - i + CHUNK - 1) // CHUNK
            count += 1
            i = end
        else:
            i += 1
    return found[:count], chunks


@jit(helper=True)
def _border(short: int, long: Any) -> int:
    """The position of the ``short``-th key that is in no long run."""
    for r in range(long.shape[0]):
        if short < long[r, 0]:
            break
        short += long[r, 1] - long[r, 0]
    return short


@jit(helper=True)
def _given(arguments: Any, th: Any) -> Any:
    """What the block of arguments holds, see :func:`_arguments`."""
    given = numba.carray(place(arguments), 20, np.int64)
    keys = numba.carray(place(given[0]), given[1], np.uint64)
    base, stride = given[8:12], given[12:16]
    hyper = numba.carray(place(given[5]), 3, np.float64)
    scalars = numba.carray(place(given[6]), 4, np.float64)
    long = numba.carray(place(given[16]), (given[17], 3), np.int64)
    sums = numba.carray(place(given[18]), (given[19], given[4]), th.dtype)
    return keys, given[2], given[3] != 0, given[4], base, stride, hyper, scalars, long, sums


@functools.cache
def kernel(weight: str, values: str, history: str, master: str | None, row_wise: bool) -> int:
    """The worker that updates rows, for operands of these formats (None: no master copy)."""
    tw, tv, th, tm = TOKENS[weight], TOKENS[values], TOKENS[history], None if master is None else TOKENS[master]
    rows = row_wise or None  # None or True, types that differ: only one of the two is compiled

    def update(arguments: Any, k: Any, count: Any) -> None:
        keys, shift, distinct, length, base, stride, hyper, scalars, long, sums = _given(arguments, th)
        rest = len(keys)
        for r in range(long.shape[0]):
            rest -= long[r, 1] - long[r, 0]
        first = 0 if k == 0 else _border(rest * k // count, long)
        last = len(keys) if k == count - 1 else _border(rest * (k + 1) // count, long)
        _share(keys, first, last, shift, distinct, base, stride, tw, tv, th, tm, length, rows, hyper, scalars, long,
               sums)  # fmt: skip

    return worker(update)


@functools.cache
def kernel_of_sums(values: str, history: str) -> int:
    """The worker that sums the chunks of the long runs."""
    tv, th = TOKENS[values], TOKENS[history]

    def sum_chunks(arguments: Any, k: Any, count: Any) -> None:
        keys, shift, _, length, base, stride, _, _, long, sums = _given(arguments, th)
        mask, r = np.uint64((1 << shift) - 1), 0
        for c in range(sums.shape[0] * k // count, sums.shape[0] * (k + 1) // count):
            while r + 1 < long.shape[0] and long[r + 1, 2] <= c:
                r += 1
            start = long[r, 0] + (c - long[r, 2]) * CHUNK
            end = min(start + CHUNK, long[r, 1])
            out = pointer(np.int64(sums.ctypes.data) + c * length * th.itemsize, th, "sum")
            _sum_chunk(keys, start, end, mask, base[VALUES], stride[VALUES], GATHER_AHEAD, tv, out, length)

    return worker(sum_chunks)


@jit()
def _arguments(keys: Any, shift: int, distinct: bool, length: int, base: Any, stride: Any, hyper: Any, scalars: Any,
               long: Any, sums: Any) -> Any:  # fmt: skip
    block = np.empty(20, np.int64)
    block[0], block[1], block[2], block[3], block[4] = keys.ctypes.data, len(keys), shift, distinct, length
    block[5], block[6], block[7] = hyper.ctypes.data, scalars.ctypes.data, 0
    for operand in range(4):
        block[8 + operand], block[12 + operand] = base[operand], stride[operand]
    block[16], block[17] = long.ctypes.data, long.shape[0]
    block[18], block[19] = sums.ctypes.data, sums.shape[0]
    return block


_NO_LONG_RUNS = np.empty((0, 3), np.int64)


def launch(keys: Any, shift: int, distinct: bool, base: Any, stride: Any, formats: Any, length: int, row_wise: bool,
           hyper: Any, scalars: Any, threads: int | None) -> None:  # fmt: skip
    """Update the rows that ``keys`` name.

    ``distinct`` says that no row occurs twice, and that position ``i`` is the ``i``-th key's; ``formats`` are those of
    weight, values, history and master copy (None for none). At most ``threads`` threads, or as many as Numba may use.
    """
    threads = 1 if len(keys) * length < SMALL else threads or max_workers()
    long, chunks = _NO_LONG_RUNS, 0
    if threads > 1 and not distinct:
        long, chunks = long_runs(keys, shift)
    sums = np.empty((chunks, length), TOKENS[formats[2]].dtype)
    arguments = _arguments(keys, shift, distinct, length, base, stride, hyper, scalars, long, sums)
    if chunks:
        run(kernel_of_sums(formats[1], formats[2]), arguments, threads)
    run(kernel(*formats, row_wise), arguments, threads)
