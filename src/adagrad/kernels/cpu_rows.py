"""Row-sparse updates on the CPU: each row present is updated once, with the sum of its occurrences.

The gradient is read from front to back. A row that occurs once is updated from where its values lie; the values of the
others are added, as they come, to sums, from which their rows are updated at the end. While one row is computed, the
memory of a row to come is asked for, block by block.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from adagrad.kernels.blocks import ask, filled, load_block, store_block
from adagrad.kernels.cpu_dense import elements, one_row
from adagrad.kernels.cpu_rule import constants
from adagrad.kernels.formats import TOKENS, pointer
from adagrad.kernels.numba_jit import jit, max_workers, place, run, worker, workers
from adagrad.kernels.row_groups import (
    ARE_DISTINCT,
    BASE,
    ENDS,
    ENTRIES,
    FACTS,
    GRAD,
    HISTORY,
    LENGTH,
    MASTER,
    RATES,
    ROWS,
    SCALARS,
    STRIDE,
    WEIGHT,
    number_rows,
    own_positions,
)
from adagrad.rule import CHUNK, LANES

SMALL = 65_536
"""Elements below which starting the threads costs more than they save."""

AHEAD, AHEAD_BYTES = 4, 2048
"""How many rows ahead memory is asked for; of wide rows, how many bytes of the weight."""

SUMS_AHEAD = 8
"""The same for occurrences that are only added up."""

BATCH, BATCH_BYTES = 1024, 65_536
"""Occurrences that are looked at together, those of single rows first; of wide rows, how many bytes of the gradient."""


# ---------------------------------------------------------------------------------------------------------------- rows


@jit(helper=True)
def _operands(base: Any, stride: Any, row: Any, tw: Any, th: Any, tm: Any) -> Any:
    """Weight, history and master copy of a row."""
    w = pointer(base[WEIGHT] + row * stride[WEIGHT], tw, "weight")
    h = pointer(base[HISTORY] + row * stride[HISTORY], th, "history")
    return w, h, pointer(base[MASTER] + row * stride[MASTER], tm, "master")


@jit(helper=True)
def _update_row(at: Any, g: Any, coming: Any, coming_g: Any, length: int, fixed: Any, row_wise: Any) -> None:
    """Update the row whose operands are ``at``, and ask for those of a row to come and its gradient."""
    w, h, m = at
    next_w, next_h, next_m = coming
    if row_wise is None:
        elements(w, g, h, m, 0, length, fixed, (next_w, coming_g, next_h, next_m))
    else:
        ask(next_h, 0)
        one_row(w, g, h, m, 0, length, 0, fixed, (next_w, coming_g, None, next_m))


@jit(helper=True)
def _add(total: Any, g: Any, length: int, coming: Any, coming_g: Any) -> None:
    """Add a row of values to a sum, and ask for the sum and the values to come."""
    whole = length - length % LANES
    for i in range(0, whole, LANES):
        ask(coming, i)
        ask(coming_g, i)
        store_block(total, i, load_block(total, i, None) + load_block(g, i, None), None)
    if whole < length:
        ask(coming, whole)
        ask(coming_g, whole)
        rest = length - whole
        store_block(total, whole, load_block(total, whole, rest) + load_block(g, whole, rest), rest)


@jit(helper=True)
def _clear(total: Any, length: int, token: Any) -> None:
    """Begin a sum: adding to -0 gives the number that is added, the sign of 0 included."""
    zeros, whole = filled(token.dtype.type(-0.0)), length - length % LANES
    for i in range(0, whole, LANES):
        store_block(total, i, zeros, None)
    if whole < length:
        store_block(total, whole, zeros, length - whole)


# ---------------------------------------------------------------------------------------------------------------- sums
#
# Occurrences are added in chunks of CHUNK. A row that has more has a second sum, to which each complete chunk is added.


@jit(helper=True)
def _number_sums(numbers: Any, rows: Any, counts: Any) -> Any:
    """In place: the sum that each position adds to, or -1 where its row occurs once; the row and count of each sum."""
    sum_of, n = np.empty(len(rows), np.int32), 0
    for number in range(len(rows)):
        several = counts[number] > 1
        sum_of[number] = n if several else -1
        rows[n], counts[n] = rows[number], counts[number]
        n += 1 if several else 0
    for j in range(len(numbers)):
        numbers[j] = sum_of[numbers[j]]
    return numbers, rows[:n], counts[:n]


@jit(helper=True)
def _begin_sums(counts: Any, length: int, th: Any) -> Any:
    """Memory of all sums, and of each row's: how much is missing to a chunk (never 0 for a row of one), its second."""
    n = len(counts)
    missing, second, total = np.empty(n, np.int32), np.empty(n, np.int32), n
    for i in range(n):
        is_long = counts[i] > CHUNK
        missing[i], second[i] = CHUNK if is_long else CHUNK + 1, total
        total += 1 if is_long else 0
    memory = np.empty((total, length), th.dtype)
    for i in range(total):
        _clear(_sum(memory, i, length, th), length, th)
    return memory, missing, second


