"""Row-sparse updates on the CPU: each row present is updated once, with the sum of its occurrences.

Rows that occur once are updated straight from their values. The values of the others are added to sums, from which
their rows are updated at the end. Both passes read the gradient from front to back. While one row is computed, a later
one is prefetched, block by block.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from adagrad.kernels.blocks import load_block, prefetch, store_block
from adagrad.kernels.cpu_dense import prefetch_operands, update_block, update_elements, update_row
from adagrad.kernels.cpu_rule import constants
from adagrad.kernels.formats import TOKENS, load, pointer, store
from adagrad.kernels.numba_jit import decref, jit, pointer_to, run, worker
from adagrad.kernels.records import (
    ARE_INCREASING,
    BASE,
    CHECKED_IDS,
    ENTRIES,
    FACTS,
    GRAD,
    GROUPS,
    HISTORY,
    LENGTH,
    MASTER,
    RATES,
    SCALARS,
    SCRATCH,
    STRIDE,
    WEIGHT,
)
from adagrad.kernels.row_sums import (
    ADDED,
    ADDRESS,
    COUNTS,
    GROUPED,
    MISSING,
    OWNER,
    POSITIONS,
    SECOND,
    SINGLE,
    SUMMED,
    SUMS,
    TO,
    clear,
    grouped,
    grouping,
    sum_at,
)
from adagrad.kernels.threads import claim, give_back, new_notes, on_threads
from adagrad.rule import CHUNK, LANES

ROW_COST = 50
"""The approximate cost of a row besides its elements, in elements."""

ID_COST = 16
"""The cost of checking an id, likewise; it is less, but a worker that has checked ids has them in its core's cache."""

PARALLEL_MIN = 131_072
"""Work, see :func:`work_of`, below which starting the threads costs more than they save."""

AHEAD, SUMS_AHEAD, ELEMENTS_AHEAD = 8, 32, 32
"""How many rows ahead to prefetch: rows that are updated, those that are only added up, rows of one element."""

ROWS_AHEAD_BYTES = 2048
"""Long rows are prefetched fewer ahead: as many as are no more bytes than this, but at least one."""

BATCH = 1024
"""Rows updated at a time; where ids increase, and so are not grouped, positions are first written to scratch memory."""

TILE = 256
"""Rows of one element that are packed and computed together, a multiple of LANES."""

SCRATCH_WORDS = BATCH // 2 + 4 * TILE
"""Words of a worker's scratch memory: a batch of 4-byte positions and a tile of four operands of up to 8 bytes."""


# ----------------------------------------------------------------------------------------------------------------- rows


@jit()
def work_of(facts: Any) -> Any:
    """The cost of an update, in elements."""
    return facts[ENTRIES] * (facts[LENGTH] + ROW_COST)


@jit(helper=True)
def _four(facts: Any, at: int) -> Any:
    """The facts of weight, gradient, history and master copy from ``at`` on, as values that no store can change."""
    return facts[at + WEIGHT], facts[at + GRAD], facts[at + HISTORY], facts[at + MASTER]


