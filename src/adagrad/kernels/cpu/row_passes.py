"""The passes over the rows of a row-sparse update: rows that occur once, sums of the others, rows updated from sums.

While one row is computed, a later one is prefetched, block by block. ``operands`` are what :func:`addresses` returns
and the tokens of weight, values, history and master copy; ``groups`` is what the worker grouped, see
:mod:`adagrad.kernels.cpu.row_sums`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from adagrad.kernels.cpu.blocks import load_block, prefetch, store_block
from adagrad.kernels.cpu.dense import prefetch_operands, update_block, update_blocks, update_row
from adagrad.kernels.cpu.formats import load, pointer, store
from adagrad.kernels.cpu.row_sums import (
    ADDED,
    ADDRESS,
    COUNTS,
    MISSING,
    SECOND,
    SUMMED,
    SUMS,
    TO,
    clear,
    grouped,
    sum_at,
)
from adagrad.kernels.records import BASE, GRAD, HISTORY, MASTER, STRIDE, WEIGHT
from adagrad.kernels.runtime.numba_jit import jit
from adagrad.rule import CHUNK, LANES

AHEAD, SUMS_AHEAD, ELEMENTS_AHEAD = 8, 32, 32
"""How many rows ahead to prefetch: rows that are updated, those that are only added up, rows of one element."""

ROWS_AHEAD_BYTES = 2048
"""Long rows are prefetched fewer ahead: as many as are no more bytes than this, but at least one."""

TILE = 256
"""Rows of one element that are packed and computed together, a multiple of LANES."""


@jit(helper=True)
def addresses(facts: Any) -> Any:
    """Addresses and strides of weight, gradient, history and master copy, as values that no store can change."""
    base = facts[BASE + WEIGHT], facts[BASE + GRAD], facts[BASE + HISTORY], facts[BASE + MASTER]
    return base, (facts[STRIDE + WEIGHT], facts[STRIDE + GRAD], facts[STRIDE + HISTORY], facts[STRIDE + MASTER])


@jit(helper=True)
def _ahead(most: int, length: int, token: Any) -> Any:
    """How many rows ahead to prefetch; ``most`` for short rows."""
    return min(max(ROWS_AHEAD_BYTES // max(length * token.itemsize, 1), 1), most)


@jit(helper=True)
def _row_at(base: Any, stride: Any, row: Any, tw: Any, th: Any, tm: Any) -> Any:
    """Weight, history and master copy of a row; ``base`` and ``stride`` are in bytes."""
    w = pointer(base[WEIGHT] + row * stride[WEIGHT], tw, "weight")
    h = pointer(base[HISTORY] + row * stride[HISTORY], th, "history")
    return w, h, pointer(base[MASTER] + row * stride[MASTER], tm, "master")


# -------------------------------------------------------------------------------------------------------- over one row
#
# Updates of a row, whose operands are ``at`` and ``g``; those of a later row are prefetched.


@jit(helper=True)
def by_blocks(at: Any, g: Any, coming: Any, coming_g: Any, length: int, fixed: Any) -> None:
    """For a length that is a multiple of LANES, which is all that is compiled for plain terms."""
    w, h, m = at
    next_w, next_h, next_m = coming
    update_blocks(w, g, h, m, 0, length, fixed, (next_w, coming_g, next_h, next_m))


@jit(helper=True)
def by_elements(at: Any, g: Any, coming: Any, coming_g: Any, length: int, fixed: Any) -> None:
    w, h, m = at
    next_w, next_h, next_m = coming
    whole = length - length % LANES
    by_blocks(at, g, coming, coming_g, whole, fixed)
    if whole < length:
        update_block(w, g, h, m, whole, length - whole, fixed, (next_w, coming_g, next_h, next_m))


@jit(helper=True)
def by_row(at: Any, g: Any, coming: Any, coming_g: Any, length: int, fixed: Any) -> None:
    w, h, m = at
    next_w, next_h, next_m = coming
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


# ------------------------------------------------------------------------------------------------------- over all rows


@jit(helper=True)
def _values(base: Any, stride: Any, position: Any, tv: Any) -> Any:
    return pointer(base[GRAD] + position * stride[GRAD], tv, "grad")


@jit(helper=True)
def update_once(rows: Any, positions: Any, operands: Any, length: int, fixed: Any, update: Any) -> None:
    """Update distinct rows, each from the values at its position, by ``update``, a function for one row."""
    base, stride, tw, tv, th, tm = operands
    n, ahead = len(positions), _ahead(AHEAD, length, tw)
    for j in range(n):
        then = min(j + ahead, n - 1)
        at = _row_at(base, stride, np.int64(rows[j]), tw, th, tm)
        coming = _row_at(base, stride, np.int64(rows[then]), tw, th, tm)
        g, coming_g = _values(base, stride, positions[j], tv), _values(base, stride, positions[then], tv)
        update(at, g, coming, coming_g, length, fixed)


@jit(helper=True)
def _copy(to: Any, i: int, elements: Any, j: int) -> None:
    if to is not None:
        store(to, i, load(elements, j))


@jit(helper=True)
def update_short_rows(rows: Any, positions: Any, operands: Any, fixed: Any, tile: Any) -> None:
    """:func:`update_once` for rows of one element, packed into blocks: one alone would take as long as a whole block.

    For such rows, row-wise and element-wise history are the same.
    """
    base, stride, tw, tv, th, tm = operands
    n, part = len(positions), 8 * TILE
    packed_w, packed_g = pointer(tile, tw, "weight"), pointer(tile + part, tv, "grad")
    packed_h, packed_m = pointer(tile + 2 * part, th, "history"), pointer(tile + 3 * part, tm, "master")
    for start in range(0, n, TILE):
        count = min(n - start, TILE)
        for i in range(count):
            w, h, m = _row_at(base, stride, np.int64(rows[start + i]), tw, th, tm)
            then = rows[min(start + i + ELEMENTS_AHEAD, n - 1)]
            next_w, next_h, next_m = _row_at(base, stride, np.int64(then), tw, th, tm)
            prefetch_operands((next_w, None, next_h, next_m), 0)
            _copy(packed_w, i, w, 0)
            _copy(packed_g, i, _values(base, stride, positions[start + i], tv), 0)
            _copy(packed_h, i, h, 0)
            _copy(packed_m, i, m, 0)
        for i in range(0, count, LANES):  # lanes past the last row are padding
            update_block(packed_w, packed_g, packed_h, packed_m, i, None, fixed, None)
        for i in range(count):
            w, h, m = _row_at(base, stride, np.int64(rows[start + i]), tw, th, tm)
            _copy(w, 0, packed_w, i)
            _copy(h, 0, packed_h, i)
            _copy(m, 0, packed_m, i)


@jit(helper=True)
def add_up(groups: Any, operands: Any, length: int) -> None:
    """Add the values of rows that occur several times to their sums, each complete chunk to the row's second sum."""
    base, stride, _, tv, th, _ = operands
    positions, to, memory = grouped(groups[ADDED], np.int32), grouped(groups[TO], np.uint32), groups[SUMS, ADDRESS]
    missing, second = grouped(groups[MISSING], np.int32), grouped(groups[SECOND], np.int32)
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
def update_from_sums(groups: Any, dtype: Any, operands: Any, length: int, fixed: Any, update: Any) -> None:
    """Update rows, by ``update``, from their sums, to which an incomplete last chunk is added first."""
    base, stride, tw, _, th, tm = operands
    rows, counts, memory = grouped(groups[SUMMED], dtype), grouped(groups[COUNTS], np.int32), groups[SUMS, ADDRESS]
    missing, second = grouped(groups[MISSING], np.int32), grouped(groups[SECOND], np.int32)
    n, ahead = len(rows), _ahead(AHEAD, length, tw)
    for i in range(n):
        then, g = min(i + ahead, n - 1), sum_at(memory, i, length, th)
        if counts[i] > CHUNK:
            chunk, g = g, sum_at(memory, second[i], length, th)
            if missing[i] < CHUNK:
                _add(g, chunk, length, None, None)
        at = _row_at(base, stride, np.int64(rows[i]), tw, th, tm)
        coming = _row_at(base, stride, np.int64(rows[then]), tw, th, tm)
        update(at, g, coming, sum_at(memory, then, length, th), length, fixed)