@jit(helper=True)
def _sum(memory: Any, i: Any, length: int, th: Any) -> Any:
    return pointer(np.int64(memory.ctypes.data) + i * length * th.itemsize, th, "sum")


# --------------------------------------------------------------------------------------------------------- the gradient


@jit(helper=True)
def _values(base: Any, stride: Any, position: Any, tv: Any) -> Any:
    return pointer(base[GRAD] + position * stride[GRAD], tv, "grad")


@jit(helper=True)
def _update_once(ids: Any, positions: Any, base: Any, stride: Any, tw: Any, tv: Any, th: Any, tm: Any, length: int,
                 fixed: Any, row_wise: Any, ahead: int) -> None:  # fmt: skip
    """Update the rows at ``positions``, each from the values there."""
    n = len(positions)
    for j in range(n):
        i, then = positions[j], positions[min(j + ahead, n - 1)]
        at = _operands(base, stride, np.int64(ids[i]), tw, th, tm)
        coming = _operands(base, stride, np.int64(ids[then]), tw, th, tm)
        _update_row(at, _values(base, stride, i, tv), coming, _values(base, stride, then, tv), length, fixed, row_wise)


@jit(helper=True)
def _add_up(positions: Any, to: Any, memory: Any, missing: Any, second: Any, base: Any, stride: Any, tv: Any, th: Any,
            length: int) -> None:  # fmt: skip
    """Add the values at ``positions``, each to a sum."""
    n = len(positions)
    for j in range(n):
        then, chunk = min(j + SUMS_AHEAD, n - 1), _sum(memory, to[j], length, th)
        coming, coming_g = _sum(memory, to[then], length, th), _values(base, stride, positions[then], tv)
        _add(chunk, _values(base, stride, positions[j], tv), length, coming, coming_g)
        missing[to[j]] -= np.int32(1)
        if missing[to[j]] == 0:
            missing[to[j]] = CHUNK
            _add(_sum(memory, second[to[j]], length, th), chunk, length, None, None)
            _clear(chunk, length, th)


@jit(helper=True)
def _update_from_sums(rows: Any, counts: Any, memory: Any, missing: Any, second: Any, base: Any, stride: Any, tw: Any,
                      th: Any, tm: Any, length: int, fixed: Any, row_wise: Any, ahead: int) -> None:  # fmt: skip
    n = len(rows)
    for i in range(n):
        then, g = min(i + ahead, n - 1), _sum(memory, i, length, th)
        if counts[i] > CHUNK:
            chunk, g = g, _sum(memory, second[i], length, th)
            if missing[i] < CHUNK:
                _add(g, chunk, length, None, None)
        at = _operands(base, stride, np.int64(rows[i]), tw, th, tm)
        coming = _operands(base, stride, np.int64(rows[then]), tw, th, tm)
        _update_row(at, g, coming, _sum(memory, then, length, th), length, fixed, row_wise)


