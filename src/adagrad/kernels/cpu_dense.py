"""Dense updates on the CPU: any number of weights in one launch, through a table of addresses.

Row ``i`` of ``table`` holds, for one weight, the addresses of weight, gradient, history and master copy (0 for none),
the number of elements and, where the history is row-wise, the length of a row, else 0; ``hyper`` holds its lr,
coupled and decoupled weight decay (one row may stand for all weights). What a row names has no gaps, is aligned, and
all of it lies in one order: :mod:`adagrad.kernels.table` and :mod:`adagrad.kernels.ordinary` see to that.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np

from adagrad.arrays import row_length
from adagrad.kernels.blocks import broadcast, first, fold, load_block, number, prefetch, store_block
from adagrad.kernels.cpu_rule import constants, descend, effective_gradient
from adagrad.kernels.formats import TOKENS, load, master_or, pointer, store
from adagrad.kernels.numba_jit import jit, max_workers, place, run, worker, workers
from adagrad.rule import LANES, Rule

WEIGHT, GRAD, HISTORY, MASTER, SIZE, ROW = range(6)
COLUMNS = 6
"""Columns of the address table."""

TABLE_AT, TABLE_ROWS, RATES_AT, RATES_ROWS, SCALARS_AT, TOTAL, GIVEN = range(7)
"""Words of the block of :func:`arguments`."""

ALIGN = 16
"""Elements: where workers part. No two write to one cache line of a float32 array that begins with one."""

AHEAD = 2048
"""Bytes: how far ahead memory is asked for. The processor's own guesses end with each page."""


def table_row(memories: Sequence[np.ndarray | None], rule: Rule) -> list[int]:
    """A row of the address table, for the memory of weight, gradient, history and master copy (None for none)."""
    weight = memories[0]
    addresses = [0 if memory is None else memory.ctypes.data for memory in memories]
    length = row_length(weight.shape) if rule.row_wise and weight is not None else 0
    return [*addresses, 0 if weight is None else weight.size, length]


@jit(helper=True)
def elements(w: Any, g: Any, h: Any, m: Any, start: int, stop: int, fixed: Any, coming: Any) -> None:
    """Element-wise: every element from ``start`` to ``stop`` has its own history value.

    ``coming``: the operands of what is needed soon, from their ``start`` on; their memory is asked for block by block.
    """
    whole = stop - (stop - start) % LANES
    for i in range(start, whole, LANES):
        update_block(w, g, h, m, i, None, fixed, coming)
    if whole < stop:
        update_block(w, g, h, m, whole, stop - whole, fixed, coming)


@jit(helper=True)
def update_block(w: Any, g: Any, h: Any, m: Any, i: int, count: Any, fixed: Any, coming: Any) -> None:
    rescale, clip, inside, outside, lr, decay, shrink = fixed
    prefetch_operands(coming, i)
    weight = load_block(master_or(w, m), i, count)
    grad = effective_gradient(load_block(g, i, count), weight, decay, rescale, clip)
    history = load_block(h, i, count) + grad * grad
    weight = descend(weight, grad, history, lr, shrink, inside, outside)
    store_block(h, i, history, count)
    _store_weight(w, m, i, weight, count)


@jit(helper=True)
def _store_weight(w: Any, m: Any, i: int, weight: Any, count: Any) -> None:
    if m is not None:
        store_block(m, i, weight, count)
    store_block(w, i, weight, count)


@jit(helper=True)
def prefetch_operands(coming: Any, i: int) -> None:
    """Ask for the memory of the operands in ``coming``, a tuple or None, from element ``i`` on."""
    if coming is not None:
        weight, grad, history, master = coming
        prefetch(weight, i)
        prefetch(grad, i)
        prefetch(history, i)
        prefetch(master, i)


@jit(helper=True)
def one_row(w: Any, g: Any, h: Any, m: Any, start: int, length: int, r: int, fixed: Any, coming: Any) -> None:
    """Row-wise: the ``length`` elements from ``start`` on share the history value ``h[r]``; ``coming`` as above."""
    source, stop = master_or(w, m), start + length
    lanes = add_squares(broadcast(number(h, 0)), source, g, start, stop, fixed, coming)
    history = load(h, r) + fold(lanes) / number(h, length)
    descend_row(w, g, m, start, stop, history, fixed)
    store(h, r, history)


