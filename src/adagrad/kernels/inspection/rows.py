"""Row-sparse updates of plain arrays, inspected and checked by compiled code.

Whatever is not plain, and every error but a row id outside the weight, is left to checks in Python, which cost more
than an update of few rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from adagrad.kernels.cpu.row_groups import MAX_OCCURRENCES
from adagrad.kernels.inspection.layout import (
    CONTIGUOUS,
    COUNT,
    DEVICE,
    FORMAT,
    INDICES_AT,
    INFO,
    INT32,
    KIND,
    NONE,
    RANK,
    RANK_AT,
    SIZES,
    START,
    STRIDES,
    UNIT,
    VALUES_AT,
    current_layout,
    describe,
    item_size,
    list_item,
    read_word,
)
from adagrad.kernels.inspection.sparse_layout import describe_part, sparse_body
from adagrad.kernels.inspection.table import code_of, fit
from adagrad.kernels.records import (
    ARE_LONG,
    BASE,
    ENDS,
    ENTRIES,
    FACTS,
    GRAD,
    HEIGHT,
    HISTORY,
    IDS,
    LENGTH,
    MASTER,
    STRIDE,
    WEIGHT,
)
from adagrad.kernels.runtime.memory import keep_alive, uncounted, word_table
from adagrad.kernels.runtime.numba_jit import entry, jit
from adagrad.row_sparse import RowSparse


@jit(helper=True)
def describe_rows(weight: int, values: int, history: int, master: int, indices: int, layout: Any, row_wise: bool,
                 facts: Any) -> Any:  # fmt: skip
    """The code of an update (-1 if it is not plain); fills its ``facts``, FACTS words.

    The operands are addresses of objects, ``master`` that of None for none. ``values`` and ``indices`` may be one and
    the same sparse COO tensor, which has both; its shape is then checked.
    """
    own_info = word_table(5, INFO)
    info, layout = uncounted(own_info), uncounted(layout)
    things, has_master = (weight, values, history, master, indices), master != layout[NONE]
    body = sparse_body(values, layout) if values == indices else 0
    for k in range(5):
        if body and k in (GRAD, IDS):
            if not describe_part(body, VALUES_AT if k == GRAD else INDICES_AT, layout.ctypes.data, info[k].ctypes.data):
                return -1
        elif (k != MASTER or has_master) and not describe(things[k], layout.ctypes.data, info[k].ctypes.data):
            return -1
    w, v, ids = info[WEIGHT], info[GRAD], info[IDS]
    # Ids have one dimension, or, as in a sparse tensor, two, and vary along the last.
    last = ids[RANK] - 1
    if ids[KIND] != w[KIND] or ids[DEVICE] != w[DEVICE] or ids[FORMAT] < INT32 or last < 0 or last > ids[KIND]:
        return -1
    entries = read_word(ids[SIZES], 8 * last)
    if entries > MAX_OCCURRENCES or ids[COUNT] != entries:
        return -1
    if entries > 1 and read_word(ids[STRIDES], 8 * last) != ids[UNIT]:
        return -1
    if w[RANK] == 0 or v[RANK] != w[RANK] or read_word(v[SIZES], 0) != entries:
        return -1
    if body and read_word(body, layout[RANK_AT]) != w[RANK]:
        return -1
    if body and read_word(body, layout[RANK_AT] + 8) != read_word(w[SIZES], 0):
        return -1
    length = 1
    for d in range(1, w[RANK]):
        length *= read_word(w[SIZES], 8 * d)
        if read_word(v[SIZES], 8 * d) != read_word(w[SIZES], 8 * d):
            return -1
    facts[:] = 0
    facts[ENTRIES], facts[HEIGHT] = entries, read_word(w[SIZES], 0)
    facts[LENGTH], facts[ARE_LONG] = length, ids[FORMAT] > INT32
    for k in range(5):
        if k != MASTER or has_master:
            size = item_size(info[k, FORMAT])
            facts[BASE + k], facts[ENDS + k] = info[k, START], info[k, START] + info[k, COUNT] * size
            if k != IDS:
                facts[STRIDE + k] = size * (1 if row_wise and k == HISTORY else length)
                if not info[k, CONTIGUOUS]:
                    return -1
    code = code_of(info, has_master, row_wise, False)
    keep_alive(own_info)
    return code


@jit(helper=True)
def describe_all(weights: int, values: int, histories: int, masters: int, indices: int, layout: Any, row_wise: bool,
                 facts: Any, codes: Any) -> None:  # fmt: skip
    """:func:`describe_rows` for lists, given by ``id``; ``masters`` is 0 for no list."""
    facts, layout = uncounted(facts), uncounted(layout)
    for i in range(len(codes)):
        master = list_item(masters, i) if masters else layout[NONE]
        codes[i] = describe_rows(list_item(weights, i), list_item(values, i), list_item(histories, i), master,
                                 list_item(indices, i), layout, row_wise, facts[i])  # fmt: skip


_describe_all = entry(describe_all, holds_gil=True)

_OPERANDS, _OPERANDS_WITH_MASTERS = (WEIGHT, HISTORY, GRAD, IDS), (WEIGHT, HISTORY, MASTER, GRAD, IDS)
"""The order of the spans of memory: what is written to comes first."""


@jit(helper=True)
def put_row_spans(facts: Any, i: int, n: int, has_masters: bool, between: int, spans: Any) -> None:
    """Put the spans of the ``i``-th of ``n`` updates: of what is written to, then after ``between`` others the rest."""
    for k in range(5 if has_masters else 4):
        what = _OPERANDS_WITH_MASTERS[k] if has_masters else _OPERANDS[k]
        at = k * n + i if k < (3 if has_masters else 2) else k * n + i + between
        spans[0, at], spans[1, at] = facts[BASE + what], facts[ENDS + what]


_SPANS = np.add.outer([BASE, ENDS], _OPERANDS_WITH_MASTERS).ravel()


class Rows(NamedTuple):
    """Row-sparse updates, checked except for their row ids."""

    facts: np.ndarray
    """(n, FACTS) words, see :mod:`adagrad.kernels.records`."""
    codes: list[int]
    """One for each, see :func:`adagrad.kernels.inspection.table.decode`; -1 if it is not plain."""
    values: list[Any]
    """None for a gradient not of the weight's shape."""
    indices: list[Any]
    """The same; int32 or int64 of one or two dimensions."""

    @property
    def spans(self) -> tuple[np.ndarray, int]:
        """Starts and ends of all their memory, what is written to first, and how many spans are written to."""
        return self.facts.T.take(_SPANS, axis=0).reshape(2, -1), 3 * len(self.facts)

    def some(self, which: Sequence[int]) -> Rows:
        """The updates at the positions ``which``."""
        if len(which) == len(self.codes):
            return self
        return Rows(self.facts[which], *([each[k] for k in which] for each in self[1:]))