@jit(helper=True)
def _pick(positions: Any, to: Any, start: int, stop: int, once: Any, several: Any, sums: Any) -> Any:
    """Of the occurrences from ``start`` to ``stop``: the positions of single rows, the others', and their sums."""
    m, e = 0, 0
    for j in range(start, stop):
        once[m], several[e], sums[e] = positions[j], positions[j], to[j]
        m += 1 if to[j] < 0 else 0
        e += 1 if to[j] >= 0 else 0
    return once[:m], several[:e], sums[:e]


@functools.cache
def kernel(is_high: bool, weight: str, values: str, history: str, master: str | None, row_wise: bool) -> int:
    """The worker for these formats of operands (None: no master copy); ids have 64 bits for a high weight, else 32."""
    tw, tv, th, tm = TOKENS[weight], TOKENS[values], TOKENS[history], None if master is None else TOKENS[master]
    by_row = row_wise or None  # None or True, types that differ: only one of the two is compiled
    dtype = np.int64 if is_high else np.int32

    def update(arguments: Any, k: Any, count: Any) -> None:
        facts = numba.carray(place(arguments), FACTS, np.int64)
        n, length, distinct = facts[ENTRIES], facts[LENGTH], facts[ARE_DISTINCT]
        ids, base, stride = numba.carray(place(facts[ROWS]), n, dtype), facts[BASE:ENDS], facts[STRIDE:ROWS]
        rates = numba.carray(place(facts[RATES]), 3, np.float64)
        scalars = numba.carray(place(facts[SCALARS]), 4, np.float64)
        fixed = constants(scalars, rates, th)
        ahead = min(max(AHEAD_BYTES // max(length * tw.itemsize, 1), 1), AHEAD)
        batch = min(max(BATCH_BYTES // max(length * tv.itemsize, 1), 64), BATCH)
        once, several, sums = np.empty((3, BATCH + 1), np.int64)
        # Distinct rows are shared out by position, others by owner.
        positions = own_positions(ids if distinct == 0 else ids[:0], k, count)
        numbers, rows, counts = number_rows(ids, positions)
        to, rows, counts = _number_sums(numbers, rows, counts)
        memory, missing, second = _begin_sums(counts, length, th)
        first, last = (n * k // count, n * (k + 1) // count) if distinct else (0, len(positions))
        for start in range(first, last, batch):
            stop = min(start + batch, last)
            if distinct:
                for i in range(start, stop):
                    once[i - start] = i
                single, others, added = once[: stop - start], several[:0], sums[:0]
            else:
                single, others, added = _pick(positions, to, start, stop, once, several, sums)
            _update_once(ids, single, base, stride, tw, tv, th, tm, length, fixed, by_row, ahead)
            _add_up(others, added, memory, missing, second, base, stride, tv, th, length)
        _update_from_sums(rows, counts, memory, missing, second, base, stride, tw, th, tm, length, fixed, by_row, ahead)
        memory[:0] = 0  # it is used by address above: this keeps it alive until here

    return worker(update)


def launch(facts: Any, rows: Any, formats: Any, row_wise: bool, rates: Any, scalars: Any, threads: int | None) -> None:
    """Update ``rows``, the row of each of the values, which ``facts`` has been told of.

    ``formats`` are those of weight, values, history and master copy (None for none). At most ``threads`` threads, or as
    many as Numba may use.
    """
    facts[RATES], facts[SCALARS] = rates.ctypes.data, scalars.ctypes.data
    threads = 1 if facts[ENTRIES] * facts[LENGTH] < SMALL else threads or max_workers()
    with workers(threads) as count:
        run(kernel(rows.itemsize == 8, *formats, row_wise), facts, count)
