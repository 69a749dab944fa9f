"""The address table of a list of updates, built and checked by compiled code; plain lists are updated there and then.

Whatever is not plain, and every error, is left to the ordinary way: a row of the table then has the code -1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from adagrad.kernels import cpu_dense
from adagrad.kernels.counts import advance_counts, find_counts
from adagrad.kernels.cpu_dense import COLUMNS, GIVEN, GRAD, HISTORY, MASTER, ROW, SIZE, WEIGHT, kernel, put_arguments
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
from adagrad.kernels.numba_jit import acquire_gil, borrowed, crew, jit, max_workers, release_gil, run, workers
from adagrad.kernels.spans import disjoint, guess
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
def _fits(a: Any, b: Any, row_wise: bool, shared: bool) -> Any:
    """Whether ``b`` goes with the elements of ``a``, one by one, or by rows where it is ``shared`` by each of them."""
    return _same_shape(a, b, shared) and (row_wise or _same_order(a, b))


@jit(helper=True)
def code_of(seen: Any, has_master: bool, row_wise: bool) -> Any:
    """The code of an update whose arrays fit together, else -1; the gradient's shape is not looked at.

    ``seen[k]`` is what :func:`adagrad.kernels.layout.look` found out of weight, gradient, history and master copy.
    """
    w, g = seen[WEIGHT], seen[GRAD]
    low = w[FORMAT] < FLOAT32
    computing = FLOAT32 if low else w[FORMAT]
    if w[FORMAT] > FLOAT64 or (has_master and not low) or (w[RANK] == 0 if row_wise else not _has_no_gaps(w)):
        return -1
    for k in range(4):
        a = seen[k]
        if k == MASTER and not has_master:
            continue
        if a[KIND] != w[KIND] or a[PLACE] != w[PLACE] or (row_wise and not a[CONTIGUOUS]):
            return -1
        if a[FORMAT] != computing and (a[FORMAT] != w[FORMAT] or k > GRAD):
            return -1
        if k != GRAD and not (a[WRITEABLE] and _fits(w, a, row_wise, row_wise and k == HISTORY)):
            return -1
    code = w[PLACE] * PLACES + w[FORMAT]
    code += WITH_MASTER if has_master else 0
    return code + (WIDE_GRAD if g[FORMAT] != w[FORMAT] else 0)


@functools.lru_cache(maxsize=256)
def formats(code: int) -> tuple[int, Formats]:
    """What a code says: the place (0 for the CPU, 1 + index of a CUDA device) and the formats."""
    place, digits = divmod(code, PLACES)
    weight = FORMATS[digits % WITH_MASTER]
    computing = "float64" if weight == "float64" else "float32"
    grad = "float32" if digits & WIDE_GRAD else weight
    return place, (weight, grad, computing, "float32" if digits & WITH_MASTER else None)


def code_of_formats(weight: str, grad: str, *, has_master: bool) -> int:
    """The code on the CPU of an update with these formats."""
    return FORMATS.index(weight) + (WITH_MASTER if has_master else 0) + (WIDE_GRAD if grad != weight else 0)


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
    n, total = len(table), 0
    columns = spans.shape[1] // n
    own_out, own_seen, own_things = np.empty(1, np.int64), np.zeros((4, SEEN), np.int64), np.empty(4, np.int64)
    out, seen, things, how = borrowed(own_out), borrowed(own_seen), borrowed(own_things), borrowed(how)
    for i in range(n):
        things[WEIGHT], things[GRAD], things[HISTORY] = item(weights, i), item(grads, i), item(histories, i)
        things[MASTER] = item(masters, i) if masters else how[NONE]
        has_master, plain = things[MASTER] != how[NONE], True
        for k in range(4):
            if plain and (k != MASTER or has_master):
                plain = look(things[k], how, out, seen[k])
        plain = plain and _fits(seen[WEIGHT], seen[GRAD], row_wise, False)
        codes[i] = code_of(seen, has_master, row_wise) if plain else -1
        table[i] = 0
        for at in range(i, n * columns, n):
            spans[0, at], spans[1, at] = 0, 0
        if codes[i] < 0:
            continue
        count = seen[WEIGHT, COUNT]
        total += count
        table[i, SIZE] = count
        if row_wise and count:
            table[i, ROW] = count // word(seen[WEIGHT, SIZES], 0)
        for k in range(4):
            if k != MASTER or has_master:
                start, size = seen[k, START], seen[k, COUNT] * item_size(seen[k, FORMAT])
                at = i + n * (columns - 1 if k == GRAD else k // 2 if k < MASTER else 2)
                table[i, k], spans[0, at], spans[1, at] = start, start, start + size
    same = codes[0]
    for i in range(n):
        same = same if codes[i] == same else -1
    own_out[:0], own_seen[:0], own_things[:0] = 0, 0, 0  # they are used by address above: this keeps them alive
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

    def groups(self) -> list[tuple[int, Sequence[int]]]:
        """Each code but -1, in order, and which rows have it."""
        if self.common >= 0:
            return [(self.common, range(len(self.rows)))]
        kinds = np.unique(self.codes[self.codes >= 0]).tolist()
        return [(code, np.flatnonzero(self.codes == code).tolist()) for code in kinds]

    def part(self, which: Sequence[int]) -> tuple[np.ndarray, np.ndarray, int]:
        """Some of the rows, or all, their codes and their elements."""
        if len(which) == len(self.rows):
            return self.rows, self.codes, self.total
        rows, codes = self.rows[list(which)], self.codes[list(which)]
        return rows, codes, int(rows[:, SIZE].sum())


def fit(weights: Any, grads: Any, histories: Any, masters: Any) -> bool:
    """Whether all are lists of one length, which is not 0; ``masters`` may be empty."""
    if not type(weights) is type(grads) is type(histories) is type(masters) is list:
        return False
    return 0 < len(weights) == len(grads) == len(histories) and len(masters) in (0, len(weights))


def table(weights: list[Any], grads: list[Any], histories: list[Any], masters: list[Any], row_wise: bool) -> Table:
    """See :class:`Table`. ``masters`` may be empty or hold None."""
    n, how = len(weights), layout()
    columns = 4 if masters else 3
    rows, codes, spans = np.empty((n, COLUMNS), np.int64), np.empty(n, np.int64), np.empty((2, columns * n), np.int64)
    if how is None or not fit(weights, grads, histories, masters):
        codes[:], spans[:] = -1, 0
        return Table(rows, codes, -1, 0, spans, (columns - 1) * n)
    common, total = fill(
        id(weights), id(grads), id(histories), id(masters) if masters else 0, how, row_wise, rows, codes, spans
    )
    return Table(rows, codes, common, total, spans, (columns - 1) * n)


# ---------------------------------------------------------------------------------------------------------- all at once

SHORT = 32
"""Weights in a list that is tried first as if it had few elements, if the last one had; then no thread is asked for."""

WAS_LARGE = PLACES
"""Where this is remembered, behind the workers: the number of elements if there were many, else 0."""

DONE, LARGE, LEFT = -3, -2, -1
"""What was done of a list: all; nothing, because it is not so small; nothing, because it is not plain, dense or on the
CPU. Any other number is a code, whose worker is wanted."""


@jit(holds_gil=True)
def _update_plain(weights: int, grads: int, histories: int, masters: int, steps: int, n: int, how: Any, row_wise: bool,
                  hyper: Any, scalars: Any, known: Any, order: Any, small: int, is_trial: bool, count: int
                  ) -> Any:  # fmt: skip
    table, codes, spans = np.empty((n, COLUMNS), np.int64), np.empty(n, np.int64), np.empty((2, len(order)), np.int64)
    step_at, blocks = np.empty(n if steps else 0, np.int64), np.empty((PLACES, GIVEN), np.int64)
    counts, elements = np.zeros(PLACES, np.int64), np.zeros(PLACES, np.int64)
    _, total = fill(weights, grads, histories, masters, how, row_wise, table, codes, spans)
    for i in range(n):
        if codes[i] < 0 or codes[i] >= PLACES:
            return LEFT
        counts[codes[i]] += 1
        elements[codes[i]] += table[i, SIZE]
    known[WAS_LARGE] = total if total >= small else 0
    if is_trial and total >= small:
        return LARGE
    if not disjoint(spans[0], spans[1], len(order) - n, order) or (steps and not find_counts(steps, how, step_at)):
        return LEFT
    for code in range(PLACES):
        if counts[code] and known[code] == 0:
            return code
    rows, rates = (table, hyper) if counts[codes[0]] == n else _by_code(table, codes, hyper, counts)
    # No exception may come from here, nor is memory asked for: it would find no GIL, and a part of the list updated.
    # The GIL is let go for the work in all; threads are for those launches that are worth them.
    state, first = np.int64(0) if is_trial else release_gil(), 0
    for code in range(PLACES):
        if counts[code]:
            put_arguments(blocks[code], rows, first, counts[code], rates, scalars, elements[code])
            run(known[code], blocks[code], crew(elements[code], small, count))
            first += counts[code]
    if not is_trial:
        acquire_gil(state)
    advance_counts(step_at)
    rows[:0], rates[:0], blocks[:0] = 0, 0, 0  # they are used by address above: this keeps them alive until here
    return DONE


@jit(helper=True)
def _by_code(table: Any, codes: Any, hyper: Any, counts: Any) -> Any:
    """The rows and their rates, or those of all, in the order of their codes, each of which there are ``counts`` of."""
    rows, rates, places = np.empty(table.shape, np.int64), np.empty(hyper.shape), np.zeros(PLACES, np.int64)
    for code in range(1, PLACES):
        places[code] = places[code - 1] + counts[code - 1]
    for i in range(len(codes)):
        j = places[codes[i]]
        places[codes[i]] += 1
        # Number by number: NumPy's assignment of a row takes seconds to compile.
        for column in range(COLUMNS):
            rows[j, column] = table[i, column]
        for rate in range(3):
            rates[j if len(hyper) > 1 else 0, rate] = hyper[i if len(hyper) > 1 else 0, rate]
    return rows, rates


def update_plain(weights: list[Any], grads: list[Any], histories: list[Any], masters: list[Any], steps: list[Any],
                 hyper: np.ndarray, rule: Rule, threads: int | None) -> bool:  # fmt: skip
    """Check and update a list by one call of compiled code; False if it is left as it was.

    The lists :func:`fit`; ``hyper`` has a row for each weight, or one for all.
    """
    n, how = len(weights), layout()
    if how is None:
        return False
    known, order, row_wise = _workers(rule.row_wise), guess(4 * n if masters else 3 * n), rule.row_wise
    given = (
        id(weights), id(grads), id(histories), id(masters) if masters else 0, id(steps) if steps else 0, n,
        how, row_wise, hyper, rule.scalars, known, order, cpu_dense.SMALL,
    )  # fmt: skip
    is_trial = n <= SHORT and not known[WAS_LARGE]
    while True:
        if is_trial:
            code = _update_plain(*given, True, 1)
        else:
            held = workers(threads or max_workers(), int(known[WAS_LARGE]))
            with held as count:
                code = _update_plain(*given, False, count)
                held.work = int(known[WAS_LARGE])
        if code >= 0:
            known[code] = kernel(*formats(code)[1], rule.row_wise)
        elif code != LARGE:
            return bool(code == DONE)
        else:
            is_trial = False


@functools.cache
def _workers(row_wise: bool) -> np.ndarray:
    """The workers that have been compiled, by code; and ``WAS_LARGE``."""
    return np.zeros(PLACES + 1, np.int64)
