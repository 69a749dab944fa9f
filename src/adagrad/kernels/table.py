"""The address table of a list of updates, built and checked by compiled code; short lists are updated there and then.

Whatever is not plain, and every error, is left to the ordinary way: a row of the table then has the code -1.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from adagrad.kernels import cpu_dense
from adagrad.kernels.cpu_dense import COLUMNS, GRAD, HISTORY, MASTER, ROW, SIZE, WEIGHT, arguments, kernel
from adagrad.kernels.layout import (
    CONTIGUOUS,
    COUNT,
    FLOAT32,
    FLOAT64,
    FORMAT,
    FORMATS,
    KIND,
    NONE,
    PLACE,
    RANK,
    SEEN,
    SIZES,
    START,
    STRIDES,
    UNIT,
    WRITEABLE,
    item,
    item_size,
    layout,
    look,
    word,
)
from adagrad.kernels.numba_jit import call, jit
from adagrad.kernels.spans import disjoint
from adagrad.rule import Rule

Formats: TypeAlias = "tuple[str, str, str, str | None]"
"""The element formats of weight, gradient, history and master copy (None for none)."""

# A row's code: 16 * place + 8 if the gradient is wider than the weight + 4 if there is a master copy + format.
WITH_MASTER, WIDE_GRAD, PLACES = 4, 8, 16


# ----------------------------------------------------------------------------------------------------------- one update


@jit(helper=True)
def _same_shape(a: Any, b: Any, row_wise: bool) -> Any:
    """Whether ``b`` has the shape of ``a``, or of its row-wise history."""
    same = a[RANK] == b[RANK]
    for d in range(a[RANK] if same else 0):
        same &= word(b[SIZES], 8 * d) == (1 if row_wise and d > 0 else word(a[SIZES], 8 * d))
    return same


@jit(helper=True)
def _same_order(a: Any, b: Any) -> Any:
    """Whether the elements of two arrays of one shape lie in the same order."""
    if a[CONTIGUOUS]:
        return b[CONTIGUOUS] != 0
    same = True
    for d in range(a[RANK]):
        same &= word(a[STRIDES], 8 * d) * b[UNIT] == word(b[STRIDES], 8 * d) * a[UNIT]
    return same


@jit(helper=True)
def _has_no_gaps(a: Any) -> Any:
    """Whether some order of the dimensions makes it contiguous (channels last, Fortran's order, transposed, ...)."""
    if a[CONTIGUOUS]:
        return True
    reach = 1
    for _ in range(a[RANK]):
        for d in range(a[RANK]):
            if word(a[STRIDES], 8 * d) == reach * a[UNIT] and word(a[SIZES], 8 * d) > 1:
                reach *= word(a[SIZES], 8 * d)
                break
    return reach == a[COUNT]


@jit(helper=True)
def _is_beside(a: Any, w: Any, format: int) -> Any:
    """Whether ``a`` is of the weight's kind and on its device, and has a format."""
    return a[KIND] == w[KIND] and a[PLACE] == w[PLACE] and a[FORMAT] == format


@jit(helper=True)
def code_of(w: Any, g: Any, h: Any, m: Any, has_master: bool, row_wise: bool, rows: bool) -> Any:
    """The code of an update whose arrays fit together, else -1; ``rows`` where ``g`` is of some rows, in any order."""
    low = w[FORMAT] < FLOAT32
    computing = FLOAT32 if low else w[FORMAT]
    if w[FORMAT] > FLOAT64 or not (w[WRITEABLE] and h[WRITEABLE]) or not _is_beside(h, w, computing):
        return -1
    if not (_is_beside(g, w, w[FORMAT]) or _is_beside(g, w, computing)):
        return -1
    if not (rows or _same_shape(w, g, False)) or not _same_shape(w, h, row_wise):
        return -1
    if row_wise:
        if w[RANK] == 0 or not (w[CONTIGUOUS] and g[CONTIGUOUS] and h[CONTIGUOUS]):
            return -1
    elif not ((rows or _same_order(w, g)) and _same_order(w, h) and _has_no_gaps(w)):
        return -1
    code = w[PLACE] * PLACES + w[FORMAT]
    if g[FORMAT] != w[FORMAT]:
        code += WIDE_GRAD
    if has_master:
        if not (low and m[WRITEABLE] and _is_beside(m, w, FLOAT32)):
            return -1
        if not _same_shape(w, m, False) or not _same_order(w, m):
            return -1
        code += WITH_MASTER
    return code


@functools.lru_cache(maxsize=256)
def formats(code: int) -> tuple[int, Formats]:
    """What a code says: the place (0 for the CPU, 1 + index of a CUDA device) and the formats."""
    place, digits = divmod(code, PLACES)
    weight = FORMATS[digits % WITH_MASTER]
    computing = "float64" if weight == "float64" else "float32"
    grad = "float32" if digits & WIDE_GRAD else weight
    return place, (weight, grad, computing, "float32" if digits & WITH_MASTER else None)


# ------------------------------------------------------------------------------------------------------------- the list


@jit(holds_gil=True)
def fill(weights: int, grads: int, histories: int, masters: int, how: Any, row_wise: bool, table: Any, codes: Any,
         spans: Any) -> Any:  # fmt: skip
    """Fill ``table``, the ``codes`` of its rows and the ``spans`` of memory, from four lists, given by ``id``.

    Row ``i`` is for the ``i``-th weight, gradient, history and, if there is such a list, master copy or None. Codes
    are -1, and spans empty, where the row is left to the ordinary way. ``spans``: the starts and the ends of weights,
    histories, master copies if there is such a list, gradients. Returns the code that all rows share (-1 if they do
    not) and the number of elements.
    """
    starts, ends = spans[0], spans[1]
    n, total = len(table), 0
    first_grad = len(starts) - n
    out = np.empty(1, np.int64)
    w, g, h, m = np.zeros(SEEN, np.int64), np.zeros(SEEN, np.int64), np.zeros(SEEN, np.int64), np.zeros(SEEN, np.int64)
    for i in range(n):
        codes[i] = -1
        table[i] = 0
        for at in range(i, len(starts), n):
            starts[at], ends[at] = 0, 0
        master = item(masters, i) if masters else how[NONE]
        has_master = master != how[NONE]
        if (
            look(item(weights, i), how, out, w)
            and look(item(grads, i), how, out, g)
            and look(item(histories, i), how, out, h)
            and (not has_master or look(master, how, out, m))
        ):
            codes[i] = code_of(w, g, h, m, has_master, row_wise, False)
        if codes[i] < 0:
            continue
        table[i, WEIGHT], table[i, GRAD], table[i, HISTORY] = w[START], g[START], h[START]
        table[i, SIZE] = w[COUNT]
        total += w[COUNT]
        if row_wise and w[COUNT]:
            table[i, ROW] = w[COUNT] // word(w[SIZES], 0)
        starts[i], ends[i] = w[START], w[START] + item_size(w[FORMAT]) * w[COUNT]
        starts[n + i], ends[n + i] = h[START], h[START] + item_size(h[FORMAT]) * h[COUNT]
        starts[first_grad + i], ends[first_grad + i] = g[START], g[START] + item_size(g[FORMAT]) * g[COUNT]
        if has_master:
            table[i, MASTER] = m[START]
            starts[2 * n + i], ends[2 * n + i] = m[START], m[START] + item_size(m[FORMAT]) * m[COUNT]
    same = codes[0]
    for i in range(n):
        same = same if codes[i] == same else -1
    return same, total


class Table(NamedTuple):
    """Lists of arrays as the kernels want them. Keep the arrays while it is in use."""

    rows: np.ndarray
    """(n, COLUMNS), as :mod:`adagrad.kernels.cpu_dense` has it."""
    codes: np.ndarray
    """Which rows go together, see :func:`formats`; -1 for those that are left to the ordinary way."""
    common: int
    """The code of all rows, or -1."""
    total: int
    """Elements in all rows."""
    spans: np.ndarray
    """Where the rows' memory begins and ends: what is written to, then what is read."""
    written: int
    """How many of the spans are written to."""

    def part(self, which: list[int]) -> tuple[np.ndarray, int]:
        """Some of the rows, and their elements."""
        rows = self.rows[np.array(which)]
        return rows, int(rows[:, SIZE].sum())


def table(weights: list[Any], grads: list[Any], histories: list[Any], masters: list[Any], row_wise: bool) -> Table:
    """See :class:`Table`. ``masters`` may be empty or hold None."""
    n, how = len(weights), layout()
    columns = 4 if masters else 3
    rows, codes, spans = np.empty((n, COLUMNS), np.int64), np.empty(n, np.int64), np.empty((2, columns * n), np.int64)
    if how is None or n == 0:
        codes[:], spans[:] = -1, 0
        return Table(rows, codes, -1, 0, spans, (columns - 1) * n)
    common, total = fill(
        id(weights), id(grads), id(histories), id(masters) if masters else 0, how, row_wise, rows, codes, spans
    )
    return Table(rows, codes, common, total, spans, (columns - 1) * n)


# ---------------------------------------------------------------------------------------------------------- short lists

DONE, LEFT = -2, -1
"""What :func:`update_short` did: all, or nothing. Else it wants the worker for a code."""


@jit(holds_gil=True)
def _update_short(weights: int, grads: int, histories: int, masters: int, n: int, how: Any, row_wise: bool, hyper: Any,
                  scalars: Any, workers: Any, small: int) -> Any:  # fmt: skip
    count = 4 * n if masters else 3 * n
    table, codes, spans = np.empty((n, COLUMNS), np.int64), np.empty(n, np.int64), np.empty((2, count), np.int64)
    code, total = fill(weights, grads, histories, masters, how, row_wise, table, codes, spans)
    if code < 0 or code >= PLACES or total >= small:
        return LEFT
    if not disjoint(spans[0], spans[1], count - n, np.zeros(count, np.int64)):
        return LEFT
    if workers[code] == 0:
        return code
    call(workers[code], np.int64(arguments(table, hyper, scalars, total).ctypes.data), 0, 1)
    return DONE


def update_short(weights: list[Any], grads: list[Any], histories: list[Any], masters: list[Any], hyper: np.ndarray,
                 rule: Rule) -> bool:  # fmt: skip
    """Check and update a short list of few elements by one call of compiled code; False if it is left as it was."""
    how = layout()
    if how is None:
        return False
    lists = id(weights), id(grads), id(histories), id(masters) if masters else 0, len(weights)
    known = _workers(rule.row_wise)
    while True:
        code = _update_short(*lists, how, rule.row_wise, hyper, rule.scalars, known, cpu_dense.SMALL)
        if code < 0:
            return bool(code == DONE)
        known[code] = kernel(*formats(code)[1], rule.row_wise)


@functools.cache
def _workers(row_wise: bool) -> np.ndarray:
    """The workers that have been compiled, by code."""
    return np.zeros(PLACES, np.int64)