@jit(helper=True)
def add_squares(lanes: Any, source: Any, g: Any, start: int, stop: int, fixed: Any, coming: Any) -> Any:
    """The block of ``lanes`` plus the squared effective gradients from ``start`` to ``stop``, the first in lane 0.

    The order is that of :func:`adagrad.rule.mean_square`.
    """
    whole = stop - (stop - start) % LANES
    for i in range(start, whole, LANES):
        lanes = lanes + _squares(source, g, i, None, fixed, coming)
    if whole < stop:
        lanes = lanes + _squares(source, g, whole, stop - whole, fixed, coming)
    return lanes


@jit(helper=True)
def _squares(source: Any, g: Any, i: int, count: Any, fixed: Any, coming: Any) -> Any:
    rescale, clip, _, _, _, decay, _ = fixed
    prefetch_operands(coming, i)
    grad = effective_gradient(load_block(g, i, count), load_block(source, i, count), decay, rescale, clip)
    return first(grad * grad, count)  # adding 0 changes no bit of a sum of squares


@jit(helper=True)
def descend_row(w: Any, g: Any, m: Any, start: int, stop: int, history: Any, fixed: Any) -> None:
    """The elements from ``start`` to ``stop`` descend, given the new history value of their row."""
    whole = stop - (stop - start) % LANES
    for i in range(start, whole, LANES):
        _descend_block(w, g, m, i, None, history, fixed)
    if whole < stop:
        _descend_block(w, g, m, whole, stop - whole, history, fixed)


@jit(helper=True)
def _descend_block(w: Any, g: Any, m: Any, i: int, count: Any, history: Any, fixed: Any) -> None:
    rescale, clip, inside, outside, lr, decay, shrink = fixed
    weight = load_block(master_or(w, m), i, count)
    grad = effective_gradient(load_block(g, i, count), weight, decay, rescale, clip)
    _store_weight(w, m, i, descend(weight, grad, history, lr, shrink, inside, outside), count)


@jit(helper=True)
def _border(element: int, size: int, unit: int) -> int:
    """Where a worker's share ends within a weight: a whole number of units, or of rows."""
    return max(element, 0) // unit * unit if element < size else size


