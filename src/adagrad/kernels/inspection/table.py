"""The address table of a list of dense updates, built and checked by compiled code.

Whatever is not plain, and every error, is left to checks in Python: a row of the table then has the code -1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from adagrad.arrays import computing_format
from adagrad.kernels.inspection.layout import (
    CONTIGUOUS,
    COUNT,
    DEVICE,
    ELEMENT_FORMATS,
    FLOAT32,
    FLOAT64,
    FORMAT,
    INFO,
    KIND,
    NONE,
    RANK,
    SIZES,
    START,
    STRIDES,
    UNIT,
    WRITEABLE,
    current_layout,
    describe,
    item_size,
    list_item,
    read_word,
)
from adagrad.kernels.records import COLUMNS, GRAD, HISTORY, MASTER, ROW_LENGTH, SIZE, WEIGHT
from adagrad.kernels.runtime.memory import keep_alive, uncounted, word_table, words
from adagrad.kernels.runtime.numba_jit import entry, jit

Formats: TypeAlias = "tuple[str, str, str, str | None]"
"""The element formats of weight, gradient, history and master copy (None for none)."""

# A row's code: 16 * device + 8 if the gradient is wider than the weight + 4 if there is a master copy + format.
WITH_MASTER, WIDE_GRAD, CODES_PER_DEVICE = 4, 8, 16


# ----------------------------------------------------------------------------------------------------------- one update


@jit(helper=True)
def _same_shape(a: Any, b: Any, row_wise: bool) -> Any:
    """Whether ``b`` has the shape of ``a``, or of its row-wise history."""
    if a[RANK] != b[RANK]:
        return False
    d = 0
    while d < a[RANK] and read_word(b[SIZES], 8 * d) == (1 if row_wise and d > 0 else read_word(a[SIZES], 8 * d)):
        d += 1
    return d == a[RANK]


@jit(helper=True)
def _same_order(a: Any, b: Any) -> Any:
    """Whether the elements of two arrays of one shape lie in the same order."""
    if a[CONTIGUOUS]:
        return b[CONTIGUOUS] != 0
    d = 0
    while d < a[RANK] and read_word(a[STRIDES], 8 * d) * b[UNIT] == read_word(b[STRIDES], 8 * d) * a[UNIT]:
        d += 1
    return d == a[RANK]


@jit(helper=True)
def _has_no_gaps(a: Any) -> Any:
    """Whether some order of the dimensions makes it contiguous (channels last, Fortran's order, transposed, ...)."""
    if a[CONTIGUOUS]:
        return True
    reach = 1
    for _ in range(a[RANK]):
        for d in range(a[RANK]):
            if read_word(a[STRIDES], 8 * d) == reach * a[UNIT] and read_word(a[SIZES], 8 * d) > 1:
                reach *= read_word(a[SIZES], 8 * d)
                break
    return reach == a[COUNT]


@jit(helper=True)
def _fits(a: Any, b: Any, row_wise: bool, shared: bool) -> Any:
    """Whether ``b`` fits ``a`` element by element, or, if ``shared``, with one element for each row."""
    return _same_shape(a, b, shared) and (row_wise or _same_order(a, b))


@jit(helper=True)
def code_of(info: Any, has_master: bool, row_wise: bool, is_dense: bool) -> Any:
    """The code of an update whose arrays fit together, else -1; of gradients, only a dense one's shape is checked.

    ``info[k]`` is what :func:`adagrad.kernels.inspection.layout.describe` filled in for weight, gradient, history and
    master copy.
    """
    w, g = info[WEIGHT], info[GRAD]
    low = w[FORMAT] < FLOAT32
    computing = FLOAT32 if low else w[FORMAT]
    if w[FORMAT] > FLOAT64 or (has_master and not low) or (w[RANK] == 0 if row_wise else not _has_no_gaps(w)):
        return -1
    for k in range(4):
        a = info[k]
        if k == MASTER and not has_master:
            continue
        if a[KIND] != w[KIND] or a[DEVICE] != w[DEVICE] or (row_wise and not a[CONTIGUOUS]):
            return -1
        if a[FORMAT] != computing and (a[FORMAT] != w[FORMAT] or k > GRAD):
            return -1
        if k != GRAD and not a[WRITEABLE]:
            return -1
        if (k != GRAD or is_dense) and not _fits(w, a, row_wise, row_wise and k == HISTORY):
            return -1
    code = w[DEVICE] * CODES_PER_DEVICE + w[FORMAT]
    code += WITH_MASTER if has_master else 0
    return code + (WIDE_GRAD if g[FORMAT] != w[FORMAT] else 0)


@functools.lru_cache(maxsize=256)
def decode(code: int) -> tuple[int, Formats]:
    """A code, decoded: the device (0 for the CPU, 1 + index of a CUDA device) and the formats."""
    device, digits = divmod(code, CODES_PER_DEVICE)
    weight = ELEMENT_FORMATS[digits % WITH_MASTER]
    computing = computing_format(weight)
    grad = "float32" if digits & WIDE_GRAD else weight
    return device, (weight, grad, computing, "float32" if digits & WITH_MASTER else None)


def code_of_formats(weight: str, grad: str, *, has_master: bool) -> int:
    """The code on the CPU of an update with these formats."""
    return ELEMENT_FORMATS.index(weight) + (WITH_MASTER if has_master else 0) + (WIDE_GRAD if grad != weight else 0)


# ------------------------------------------------------------------------------------------------------------- the list


@jit(helper=True)
def fill(weights: int, grads: int, histories: int, masters: int, layout: Any, row_wise: bool, table: Any, codes: Any,
         spans: Any) -> Any:  # fmt: skip
    """Fill ``table``, the ``codes`` of its rows and the ``spans`` of memory, from four lists, given by ``id``.

    Row ``i`` is for the ``i``-th weight, gradient, history and, if there is such a list, master copy or None. Codes
    are -1, and spans empty, for rows that are not plain. ``spans``: the starts and the ends of weights, histories,
    master copies if there is such a list, gradients. Returns the code that all rows share (-1 if they do not) and the
    number of elements.
    """
    n, total = len(table), 0
    columns = spans.shape[1] // n
    own_info, own_things = word_table(4, INFO), words(4)
    info, things, layout = uncounted(own_info), uncounted(own_things), uncounted(layout)
    for i in range(n):
        things[WEIGHT], things[GRAD] = list_item(weights, i), list_item(grads, i)
        things[HISTORY] = list_item(histories, i)
        things[MASTER] = list_item(masters, i) if masters else layout[NONE]
        has_master, plain = things[MASTER] != layout[NONE], True
        for k in range(4):
            if plain and (k != MASTER or has_master):
                plain = describe(things[k], layout.ctypes.data, info[k].ctypes.data)
        codes[i] = code_of(info, has_master, row_wise, True) if plain else -1
        table[i] = 0
        for at in range(i, n * columns, n):
            spans[0, at], spans[1, at] = 0, 0
        if codes[i] < 0:
            continue
        count = info[WEIGHT, COUNT]
        total += count
        table[i, SIZE] = count
        if row_wise and count:
            table[i, ROW_LENGTH] = count // read_word(info[WEIGHT, SIZES], 0)
        for k in range(4):
            if k != MASTER or has_master:
                start, size = info[k, START], info[k, COUNT] * item_size(info[k, FORMAT])
                at = i + n * (0, columns - 1, 1, 2)[k]
                table[i, k], spans[0, at], spans[1, at] = start, start, start + size
    same = codes[0]
    for i in range(n):
        same = same if codes[i] == same else -1
    keep_alive(own_info)
    keep_alive(own_things)
    return same, total


_fill = entry(fill, holds_gil=True)


class Table(NamedTuple):
    """Lists of arrays as the kernels take them. The arrays must outlive it."""

    rows: np.ndarray
    """(n, COLUMNS), as :mod:`adagrad.kernels.records` has it."""
    codes: np.ndarray
    """Which rows go together, see :func:`decode`; -1 for those that are not plain."""
    common: int
    """The code of all rows, or -1."""
    total: int
    """Elements in all rows."""
    spans: np.ndarray
    """(2, n) starts and ends of the rows' memory: what is written to, then what is read."""
    written: int
    """How many of the spans are written to."""

    def groups(self) -> list[tuple[int, Sequence[int]]]:
        """Each code but -1, in ascending order, and the positions of its rows."""
        if self.common >= 0:
            return [(self.common, range(len(self.rows)))]
        kinds = np.unique(self.codes[self.codes >= 0]).tolist()
        return [(code, np.flatnonzero(self.codes == code).tolist()) for code in kinds]

    def part(self, which: Sequence[int]) -> tuple[np.ndarray, np.ndarray, int]:
        """The rows at the positions ``which``, their codes and their number of elements."""
        if len(which) == len(self.rows):
            return self.rows, self.codes, self.total
        rows, codes = self.rows[list(which)], self.codes[list(which)]
        return rows, codes, int(rows[:, SIZE].sum())


_WORDS = np.zeros((0, COLUMNS), np.int64)
NOTHING = Table(_WORDS, _WORDS[:, 0], -1, 0, np.zeros((2, 0), np.int64), 0)


def fit(weights: Any, grads: Any, histories: Any, masters: Any) -> bool:
    """Whether all are lists of one length, which is not 0; ``masters`` may be empty."""
    if not type(weights) is type(grads) is type(histories) is type(masters) is list:
        return False
    return 0 < len(weights) == len(grads) == len(histories) and len(masters) in (0, len(weights))


def build_table(
    weights: list[Any], grads: list[Any], histories: list[Any], masters: list[Any], row_wise: bool
) -> Table:
    """See :class:`Table`. ``masters`` may be empty or hold None."""
    n, layout = len(weights), current_layout()
    columns = 4 if masters else 3
    rows, codes, spans = np.empty((n, COLUMNS), np.int64), np.empty(n, np.int64), np.empty((2, columns * n), np.int64)
    if layout is None or not fit(weights, grads, histories, masters):
        codes[:], spans[:] = -1, 0
        return Table(rows, codes, -1, 0, spans, (columns - 1) * n)
    common, total = _fill(
        id(weights), id(grads), id(histories), id(masters) if masters else 0, layout, row_wise, rows, codes, spans
    )
    return Table(rows, codes, common, total, spans, (columns - 1) * n)
