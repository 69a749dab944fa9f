"""Dense updates on the CPU: any number of weights in one launch, through a table of addresses.

Row ``i`` of ``table`` holds, for one weight, the addresses of weight, gradient, history and master copy (0 for none),
the number of elements and, where the history is row-wise, the length of a row, else 0; ``hyper`` holds its lr,
coupled and decoupled weight decay (one row may stand for all weights). Everything that the table names is
C-contiguous and aligned; see :mod:`adagrad.kernels` for what makes it so.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from adagrad.kernels.cpu_rule import constants, descend, effective_gradient
from adagrad.kernels.formats import TOKENS, load, master_or, pointer, store
from adagrad.kernels.numba_jit import jit, place, run, worker
from adagrad.rule import LANES

WEIGHT, GRAD, HISTORY, MASTER, SIZE, ROW = range(6)
COLUMNS = 6
"""Columns of the address table."""

ALIGN = 16
"""Elements: where workers part, so that no two write to one cache line of a float32 array."""


@jit(helper=True)
def elements(w: Any, g: Any, h: Any, m: Any, start: int, stop: int, constants: Any) -> None:
    """Element-wise: every element from ``start`` to ``stop`` has its own history value."""
    rescale, clip, inside, outside, lr, decay, shrink = constants
    source = master_or(w, m)
    for i in range(start, stop):
        weight = load(source, i)
        grad = effective_gradient(load(g, i), weight, decay, rescale, clip)
        history = load(h, i) + grad * grad
        weight = descend(weight, grad, history, lr, shrink, inside, outside)
        store(h, i, history)
        if m is not None:
            store(m, i, weight)
        store(w, i, weight)


@jit(helper=True)
def one_row(
    w: Any, g: Any, h: Any, m: Any, start: int, length: int, r: int, constants: Any, lanes: Any
) -> None:
    """Row-wise: the ``length`` elements from ``start`` on share the history value ``h[r]``."""
    rescale, clip, inside, outside, lr, decay, shrink = constants
    source = master_or(w, m)
    history = load(h, r) + _mean_square(source, g, start, length, decay, rescale, clip, lanes)
    for i in range(start, start + length):
        weight = load(source, i)
        grad = effective_gradient(load(g, i), weight, decay, rescale, clip)
        weight = descend(weight, grad, history, lr, shrink, inside, outside)
        if m is not None:
            store(m, i, weight)
        store(w, i, weight)
    store(h, r, history)


@jit(helper=True)
def _mean_square(w: Any, g: Any, start: int, length: int, decay: Any, rescale: Any, clip: Any, lanes: Any) -> Any:
    """Mean of the squared effective gradient over one row, in the order of :func:`adagrad.rule.mean_square`."""
    for lane in range(LANES):
        lanes[lane] = 0
    whole = length - length % LANES
    for block in range(0, whole, LANES):
        for lane in range(LANES):
            i = start + block + lane
            grad = effective_gradient(load(g, i), load(w, i), decay, rescale, clip)
            lanes[lane] += grad * grad
    for lane in range(length - whole):
        i = start + whole + lane
        grad = effective_gradient(load(g, i), load(w, i), decay, rescale, clip)
        lanes[lane] += grad * grad
    half = LANES // 2
    while half > 0:
        for lane in range(half):
            lanes[lane] += lanes[lane + half]
        half //= 2
    return lanes[0] / lanes.dtype.type(length)


@jit(helper=True)
def _border(element: int, size: int, unit: int) -> int:
    """Where a worker's share ends within a weight: whole cache lines, or whole rows."""
    return max(element, 0) // unit * unit if element < size else size


@jit(helper=True)
def _share(
    table: Any, hyper: Any, scalars: Any, tw: Any, tg: Any, th: Any, tm: Any, row_wise: Any, first: int, last: int
) -> None:
    """Update the elements ``first`` to ``last`` of all weights laid end to end."""
    lanes = np.empty(LANES, th.dtype)
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
        w, g = pointer(table[i, WEIGHT], tw, "weight"), pointer(table[i, GRAD], tg, "grad")
        h, m = pointer(table[i, HISTORY], th, "history"), pointer(table[i, MASTER], tm, "master")
        fixed = constants(scalars, hyper[i if len(hyper) > 1 else 0], th)
        if row_wise is None:
            elements(w, g, h, m, start, stop, fixed)
        else:
            for r in range(start // length, stop // length):
                one_row(w, g, h, m, r * length, length, r, fixed, lanes)


@functools.cache
def kernel(weight: str, grad: str, history: str, master: str | None, row_wise: bool) -> int:
    """The worker for weights of these formats (None: no master copy)."""
    tw, tg, th, tm = TOKENS[weight], TOKENS[grad], TOKENS[history], None if master is None else TOKENS[master]
    rows = row_wise or None  # None or True, types that differ: only one of the two is compiled

    def dense(arguments: Any, k: Any, count: Any) -> None:
        given = numba.carray(place(arguments), 6, np.int64)
        table = numba.carray(place(given[0]), (given[1], COLUMNS), np.int64)
        hyper = numba.carray(place(given[2]), (given[3], 3), np.float64)
        scalars = numba.carray(place(given[4]), 4, np.float64)
        total = given[5]
        _share(table, hyper, scalars, tw, tg, th, tm, rows, total * k // count, total * (k + 1) // count)

    return worker(dense)


@jit()
def _arguments(table: Any, hyper: Any, scalars: Any, total: int) -> Any:
    block = np.empty(6, np.int64)
    block[0], block[1] = table.ctypes.data, table.shape[0]
    block[2], block[3] = hyper.ctypes.data, hyper.shape[0]
    block[4], block[5] = scalars.ctypes.data, total
    return block


SMALL = 32_768
"""Elements below which starting the threads costs more than they save."""


def launch(
    table: Any, total: int, hyper: Any, scalars: Any, formats: Any, row_wise: bool, threads: int | None
) -> None:
    """Update the weights of ``table``, of ``total`` elements, all of one combination of formats.

    ``formats`` are those of weight, gradient, history and master copy (None for none); ``hyper`` has a row for each
    weight, or one for all; at most ``threads`` threads, or as many as Numba may use.
    """
    run(kernel(*formats, row_wise), _arguments(table, hyper, scalars, total), 1 if total < SMALL else threads)
