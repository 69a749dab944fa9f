"""Dense updates on the CPU: any number of weights in one launch, through a table of addresses.

Row ``i`` of ``table`` holds, for one weight, the addresses of weight, gradient, history and master copy (0 for none),
the number of elements and, if the history is row-wise, the length of a row, else 0; ``rates`` holds its lr, coupled wd
and decoupled wd (one row may stand for all weights). The operands of a row are aligned, have no gaps and store their
elements in the same order: :mod:`adagrad.kernels.inspection.table` and :mod:`adagrad.kernels.general_cpu` ensure that.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import binding as llvm

from adagrad.arrays import row_length
from adagrad.kernels.cpu.blocks import broadcast, constant, keep_first, load_block, prefetch, store_block, sum_by_halves
from adagrad.kernels.cpu.formats import TOKENS, load, master_or, pointer, store
from adagrad.kernels.cpu.rule import (
    common_terms,
    constants,
    effective_gradient,
    has_decay,
    has_rare_terms,
    new_weight,
    plain_terms,
)
from adagrad.kernels.records import COLUMNS, GRAD, HISTORY, MASTER, ROW_LENGTH, SIZE, WEIGHT
from adagrad.kernels.runtime.memory import array_at, words
from adagrad.kernels.runtime.numba_jit import jit, run, worker
from adagrad.kernels.runtime.threads import claim, give_back, new_notes, on_threads
from adagrad.rule import LANES, Rule

TABLE_AT, TABLE_ROWS, RATES_AT, RATES_ROWS, SCALARS_AT, TOTAL, GIVEN = range(7)
"""The words of the block of :func:`arguments`, and how many there are."""

ALIGN = 16
"""Workers' shares are multiples of this many elements, so that no two write to one cache line of a float32 array that
begins with one."""

AHEAD_BYTES = 384 if llvm.get_host_cpu_name().startswith("znver") else 2048
"""How many bytes ahead to prefetch. Intel's hardware prefetchers stop at the end of each page: without this, large
weights run at 0.89 of the stream's speed, not 0.99. AMD's Zen need little help, and as much costs them 5 to 10%."""


def table_row(
    rule: Rule, weight: np.ndarray, grad: np.ndarray, history: np.ndarray, master: np.ndarray | None = None
) -> list[int]:
    """A row of the address table, for the memory of weight, gradient, history and master copy (None for none)."""
    addresses = [0 if memory is None else memory.ctypes.data for memory in (weight, grad, history, master)]
    return [*addresses, weight.size, row_length(weight.shape) if rule.row_wise else 0]


@jit(helper=True)
def update_blocks(w: Any, g: Any, h: Any, m: Any, start: int, stop: int, fixed: Any, coming: Any) -> None:
    """Update whole blocks, the elements from ``start`` to ``stop``, each with its own history value.

    ``fixed`` are :func:`constants`, and may lack terms; the operands ``coming``, needed soon, are prefetched likewise,
    block by block.
    """
    for i in range(start, stop, LANES):
        update_block(w, g, h, m, i, None, fixed, coming)


@jit(helper=True)
def update_block(w: Any, g: Any, h: Any, m: Any, i: int, count: Any, fixed: Any, coming: Any) -> None:
    """Update the block at element ``i``, or its first ``count`` elements; prefetch that of ``coming``."""
    rescale, clip, eps_inside, eps_outside, lr, wd, decoupled_wd = fixed
    prefetch_operands(coming, i)
    weight = load_block(master_or(w, m), i, count)
    grad = effective_gradient(load_block(g, i, count), weight, wd, rescale, clip)
    history = load_block(h, i, count) + grad * grad
    weight = new_weight(weight, grad, history, lr, decoupled_wd, eps_inside, eps_outside)
    store_block(h, i, history, count)
    _store_weight(w, m, i, weight, count)


@jit(helper=True)
def _store_weight(w: Any, m: Any, i: int, weight: Any, count: Any) -> None:
    if m is not None:
        store_block(m, i, weight, count)
    store_block(w, i, weight, count)


@jit(helper=True)
def prefetch_operands(coming: Any, i: int) -> None:
    """Prefetch the block at element ``i`` of each operand in ``coming``, a tuple or None, unless it is None."""
    if coming is not None:
        weight, grad, history, master = coming
        prefetch(weight, i)
        prefetch(grad, i)
        prefetch(history, i)
        prefetch(master, i)


@jit(helper=True)
def update_row(w: Any, g: Any, h: Any, m: Any, start: int, length: int, r: int, fixed: Any, coming: Any) -> None:
    """Update the ``length`` elements from ``start`` on, which share the history value ``h[r]``; ``coming`` as above."""
    source, stop = master_or(w, m), start + length
    lanes = add_squares(broadcast(constant(h, 0)), source, g, start, stop, fixed, coming)
    history = load(h, r) + sum_by_halves(lanes) / constant(h, length)
    update_weights_of_row(w, g, m, start, stop, history, fixed)
    store(h, r, history)


@jit(helper=True)
def add_squares(lanes: Any, source: Any, g: Any, start: int, stop: int, fixed: Any, coming: Any) -> Any:
    """The block ``lanes`` plus the squared effective gradients from ``start`` to ``stop``, the first in lane 0.

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
    rescale, clip, _, _, _, wd, _ = fixed
    prefetch_operands(coming, i)
    grad = effective_gradient(load_block(g, i, count), load_block(source, i, count), wd, rescale, clip)
    return keep_first(grad * grad, count)  # adding 0 changes no bit of a sum of squares