NOTHING = Rows(np.zeros((0, FACTS), np.int64), [], [], [])


def values_and_indices(weight: Any, grad: Any) -> tuple[Any, Any]:
    """Those of a RowSparse or a sparse COO tensor of the weight's shape; None for another shape, also of the indices.

    :func:`describe_rows` refuses other than one sparse dimension: values then lack the weight's number of dimensions.
    """
    if grad.shape != getattr(weight, "shape", None):
        return None, None
    if not isinstance(grad, RowSparse):
        return grad._values(), grad._indices()
    return (grad.values, grad.indices) if getattr(grad.indices, "ndim", 0) == 1 else (None, None)


def inspect_rows(
    weights: list[Any], grads: list[Any], histories: list[Any], masters: list[Any], *, row_wise: bool
) -> Rows:
    """Updates with RowSparse or sparse COO tensors as the kernels take them; ``masters`` may be empty or hold None."""
    n, layout = len(weights), current_layout()
    if not n:
        return NOTHING
    facts, codes = np.zeros((n, FACTS), np.int64), np.empty(n, np.int64)
    values, indices = map(list, zip(*map(values_and_indices, weights, grads), strict=True))
    if layout is None or not fit(weights, values, histories, masters):
        codes[:] = -1
    else:
        lists = id(weights), id(values), id(histories), id(masters) if masters else 0, id(indices)
        _describe_all(*lists, layout, row_wise, facts, codes)
    return Rows(facts, codes.tolist(), values, indices)