@jit(helper=True)
def _share(
    table: Any, hyper: Any, scalars: Any, tw: Any, tg: Any, th: Any, tm: Any, row_wise: Any, first: int, last: int
) -> None:
    """Update the elements ``first`` to ``last`` of all weights laid end to end."""
    begin = 0
    for i in range(table.shape[0]):
        size, length = table[i, SIZE], table[i, ROW]
        if begin >= last:
            break
        unit = length if length else ALIGN
        start, stop = _border(first - begin, size, unit), _border(last - begin, size, unit)
        begin += size
        if start >= stop:
            continue
        w, g, h, m = _operands(table[i], 0, tw, tg, th, tm)
        soon_w, soon_g, soon_h, soon_m = _operands(table[i], AHEAD, tw, tg, th, tm)
        fixed = constants(scalars, hyper[i if len(hyper) > 1 else 0], th)
        if row_wise is None:
            elements(w, g, h, m, start, stop, fixed, (soon_w, soon_g, soon_h, soon_m))
        else:
            for r in range(start // length, stop // length):
                one_row(w, g, h, m, r * length, length, r, fixed, (soon_w, soon_g, None, soon_m))


@jit(helper=True)
def _operands(row: Any, ahead: int, tw: Any, tg: Any, th: Any, tm: Any) -> Any:
    """Weight, gradient, history and master copy of a row of the table, or what lies so many bytes further on."""
    w, g = pointer(row[WEIGHT] + ahead, tw, "weight"), pointer(row[GRAD] + ahead, tg, "grad")
    return w, g, pointer(row[HISTORY] + ahead, th, "history"), pointer(row[MASTER] + ahead, tm, "master")


@functools.cache
def kernel(weight: str, grad: str, history: str, master: str | None, row_wise: bool) -> int:
    """The worker for weights of these formats (None: no master copy)."""
    tw, tg, th, tm = TOKENS[weight], TOKENS[grad], TOKENS[history], None if master is None else TOKENS[master]
    rows = row_wise or None  # None or True, types that differ: only one of the two is compiled

    def dense(arguments: Any, k: Any, count: Any) -> None:
        table, hyper, scalars, total = _given(arguments)
        _share(table, hyper, scalars, tw, tg, th, tm, rows, total * k // count, total * (k + 1) // count)

    return worker(dense)


@functools.cache
def row_part_kernel(weight: str, grad: str, history: str, master: str | None, descending: bool) -> int:
    """The worker for a part of one row.

    A first pass adds the squares of the part to the lanes that ``HISTORY`` points to, those of the first element to
    lane 0; a second, ``descending``, finds there the new history value of the row.
    """
    tw, tg, th, tm = TOKENS[weight], TOKENS[grad], TOKENS[history], None if master is None else TOKENS[master]
    second = descending or None  # types that differ, as above

    def row_part(arguments: Any, k: Any, count: Any) -> None:
        table, hyper, scalars, _ = _given(arguments)
        w, g = pointer(table[0, WEIGHT], tw, "weight"), pointer(table[0, GRAD], tg, "grad")
        m = pointer(table[0, MASTER], tm, "master")
        size, fixed = table[0, SIZE], constants(scalars, hyper[0], th)
        if second is None:
            lanes = pointer(table[0, HISTORY], th, "sum")
            added = add_squares(load_block(lanes, 0, None), master_or(w, m), g, 0, size, fixed, None)
            store_block(lanes, 0, added, None)
        else:
            descend_row(w, g, m, 0, size, load(pointer(table[0, HISTORY], th, "history"), 0), fixed)

    return worker(row_part)


@jit(helper=True)
def _given(arguments: Any) -> Any:
    """What the block of arguments holds, see :func:`arguments`."""
    given = numba.carray(place(arguments), GIVEN, np.int64)
    table = numba.carray(place(given[TABLE_AT]), (given[TABLE_ROWS], COLUMNS), np.int64)
    hyper = numba.carray(place(given[RATES_AT]), (given[RATES_ROWS], 3), np.float64)
    scalars = numba.carray(place(given[SCALARS_AT]), 4, np.float64)
    return table, hyper, scalars, given[TOTAL]


@jit()
def arguments(table: Any, hyper: Any, scalars: Any, total: int) -> Any:
    """What the workers are given, as one block; the arrays must outlive it."""
    block = np.empty(GIVEN, np.int64)
    put_arguments(block, table, 0, len(table), hyper, scalars, total)
    return block


@jit(helper=True)
def put_arguments(block: Any, table: Any, first: int, count: int, hyper: Any, scalars: Any, total: int) -> None:
    """Fill such a block for ``count`` rows of the table from ``first`` on, of ``total`` elements; nothing is allocated.

    ``hyper`` has a row for each row of the table, or one for all.
    """
    skipped, rates = (0, 1) if len(hyper) == 1 else (first, count)
    block[TABLE_AT], block[TABLE_ROWS] = table.ctypes.data + table.strides[0] * first, count
    block[RATES_AT], block[RATES_ROWS] = hyper.ctypes.data + hyper.strides[0] * skipped, rates
    block[SCALARS_AT], block[TOTAL] = scalars.ctypes.data, total


SMALL = 32_768
"""Elements below which starting the threads costs more than they save."""


def launch(table: Any, total: int, hyper: Any, scalars: Any, formats: Any, row_wise: bool, threads: int | None) -> None:
    """Update the weights of ``table``, of ``total`` elements, all of one combination of formats.

    ``formats`` are those of weight, gradient, history and master copy (None for none); ``hyper`` has a row for each
    weight, or one for all; at most ``threads`` threads, or as many as Numba may use.
    """
    threads = 1 if total < SMALL else threads or max_workers()
    work = kernel(*formats, row_wise)
    with workers(threads, total) as count:
        run(work, arguments(table, hyper, scalars, total), count)


def launch_row_part(table: Any, hyper: Any, scalars: Any, formats: Any, descending: bool) -> None:
    """One pass over a part of one row, see :func:`row_part_kernel`; ``table`` and ``hyper`` have one row."""
    run(row_part_kernel(*formats, descending), arguments(table, hyper, scalars, 0), 1)