@jit(helper=True)
def update_weights_of_row(w: Any, g: Any, m: Any, start: int, stop: int, history: Any, fixed: Any) -> None:
    """Update the weights from ``start`` to ``stop``, given the new history value of their row."""
    whole = stop - (stop - start) % LANES
    for i in range(start, whole, LANES):
        _update_weight_block(w, g, m, i, None, history, fixed)
    if whole < stop:
        _update_weight_block(w, g, m, whole, stop - whole, history, fixed)


@jit(helper=True)
def _update_weight_block(w: Any, g: Any, m: Any, i: int, count: Any, history: Any, fixed: Any) -> None:
    rescale, clip, eps_inside, eps_outside, lr, wd, decoupled_wd = fixed
    weight = load_block(master_or(w, m), i, count)
    grad = effective_gradient(load_block(g, i, count), weight, wd, rescale, clip)
    _store_weight(w, m, i, new_weight(weight, grad, history, lr, decoupled_wd, eps_inside, eps_outside), count)


@jit(helper=True)
def _border(element: int, size: int, unit: int) -> int:
    """Where a worker's share ends within a weight of ``size`` elements: at a multiple of ``unit``, or at its end."""
    return max(element, 0) // unit * unit if element < size else size


@jit(helper=True)
def _share(
    table: Any, rates: Any, scalars: Any, tw: Any, tg: Any, th: Any, tm: Any, row_wise: Any, first: int, last: int
) -> None:
    """Update the elements ``first`` to ``last`` of all weights laid end to end, both moved to a :func:`_border`."""
    begin = 0
    for i in range(table.shape[0]):
        size, length = table[i, SIZE], table[i, ROW_LENGTH]
        if begin >= last:
            break
        unit = length if length else ALIGN
        start, stop = _border(first - begin, size, unit), _border(last - begin, size, unit)
        begin += size
        if start >= stop:
            continue
        w, g, h, m = _operands(table[i], 0, tw, tg, th, tm)
        soon_w, soon_g, soon_h, soon_m = _operands(table[i], AHEAD_BYTES, tw, tg, th, tm)
        fixed = constants(scalars, rates[i if len(rates) > 1 else 0], th)
        if row_wise is None:
            coming, whole = (soon_w, soon_g, soon_h, soon_m), stop - (stop - start) % LANES
            if has_rare_terms(fixed):
                update_blocks(w, g, h, m, start, whole, fixed, coming)
            elif has_decay(fixed):
                update_blocks(w, g, h, m, start, whole, common_terms(fixed), coming)
            else:
                update_blocks(w, g, h, m, start, whole, plain_terms(fixed), coming)
            if whole < stop:  # with all terms, because the code for partial blocks is long
                update_block(w, g, h, m, whole, stop - whole, fixed, coming)
        else:
            for r in range(start // length, stop // length):
                update_row(w, g, h, m, r * length, length, r, fixed, (soon_w, soon_g, None, soon_m))


@jit(helper=True)
def _operands(row: Any, ahead: int, tw: Any, tg: Any, th: Any, tm: Any) -> Any:
    """Weight, gradient, history and master copy of a row of the table, or what lies ``ahead`` bytes further on."""
    w, g = pointer(row[WEIGHT] + ahead, tw, "weight"), pointer(row[GRAD] + ahead, tg, "grad")
    return w, g, pointer(row[HISTORY] + ahead, th, "history"), pointer(row[MASTER] + ahead, tm, "master")


@functools.cache
def kernel(weight: str, grad: str, history: str, master: str | None, row_wise: bool) -> int:
    """The address of the worker for weights of these formats (None: no master copy)."""
    tw, tg, th, tm = TOKENS[weight], TOKENS[grad], TOKENS[history], None if master is None else TOKENS[master]
    rows = row_wise or None  # None or True differ in type: only one branch is compiled

    def dense(arguments: Any, k: Any, workers: Any) -> None:
        table, rates, scalars, total = _given(arguments)
        _share(table, rates, scalars, tw, tg, th, tm, rows, total * k // workers, total * (k + 1) // workers)

    return worker(dense)


@functools.cache
def row_part_kernel(weight: str, grad: str, history: str, master: str | None, writes_weights: bool) -> int:
    """The address of the worker for a part of one row.

    At the address ``HISTORY`` lie LANES lanes, the row's history value and room for the new one. A first pass adds the
    part's squared gradients to the lanes, the first one to lane 0; a second one, which ``writes_weights``, takes their
    mean over the ``ROW_LENGTH`` elements of the row for the new value, and updates the weights.
    """
    tw, tg, th, tm = TOKENS[weight], TOKENS[grad], TOKENS[history], None if master is None else TOKENS[master]
    second = writes_weights or None  # as above

    def row_part(arguments: Any, k: Any, workers: Any) -> None:
        table, rates, scalars, _ = _given(arguments)
        w, g = pointer(table[0, WEIGHT], tw, "weight"), pointer(table[0, GRAD], tg, "grad")
        m = pointer(table[0, MASTER], tm, "master")
        size, fixed = table[0, SIZE], constants(scalars, rates[0], th)
        shared = pointer(table[0, HISTORY], th, "sum")
        lanes = load_block(shared, 0, None)
        if second is None:
            store_block(shared, 0, add_squares(lanes, master_or(w, m), g, 0, size, fixed, None), None)
        else:
            history = load(shared, LANES) + sum_by_halves(lanes) / constant(shared, table[0, ROW_LENGTH])
            store(shared, LANES + 1, history)
            update_weights_of_row(w, g, m, 0, size, history, fixed)

    return worker(row_part)


@jit(helper=True)
def _given(arguments: Any) -> Any:
    """Table, rates, scalars and the number of elements, from the address of a block of :func:`arguments`."""
    given = array_at(arguments, GIVEN, np.int64)
    table = array_at(given[TABLE_AT], (given[TABLE_ROWS], COLUMNS), np.int64)
    rates = array_at(given[RATES_AT], (given[RATES_ROWS], 3), np.float64)
    scalars = array_at(given[SCALARS_AT], 4, np.float64)
    return table, rates, scalars, given[TOTAL]


@jit()
def arguments(table: Any, rates: Any, scalars: Any, total: int) -> Any:
    """The workers' arguments as one block of GIVEN words, which holds addresses: the arrays must outlive it."""
    block = words(GIVEN)
    put_arguments(block, table, 0, len(table), rates, scalars, total)
    return block


@jit(helper=True)
def put_arguments(block: Any, table: Any, first: int, count: int, rates: Any, scalars: Any, total: int) -> None:
    """Fill such a block for ``count`` rows of the table from ``first`` on, ``total`` elements; nothing is allocated.

    ``rates`` has a row for each row of the table, or one for all.
    """
    skipped, rows = (0, 1) if len(rates) == 1 else (first, count)
    block[TABLE_AT], block[TABLE_ROWS] = table.ctypes.data + table.strides[0] * first, count
    block[RATES_AT], block[RATES_ROWS] = rates.ctypes.data + rates.strides[0] * skipped, rows
    block[SCALARS_AT], block[TOTAL] = scalars.ctypes.data, total


PARALLEL_MIN = 32_768
"""Elements below which starting the threads costs more than they save."""


def launch(table: Any, total: int, rates: Any, scalars: Any, formats: Any, row_wise: bool, threads: int | None) -> None:
    """Update the weights of ``table``, of ``total`` elements, all of one combination of formats.

    ``formats`` are those of weight, gradient, history and master copy (None for none); ``rates`` has a row for each
    weight, or one for all; at most ``threads`` threads, or by default as many as Numba may use.
    """
    notes = new_notes(total)
    given = kernel(*formats, row_wise), arguments(table, rates, scalars, total), notes
    on_threads(_run, given, notes.data, 1 if total < PARALLEL_MIN else threads)


@jit()
def _run(worker_at: int, block: Any, notes: Any, workers: int) -> None:
    run(worker_at, block, claim(notes, workers))
    give_back(notes)


def launch_row_part(table: Any, rates: Any, scalars: Any, formats: Any, writes_weights: bool) -> None:
    """One pass over a part of one row, see :func:`row_part_kernel`; ``table`` and ``rates`` have one row."""
    run(row_part_kernel(*formats, writes_weights), arguments(table, rates, scalars, 0), 1)