@jit(helper=True)
def _ahead(most: int, length: int, token: Any) -> Any:
    """How many rows ahead to prefetch; ``most`` for short rows."""
    return min(max(ROWS_AHEAD_BYTES // max(length * token.itemsize, 1), 1), most)


@jit(helper=True)
def _operands(base: Any, stride: Any, row: Any, tw: Any, th: Any, tm: Any) -> Any:
    """Weight, history and master copy of a row; ``base`` and ``stride`` are in bytes."""
    w = pointer(base[WEIGHT] + row * stride[WEIGHT], tw, "weight")
    h = pointer(base[HISTORY] + row * stride[HISTORY], th, "history")
    return w, h, pointer(base[MASTER] + row * stride[MASTER], tm, "master")


@jit(helper=True)
def _update_and_prefetch(at: Any, g: Any, coming: Any, coming_g: Any, length: int, fixed: Any, row_wise: Any) -> None:
    """Update the row whose operands are ``at``, and prefetch those of a later row."""
    w, h, m = at
    next_w, next_h, next_m = coming
    if row_wise is None:
        update_elements(w, g, h, m, 0, length, fixed, (next_w, coming_g, next_h, next_m))
    else:
        prefetch(next_h, 0)
        update_row(w, g, h, m, 0, length, 0, fixed, (next_w, coming_g, None, next_m))


@jit(helper=True)
def _add(total: Any, g: Any, length: int, coming: Any, coming_g: Any) -> None:
    """Add a row of values to a sum, and prefetch a later sum and its values."""
    if length == 1:
        prefetch(coming, 0)
        prefetch(coming_g, 0)
        store(total, 0, load(total, 0) + load(g, 0))
        return
    whole = length - length % LANES
    for i in range(0, whole, LANES):
        prefetch(coming, i)
        prefetch(coming_g, i)
        store_block(total, i, load_block(total, i, None) + load_block(g, i, None), None)
    if whole < length:
        prefetch(coming, whole)
        prefetch(coming_g, whole)
        rest = length - whole
        store_block(total, whole, load_block(total, whole, rest) + load_block(g, whole, rest), rest)


# --------------------------------------------------------------------------------------------------------- the gradient


@jit(helper=True)
def _values(base: Any, stride: Any, position: Any, tv: Any) -> Any:
    return pointer(base[GRAD] + position * stride[GRAD], tv, "grad")


@jit(helper=True)
def _update_once(rows: Any, positions: Any, base: Any, stride: Any, tw: Any, tv: Any, th: Any, tm: Any, length: int,
                 fixed: Any, row_wise: Any, ahead: int) -> None:  # fmt: skip
    """Update distinct rows, each from the values at its position; ``ahead`` in rows."""
    n = len(positions)
    for j in range(n):
        then = min(j + ahead, n - 1)
        at = _operands(base, stride, np.int64(rows[j]), tw, th, tm)
        coming = _operands(base, stride, np.int64(rows[then]), tw, th, tm)
        g, coming_g = _values(base, stride, positions[j], tv), _values(base, stride, positions[then], tv)
        _update_and_prefetch(at, g, coming, coming_g, length, fixed, row_wise)


@jit(helper=True)
def _copy(to: Any, i: int, elements: Any, j: int) -> None:
    if to is not None:
        store(to, i, load(elements, j))


@jit(helper=True)
def _update_short_rows(rows: Any, positions: Any, base: Any, stride: Any, tw: Any, tv: Any, th: Any, tm: Any,
                       fixed: Any, tile: Any) -> None:  # fmt: skip
    """:func:`_update_once` for rows of one element, packed into blocks: one alone would take as long as a whole block.

    For such rows, row-wise and element-wise history are the same.
    """
    n, part = len(positions), 8 * TILE
    packed_w, packed_g = pointer(tile, tw, "weight"), pointer(tile + part, tv, "grad")
    packed_h, packed_m = pointer(tile + 2 * part, th, "history"), pointer(tile + 3 * part, tm, "master")
    for start in range(0, n, TILE):
        count = min(n - start, TILE)
        for i in range(count):
            w, h, m = _operands(base, stride, np.int64(rows[start + i]), tw, th, tm)
            then = rows[min(start + i + ELEMENTS_AHEAD, n - 1)]
            next_w, next_h, next_m = _operands(base, stride, np.int64(then), tw, th, tm)
            prefetch_operands((next_w, None, next_h, next_m), 0)
            _copy(packed_w, i, w, 0)
            _copy(packed_g, i, _values(base, stride, positions[start + i], tv), 0)
            _copy(packed_h, i, h, 0)
            _copy(packed_m, i, m, 0)
        for i in range(0, count, LANES):  # lanes past the last row are padding
            update_block(packed_w, packed_g, packed_h, packed_m, i, None, fixed, None)
        for i in range(count):
            w, h, m = _operands(base, stride, np.int64(rows[start + i]), tw, th, tm)
            _copy(w, 0, packed_w, i)
            _copy(h, 0, packed_h, i)
            _copy(m, 0, packed_m, i)


@jit(helper=True)
def _add_up(positions: Any, to: Any, memory: Any, missing: Any, second: Any, base: Any, stride: Any, tv: Any, th: Any,
            length: int) -> None:  # fmt: skip
    """Add the values at ``positions[j]`` to the sum ``to[j]``, and each complete chunk to the row's second sum."""
    n, ahead = len(positions), _ahead(SUMS_AHEAD, length, tv)
    for j in range(n):
        mine, then = np.uint64(to[j]), min(j + ahead, n - 1)
        chunk, coming = sum_at(memory, np.int64(mine), length, th), sum_at(memory, np.int64(to[then]), length, th)
        coming_g = _values(base, stride, positions[then], tv)
        _add(chunk, _values(base, stride, positions[j], tv), length, coming, coming_g)
        missing[mine] -= np.int32(1)
        if missing[mine] == 0:
            missing[mine] = CHUNK
            _add(sum_at(memory, second[mine], length, th), chunk, length, None, None)
            clear(chunk, length, th)


@jit(helper=True)
def _update_from_sums(rows: Any, counts: Any, memory: Any, missing: Any, second: Any, base: Any, stride: Any, tw: Any,
                      th: Any, tm: Any, length: int, fixed: Any, row_wise: Any, ahead: int) -> None:  # fmt: skip
    """Update rows from their sums, to which an incomplete last chunk is added first."""
    n = len(rows)
    for i in range(n):
        then, g = min(i + ahead, n - 1), sum_at(memory, i, length, th)
        if counts[i] > CHUNK:
            chunk, g = g, sum_at(memory, second[i], length, th)
            if missing[i] < CHUNK:
                _add(g, chunk, length, None, None)
        at = _operands(base, stride, np.int64(rows[i]), tw, th, tm)
        coming = _operands(base, stride, np.int64(rows[then]), tw, th, tm)
        _update_and_prefetch(at, g, coming, sum_at(memory, then, length, th), length, fixed, row_wise)


@functools.cache
def kernel(needs_int64: bool, weight: str, values: str, history: str, master: str | None, row_wise: bool) -> int:
    """The address of the worker for operands of these formats (None: no master copy), and for 64- or 32-bit row ids."""
    tw, tv, th, tm = TOKENS[weight], TOKENS[values], TOKENS[history], None if master is None else TOKENS[master]
    by_row = row_wise or None  # None or True differ in type: only one branch is compiled
    dtype = np.int64 if needs_int64 else np.int32

    def update(arguments: Any, k: Any, count: Any) -> None:
        facts = numba.carray(pointer_to(arguments), FACTS, np.int64)
        n, length, increasing = facts[ENTRIES], facts[LENGTH], facts[ARE_INCREASING]
        ids = numba.carray(pointer_to(facts[CHECKED_IDS]), n, dtype)
        base, stride = _four(facts, BASE), _four(facts, STRIDE)
        rates = numba.carray(pointer_to(facts[RATES]), 3, np.float64)
        scalars = numba.carray(pointer_to(facts[SCALARS]), 4, np.float64)
        fixed = constants(scalars, rates, th)
        ahead = _ahead(AHEAD, length, tw)
        kept = numba.carray(pointer_to(facts[GROUPS]), (count, GROUPED, 3), np.int64)[k]
        scratch = numba.carray(pointer_to(facts[SCRATCH]), (count, SCRATCH_WORDS), np.int64)[k]
        own_positions = numba.carray(pointer_to(scratch.ctypes.data), BATCH, np.int32)
        tile = scratch[BATCH // 2 :].ctypes.data
        # Workers divide ids that increase by position, others by owner.
        first, last = n * k // count, n * (k + 1) // count
        rows = ids[first:last] if increasing else grouped(kept, SINGLE, dtype)
        positions = grouped(kept, POSITIONS, np.int32)
        for start in range(0, len(rows), BATCH):
            stop = min(start + BATCH, len(rows))
            if increasing:
                for i in range(start, stop):
                    own_positions[i - start] = first + i
                here = own_positions[: stop - start]
            else:
                here = positions[start:stop]
            if length == 1:
                _update_short_rows(rows[start:stop], here, base, stride, tw, tv, th, tm, fixed, tile)
            else:
                _update_once(rows[start:stop], here, base, stride, tw, tv, th, tm, length, fixed, by_row, ahead)
        memory = kept[SUMS, ADDRESS]
        missing, second = grouped(kept, MISSING, np.int32), grouped(kept, SECOND, np.int32)
        added, to = grouped(kept, ADDED, np.int32), grouped(kept, TO, np.uint32)
        _add_up(added, to, memory, missing, second, base, stride, tv, th, length)
        rows, counts = grouped(kept, SUMMED, dtype), grouped(kept, COUNTS, np.int32)
        _update_from_sums(rows, counts, memory, missing, second, base, stride, tw, th, tm, length, fixed, by_row, ahead)

    return worker(update)


@jit()
def carry_out(facts: Any, kept: Any, scratch: Any, group: int, update: int, count: int) -> bool:
    """Group and update by ``count`` workers; False if memory ran out, and then nothing has changed.

    ``group`` and ``update`` are the workers' addresses; ``kept`` and ``scratch`` come from :func:`room`, for ``count``
    workers or more.
    """
    kept[:] = 0
    facts[GROUPS], facts[SCRATCH] = kept.ctypes.data, scratch.ctypes.data
    are_grouped = True
    if not facts[ARE_INCREASING]:
        run(group, facts, count)
        for k in range(count):
            are_grouped &= kept[k, SUMS, OWNER] != 0
    if are_grouped:
        run(update, facts, count)
    for k in range(count):
        for what in range(GROUPED):
            if kept[k, what, OWNER] != 0:
                decref(kept[k, what, OWNER])
    return are_grouped


@jit()
def room(count: int) -> Any:
    """Memory for ``count`` workers: for what they group, and scratch memory for positions and a tile."""
    return np.empty((count, GROUPED, 3), np.int64), np.empty((count, SCRATCH_WORDS), np.int64)


def out_of_memory(at: str, entries: int) -> MemoryError:
    return MemoryError(f"indices of grads{at}: {entries} row ids: too many for the memory that is left")


def launch(at: str, facts: Any, rows: Any, formats: Any, row_wise: bool, rates: Any, scalars: Any, threads: int | None
           ) -> None:  # fmt: skip
    """Carry out the update that ``facts`` describes; ``rows`` is the array at ``facts[CHECKED_IDS]``.

    ``formats`` are those of weight, values, history and master copy (None for none); ``rates`` those of one weight. At
    most ``threads`` threads, or by default as many as Numba may use.

    Raises
    ------
    MemoryError
        No memory is left for grouping and summing the rows; nothing has changed.
    """
    work = int(work_of(facts))
    needs_int64 = rows.itemsize == 8
    group = 0 if facts[ARE_INCREASING] else grouping(needs_int64, formats[2])
    update = kernel(needs_int64, *formats, row_wise)
    facts[RATES], facts[SCALARS] = rates.ctypes.data, scalars.ctypes.data
    notes = new_notes(work)
    given = facts, group, update, notes
    if not on_threads(_carry_out, given, notes.data, 1 if work < PARALLEL_MIN else threads):
        raise out_of_memory(at, len(rows))


@jit()
def _carry_out(facts: Any, group: int, update: int, notes: Any, count: int) -> bool:
    kept, scratch = room(count)
    done = carry_out(facts, kept, scratch, group, update, claim(notes, count))
    give_back(notes)
    return done
